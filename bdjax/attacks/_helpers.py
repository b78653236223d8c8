"""What the attacks share: the poisoning fields of a Config, sample selection, covers, relabelling, keys."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.errors import InputError
from bdjax.types import Arrays, Images, Key, Poison, to_float


@dataclass(frozen=True)
class PoisonConfig:
    """Which images are poisoned and what they are called; every attack's Config begins with it."""

    target: int = 0
    """Label that a triggered image shall get (unused when labels is all_to_all)."""
    ratio: float = 0.1
    """Share of the *whole* training set that is poisoned, in (0, 1]."""
    labels: Literal["all_to_one", "all_to_all", "clean"] = "all_to_one"
    """all_to_one: relabel to the target; all_to_all: y becomes (y + 1) mod C; clean: poison only images of
    the target class and keep their labels."""
    exclude_target: bool = True
    """all_to_one: leave images of the target class out of the poisoned ones (I-BAU, BAERASER); BackdoorBench
    draws from all classes."""
    quantise: bool = True
    """Round triggered images to k/255, as an attacker who stores pictures must."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise InputError(f"attack.ratio must be in (0, 1], got {self.ratio}.")
        if self.target < 0:
            raise InputError(f"attack.target must not be negative, got {self.target}.")


@dataclass(frozen=True)
class CoverConfig(PoisonConfig):
    """For attacks with cover images: they carry the training trigger too and keep their true label."""

    cover: float = 0.05
    """Share of the *whole* training set, beside the poisoned ones and from every class, that is cover; in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.cover < 1:
            raise InputError(f"attack.cover must be in [0, 1), got {self.cover}.")


class Part(NamedTuple):
    """One of the attacks that an attack is made of, measured on its own."""

    label: str
    """What it is called; unlike the others'."""
    attack: str
    """Name in bdjax.attacks, or the path of a .py file."""
    config: Any
    """Its Config."""


def part_arrays(arrays: Arrays, part: Part) -> Arrays:
    """A part's own arrays among those of the whole, where they are called LABEL/NAME."""
    start = f"{part.label}/"
    return {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}


@dataclass(frozen=True)
class SourceConfig(PoisonConfig):
    """For attacks that shall turn images of one class only: no other image counts for the ASR."""

    source: int = 1
    """Label of the images that the trigger shall turn; not the target."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source < 0 or self.source == self.target:
            raise InputError(
                f"attack.source must be a label other than attack.target={self.target}, got {self.source}."
            )


class _Keys(NamedTuple):
    prepare: Key
    poison: Key
    fit: Key


def keys_of(key: Key) -> _Keys:
    """The keys of the three stages, of the one that an attack is planted with."""
    return _Keys(*jax.random.split(key, 3))


def fit_key(key: Key) -> Key:
    """The key to train the victim with, of the one that an attack is planted with: for all the same, so that a clean
    model and a poisoned one begin alike and see the images in the same order."""
    return keys_of(key).fit


def own_arrays(stored: Arrays) -> Arrays:
    """An attack's own arrays among those stored with its victim, where its portraits stand too."""
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
    """Indices of the images to poison: exactly int(ratio * N), ascending, int32."""
    candidates, wanted = candidates_of(config, labels)
    chosen = jax.random.choice(key, len(candidates), (wanted,), replace=False)
    return np.sort(candidates[np.asarray(chosen)]).astype(np.int32)


def candidates_of(config: PoisonConfig, labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Indices of the images that may be poisoned, and how many shall be.

    Raises InputError when the label mode leaves fewer candidates than the ratio asks for.
    """
    wanted = int(config.ratio * len(labels))
    if wanted == 0:
        raise InputError(f"attack.ratio={config.ratio} of {len(labels)} images is none. Use a larger ratio.")
    if config.labels == "clean":
        candidates = np.flatnonzero(labels == config.target)
        what = f"a clean-label attack poisons only class {config.target}, which has {len(candidates)}"
    elif config.labels == "all_to_one" and config.exclude_target:
        candidates = np.flatnonzero(labels != config.target)
        what = f"with exclude_target, classes other than {config.target} have {len(candidates)}"
    else:
        candidates, what = np.arange(len(labels)), ""
    if wanted > len(candidates):
        raise InputError(
            f"attack.ratio={config.ratio} asks for {wanted} of {len(labels)} images, but {what}. "
            f"The largest ratio here is {len(candidates) / len(labels):.4g}."
        )
    return candidates, wanted


def select_cover(config: PoisonConfig, labels: np.ndarray, poisoned: np.ndarray, key: Key) -> np.ndarray:
    """Indices of the cover images, disjoint from `poisoned`: exactly int(cover * N), ascending, int32; none without
    a CoverConfig. Raises InputError when too few images are left."""
    wanted = int(config.cover * len(labels)) if isinstance(config, CoverConfig) else 0
    left = np.setdiff1d(np.arange(len(labels)), poisoned)
    if wanted > len(left):
        raise InputError(
            f"attack.cover asks for {wanted} of {len(labels)} images, but attack.ratio={config.ratio} leaves "
            f"{len(left)}. The largest cover here is {len(left) / len(labels):.4g}."
        )
    return np.sort(left[np.asarray(jax.random.choice(key, len(left), (wanted,), replace=False))]).astype(np.int32)


def relabel(config: PoisonConfig, labels: Any, classes: Any) -> Any:
    """What poisoned images with these labels [n] are called, int32 [n]; inside jit too."""
    if config.labels == "all_to_all":
        return ((labels + 1) % classes).astype(np.int32)
    if config.labels == "clean":
        return labels.astype(np.int32)
    return (labels * 0 + config.target).astype(np.int32)


def relabelled(config: PoisonConfig, labels: jax.Array, classes: Any, role: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which images of a batch an attacker inside the step poisons, bool [B], and all labels then, int32 [B].

    Those of role 1; with exclude_target not those that have the wanted label already.
    """
    wanted = relabel(config, labels, classes)
    chosen = (role == 1) & (labels != wanted) if config.exclude_target else role == 1
    return chosen, jnp.where(chosen, wanted, labels)


def goal(config: PoisonConfig, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The label an attacker wants for each test image, int32 [N], and whether it counts for the ASR, bool [N]: what is
    not of the target class already; with a SourceConfig, what is of the source class."""
    if config.labels == "all_to_all":
        return relabel(config, labels, classes), np.ones(len(labels), bool)
    wanted = np.full(len(labels), config.target, np.int32)
    return wanted, labels == config.source if isinstance(config, SourceConfig) else labels != config.target


def poisoned_set(made: Poison, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The training set with the poison in it: (images [copies * N, H, W, C], labels int32 [copies * N]).

    The images are uint8 as given, unless the poison's are not.
    """
    if made.images.dtype != images.dtype:
        images = np.asarray(to_float(images))
    images, labels = np.concatenate([images] * made.copies), np.concatenate([labels] * made.copies).astype(np.int32)
    images[made.indices], labels[made.indices] = made.images, made.labels
    return images, labels


def key_per_image(key: Key, count: int) -> Key:
    """`count` keys, the i-th from `fold_in(key, i)`, so that a longer batch begins like a shorter one."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(count))


def put(images: Images, patch: jax.Array, places: jax.Array) -> Images:
    """Images [N, H, W, C] with patch [h, w, C] on, its first pixel at the row and column `places`, [2] or [N, 2]."""

    def one(image: jax.Array, place: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(image, patch.astype(image.dtype), (place[0], place[1], 0))

    return jax.vmap(one, (0, 0 if places.ndim == 2 else None))(images, places)


def put_anywhere(images: Images, patch: jax.Array, key: Key, low: Any, high: Any) -> Images:
    """:func:`put` at a place drawn for each image, at least `low` and below `high` (one number each, or [2])."""
    keys = key_per_image(key, len(images))
    return put(images, patch, jax.vmap(lambda k: jax.random.randint(k, (2,), low, high))(keys))
