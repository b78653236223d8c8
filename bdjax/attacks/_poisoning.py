"""Data poisoning, shared by the attacks: Config fields, selection of images, relabelling, random keys, pasting."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.errors import InputError
from bdjax.types import Arrays, Images, Key, Poison, to_float


@dataclass(frozen=True)
class PoisonConfig:
    """Which images are poisoned and how they are labelled; the base of every attack's Config."""

    target: int = 0
    """Label that the attacker wants for triggered images (unused when labels is all_to_all)."""
    ratio: float = 0.1
    """Share of the *whole* training set that is poisoned, in (0, 1]."""
    labels: Literal["all_to_one", "all_to_all", "clean"] = "all_to_one"
    """all_to_one: relabel to the target; all_to_all: y becomes (y + 1) mod C; clean: poison only images of
    the target class and keep their labels."""
    exclude_target: bool = True
    """all_to_one: leave images of the target class out of the poisoned ones (I-BAU, BAERASER); BackdoorBench
    draws from all classes."""
    quantise: bool = True
    """Round triggered images to k/255, as storing them as 8-bit pictures does."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise InputError(f"attack.ratio must be in (0, 1], got {self.ratio}.")
        if self.target < 0:
            raise InputError(f"attack.target must not be negative, got {self.target}.")


@dataclass(frozen=True)
class CoverConfig(PoisonConfig):
    """Base of the Configs of attacks with cover images, which carry the training trigger and keep their true label."""

    cover: float = 0.05
    """Share of the *whole* training set that is cover, drawn from every class beside the poisoned images; in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.cover < 1:
            raise InputError(f"attack.cover must be in [0, 1), got {self.cover}.")


class Part(NamedTuple):
    """One attack of a composite attack, measured separately."""

    label: str
    """Name of the part, unique within the composite attack."""
    attack: str
    """Name in bdjax.attacks, or the path of a .py file."""
    config: Any
    """Its Config."""


def part_arrays(arrays: Arrays, part: Part) -> Arrays:
    """Select the arrays of one part from those of a composite attack, where they are called LABEL/NAME."""
    start = f"{part.label}/"
    return {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}


@dataclass(frozen=True)
class SourceConfig(PoisonConfig):
    """Base of the Configs of source-specific attacks, whose ASR counts images of one class only."""

    source: int = 1
    """Label of the images that the attack turns into the target; not the target."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source < 0 or self.source == self.target:
            raise InputError(
                f"attack.source must be a label other than attack.target={self.target}, got {self.source}."
            )


class _Keys(NamedTuple):
    """Random keys of the three stages of planting."""

    prepare: Key
    poison: Key
    fit: Key


def keys_of(key: Key) -> _Keys:
    """Split the key of :func:`bdjax.attacks.plant` into the keys of its three stages."""
    return _Keys(*jax.random.split(key, 3))


def fit_key(key: Key) -> Key:
    """Return the key of the victim's training, derived from the key of :func:`bdjax.attacks.plant`.

    It is the same for all attacks, so a clean and a poisoned model start from the same weights and see the images in
    the same order.
    """
    return keys_of(key).fit


def without_previews(stored: Arrays) -> Arrays:
    """Return the arrays of the attack itself, without the trigger previews that are stored with them."""
    return {name: value for name, value in stored.items() if not name.startswith("on_")}


def check_target(config: PoisonConfig, classes: int) -> None:
    """Raise InputError when the target, or the source, is not one of `classes` labels."""
    if config.target >= classes and config.labels != "all_to_all":
        raise InputError(
            f"attack.target={config.target}, but the labels go from 0 to {classes - 1}. Use --attack.target."
        )
    if isinstance(config, SourceConfig) and config.source >= classes:
        raise InputError(
            f"attack.source={config.source}, but the labels go from 0 to {classes - 1}. Use --attack.source."
        )


def select(config: PoisonConfig, labels: np.ndarray, key: Key) -> np.ndarray:
    """Draw the images to poison.

    Args:
      config: Config of the attack.
      labels: int32 [N], labels of the training set.
      key: random key of the draw.

    Returns:
      int32 [int(ratio * N)], their indices, ascending.

    Raises:
      InputError: when there are too few candidates (see :func:`candidates_of`).
    """
    candidates, count = candidates_of(config, labels)
    chosen = jax.random.choice(key, len(candidates), (count,), replace=False)
    return np.sort(candidates[np.asarray(chosen)]).astype(np.int32)


def candidates_of(config: PoisonConfig, labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the indices of the images that may be poisoned, and the number of images to poison.

    Raises InputError when the label mode leaves fewer candidates than the ratio requires.
    """
    count = int(config.ratio * len(labels))
    if count == 0:
        raise InputError(f"attack.ratio={config.ratio} of {len(labels)} images is none. Use a larger ratio.")
    if config.labels == "clean":
        candidates = np.flatnonzero(labels == config.target)
        reason = f"a clean-label attack poisons only class {config.target}, which has {len(candidates)}"
    elif config.labels == "all_to_one" and config.exclude_target:
        candidates = np.flatnonzero(labels != config.target)
        reason = f"with exclude_target, classes other than {config.target} have {len(candidates)}"
    else:
        candidates, reason = np.arange(len(labels)), ""
    if count > len(candidates):
        raise InputError(
            f"attack.ratio={config.ratio} asks for {count} of {len(labels)} images, but {reason}. "
            f"The largest ratio here is {len(candidates) / len(labels):.4g}."
        )
    return candidates, count


def select_cover(config: PoisonConfig, labels: np.ndarray, poisoned: np.ndarray, key: Key) -> np.ndarray:
    """Draw the cover images.

    Args:
      config: Config of the attack; without a :class:`CoverConfig` there are none.
      labels: int32 [N], labels of the training set.
      poisoned: int32 [n], indices of the poisoned images, which are excluded.
      key: random key of the draw.

    Returns:
      int32 [int(cover * N)], their indices, ascending.

    Raises:
      InputError: when too few images are not poisoned.
    """
    count = int(config.cover * len(labels)) if isinstance(config, CoverConfig) else 0
    clean = np.setdiff1d(np.arange(len(labels)), poisoned)
    if count > len(clean):
        raise InputError(
            f"attack.cover asks for {count} of {len(labels)} images, but attack.ratio={config.ratio} leaves "
            f"{len(clean)}. The largest cover here is {len(clean) / len(labels):.4g}."
        )
    return np.sort(clean[np.asarray(jax.random.choice(key, len(clean), (count,), replace=False))]).astype(np.int32)


def relabel(config: PoisonConfig, labels: Any, classes: Any) -> Any:
    """Return the attacker's labels for poisoned images; traceable.

    Args:
      config: Config of the attack.
      labels: int [n], the true labels.
      classes: number of classes.

    Returns:
      int32 [n].
    """
    if config.labels == "all_to_all":
        return ((labels + 1) % classes).astype(np.int32)
    if config.labels == "clean":
        return labels.astype(np.int32)
    return (labels * 0 + config.target).astype(np.int32)


def relabel_batch(
    config: PoisonConfig, labels: jax.Array, classes: Any, role: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Relabel the poisoned images of a batch: those of role 1, except, with exclude_target, those of the target class.

    Args:
      config: Config of the attack.
      labels: int32 [B], the true labels.
      classes: number of classes.
      role: int8 [B], see :class:`bdjax.types.SampleInfo`.

    Returns:
      (bool [B], which images are poisoned; int32 [B], all labels afterwards).
    """
    new_labels = relabel(config, labels, classes)
    poisoned = (role == 1) & (labels != new_labels) if config.exclude_target else role == 1
    return poisoned, jnp.where(poisoned, new_labels, labels)


def goal(config: PoisonConfig, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the attacker's label for each test image, and which images count for the ASR.

    Images that belong to the target class already do not count; with a SourceConfig only the source class does.

    Args:
      config: Config of the attack.
      labels: int32 [N], the true labels.
      classes: number of classes.

    Returns:
      (int32 [N], labels; bool [N], whether the image counts).
    """
    if config.labels == "all_to_all":
        return relabel(config, labels, classes), np.ones(len(labels), bool)
    targets = np.full(len(labels), config.target, np.int32)
    return targets, labels == config.source if isinstance(config, SourceConfig) else labels != config.target


def poisoned_set(poison: Poison, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the training set with the poisoned images in their places.

    Args:
      poison: the poisoned images and their positions.
      images: stored images [N, H, W, C].
      labels: int [N].

    Returns:
      (images [copies * N, H, W, C], labels int32 [copies * N]); uint8, unless the poisoned images are float32.
    """
    if poison.images.dtype != images.dtype:
        images = np.asarray(to_float(images))
    images, labels = np.concatenate([images] * poison.copies), np.concatenate([labels] * poison.copies).astype(np.int32)
    images[poison.indices], labels[poison.indices] = poison.images, poison.labels
    return images, labels


def key_per_image(key: Key, count: int) -> Key:
    """Return `count` keys, the i-th from `fold_in(key, i)`, so that a longer batch begins like a shorter one."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(count))


def put(images: Images, patch: jax.Array, places: jax.Array) -> Images:
    """Paste a patch into images.

    Args:
      images: [N, H, W, C].
      patch: [h, w, C].
      places: int32 row and column of the patch's first pixel, [2] for all images or [N, 2].

    Returns:
      Images with the patch, same shape.
    """

    def put_one(image: jax.Array, place: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(image, patch.astype(image.dtype), (place[0], place[1], 0))

    return jax.vmap(put_one, (0, 0 if places.ndim == 2 else None))(images, places)


def put_anywhere(images: Images, patch: jax.Array, key: Key, low: Any, high: Any) -> Images:
    """Paste a patch into images, at a place drawn for each image.

    Args:
      images: [N, H, W, C].
      patch: [h, w, C].
      key: random key of the draw.
      low: smallest row and column of the patch's first pixel, one number or [2].
      high: exclusive upper bound of the same.

    Returns:
      Images with the patch, same shape.
    """
    keys = key_per_image(key, len(images))
    return put(images, patch, jax.vmap(lambda k: jax.random.randint(k, (2,), low, high))(keys))
