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
from bdjax.defenses._tuning import descend, hyper_arrays, image_arrays, iterate_epochs, training_state, variables_of
from bdjax.engine import FitConfig, augment, parallel
from bdjax.engine.optimizer import learning_rates
from bdjax.types import Callback, Key, Model, Variables, Victim, to_float

Term = Callable[[Any, Any], jax.Array]
"""`term(params, extra) -> scalar`, added to the loss; a module-level function."""
Projection = Callable[[Any, Any], Any]
"""`projection(params, extra) -> params`, applied after every step; a module-level function."""


class Epoch(NamedTuple):
    """The result of an epoch; its variables are donated to the next one."""

    number: int
    """Number of the epoch, from 1."""
    variables: Variables
    """The model after the epoch."""
    loss: float
    """Mean loss over the steps."""
    accuracy: float
    """Training accuracy in [0, 1], measured on every batch before its step."""


def train_epochs(
    victim: Victim, images: Any, labels: np.ndarray, recipe: FitConfig, key: Key, callback: Callback, stage: str, *,
    sign: float = 1.0, rates: Callable[[int], float] | None = None, term: Term | None = None,
    projection: Projection | None = None, extra: Any = None,
) -> Iterator[Epoch]:  # fmt: skip
    """Train the victim in training mode by a recipe, and yield the result of each epoch.

    Args:
      victim: the model to train.
      images: stored [n, H, W, C].
      labels: int32 [n].
      recipe: the training recipe. Its batch size is reduced to the number of images, and to a multiple of the number
        of devices.
      key: random key that shuffles and augments the images.
      callback: receives the progress of the steps, but no variables.
      stage: name of the training stage, for progress and messages.
      sign: factor of the cross-entropy; -1 ascends it.
      rates: `rates(epoch)`, from epoch 0, replaces the learning rate and schedule of the recipe.
      term: see :data:`Term`; None: the cross-entropy alone.
      projection: see :data:`Projection`; None: no projection.
      extra: pytree of arrays, the second argument of `term` and `projection`.

    Yields:
      The result of each epoch.

    Raises:
      InputError: when the batch size or the number of images is smaller than the number of devices, or when the loss
        becomes NaN or infinite.
    """
    size = batch_of(recipe.batch_size, len(labels))
    steps = len(labels) // size
    if rates is None:
        table = learning_rates(recipe.schedule, recipe.learning_rate, recipe.epochs * steps).reshape(-1, steps)
    else:
        table = np.repeat(np.array([[rates(epoch)] for epoch in range(recipe.epochs)], np.float32), steps, 1)
    constants = {
        **image_arrays(images, labels),
        **hyper_arrays(recipe, ("momentum", "weight_decay")),
        "extra": extra,
        "sign": jnp.float32(sign),
    }
    for number, state, metrics in iterate_epochs(
        _step(victim.model, recipe.optimizer, recipe.augment, term, projection),
        training_state(victim.variables, recipe.optimizer), constants, table, size, key,
        partial(callback.on_progress, stage), loss_name=f"{stage} loss",
    ):  # fmt: skip
        yield Epoch(number, variables_of(state), *(float(metrics[name]) for name in ("loss", "accuracy")))


@lru_cache(maxsize=32)
def _step(model: Model, optimizer: Any, policy: str, term: Term | None, projection: Projection | None) -> Callable:
    """Return a training step in the engine's form."""
    augmented = augment.policy(policy)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images = augmented(to_float(constants["images"][batch["index"]]), batch["augment"])
        labels = constants["labels"][batch["index"]]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, _, stats = model.apply(variables, images, True, batch["dropout"], axis)
            value = constants["sign"] * optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            value = value + (term(params, constants["extra"]) if term else 0)
            return value, (stats, (logits.argmax(-1) == labels).mean())

        (value, (stats, hits)), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, {"loss": value, "accuracy": hits}), axis)
        after = descend(
            state, gradient, stats, optimizer, per_step["rate"], constants["momentum"], constants["weight_decay"]
        )  # fmt: skip
        if projection:
            after["params"] = projection(after["params"], constants["extra"])
        return after, metrics

    return step
