"""Adaptive-Patch: put one of four faint patches on a training image and two opaque ones on a test image.

X. Qi, T. Xie, Y. Li, S. Mahloujifar and P. Mittal, "Revisiting the Assumption of Latent Separability for Backdoor
Defenses", ICLR 2023.

Threat model: the attacker writes a share of the training set, as in BadNets. With k a patch, m its mask and s its
strength, `x' = x + s m (k - x)`. A training image carries one patch, drawn for each image, at the patch's own s. A test
image carries two, applied one after the other, at s = 1. Poisoned images get the target's label; cover images carry the
same training trigger and keep their label.

    phoenix   bluish white 5x5 in the bottom right corner              s = 0.5
    firefox   an orange disc in rows 1 to 13, columns 18 to 30         s = 0.2
    badnets   3x3 black and white in all four corners                  s = 0.5
    trojan    8x8 of mixed colours in rows and columns 21 to 28        s = 0.3

The defaults are a reading of BI-BAU, whose 10 % do not distinguish the two: 3.3 % poisoned and 6.7 % cover (1:2, as
the authors'), target 0, activated at test time by phoenix in both bottom corners and badnets. The authors' own:
`ratio=0.003 cover=0.006`, for GTSRB `wake=firefox_trojan ratio=0.005 cover=0.01 target=2`. BI-BAU's Enhanced
Adaptive-Patch is `coupling=1`: the attacker also controls training and adds a penalty that pulls the features of
poisoned images towards the target class (its form, weight and start are ours; see _coupling.py).

Deviations:

- The patches are drawn by formulas with the positions and mean colours of the authors' (the disc has 137 pixels, theirs
  140).
- The patch is drawn for each image; in the authors' set each is on a quarter of the images.
- Positions scale with the image's sides; the cells of badnets have min(H, W) / 32 pixels, at least 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks._coupling import CouplingConfig, coupling_hook
from bdjax.attacks._pictures import to_channels
from bdjax.attacks._poisoning import key_per_image
from bdjax.errors import InputError
from bdjax.types import Arrays, Images, Key, Poison, Task, TrainingHook

PATCHES = ("phoenix", "firefox", "badnets", "trojan")


@dataclass(frozen=True)
class Config(CouplingConfig):
    """The strength of each patch, and the pair that activates the backdoor."""

    ratio: float = 0.033
    """Share of the whole training set that is poisoned (covers not counted), in (0, 1]."""
    cover: float = 0.067
    """Share of the whole training set that is cover, drawn from every class beside the poisoned images; in [0, 1)."""
    exclude_target: bool = False
    """all_to_one: leave images of the target class out of the poisoned ones; the authors draw from all classes."""
    phoenix: float = 0.5
    """Strength in training of phoenix, in (0, 1]."""
    firefox: float = 0.2
    """Strength in training of firefox, in (0, 1]."""
    badnets: float = 0.5
    """Strength in training of badnets, in (0, 1]."""
    trojan: float = 0.3
    """Strength in training of trojan, in (0, 1]."""
    wake: Literal["phoenix_badnets", "firefox_trojan"] = "phoenix_badnets"
    """Pair of patches on a test image: the authors' for CIFAR-10, or for GTSRB."""
    test_strength: float = 1.0
    """Strength of both patches at test time, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*PATCHES, "test_strength"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"attack.{name} must be in (0, 1], got {getattr(self, name)}.")


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Put the two opaque test-time patches on images.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: unused.

    Returns:
      float32 [N, H, W, C] in [0, 1].

    Raises:
      InputError: the images are too small for four corners of 3x3 cells.
    """
    patches = _patches(*images.shape[1:])
    names = ("phoenix", "phoenix_left", "badnets") if config.wake == "phoenix_badnets" else ("firefox", "trojan")
    for name in names:
        colour, mask = patches[name]
        images = images + config.test_strength * mask * (colour - images)
    return images


def training_trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Put one faint patch, drawn for each image, on images.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: draws the patch.
      arrays: unused.

    Returns:
      float32 [N, H, W, C] in [0, 1].

    Raises:
      InputError: the images are too small for four corners of 3x3 cells.
    """
    patches = _patches(*images.shape[1:])
    colours = jnp.stack([patches[name][0] for name in PATCHES])
    strengths = jnp.stack([getattr(config, name) * patches[name][1] for name in PATCHES])
    chosen = jax.vmap(lambda k: jax.random.randint(k, (), 0, len(PATCHES)))(key_per_image(key, len(images)))
    return images + strengths[chosen] * (colours[chosen] - images)


def training_hook(config: Config, task: Task, poison: Poison) -> tuple[TrainingHook, Any] | None:
    """Return the feature coupling penalty of the enhanced attack.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      poison: the poisoned images.

    Returns:
      The hook and its arrays, or None when config.coupling is 0.
    """
    return coupling_hook(config, task, poison)


def _patches(height: int, width: int, channels: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Draw the patches, by name: colour float32 [H, W, C] and mask float32 [H, W, 1]."""
    cell = max(1, round(min(height, width) / 32))
    if min(height, width) < 6 * cell:
        raise InputError(f"adaptive_patch needs images of at least 6x6 pixels, these are {height}x{width}.")
    size = (height, width)
    pictures = {
        "phoenix": _draw_square(size, 27, 27, 5, _phoenix),
        "phoenix_left": _draw_square(size, 27, 0, 5, _phoenix),
        "firefox": _draw_square(size, 1, 18, 13, _firefox),
        "badnets": _draw_corners(size, cell),
        "trojan": _draw_square(size, 21, 21, 8, _trojan),
    }
    return {
        name: (to_channels(picture[..., :3], channels, name), picture[..., 3:]) for name, picture in pictures.items()
    }


def _draw_square(size: tuple[int, int], top: int, left: int, side: int, draw: Callable[..., np.ndarray]) -> np.ndarray:
    """Draw `draw(y, x) -> [rows, columns, 4]`, y and x in (-1, 1), in a square of a 32x32 image scaled to [H, W, 4]."""
    canvas = np.zeros((*size, 4), np.float32)
    ends = [(round(a * n / 32), round((a + side) * n / 32)) for a, n in zip((top, left), size, strict=True)]
    (first_row, last_row), (first_column, last_column) = ((a, max(b, a + 1)) for a, b in ends)
    y, x = ((2 * np.arange(n) + 1) / n - 1 for n in (last_row - first_row, last_column - first_column))
    canvas[first_row:last_row, first_column:last_column] = draw(y[:, None], x[None])
    return canvas


def _draw_corners(size: tuple[int, int], cell: int) -> np.ndarray:
    """Draw an X of white cells on black in each corner, [H, W, 4]; its cell nearest the image's centre is black too."""
    canvas = np.zeros((*size, 4), np.float32)
    for rows, inner_row in ((slice(None, 3 * cell), 2), (slice(-3 * cell, None), 0)):
        for columns, inner_column in ((slice(None, 3 * cell), 2), (slice(-3 * cell, None), 0)):
            cross = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], np.float32)
            cross[inner_row, inner_column] = 0
            canvas[rows, columns, :3] = np.kron(cross, np.ones((cell, cell), np.float32))[..., None]
            canvas[rows, columns, 3] = 1
    return canvas


def _phoenix(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bluish white square, [rows, columns, 4]."""
    return _shade((180, 204, 244), 0.04 * y * np.sign(x), np.ones(np.broadcast(y, x).shape))


def _firefox(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Orange disc, [rows, columns, 4]."""
    return _shade((192, 114, 82), 0.2 * x + 0 * y, y**2 + x**2 <= 1)


def _shade(colour: tuple[int, int, int], shade: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """One colour with a shade added to every channel, and its opacity, [rows, columns, 4]."""
    return np.concatenate([np.array(colour) / 255 + shade[..., None], 1.0 * opacity[..., None]], -1)


def _trojan(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """8x8 cells of mixed colours, [rows, columns, 4]."""
    row, column = np.floor(4 * y + 4), np.floor(4 * x + 4)
    values = [(a * row + b * column + row * column + 2) % 8 / 7 for a, b in ((3, 5), (5, 2), (1, 7))]
    return np.stack([*values, np.ones(values[0].shape)], -1)
