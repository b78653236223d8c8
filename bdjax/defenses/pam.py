"""PAM: path-aware minimisation, with gradients taken between the current weights and the victim's.

R. Min, Z. Qin, N. L. Zhang, L. Shen and M. Cheng, "Uncovering, Explaining, and Mitigating the Superficial Safety of
Backdoor Defense", NeurIPS 2024, arXiv:2410.09838.

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

Each round inverts the backdoor as BTI-DBF does (:mod:`bdjax.defenses._inversion`), and then trains on batches x' in
which int(0.2 B) + 1 of the B images pass through the generator, with true labels. The gradient is taken at a
point between the current weights w and the victim's w_b, so that the backdoor is removed along the whole path to w_b
and later fine-tuning does not restore it:

    w' = w + ρ (w_b - w) / (‖w_b - w‖_2 + 1e-12),     w <- w - η ∂/∂w' mean CE(f_w'(x'), y)

The norm is taken over all parameters together; at the first step w = w_b, and w' = w. Batch normalisation is in
training mode; its statistics are not interpolated but updated by the forward pass at w'. The defaults are the
release's: ρ = 0.5, SGD at 0.01 with momentum 0.1 and no weight decay, 3 rounds of 30 epochs each. The
generator is trained for 140 epochs in all (see the cost in :mod:`bdjax.defenses.btidbf`).

Deviations:
- The release recommends one or two rounds for Blended and SSBA, and fewer epochs where test accuracy drops. Here the
  number of rounds is fixed, and the run returns to the last epoch at which validation accuracy held.
- Its option `adaptive`, off by default, is left out.
- Every epoch is divided into batches of equal size.
- The deviations of the inversion are listed in :mod:`bdjax.defenses._inversion`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bdjax.defenses._inversion import InversionConfig, alternate
from bdjax.defenses._inversion_steps import max_chosen, mix_generated
from bdjax.defenses._tuning import descend, hyper_arrays, training_state
from bdjax.engine import augment, parallel
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float


@dataclass(frozen=True)
class Config(InversionConfig):
    """The inversion (the fields of InversionConfig) and path-aware minimisation."""

    rounds: int = 3
    """Rounds of inversion, each followed by path-aware minimisation."""
    epochs: int = 30
    """Passes over the clean images, in every round."""
    fraction: float = 0.2
    """Share of a batch that passes through the generator, in [0, 1), to which one image is added."""
    rho: float = 0.5
    """ρ, distance from w towards the victim at which the gradient is taken, in L2 over all parameters."""
    learning_rate: float = 0.01
    """Learning rate of SGD."""
    momentum: float = 0.1
    """Momentum of SGD, in [0, 1)."""

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
    """Alternate between inversion and minimisation along the path to the victim.

    Args:
      config: hyper-parameters of the method.
      victim: the model to purify.
      view: clean images (stored [n, H, W, C]) and labels [n]. After each epoch of the minimisation, its callback
        receives the variables, G(x) - x of four images (`perturbation`), and the class that is predicted most often
        for the generator's images (`suspected`).
      key: random key that draws the masks, the batches and the generator.

    Returns:
      The purified variables.

    Raises:
      InputError: when the model has no dense layer "head", when the batch size or the number of images is smaller than
        the number of devices, or when the loss becomes NaN or infinite.
    """
    constants = {
        "original": jax.tree.map(jnp.array, victim.variables["params"]),
        "hyper": hyper_arrays(config, ("rho", "momentum")),
    }
    return alternate(config, victim, view, key, "PAM", _step, training_state(victim.variables, "sgd"), constants)


def step_towards(params: Any, original: Any, rho: Any) -> Any:
    """Return w': a step of length `rho` from the current weights towards the victim's.

    Args:
      params: the current weights w, a pytree.
      original: the victim's weights w_b, a pytree like `params`.
      rho: ρ, L2 length of the step over all parameters.

    Returns:
      A pytree like `params`; `params` itself where the two are equal.
    """
    difference = jax.tree.map(jnp.subtract, original, params)
    length = optax.tree.norm(difference)
    return jax.tree.map(lambda p, d: p + rho * d / (length + 1e-12), params, difference)


@lru_cache(maxsize=16)
def _step(model: Model, generator: Callable, policy: str, fraction: float, size: int) -> Callable:
    """Return one step of path-aware minimisation, in the engine's form."""
    augmented = augment.policy(policy)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images = augmented(to_float(constants["images"][batch["index"]]), batch["augment"])
        labels = constants["labels"][batch["index"]]
        mixed = mix_generated(
            generator, constants["generator"], images, batch["chosen"], max_chosen(fraction, size, axis)
        )  # fmt: skip

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, _, stats = model.apply(variables, mixed, True, batch["dropout"], axis)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats

        point = step_towards(state["params"], constants["original"], constants["hyper"]["rho"])
        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(point)
        value, gradient = parallel.average((value, gradient), axis)
        after = descend(state, gradient, stats, "sgd", per_step["rate"], constants["hyper"]["momentum"])
        return after, {"loss": value}

    return step
