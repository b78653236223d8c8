"""PAM: path-aware minimisation, away from the way back to the victim (Min et al., NeurIPS 2024).

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

Each round inverts the backdoor as BTI-DBF does (:mod:`bdjax.defenses._inversion`), and then trains on batches x' in
which int(0.2 B) + 1 of the B images are the generator's, with true labels. The gradient is taken a part of the way back
to the victim w_b, so that the whole path to it loses the backdoor and a later fine-tuning does not bring it back:

    w' = w + ρ (w_b - w) / (‖w_b - w‖_2 + 1e-12),     w <- w - η ∂/∂w' mean CE(f_w'(x'), y)

The norm is over all parameters together; at the first step w = w_b, and w' = w. In training mode; BatchNorm statistics
are not interpolated, those of the forward pass at w' stay. The defaults are the release's: ρ 0.5, SGD 0.01 with
momentum 0.1 and no weight decay, 30 epochs in each of 3 rounds.

**Deviations** from the release: for Blended and SSBA it is told to make one or two rounds, and fewer epochs where
accuracy on test images falls; here the rounds are always the same, and a run goes back to the last epoch after which
accuracy on its validation images held. `adaptive`, which is off there, is left out. Those of the inversion are listed
there. An epoch is cut into equal batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bdjax import augment
from bdjax.defenses._inversion import InversionConfig, alternate, generator_of, mixed, most_of
from bdjax.defenses._tuning import begin, descend, equal_batches
from bdjax.engine import parallel
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float


@dataclass(frozen=True)
class Config(InversionConfig):
    """Inversion (the fields of InversionConfig) and path-aware minimisation."""

    rounds: int = 3
    """Times that the mask and the generator are trained, each followed by path-aware minimisation."""
    epochs: int = 30
    """Passes over the clean images, in every round."""
    fraction: float = 0.2
    """Share of a batch that is the generator's, in [0, 1); one image more is."""
    rho: float = 0.5
    """ρ, how far towards the victim the gradient is taken: an L2 distance of all parameters."""
    learning_rate: float = 0.01
    """Of SGD."""
    momentum: float = 0.1
    """Of SGD, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            "defense",
            (("epochs",), "at least 1", lambda v: v >= 1),
            (("fraction", "momentum"), "in [0, 1)", lambda v: 0 <= v < 1),
            (("rho",), "zero or more", lambda v: v >= 0),
            (("learning_rate",), "positive", lambda v: v > 0),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Invert, and minimise along the path to the victim, by turns.

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; key: draws masks, batches and the generator.
    Returns: the variables; the watch is shown them, the generator's changes of four images (`perturbation`) and the
      class that most of its images are called (`suspected`) after each epoch of the minimisation.
    Raises InputError for a model without a layer "head", fewer images than devices, a loss that is not finite.
    """
    model, (_, size) = victim.model, equal_batches(config.batch_size, len(view.labels))
    step = _step(model, generator_of(model.shape, config.width, config.downs), config.augment, config.fraction, size)
    shared = {
        "original": jax.tree.map(jnp.array, victim.variables["params"]),
        "hyper": {name: jnp.float32(getattr(config, name)) for name in ("rho", "momentum")},
    }
    return alternate(config, victim, view, key, "PAM", step, begin(victim.variables, "sgd"), shared)


def towards(params: Any, original: Any, rho: Any) -> Any:
    """w': a step of length `rho` (all parameters together) from w towards w_b; w itself where they are the same."""
    way = jax.tree.map(jnp.subtract, original, params)
    length = jnp.sqrt(jax.tree.reduce(jnp.add, jax.tree.map(lambda d: (d**2).sum(), way)))
    return jax.tree.map(lambda p, d: p + rho * d / (length + 1e-12), params, way)


@lru_cache(maxsize=16)
def _step(model: Model, generator: Callable, policy: str, fraction: float, size: int) -> Callable:
    """One step of path-aware minimisation, in the engine's form."""
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images = distort(to_float(shared["images"][split["index"]]), split["augment"])
        labels = shared["labels"][split["index"]]
        changed = mixed(generator, shared["generator"], images, split["chosen"], most_of(fraction, size, axis))

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, _, stats = model.apply(variables, changed, True, split["dropout"], axis)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats

        there = towards(state["params"], shared["original"], shared["hyper"]["rho"])
        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(there)
        value, gradient = parallel.average((value, gradient), axis)
        after = descend(state, gradient, stats, "sgd", whole["rate"], shared["hyper"]["momentum"])
        return after, {"loss": value}

    return step
