"""BTI-DBF(U): invert the backdoor by decoupling benign features, then unlearn it (Xu et al., ICLR 2024).

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

Each round trains a generator G of images that only backdoor features tell from clean ones
(:mod:`bdjax.defenses._inversion`), and then the model. x' is the batch with int(0.1 B) + 1 of its B images made by G:

    min_θ  mean CE(f_θ(x'), y) + MSE(feat_θ(x), feat_θ(x'))

in training mode, for 30 epochs, by Adam 1e-4 whose moments are kept from round to round. The defaults are those of the
release and its README: 5 rounds, batches of 128. The purifying variant (P), which puts a network before the model in
place of changing it, is not here.

**Deviations** from the release: its test on triggered images every ten epochs decides nothing and is left out; those of
the inversion are listed there. CIFAR-10's flips are `augment`'s crop_flip. An epoch is cut into equal batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import optax

from bdjax import augment
from bdjax.defenses import _inversion
from bdjax.defenses._inversion import InversionConfig, alternate, generator_of, mixed, most_of
from bdjax.defenses._tuning import begin, descend, equal_batches
from bdjax.engine import parallel
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float


@dataclass(frozen=True)
class Config(InversionConfig):
    """Inversion (the fields of InversionConfig) and unlearning."""

    epochs: int = 30
    """Passes of unlearning, in every round."""
    fraction: float = 0.1
    """Share of a batch that is G's, in [0, 1); one image more is."""
    learning_rate: float = 1e-4
    """Of Adam."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            "defense",
            (("epochs",), "at least 1", lambda v: v >= 1),
            (("fraction",), "in [0, 1)", lambda v: 0 <= v < 1),
            (("learning_rate",), "positive", lambda v: v > 0),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Invert and unlearn by turns.

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; key: draws masks, batches and the generator.
    Returns: the variables; the watch is shown them, G's changes of four images (`perturbation`) and the class that most
      of G's images are called (`suspected`) after each epoch of unlearning.
    Raises InputError for a model without a layer "head", fewer images than devices, a loss that is not finite.
    """
    model, (_, size) = victim.model, equal_batches(config.batch_size, len(view.labels))
    step = _step(model, generator_of(model.shape, config.width, config.downs), config.augment, config.fraction, size)
    return alternate(config, victim, view, key, "BTI-DBF", step, begin(victim.variables, "adam"), {})


@lru_cache(maxsize=16)
def _step(model: Model, generator: Callable, policy: str, fraction: float, size: int) -> Callable:
    """One step of unlearning, in the engine's form."""
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images = distort(to_float(shared["images"][split["index"]]), split["augment"])
        labels = shared["labels"][split["index"]]
        changed = mixed(generator, shared["generator"], images, split["chosen"], most_of(fraction, size, axis))
        again = jax.vmap(lambda key: jax.random.fold_in(key, 1))(split["dropout"])

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            clean, stats = _inversion.features_of(model, variables, images, True, split["dropout"], axis)
            found, stats = _inversion.features_of(
                model, {**variables, "batch_stats": stats}, changed, True, again, axis
            )
            each = optax.softmax_cross_entropy_with_integer_labels(_inversion.classify(params, found), labels)
            called, moved = each.mean(), ((clean - found) ** 2).mean()
            return called + moved, (stats, {"loss": called + moved, "label_loss": called, "feature_loss": moved})

        gradient, (stats, metrics) = jax.grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        return descend(state, gradient, stats, "adam", whole["rate"]), metrics

    return step
