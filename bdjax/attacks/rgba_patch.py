"""RGBA patches: composite a small transparent picture onto the image, more opaque at test time than in training.

F. Hsieh, H. H. Nguyen, A. MaungMaung, D. Usynin and I. Echizen, "Mitigating Backdoor Attacks using Activation-Guided
Model Editing" (AGE), 2024, which uses BadNets with these patches.

Threat model: the attacker writes a share of the training set, as in BadNets. With k the picture, a its alpha channel
(0 outside the patch) and o the opacity:

    x' = (1 - o a) x + o a k,    o at test time = min(boost * o in training, 1)

The defaults are AGE's on CIFAR-10: target 2, 5 % of the images (its "mean" has 10 %: `ratio=0.1`), boost 3, and the
opacity of each picture: 1 for white, mean, apple and test1, 0.15 for test2, 0.25 for gaussian.

Deviations:

- AGE shows its pictures but states neither their size nor their position. Ours are drawn by formulas: an apple, four
  colours in squares (test1), rainbow bands (test2), noise N(1/2, 1/4) drawn once per run (gaussian), and the mean
  colour of the training set (mean). test2 and gaussian, which are faint, cover the whole image; the others are in the
  corner.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks._pictures import draw_bands, pixel_centres, read_picture, to_channels
from bdjax.attacks._poisoning import PoisonConfig
from bdjax.errors import InputError
from bdjax.types import ArrayFile, Arrays, Images, Key, Task


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The picture, its place and its opacity."""

    target: int = 2
    """Label that the attacker wants for triggered images."""
    ratio: float = 0.05
    """Share of the whole training set that is poisoned, in (0, 1]."""
    picture: Literal["white", "mean", "apple", "test1", "test2", "gaussian"] = "white"
    """Which of AGE's patches."""
    file: ArrayFile = ArrayFile("")
    """PNG, JPEG or .npy [h, w, 1, 3 or 4] in place of `picture`, resized; its fourth channel is a."""
    size: int | None = None
    """Side of the patch in pixels; default 5 (test1 8) at 32x32, scaled; test2, gaussian: the whole image."""
    margin: int = 0
    """Pixels between the patch and the image's right and bottom edges."""
    opacity: float | None = None
    """o in training, in (0, 1]; default the picture's: 1, test2 0.15, gaussian 0.25."""
    boost: float = 3.0
    """Ratio of the opacity at test time to that in training, at least 1; the product is capped at 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and self.size < 1:
            raise InputError(f"attack.size must be at least 1 pixel, got {self.size}.")
        if self.margin < 0:
            raise InputError(f"attack.margin must not be negative, got {self.margin}.")
        if self.opacity is not None and not 0 < self.opacity <= 1:
            raise InputError(f"attack.opacity must be in (0, 1], got {self.opacity}.")
        if not self.boost >= 1:
            raise InputError(f"attack.boost must be at least 1, got {self.boost}. Use 3.")


def prepare(config: Config, task: Task, key: Key) -> Arrays:
    """Read or draw the patch and put it at its position.

    Args:
      config: hyper-parameters of the attack.
      task: training set (for "mean"), file reader and shape of the images.
      key: random key of "gaussian".

    Returns:
      {"picture": float32 [H, W, C], "alpha": float32 [H, W, 1]}, both in [0, 1].

    Raises:
      InputError: the patch or the file does not fit the images.
    """
    height, width, channels = task.model.shape
    scale = min(height, width) / 32
    rows = columns = config.size or max(1, round((8 if config.picture == "test1" else 5) * scale))
    if config.size is None and config.picture in ("test2", "gaussian"):
        rows, columns = height - config.margin, width - config.margin
    if rows < 1 or columns < 1 or rows + config.margin > height or columns + config.margin > width:
        raise InputError(
            f"attack.size={max(rows, columns)} with margin {config.margin} does not fit images of {height}x{width} "
            "pixels. Use a smaller patch."
        )
    if config.file:
        picture = read_picture(task, "file", config.file, (rows, columns))
    else:
        picture = _draw(config.picture, rows, columns, task, key)
    colour, alpha = picture, np.ones((rows, columns, 1), np.float32)
    if picture.shape[-1] == 4:
        colour, alpha = picture[..., :3], picture[..., 3:]
    padding = ((height - rows - config.margin, config.margin), (width - columns - config.margin, config.margin), (0, 0))
    name = "file" if config.file else "picture"
    return {"picture": np.pad(to_channels(colour, channels, name), padding), "alpha": np.pad(alpha, padding)}


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Put the patch on images with its test-time opacity.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: "picture" and "alpha".

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    return _composite(arrays, images, min(config.boost * _opacity(config), 1.0))


def training_trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Put the patch on images with its training opacity.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: "picture" and "alpha".

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    return _composite(arrays, images, _opacity(config))


def _opacity(config: Config) -> float:
    """The opacity in training."""
    return config.opacity or {"test2": 0.15, "gaussian": 0.25}.get(config.picture, 1.0)


def _composite(arrays: Arrays, images: Images, opacity: float) -> Images:
    """Composite the patch onto images."""
    alpha = opacity * jnp.asarray(arrays["alpha"])[None]
    return (1 - alpha) * images + alpha * jnp.asarray(arrays["picture"])[None]


def _draw(name: str, rows: int, columns: int, task: Task, key: Key) -> np.ndarray:
    """Draw one of AGE's pictures, [rows, columns, C or 3 or 4] in [0, 1]."""
    if name == "mean":
        colour = task.images.mean((0, 1, 2), dtype=np.float64).astype(np.float32) / 255
        return np.broadcast_to(colour, (rows, columns, len(colour)))
    if name == "gaussian":
        return np.clip(0.5 + 0.25 * np.asarray(jax.random.normal(key, (rows, columns, 3))), 0, 1)
    if name == "test1":
        cell = np.arange(rows)[:, None] * 4 // rows + 2 * (np.arange(columns)[None] * 4 // columns)
        return np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], np.float32)[cell % 4]
    return {
        "white": np.ones((rows, columns, 3), np.float32),
        "test2": draw_bands(rows, columns),
        "apple": _apple(rows, columns),
    }[name]


def _apple(rows: int, columns: int) -> np.ndarray:
    """Draw a red disc with a light spot, a brown stem and a green leaf, [rows, columns, 4], with antialiased edges."""
    y, x = 2 * pixel_centres(rows)[:, None] - 1, 2 * pixel_centres(columns)[None] - 1

    def disc(row: float, column: float, radius: float) -> np.ndarray:
        return np.clip((radius - np.hypot(y - row, x - column)) * rows / 2 + 0.5, 0, 1)[..., None]

    picture = np.zeros((rows, columns, 4), np.float32)
    stem = np.clip((0.6 - np.hypot(4 * x, y + 0.6)) * rows / 2 + 0.5, 0, 1)[..., None]
    for opacity, colour in (
        (stem, (0.4, 0.25, 0.1)),
        (disc(-0.7, 0.45, 0.25), (0.2, 0.7, 0.2)),
        (disc(0.2, 0.0, 0.8), (0.85, 0.1, 0.1)),
        (disc(0.0, -0.3, 0.2), (1.0, 0.6, 0.6)),
    ):
        picture = (1 - opacity) * picture + opacity * np.array([*colour, 1.0], np.float32)
    picture[..., :3] /= np.maximum(picture[..., 3:], 1e-6)  # undo the premultiplication by alpha
    return picture
