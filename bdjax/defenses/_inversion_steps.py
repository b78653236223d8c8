"""Steps and losses of the trigger inversion of BTI-DBF (:mod:`bdjax.defenses._inversion`)."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._tuning import descend
from bdjax.engine import augment, parallel
from bdjax.models import head, penultimate, unet
from bdjax.types import Images, Key, Model, Variables, to_float


def feature_mask(values: jax.Array) -> jax.Array:
    """Return the mask m in [0, 1] for values u, both float32 [D]."""
    return jnp.tanh(values) / (2 + 1e-7) + 0.5


def classify(params: Any, features: jax.Array) -> jax.Array:
    """Return the logits [N, classes] of the last dense layer for its inputs [N, D]."""
    return features @ head(params) + params["head"].get("bias", 0)


def penultimate_features(
    model: Model, variables: Variables, images: Images, train: bool = False, keys: Any = None, axis: str | None = None
) -> tuple[jax.Array, Any]:
    """Compute the inputs of the last dense layer.

    Args:
      model: the classifier.
      variables: variables of the model.
      images: float32 [N, H, W, C] in [0, 1].
      train: whether the model runs in training mode.
      keys: random keys [N] for dropout, or None.
      axis: name of the mapped axis over which BatchNorm statistics are averaged, or None.

    Returns:
      (inputs, float32 [N, D]; BatchNorm statistics after the forward pass).
    """
    _, features, stats = model.apply(variables, images, train, keys, axis)
    return penultimate(features).astype(jnp.float32), stats


def mix_generated(generator: Callable, params: Any, images: Images, chosen: jax.Array, most: int) -> Images:
    """Replace the chosen images of a batch by the generator's.

    Args:
      generator: `generator(params, images) -> images`.
      params: parameters of the generator.
      images: the batch, float32 [B, H, W, C].
      chosen: bool [B], the positions to replace.
      most: largest possible number of chosen positions.

    Returns:
      float32 [B, H, W, C], without a gradient through the generator.
    """
    at = jnp.nonzero(chosen, size=most, fill_value=len(images))[0]
    generated = jax.lax.stop_gradient(generator(params, images[jnp.minimum(at, len(images) - 1)]))
    return images.at[at].set(generated, mode="drop")


def choose_positions(share: float, number: int, size: int, key: Key) -> dict[str, jax.Array]:
    """Choose the positions of each batch that pass through the generator.

    They are evenly spaced, so that every device has equally many; the image at a position is random anyway.

    Args:
      share: fraction of a batch, in [0, 1), to which one image is added.
      number: number of batches.
      size: images in a batch.
      key: not used.

    Returns:
      "chosen": bool [number, size], with int(share * size) + 1 positions in each batch.
    """
    count = min(int(share * size + 1e-9) + 1, size)
    steps = np.arange(size + 1) * count // size
    return {"chosen": jnp.broadcast_to(jnp.asarray(steps[1:] > steps[:-1]), (number, size))}


def max_chosen(share: float, size: int, axis: str | None) -> int:
    """Return the largest number of positions of :func:`choose_positions` in one device's part of a batch.

    Args:
      share: as of :func:`choose_positions`.
      size: images in a batch on all devices.
      axis: name of the mapped axis of the devices, or None.

    Returns:
      The number of positions.
    """
    count = min(int(share * size + 1e-9) + 1, size)
    return -(-count // parallel.size(axis))


@lru_cache(maxsize=16)
def generator_function(shape: tuple[int, int, int], width: int, downs: int) -> Callable:
    """Return the generator G as a compiled function, the same object for the same arguments.

    Args:
      shape: (H, W, C) of an image.
      width: channels of the first block.
      downs: number of down-sampling blocks.

    Returns:
      `generator(params, images [N, H, W, C]) -> images`.
    """
    net = unet(shape, width, downs)
    return jax.jit(lambda params, images: net.apply({"params": params, "batch_stats": {}}, images)[0])


def _mse(first: jax.Array, second: jax.Array) -> jax.Array:
    return ((first - second) ** 2).mean()


@lru_cache(maxsize=16)
def copy_step(model: Model, generator: Callable, policy: str) -> Callable:
    """Return a step, in the engine's form, that trains the generator to copy its input.

    Args:
      model: the classifier.
      generator: see :func:`generator_function`.
      policy: name of the augmentation.

    Returns:
      The step, the same object for the same arguments.
    """
    augmented = augment.policy(policy)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images = augmented(to_float(constants["images"][batch["index"]]), batch["augment"])
        clean_logits, clean_features = model.apply(constants["model"], images)[:2]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            generated = generator(params, images)
            logits, features, _ = model.apply(constants["model"], generated)
            predicted = optax.softmax_cross_entropy(jax.nn.softmax(clean_logits), jax.nn.softmax(logits)).mean()
            feature_change = _mse(*(penultimate(f).astype(jnp.float32) for f in (clean_features, features)))
            image = _mse(images, generated)
            weight = jnp.where(parallel.average(image, axis) > 0.1, 100.0, 0.01)
            value = predicted + feature_change + jax.lax.stop_gradient(weight) * image
            return value, {"loss": value, "image": image}

        gradient, metrics = jax.grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        return descend(state, gradient, state["batch_stats"], "adam", per_step["rate"]), metrics

    return step


@lru_cache(maxsize=16)
def mask_step(model: Model, policy: str) -> Callable:
    """Return a step of u, in the engine's form, with a copy of the model in training mode."""
    augmented = augment.policy(policy)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images = augmented(to_float(constants["images"][batch["index"]]), batch["augment"])
        labels, params = constants["labels"][batch["index"]], constants["model"]["params"]
        variables = {"params": params, "batch_stats": state["batch_stats"]}
        features, stats = penultimate_features(model, variables, images, True, None, axis)
        value, gradient = jax.value_and_grad(mask_loss)(state["params"], params, features, labels)
        value, gradient = parallel.average((value, gradient), axis)
        return descend(state, gradient, stats, "adam", per_step["rate"]), {"loss": value}

    return step


def mask_loss(values: jax.Array, params: Any, features: jax.Array, labels: jax.Array) -> jax.Array:
    """Loss of step 1.

    Args:
      values: u, float32 [D].
      params: parameters of the model.
      features: inputs of its last dense layer, float32 [N, D].
      labels: int32 [N].

    Returns:
      float32 scalar.
    """
    mask = feature_mask(values)
    benign_logits, backdoor_logits = (classify(params, part * features) for part in (mask, 1 - mask))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return cross_entropy(benign_logits, labels).mean() - cross_entropy(backdoor_logits, labels).mean()


@lru_cache(maxsize=16)
def inversion_step(model: Model, generator: Callable, policy: str) -> Callable:
    """Return a step of the generator, in the engine's form, that changes the backdoor features of its input.

    Args:
      model: the classifier.
      generator: see :func:`generator_function`.
      policy: name of the augmentation.

    Returns:
      The step, the same object for the same arguments.
    """
    augmented = augment.policy(policy)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images = augmented(to_float(constants["images"][batch["index"]]), batch["augment"])
        mask, hyper = constants["mask"], constants["hyper"]
        clean = penultimate_features(model, constants["model"], images)[0]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            generated = generator(params, images)
            logits, features, _ = model.apply(constants["model"], generated)
            changed = penultimate(features).astype(jnp.float32)
            benign, backdoor = _mse(mask * clean, mask * changed), _mse((1 - mask) * clean, (1 - mask) * changed)
            image = _mse(images, generated)
            changes = parallel.average((image, benign), axis)
            copy = (changes[0] > hyper["image_bound"]) | (changes[1] > hyper["feature_bound"])
            value = jnp.where(copy, image, hyper["benign"] * benign - backdoor)
            targets = jnp.full(len(images), constants["target"])
            value += constants["pull"] * optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
            return value, {"loss": value, "image": image, "benign": benign, "backdoor": backdoor}

        gradient, metrics = jax.grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        return descend(state, gradient, state["batch_stats"], "adam", per_step["rate"]), metrics

    return step
