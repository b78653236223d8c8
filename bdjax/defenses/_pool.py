"""Recovered triggers: which are accepted, how they are stamped on images, and what is reported about them."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.engine.callbacks import ForwardingCallback
from bdjax.types import Callback, Images, Key, Scores, Variables


class Pool(NamedTuple):
    """All triggers that were drawn, and which of them are accepted; only accepted triggers are used."""

    triggers: jax.Array
    """float32: patches [m, h, w, C] in [0, 1], or additive triggers [m, H, W, C]."""
    labels: jax.Array
    """int32 [m], the target label of each trigger."""
    asr: jax.Array
    """float32 [m] in [0, 1], attack success rate on clean images of other classes."""
    accepted: jax.Array
    """bool [m], whether the ASR reaches the threshold."""
    position_logits: Any = None
    """Log-odds of the first row [m, H - h + 1] and the first column [m, W - w + 1] of a patch; None: uniform."""

    def suspected_labels(self) -> np.ndarray:
        """Return the labels of the accepted triggers, int32, ascending."""
        return np.unique(np.asarray(self.labels)[np.asarray(self.accepted)]).astype(np.int32)

    def as_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays for a callback.

        "suspected" are the labels of the accepted triggers. "recovered" [k, h, w, C], "recovered_labels" and
        "recovered_asr" are at most 64 accepted triggers, alternating between labels and best first. "label_asr" is the
        mean ASR of the triggers of each label.
        """
        triggers, labels, asr, accepted = map(np.asarray, self[:4])
        ranked = np.flatnonzero(accepted)[np.argsort(-asr[accepted], kind="stable")]
        rank_in_label = np.array([(labels[ranked[:i]] == labels[at]).sum() for i, at in enumerate(ranked)], int)
        selected = ranked[np.argsort(rank_in_label, kind="stable")][:64]
        return {
            "suspected": self.suspected_labels(),
            "recovered": triggers[selected],
            "recovered_labels": labels[selected],
            "recovered_asr": asr[selected],
            "label_asr": np.array([asr[labels == label].mean() for label in range(labels.max() + 1)]),
        }


class PoolCallback(ForwardingCallback):
    """A callback that adds the arrays of a pool to every report."""

    def __init__(self, callback: Callback, pool: Pool) -> None:
        super().__init__(callback)
        self._arrays = pool.as_arrays()

    def on_round_end(self, step: int, variables: Variables, **arrays: Any) -> None:
        """Forward the report together with the pool's arrays."""
        super().on_round_end(step, variables, **arrays, **self._arrays)


def draw_triggers(pool: Pool, keys: Key) -> tuple[jax.Array, jax.Array, Any]:
    """Draw an accepted trigger, uniformly, for each of the keys [N]; jittable.

    Returns:
      The triggers [N, h, w, C], their labels int32 [N], and their position log-odds.
    """
    log_weights = jnp.where(pool.accepted, jnp.float32(0), -jnp.inf)
    indices = jax.vmap(lambda key: jax.random.categorical(jax.random.fold_in(key, 0), log_weights))(keys)
    return pool.triggers[indices], pool.labels[indices], jax.tree.map(lambda leaf: leaf[indices], pool.position_logits)


def uniform_positions(count: int, image_shape: tuple[int, ...], patch_shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Return zero log-odds for the first row and the first column of a patch.

    Args:
      count: number of triggers.
      image_shape: (H, W, ...).
      patch_shape: (h, w, ...).

    Returns:
      Float32 arrays [count, H - h + 1] and [count, W - w + 1].
    """
    return tuple(
        jnp.zeros((count, image_side - patch_side + 1))
        for image_side, patch_side in zip(image_shape[:2], patch_shape[:2], strict=True)
    )


def draw_corner(position_logits: tuple[jax.Array, ...], key: Key) -> jax.Array:
    """Draw the first row and column of a patch, int32 [2], from their log-odds."""
    return jnp.stack(
        [jax.random.categorical(k, logits) for k, logits in zip(jax.random.split(key), position_logits, strict=True)]
    )


def stamp_one(form: str, image: jax.Array, trigger: jax.Array, corner: jax.Array) -> jax.Array:
    """Put a trigger on one image.

    Args:
      form: "patch" (replaces pixels) or "additive" (is added, then clipped).
      image: float32 [H, W, C] in [0, 1].
      trigger: float32 [h, w, C], or [H, W, C] if additive.
      corner: int [2], first row and column of a patch.

    Returns:
      The image, float32 [H, W, C] in [0, 1].
    """
    if form == "additive":
        return jnp.clip(image + trigger, 0, 1)
    sides = trigger.shape[:2]
    # by products with rows and columns of ones: their derivative is a product again, and no scatter
    row_map, column_map = (
        (jnp.arange(length)[:, None] == corner[axis] + jnp.arange(side)).astype(jnp.float32)
        for axis, (length, side) in enumerate(zip(image.shape, sides, strict=False))
    )
    exact = jax.lax.Precision.HIGHEST
    placed_patch = jnp.einsum("ha,abc,wb->hwc", row_map, jnp.clip(trigger, 0, 1), column_map, precision=exact)
    inside = row_map.sum(1)[:, None, None] * column_map.sum(1)[:, None]
    return image * (1 - inside) + placed_patch


def stamp(form: str, images: Images, triggers: jax.Array, keys: Key, position_logits: Any = None) -> Images:
    """Put one trigger on each image, patches at positions drawn by the keys; jittable.

    Args:
      form: "patch" or "additive".
      images: float32 [N, H, W, C] in [0, 1].
      triggers: float32 [N, h, w, C], or [N, H, W, C] if additive.
      keys: [N], one random key per image.
      position_logits: log-odds of rows and columns as in a pool, each [N, ...]; None: uniform.

    Returns:
      The images, float32 [N, H, W, C] in [0, 1].
    """
    logits = (
        uniform_positions(len(keys), images.shape[1:], triggers.shape[1:])
        if position_logits is None
        else position_logits
    )
    corners = jax.vmap(draw_corner)(logits, jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys))
    return jax.vmap(partial(stamp_one, form))(images, triggers, corners)


@lru_cache(maxsize=8)
def stamper(form: str) -> Callable:
    """Compile (pool, images [N, H, W, C], keys [N]) -> (images with a random accepted trigger, their labels [N])."""

    def stamp_random(pool: Pool, images: Images, keys: Key) -> tuple[Images, jax.Array]:
        triggers, labels, position_logits = draw_triggers(pool, keys)
        return stamp(form, images, triggers, keys, position_logits), labels

    return jax.jit(stamp_random)


def draw_batches(key: Key, total: int, size: int, steps: int) -> jax.Array:
    """Draw batches without replacement, from a new permutation for each epoch.

    Args:
      key: random key.
      total: number of images.
      size: images per batch.
      steps: number of batches.

    Returns:
      int32 [steps, size], positions of the images.
    """
    batches_per_epoch = total // size
    epochs = [
        jax.random.permutation(jax.random.fold_in(key, epoch), total)[: batches_per_epoch * size]
        for epoch in range(-(-steps // batches_per_epoch))
    ]
    return jnp.concatenate(epochs).reshape(-1, size)[:steps]


def pool_scores(pool: Pool, classes: int) -> Scores:
    """Score each label by the largest ASR of its triggers; the model is backdoored when a trigger is accepted."""
    labels, asr = np.asarray(pool.labels), np.asarray(pool.asr)
    best = np.array([asr[labels == label].max(initial=0) for label in range(classes)], np.float32)
    target = int(np.argmax(best))
    return Scores(best, target, float(best[target]), bool(len(pool.suspected_labels())))
