"""WaNet: warp images smoothly and imperceptibly; a noise mode makes the network respond to this warp only.

A. Nguyen and A. Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021, arXiv:2102.10369.

Threat model: the attacker controls the training. One random field of k x k vectors, of mean absolute value one, is
enlarged by bicubic interpolation to n [H, W, 2] and warps every image alike: the point g (both coordinates from -1 to
1) of the new image is sampled from the old one at

    clip(g + s n / H, -1, 1)                             s = 0.5: about a quarter of a pixel

In every batch a share is warped and gets the target's label; another share is warped by the field *plus* fresh noise of
up to half a pixel per coordinate, U(-1, 1) / H, and keeps its label: without it the network would respond to any warp.

Deviations:

- Shares are exact over an epoch and spread evenly over its batches; the release takes the first int(0.1 B) and the next
  int(0.2 B) images of each.
- x is divided by W where images are not square.
- The warp is applied to images in [0, 1]; points outside the image are never sampled, so this equals the release's
  order.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks._poisoning import PoisonConfig, fit_key, keys_of, relabel_batch
from bdjax.errors import InputError
from bdjax.types import Arrays, Backdoor, Batch, Images, Key, Labels, SampleInfo, Task, TrainingHook


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The warp, and the shares of every batch that it changes."""

    ratio: float = 0.1
    """Share of every batch that is warped and relabelled, in (0, 1]."""
    exclude_target: bool = False
    """Leave images of the target class unchanged; the release does not."""
    noise_ratio: float = 0.2
    """Share of every batch in noise mode, which keeps its label; in [0, 1)."""
    strength: float = 0.5
    """s, size of the warp: s/2 pixels on average where both sides are equal; positive."""
    grid: int = 4
    """k, number of vectors of the field along each side; at least 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels == "clean":
            raise InputError("attack.labels=clean, but wanet relabels what it warps. Use all_to_one or all_to_all.")
        if not 0 <= self.noise_ratio <= 1 - self.ratio:
            raise InputError(
                f"attack.noise_ratio must be from 0 to 1 - ratio = {1 - self.ratio:g}, got {self.noise_ratio}."
            )
        if self.strength <= 0:
            raise InputError(f"attack.strength must be positive, got {self.strength}.")
        if self.grid < 2:
            raise InputError(f"attack.grid must be at least 2, got {self.grid}.")


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """Draw the warping field.

    Args:
      config: hyper-parameters of the attack.
      task: gives the size of the images.
      key: draws the field.

    Returns:
      {"field": float32 [H, W, 2] (x, y), with a mean absolute value of about one}.
    """
    height, width, _ = task.model.shape
    vectors = jax.random.uniform(key, (config.grid, config.grid, 2), minval=-1, maxval=1)
    vectors = vectors / jnp.abs(vectors).mean()
    rows, columns = _bicubic(config.grid, height), _bicubic(config.grid, width)
    return {"field": np.einsum("hi,wj,ijc->hwc", rows, columns, np.asarray(vectors, float)).astype(np.float32)}


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Warp images by the field.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: the field.

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    return _sample(images, _points(config, arrays["field"]))


def train(config: Config, task: Task, key: Key) -> Backdoor:
    """Train with the warp and the noise mode in every batch.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      key: random key.

    Returns:
      The backdoored model with the field.
    """
    arrays = prepare(config, task, keys_of(key).prepare)
    hook = TrainingHook((config, task.classes), (config.ratio, config.noise_ratio), _transform)
    attacker = {"fixed": arrays}
    variables, _ = task.fit_with_hook(task.images, task.labels, fit_key(key), hook, attacker)
    return Backdoor("wanet", config, variables, arrays)


def _transform(static: tuple[Config, int], attacker: Arrays, images: Images, labels: Labels, info: SampleInfo) -> Batch:
    """`TrainingHook.transform`: warp and relabel role 1, warp role 2 with noise."""
    (config, classes), (height, width) = static, images.shape[1:3]
    points, size = _points(config, attacker["fixed"]["field"]), jnp.array([width, height], jnp.float32)

    def warp_with_noise(image: jax.Array, key: Key) -> jax.Array:
        noise = jax.random.uniform(key, (height, width, 2), minval=-1, maxval=1) / size
        return _sample(image[None], jnp.clip(points + noise, -1, 1))[0]

    poisoned, labels = relabel_batch(config, labels, classes, info.role)
    warped = jnp.where(_per_image(poisoned), _sample(images, points), images)
    if config.noise_ratio > 0:
        warped = jnp.where(_per_image(info.role == 2), jax.vmap(warp_with_noise)(images, info.key), warped)
    return Batch(warped, labels)


def _per_image(chosen: jax.Array) -> jax.Array:
    """Reshape [N] to [N, 1, 1, 1], to broadcast over images."""
    return chosen[:, None, None, None]


def _points(config: Config, field: jax.Array) -> jax.Array:
    """Return the point that each pixel is sampled from, float32 [H, W, 2] (x, y) in [-1, 1]."""
    height, width, _ = field.shape
    x, y = (jnp.linspace(-1, 1, n, dtype=jnp.float32) for n in (width, height))
    identity = jnp.stack(jnp.broadcast_arrays(x[None], y[:, None]), -1)
    return jnp.clip(identity + config.strength * field / jnp.array([width, height], jnp.float32), -1, 1)


def _sample(images: Images, points: jax.Array) -> Images:
    """Sample images [N, H, W, C] bilinearly at points [H, W, 2]; -1 and 1 are the centres of the outer pixels."""
    height, width = images.shape[1:3]
    x, y = ((points[..., i] + 1) / 2 * (n - 1) for i, n in ((0, width), (1, height)))
    left, top = (jnp.clip(jnp.floor(v).astype(jnp.int32), 0, n - 2) for v, n in ((x, width), (y, height)))
    right, down = ((v - floor.astype(jnp.float32))[..., None] for v, floor in ((x, left), (y, top)))
    upper = images[:, top, left] * (1 - right) + images[:, top, left + 1] * right
    lower = images[:, top + 1, left] * (1 - right) + images[:, top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


def _bicubic(small: int, large: int) -> np.ndarray:
    """Return the matrix [large, small] of bicubic enlargement with aligned corners and repeated edges.

    It has PyTorch's kernel (a = -0.75); JAX resizes with another kernel and half-pixel centres.
    """
    points = np.linspace(0, small - 1, large)
    matrix = np.zeros((large, small))
    for tap in range(-1, 3):
        index = np.floor(points).astype(int) + tap
        d, a = np.abs(points - index), -0.75
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(matrix, (np.arange(large), np.clip(index, 0, small - 1)), np.where(d <= 1, near, far * (d < 2)))
    return matrix
