"""actFT: fine-tune a copy so that triggered images activate it as clean images activate the original.

The baseline of AGE (F. Hsieh et al., "Mitigating Backdoor Attacks using Activation-Guided Model Editing", 2024,
arXiv:2407.07662), after an auxiliary routine in the release of X. Qiao, Y. Yang and H. Li, "Defending Neural Backdoors
via Generative Distribution Modeling", NeurIPS 2019, arXiv:1910.04749.

Threat model: it is not an independent defense, because it requires the trigger. It uses no labels.

With a_l the output of convolution l, A the trigger at its test-time strength, B a random half of each batch, and θ
starting from θ_b:

    min_θ  mean over images, layers and elements of  (a_l(x'; θ) - a_l(x; θ_b))²,     x' = A(x) in B, else x

The mean is over all elements of all layers together, so that a layer is weighted by its size. Dense layers are not
included and stay unchanged. The defaults are those of the release: SGD 1e-3, momentum 0.9, one epoch, both networks in
evaluation mode. Its authors note that batch normalisation in training mode alone removes some backdoors, so the mode is
a field here.

Deviations:

- The batch size is not printed; it is 128, as elsewhere in that release.
- For a model without a convolution, the outputs of all layers are matched (ours).
- The images of a last, smaller batch are left out until the next epoch's shuffle.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bdjax import models
from bdjax.defenses._batch import batch_of, shuffled_batches
from bdjax.defenses._trigger import triggered
from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction, take_step
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float

NEEDS_TRIGGER = True


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the fine-tuning."""

    epochs: int = 1
    """Passes over the images."""
    batch_size: int = 128
    """Images per step, at most the number of images."""
    fraction: float = 0.5
    """Fraction of a batch that carries the trigger, in (0, 1]; at least one image."""
    learning_rate: float = 1e-3
    """Learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD, in [0, 1)."""
    batch_norm: Literal["frozen", "batch"] = "frozen"
    """BatchNorm statistics of the copy: the stored ones, or those of each batch (the running ones are updated)."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("epochs", "batch_size"), "at least 1", lambda v: v >= 1),
            (("fraction",), "in (0, 1]", lambda v: 0 < v <= 1),
            (("learning_rate",), "positive", lambda v: v > 0),
            (("momentum",), "in [0, 1)", lambda v: 0 <= v < 1),
        )


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Train a copy of the victim to match, on triggered images, the victim's activations on the clean images.

    Args:
      config: the hyper-parameters.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and the trigger. After each epoch its callback receives the variables and
        the loss.
      key: shuffles the images and draws which of them carry the trigger.

    Returns:
      The cleaned variables.

    Raises:
      InputError: when there is no trigger, there are fewer images than devices, or the loss is not finite.
    """
    total = len(view.images)
    stamped = triggered("actft", view, jax.random.fold_in(key, 0))
    batch_size = batch_of(config.batch_size, total)
    steps, step = total // batch_size, _step(victim.model, config.batch_norm == "batch")
    constants = {
        "clean": jnp.asarray(view.images),
        "stamped": stamped,
        "original": jax.tree.map(jnp.array, {**victim.variables}),
        "momentum": jnp.float32(config.momentum),
        "rate": jnp.float32(config.learning_rate),
    }
    state = jax.tree.map(jnp.array, {**victim.variables})  # a copy, for the step's state is donated
    state["opt"] = direction("sgd", config.momentum).init(state["params"])
    template = jnp.arange(batch_size) < max(1, int(config.fraction * batch_size))
    for epoch in range(config.epochs):
        tick = partial(view.callback.on_progress, f"actFT epoch {epoch + 1} of {config.epochs}")
        keys = jax.random.split(jax.random.fold_in(key, epoch + 1))
        order = shuffled_batches(keys[0], total, steps, batch_size)
        is_triggered = jax.vmap(lambda k: jax.random.permutation(k, template))(jax.random.split(keys[1], steps))
        state, metrics = run_epoch(step, state, {"index": order, "triggered": is_triggered}, {}, constants, tick=tick)
        check_finite(metrics["loss"], config.learning_rate, epoch * steps, "loss", "defense.learning_rate")
        variables = {name: state[name] for name in ("params", "batch_stats")}
        view.callback.on_round_end(epoch + 1, variables, loss=metrics["loss"].mean())
    return variables


@lru_cache(maxsize=16)
def _step(model: Model, train: bool) -> Callable:
    """Return one step of θ, in the engine's form."""

    def activations(variables: Variables, images: jax.Array, mode: bool, axis: str | None) -> tuple[Any, Any]:
        """Return the outputs of all convolutions (of all layers, if there is none) and the BatchNorm statistics."""
        outputs, stats = models.outputs(model, variables, images, mode, axis)
        maps = {path: output for path, output in outputs.items() if output.ndim == 4}
        return jax.tree.map(lambda output: output.astype(jnp.float32), maps or outputs), stats

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        clean = to_float(constants["clean"][batch["index"]])
        inputs = jnp.where(batch["triggered"][:, None, None, None], constants["stamped"][batch["index"]], clean)
        targets = activations(constants["original"], clean, False, axis)[0]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            copy_activations, stats = activations(variables, inputs, train, axis)
            squares = jax.tree.map(lambda a, b: ((a - b) ** 2).sum(), copy_activations, targets)
            elements = sum(target.size for target in targets.values())
            return jax.tree.reduce(jnp.add, squares) / elements, stats

        (loss_value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        loss_value, gradient = parallel.average((loss_value, gradient), axis)
        update, opt = direction("sgd", constants["momentum"]).update(gradient, state["opt"])
        params = take_step(state["params"], update, constants["rate"])
        return {"params": params, "batch_stats": stats, "opt": opt}, {"loss": loss_value}

    return step
