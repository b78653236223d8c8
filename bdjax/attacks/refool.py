"""Refool: the image as a camera sees it through a window that reflects another picture (Liu et al., 2020,
arXiv:2007.02343).

Threat model: as BadNets, the attacker writes a share of the training set; `labels=clean` poisons images of the target
class only. A picture r is drawn for each image t from a fixed set. Both are taken to linear light (power 2.2), mixed
with weight w for t, and taken back (power 1/2.2). One of three kinds of reflection is drawn for each image:

    ghost     (1 - w) g + w t,  g = c r + (1 - c) r shifted by (a, b), as behind a thick pane; where both are seen,
              enlarged to the whole image; c in [0.15, 0.5] or [0.5, 0.85]
    blurred   (1 - w/2) V b + w t,  b = r under a Gaussian, darkened by 1.08 to 1.18 times what b + t exceeds 1 by
              on average, channel by channel; V falls off to the edges
    sharp     (1 - w) r + w t

The defaults are those of BI-BAU (BackdoorBench): wrong labels, 10 % of the images of any class, target 0, w = 0.4,
ghost 49 %, else blurred. The original, with clean labels, is `labels=clean weight="0.55 0.95"`.

Deviations: the pictures were photographs of Pascal VOC; ours are `count` of the task's own training images, none of
the target class, or drawn ones, or a file. The original tries its pictures on a model and keeps those that fool it,
and drops mixtures by their similarity to t; BackdoorBench and we do neither. The ghost is enlarged linearly, not by
cubic splines; the Gaussian is renormalised at the edges. Pixel ranges hold at 32x32 and scale with min(H, W).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks._helpers import PoisonConfig, key_per_image
from bdjax.attacks._pictures import centres, checked, to_channels
from bdjax.errors import InputError
from bdjax.types import ArrayFile, Arrays, Images, Key, Task, to_float, to_uint8


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The reflected pictures and how they are mixed in."""

    exclude_target: bool = False
    """all_to_one: leave images of the target class out of the poisoned ones; BackdoorBench draws from all classes."""
    source: Literal["training", "drawn"] = "training"
    """What is reflected: training images of classes other than the target, or clouds of colour drawn by the key."""
    reflections: ArrayFile = ArrayFile("")
    """.npy [n, h, w, 1 or 3] (uint8, or float in [0, 1]) in place of `source`; resized."""
    count: int = 200
    """How many pictures `source` gives, at least 1; fewer if there are not as many."""
    weight: tuple[float, float] = (0.4, 0.4)
    """w, the image's share of the light, drawn from this range, in (0, 1)."""
    ghost: float = 0.49
    """Probability of a ghost, in [0, 1]."""
    sharp: float = 0.0
    """Probability of a sharp reflection, in [0, 1]; the rest is blurred."""
    offset: tuple[int, int] = (3, 8)
    """Smallest and largest shift of a ghost down and to the right, in pixels of a 32x32 image, 1 to 15."""
    sigma: tuple[float, float] = (1.0, 5.0)
    """Smallest and largest standard deviation of the blur, in pixels of a 32x32 image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise InputError(f"attack.count must be at least 1 picture, got {self.count}.")
        if not 0 < self.weight[0] <= self.weight[1] < 1:
            raise InputError(f"attack.weight must be an ascending range in (0, 1), got {self.weight}. Use 0.4 0.4.")
        if self.ghost < 0 or self.sharp < 0 or self.ghost + self.sharp > 1:
            raise InputError(
                f"attack.ghost={self.ghost} and attack.sharp={self.sharp} must not be negative nor exceed 1 together."
            )
        if not 1 <= self.offset[0] <= self.offset[1] <= 15:
            raise InputError(f"attack.offset must be an ascending range in 1 to 15, got {self.offset}. Use 3 8.")
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise InputError(f"attack.sigma must be an ascending range above 0, got {self.sigma}. Use 1 5.")


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """The pictures: {"reflections": uint8 [n, H, W, C]}.

    Raises InputError when the file does not fit, or all training images are of the target class.
    """
    height, width, channels = task.model.shape
    if config.reflections:
        array = task.read_array(config.reflections)
        if array.ndim != 4 or array.shape[-1] not in (1, 3) or not len(array):
            raise InputError(
                f"attack.reflections={config.reflections} has shape {array.shape}; expected [n, h, w, 1 or 3]."
            )
        found = checked(array, "reflections", config.reflections)
    elif config.source == "drawn":
        found = np.asarray(jax.random.uniform(key, (config.count, 4, 4, 3)))
    else:
        pool = np.flatnonzero((task.labels != config.target) | (config.labels == "all_to_all"))
        if not len(pool):
            raise InputError(
                f"attack.source=training, but all training images are of class {config.target}. Use source=drawn."
            )
        chosen = jax.random.choice(key, len(pool), (min(config.count, len(pool)),), replace=False)
        return {"reflections": task.images[pool[np.sort(np.asarray(chosen))]]}
    pictures = to_channels(found, channels, "reflections")
    return {"reflections": to_uint8(jax.image.resize(pictures, (len(found), height, width, channels), "linear"))}


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Reflect a picture in each of images [N, H, W, C] in [0, 1]; same shape and range.

    Args: key, draws the picture, its kind and its parameters for each image.
    """
    bank = jnp.asarray(arrays["reflections"])

    def one(image: jax.Array, key: Key) -> jax.Array:
        which, kind, weight, *how = jax.random.uniform(key, (9,))
        r, t = to_float(bank[_whole(which, 0, len(bank) - 1)]) ** 2.2, image**2.2
        w = _between(weight, *config.weight)
        ghost = (1 - w) * _ghost(config, r, *how[:4]) + w * t
        sharp = (1 - w) * r + w * t
        blurred = (1 - w / 2) * _blurred(config, r, t, *how[4:]) + w * t
        mixed = jnp.where(kind < config.ghost, ghost, jnp.where(kind < config.ghost + config.sharp, sharp, blurred))
        return jnp.clip(mixed, 0, 1) ** (1 / 2.2)

    return jax.vmap(one)(images, key_per_image(key, len(images)))


def _between(u: jax.Array, low: float, high: float) -> jax.Array:
    return low + u * (high - low)


def _whole(u: jax.Array, low: int, high: int) -> jax.Array:
    """A whole number from low to high, both included, all as likely for u uniform in [0, 1)."""
    return jnp.floor(_between(u, low, high + 1)).astype(jnp.int32)


def _ghost(config: Config, r: jax.Array, *u: jax.Array) -> jax.Array:
    """c r + (1 - c) r shifted, where both are seen, enlarged to [H, W, C]. The four u are uniform in [0, 1)."""
    height, width, _ = r.shape
    low, high = (max(1, round(side * min(height, width) / 32)) for side in config.offset)
    near = _between(u[2], 0.15, 0.5)
    c = jnp.where(u[3] < 0.5, near, 1 - near)
    a, b = (_whole(v, low, high).astype(jnp.float32) for v in u[:2])
    rows, columns = _enlarging(height, a), _enlarging(width, b)
    own = _separable(_sampling(rows, height), _sampling(columns, width), r)
    return c * own + (1 - c) * _separable(_sampling(rows - a, height), _sampling(columns - b, width), r)


def _enlarging(size: int, cut: jax.Array) -> jax.Array:
    """Where the pixels of an image lie that shows `size - cut` pixels, from `cut` on, enlarged to `size`."""
    return jnp.clip(cut + centres(size) * (size - cut) - 0.5, cut, size - 1)


def _sampling(place: jax.Array, size: int) -> jax.Array:
    """The matrix [len(place), size] of linear interpolation at `place`."""
    return jnp.maximum(0, 1 - jnp.abs(place[:, None] - np.arange(size, dtype=np.float32)))


def _blurred(config: Config, r: jax.Array, t: jax.Array, *u: jax.Array) -> jax.Array:
    """V b: r blurred, darkened where it overexposes t, fading to the edges, [H, W, C]. Both u are uniform in [0, 1)."""
    height, width, _ = r.shape
    sigma = min(height, width) / 32 * _between(u[0], *config.sigma)
    b = _separable(_gaussian(height, sigma), _gaussian(width, sigma), r)
    over = b + t > 1
    excess = jnp.where(over, b + t - 1, 0).sum((0, 1)) / jnp.maximum(over.sum((0, 1)), 1).astype(jnp.float32)
    b = jnp.clip(b - excess * _between(u[1], 1.08, 1.18), 0, 1)
    down, across = (np.exp(-(np.linspace(-3, 3, side) ** 2) / 4) for side in (height, width))  # roots of Gaussians
    return jnp.asarray(np.outer(down, across), jnp.float32)[..., None] * b


def _gaussian(size: int, sigma: jax.Array) -> jax.Array:
    """The matrix [size, size] of a Gaussian blur cut off at 2 sigma."""
    far = np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(np.float32)
    kernel = jnp.where(far <= jnp.ceil(2 * sigma), jnp.exp(-((far / sigma) ** 2) / 2), 0)
    return kernel / kernel.sum(1, keepdims=True)


def _separable(rows: jax.Array, columns: jax.Array, picture: jax.Array) -> jax.Array:
    return jnp.einsum("ih,jw,hwc->ijc", rows, columns, picture, precision="highest")
