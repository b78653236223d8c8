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


def mask_of(values: jax.Array) -> jax.Array:
    """m of u [D], in [0, 1]."""
    return jnp.tanh(values) / (2 + 1e-7) + 0.5


def classify(params: Any, features: jax.Array) -> jax.Array:
    """Logits [N, classes] of the last dense layer, for its input [N, D]."""
    return features @ head(params) + params["head"].get("bias", 0)


def features_of(
    model: Model, variables: Variables, images: Images, train: bool = False, keys: Any = None, axis: str | None = None
) -> tuple[jax.Array, Any]:
    """The input of the last dense layer, float32 [N, D], and the BatchNorm statistics after the forward pass."""
    _, features, stats = model.apply(variables, images, train, keys, axis)
    return penultimate(features).astype(jnp.float32), stats


def mixed(generator: Callable, params: Any, images: Images, chosen: jax.Array, most: int) -> Images:
    """The batch with G(x) at the `chosen` positions, bool [B], of which there are at most `most`."""
    at = jnp.nonzero(chosen, size=most, fill_value=len(images))[0]
    generated = jax.lax.stop_gradient(generator(params, images[jnp.minimum(at, len(images) - 1)]))
    return images.at[at].set(generated, mode="drop")


def chosen_of(share: float, number: int, size: int, key: Key) -> dict[str, jax.Array]:
    """Which positions of each batch pass through G: int(share size) + 1 of them, bool "chosen" [number, size].

    They are evenly spaced, so that every device has equally many; which image is at which position is random anyway.
    """
    count = min(int(share * size + 1e-9) + 1, size)
    steps = np.arange(size + 1) * count // size
    return {"chosen": jnp.broadcast_to(jnp.asarray(steps[1:] > steps[:-1]), (number, size))}


def most_of(share: float, size: int, axis: str | None) -> int:
    """The most positions of :func:`chosen_of` that one device's part of a batch of `size` images can have."""
    count = min(int(share * size + 1e-9) + 1, size)
    return -(-count // parallel.size(axis))


@lru_cache(maxsize=16)
def generator_of(shape: tuple[int, int, int], width: int, downs: int) -> Callable:
    """G as (params, images [N, H, W, C]) -> images; one object per shape and size."""
    net = unet(shape, width, downs)
    return jax.jit(lambda params, images: net.apply({"params": params, "batch_stats": {}}, images)[0])


def _mse(first: jax.Array, second: jax.Array) -> jax.Array:
    return ((first - second) ** 2).mean()


@lru_cache(maxsize=16)
def _copying(model: Model, generator: Callable, policy: str) -> Callable:
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images = distort(to_float(shared["images"][split["index"]]), split["augment"])
        given, was = model.apply(shared["model"], images)[:2]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            generated = generator(params, images)
            logits, features, _ = model.apply(shared["model"], generated)
            predicted = optax.softmax_cross_entropy(jax.nn.softmax(given), jax.nn.softmax(logits)).mean()
            moved = _mse(*(penultimate(f).astype(jnp.float32) for f in (was, features)))
            image = _mse(images, generated)
            weight = jnp.where(parallel.average(image, axis) > 0.1, 100.0, 0.01)
            value = predicted + moved + jax.lax.stop_gradient(weight) * image
            return value, {"loss": value, "image": image}

        gradient, metrics = jax.grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        return descend(state, gradient, state["batch_stats"], "adam", whole["rate"]), metrics

    return step


@lru_cache(maxsize=16)
def _masking(model: Model, policy: str) -> Callable:
    """One step of u, with a copy of the model in training mode."""
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images = distort(to_float(shared["images"][split["index"]]), split["augment"])
        labels, params = shared["labels"][split["index"]], shared["model"]["params"]
        variables = {"params": params, "batch_stats": state["batch_stats"]}
        features, stats = features_of(model, variables, images, True, None, axis)
        value, gradient = jax.value_and_grad(mask_loss)(state["params"], params, features, labels)
        value, gradient = parallel.average((value, gradient), axis)
        return descend(state, gradient, stats, "adam", whole["rate"]), {"loss": value}

    return step


def mask_loss(values: jax.Array, params: Any, features: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of step 1 at u [D], for features [N, D]."""
    mask = mask_of(values)
    kept, rest = (classify(params, part * features) for part in (mask, 1 - mask))
    each = optax.softmax_cross_entropy_with_integer_labels
    return each(kept, labels).mean() - each(rest, labels).mean()


@lru_cache(maxsize=16)
def _inverting(model: Model, generator: Callable, policy: str) -> Callable:
    distort = augment.policy(policy)

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images = distort(to_float(shared["images"][split["index"]]), split["augment"])
        mask, hyper = shared["mask"], shared["hyper"]
        was = features_of(model, shared["model"], images)[0]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            generated = generator(params, images)
            logits, features, _ = model.apply(shared["model"], generated)
            now = penultimate(features).astype(jnp.float32)
            benign, backdoor = _mse(mask * was, mask * now), _mse((1 - mask) * was, (1 - mask) * now)
            image = _mse(images, generated)
            far = parallel.average((image, benign), axis)
            copy = (far[0] > hyper["image_bound"]) | (far[1] > hyper["feature_bound"])
            value = jnp.where(copy, image, hyper["benign"] * benign - backdoor)
            wanted = jnp.full(len(images), shared["target"])
            value += shared["pull"] * optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()
            return value, {"loss": value, "image": image, "benign": benign, "backdoor": backdoor}

        gradient, metrics = jax.grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        return descend(state, gradient, state["batch_stats"], "adam", whole["rate"]), metrics

    return step
