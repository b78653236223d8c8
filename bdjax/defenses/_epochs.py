"""Training on the defender's images with a custom loss term, a projection of the parameters, ascent, or early stopping.

:func:`bdjax.defenses._tuning.tune` is the plain case.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._batch import batch_of
from bdjax.defenses._tuning import begin, descend, each_pass, model_of
from bdjax.engine import FitConfig, augment, parallel
from bdjax.engine.optimizer import learning_rates
from bdjax.types import Callback, Key, Model, Variables, Victim, to_float

Term = Callable[[Any, Any], jax.Array]
"""`term(params, given) -> scalar`, added to the loss; a module-level function."""
Projection = Callable[[Any, Any], Any]
"""`projection(params, given) -> params`, applied after every step; a module-level function."""


class Epoch(NamedTuple):
    """The result of an epoch; its variables are donated to the next one."""

    number: int
    """From 1."""
    variables: Variables
    """The model after the epoch."""
    loss: float
    """Mean over the steps."""
    accuracy: float
    """Training accuracy: of every batch before its step."""


def epochs(
    victim: Victim, images: Any, labels: np.ndarray, recipe: FitConfig, key: Key, callback: Callback, stage: str, *,
    sign: float = 1.0, rates: Callable[[int], float] | None = None, term: Term | None = None,
    projection: Projection | None = None, given: Any = None,
) -> Iterator[Epoch]:  # fmt: skip
    """Train the victim by `recipe`, in training mode, and yield the result of each epoch.

    Args:
      images: stored [n, H, W, C]; labels: [n]. The batch size is reduced to the number of images, and to a
        multiple of the number of devices.
      sign: factor of the cross-entropy; -1 ascends it.
      rates: `rates(epoch)`, from epoch 0, replaces the learning rate and schedule of the recipe.
      term, projection: see above; given: pytree of arrays, their second argument.
      stage: name of the steps, for the watch, which gets their progress alone.
    Raises InputError for fewer images than devices, and for a loss that is not finite.
    """
    size = batch_of(recipe.batch_size, len(labels))
    steps = len(labels) // size
    if rates is None:
        table = learning_rates(recipe.schedule, recipe.learning_rate, recipe.epochs * steps).reshape(-1, steps)
    else:
        table = np.repeat(np.array([[rates(epoch)] for epoch in range(recipe.epochs)], np.float32), steps, 1)
    shared = {
        "images": jnp.asarray(images),
        "labels": jnp.asarray(labels),
        "given": given,
        **{name: jnp.float32(getattr(recipe, name)) for name in ("momentum", "weight_decay")},
        "sign": jnp.float32(sign),
    }
    for number, state, metrics in each_pass(
        _step(victim.model, recipe.optimizer, recipe.augment, term, projection),
        begin(victim.variables, recipe.optimizer), shared, table, size, key, partial(callback.on_progress, stage),
        what=f"{stage} loss",
    ):  # fmt: skip
        yield Epoch(number, model_of(state), *(float(metrics[name]) for name in ("loss", "accuracy")))


@lru_cache(maxsize=32)
def _step(model: Model, optimizer: Any, policy: str, term: Term | None, projection: Projection | None) -> Callable:
    """One step in the engine's form."""
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images = distort(to_float(shared["images"][split["index"]]), split["augment"])
        labels = shared["labels"][split["index"]]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, _, stats = model.apply(variables, images, True, split["dropout"], axis)
            value = shared["sign"] * optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            value = value + (term(params, shared["given"]) if term else 0)
            return value, (stats, (logits.argmax(-1) == labels).mean())

        (value, (stats, hits)), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, {"loss": value, "accuracy": hits}), axis)
        after = descend(
            state, gradient, stats, optimizer, whole["rate"], shared["momentum"], shared["weight_decay"]
        )  # fmt: skip
        if projection:
            after["params"] = projection(after["params"], shared["given"])
        return after, metrics

    return step
