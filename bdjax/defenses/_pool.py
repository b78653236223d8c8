"""Recovered triggers: which are kept, how they are put on images, what is shown of them, and batches for their use."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.engine.callbacks import ForwardingCallback
from bdjax.types import Callback, Images, Key, Variables


class Pool(NamedTuple):
    """The triggers drawn, always as many, and which of them are kept: only those are ever used."""

    triggers: jax.Array
    """float32 [m, h, w, C]: patches in [0, 1], or what is added to an image [m, H, W, C]."""
    labels: jax.Array
    """int32 [m], the label that each was made for."""
    asr: jax.Array
    """float32 [m], on clean images of other classes; in [0, 1]."""
    kept: jax.Array
    """bool [m]."""
    places: Any = None
    """Log-odds of the rows [m, H - h + 1] and columns [m, W - w + 1] that a patch begins at; None: all alike likely."""

    def suspected(self) -> np.ndarray:
        """The labels of what is kept, int32, ascending."""
        return np.unique(np.asarray(self.labels)[np.asarray(self.kept)]).astype(np.int32)

    def shown(self) -> dict[str, np.ndarray]:
        """For the watch: "suspected", and of at most 64 kept triggers, labels in turn and the best first, "recovered"
        [k, h, w, C], "recovered_labels" and "recovered_asr"; "label_asr" is the mean ASR of each label's triggers."""
        triggers, labels, asr, kept = map(np.asarray, self[:4])
        best = np.flatnonzero(kept)[np.argsort(-asr[kept], kind="stable")]
        turn = np.array([(labels[best[:i]] == labels[at]).sum() for i, at in enumerate(best)], int)
        chosen = best[np.argsort(turn, kind="stable")][:64]
        return {
            "suspected": self.suspected(),
            "recovered": triggers[chosen],
            "recovered_labels": labels[chosen],
            "recovered_asr": asr[chosen],
            "label_asr": np.array([asr[labels == label].mean() for label in range(labels.max() + 1)]),
        }


class Showing(ForwardingCallback):
    """A watch that shows a pool beside whatever it is shown."""

    def __init__(self, callback: Callback, pool: Pool) -> None:
        super().__init__(callback)
        self._shown = pool.shown()

    def on_round_end(self, step: int, variables: Variables, **arrays: Any) -> None:
        """Pass it on with the pool."""
        super().on_round_end(step, variables, **arrays, **self._shown)


def draw(pool: Pool, keys: Key) -> tuple[jax.Array, jax.Array, Any]:
    """A kept trigger for each of the keys [N], all alike likely: [N, h, w, C], labels [N], places; jittable."""
    chances = jnp.where(pool.kept, jnp.float32(0), -jnp.inf)
    which = jax.vmap(lambda key: jax.random.categorical(jax.random.fold_in(key, 0), chances))(keys)
    return pool.triggers[which], pool.labels[which], jax.tree.map(lambda leaf: leaf[which], pool.places)


def anywhere(count: int, whole: tuple[int, ...], part: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Equal log-odds [count, ...] of the rows and columns of an image [H, W, ..] that a patch [h, w, ..] begins at."""
    return tuple(jnp.zeros((count, side - own + 1)) for side, own in zip(whole[:2], part[:2], strict=True))


def corner_of(places: tuple[jax.Array, ...], key: Key) -> jax.Array:
    """Row and column, int32 [2], drawn by their log-odds."""
    return jnp.stack([jax.random.categorical(k, odds) for k, odds in zip(jax.random.split(key), places, strict=True)])


def stamp_one(form: str, image: jax.Array, trigger: jax.Array, corner: jax.Array) -> jax.Array:
    """One image [H, W, C] with a trigger; a patch begins at `corner`, int [2]."""
    if form == "additive":
        return jnp.clip(image + trigger, 0, 1)
    sides = trigger.shape[:2]
    # by products with rows and columns of ones: their derivative is a product again, and no scatter
    down, right = (
        (jnp.arange(length)[:, None] == corner[axis] + jnp.arange(side)).astype(jnp.float32)
        for axis, (length, side) in enumerate(zip(image.shape, sides, strict=False))
    )
    exact = jax.lax.Precision.HIGHEST
    moved = jnp.einsum("ha,abc,wb->hwc", down, jnp.clip(trigger, 0, 1), right, precision=exact)
    inside = down.sum(1)[:, None, None] * right.sum(1)[:, None]
    return image * (1 - inside) + moved


def stamp(form: str, images: Images, triggers: jax.Array, keys: Key, places: Any = None) -> Images:
    """Images [N, H, W, C] each with its trigger [N, h, w, C], patches at a place drawn by its key [N]; jittable.

    Args: places: log-odds as in a pool, [N, ...] each.
    """
    odds = anywhere(len(keys), images.shape[1:], triggers.shape[1:]) if places is None else places
    corners = jax.vmap(corner_of)(odds, jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys))
    return jax.vmap(partial(stamp_one, form))(images, triggers, corners)


@lru_cache(maxsize=8)
def stamper(form: str) -> Callable:
    """(pool, images [N, H, W, C], keys [N]) -> (the images, each with a kept trigger, and the triggers' labels)."""

    def run(pool: Pool, images: Images, keys: Key) -> tuple[Images, jax.Array]:
        triggers, labels, places = draw(pool, keys)
        return stamp(form, images, triggers, keys, places), labels

    return jax.jit(run)


def batches(key: Key, total: int, size: int, steps: int) -> jax.Array:
    """Which of `total` images each of `steps` batches has, shuffled pass after pass: int32 [steps, size]."""
    number = total // size
    passes = [
        jax.random.permutation(jax.random.fold_in(key, again), total)[: number * size]
        for again in range(-(-steps // number))
    ]
    return jnp.concatenate(passes).reshape(-1, size)[:steps]
