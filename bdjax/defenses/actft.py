"""actFT: fine-tune a copy so that triggered images activate what clean ones do in the original (Hsieh et al., 2024).

The baseline of AGE, after an auxiliary routine in the release of Qiao et al. (NeurIPS 2019). Not a defense of its own:
whoever can run it has the trigger. No labels. With a_l what convolution l gives, A the trigger at its test-time
strength, B a random half of each batch, and θ from θ_b:

    min_θ  mean over images, layers and elements of  (a_l(x'; θ) - a_l(x; θ_b))²,     x' = A(x) in B, else x

The mean is over all elements of all layers together, so that a layer counts by its size; the dense layers are no part
of it and stay as they are. The defaults are those of the release: SGD 1e-3, momentum 0.9, one epoch, both networks in
evaluation mode. Its authors note that batch normalisation in training mode removes some backdoors by itself, so the
mode is a field here.

Deviations: the batch size is not printed, 128 as elsewhere in that release. A model without a convolution is matched in
what all its layers give (ours). A last, smaller batch waits for the next epoch's shuffle.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bdjax import models
from bdjax.defenses._batch import batch_of
from bdjax.defenses._trigger import triggered
from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float

NEEDS_TRIGGER = True


@dataclass(frozen=True)
class Config:
    """The recipe of the fine-tuning."""

    epochs: int = 1
    """Passes over the images."""
    batch_size: int = 128
    """Images a step; all of them when there are fewer."""
    fraction: float = 0.5
    """Share of a batch that carries the trigger, in (0, 1]; at least one image."""
    learning_rate: float = 1e-3
    """Of SGD."""
    momentum: float = 0.9
    """Of SGD, in [0, 1)."""
    batch_norm: Literal["frozen", "batch"] = "frozen"
    """Of the copy: the stored statistics, or each batch's (the running ones follow)."""

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
    """Teach a copy of the victim to see triggered images as the victim sees clean ones.

    Args: view: clean images (stored [n, H, W, C]) and the trigger; key: shuffles them and draws which are triggered.
    Returns: the variables; the watch is shown them and the loss after each epoch.
    Raises InputError without a trigger, for fewer images than devices, for a loss that is not finite.
    """
    total = len(view.images)
    stamped = triggered("actft", view, jax.random.fold_in(key, 0))
    size = batch_of(config.batch_size, total)
    number, step = total // size, _step(victim.model, config.batch_norm == "batch")
    shared = {
        "clean": jnp.asarray(view.images),
        "stamped": stamped,
        "original": jax.tree.map(jnp.array, {**victim.variables}),
        "momentum": jnp.float32(config.momentum),
        "rate": jnp.float32(config.learning_rate),
    }
    state = jax.tree.map(jnp.array, {**victim.variables})  # a copy, for the step's state is donated
    state["opt"] = direction("sgd", config.momentum).init(state["params"])
    carries = jnp.arange(size) < max(1, int(config.fraction * size))
    for epoch in range(config.epochs):
        tick = partial(view.callback.on_progress, f"actFT epoch {epoch + 1} of {config.epochs}")
        keys = jax.random.split(jax.random.fold_in(key, epoch + 1))
        order = jax.random.permutation(keys[0], total)[: number * size].reshape(number, size)
        places = jax.vmap(lambda k: jax.random.permutation(k, carries))(jax.random.split(keys[1], number))
        state, metrics = run_epoch(step, state, {"index": order, "triggered": places}, {}, shared, tick=tick)
        check_finite(metrics["loss"], config.learning_rate, epoch * number, "loss", "defense.learning_rate")
        variables = {name: state[name] for name in ("params", "batch_stats")}
        view.callback.on_round_end(epoch + 1, variables, loss=metrics["loss"].mean())
    return variables


@lru_cache(maxsize=16)
def _step(model: Model, train: bool) -> Callable:
    def activations(variables: Variables, images: jax.Array, mode: bool, axis: str | None) -> tuple[Any, Any]:
        outputs, stats = models.outputs(model, variables, images, mode, axis)
        maps = {path: value for path, value in outputs.items() if value.ndim == 4}
        return jax.tree.map(lambda value: value.astype(jnp.float32), maps or outputs), stats

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        clean = to_float(shared["clean"][split["index"]])
        shown = jnp.where(split["triggered"][:, None, None, None], shared["stamped"][split["index"]], clean)
        wanted = activations(shared["original"], clean, False, axis)[0]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            found, stats = activations(variables, shown, train, axis)
            squares = jax.tree.map(lambda a, b: ((a - b) ** 2).sum(), found, wanted)
            elements = sum(value.size for value in wanted.values())
            return jax.tree.reduce(jnp.add, squares) / elements, stats

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        value, gradient = parallel.average((value, gradient), axis)
        update, opt = direction("sgd", shared["momentum"]).update(gradient, state["opt"])
        params = jax.tree.map(lambda p, u: p - shared["rate"] * u, state["params"], update)
        return {"params": params, "batch_stats": stats, "opt": opt}, {"loss": value}

    return step
