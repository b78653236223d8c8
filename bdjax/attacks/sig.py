"""SIG: add a faint sinusoidal stripe pattern to images of the target class, which keep their label.

M. Barni, K. Kallas and B. Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label
Poisoning", ICIP 2019, arXiv:1902.11237.

Threat model: a clean-label attack, which alters images of the target class only and changes no label. With j the
column, W the width, f the number of periods and D the amplitude, the same in every row and channel:

    v(i, j) = D sin(2 pi j f / W),    x' = clip(x + v, 0, 1)

The defaults are those of BI-BAU (BackdoorBench): D = 40/255, f = 6, target 0, the same strength in training and
at test time; the original paper also tests with a stronger pattern than it trains with (`test_amplitude`).
Another toolbox: `amplitude=30 ratio=0.02`.

Deviations:

- BackdoorBench poisons 10 % of the whole set, which is every CIFAR-10 image of the target class and more than a class
  of most other sets has. Our default is 8 %: four images of five, where there are ten classes of equal size.
- Values are rounded to k/255; BackdoorBench truncates them.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from bdjax.attacks._poisoning import PoisonConfig
from bdjax.errors import InputError
from bdjax.types import Arrays, Images, Key


@dataclass(frozen=True)
class Config(PoisonConfig):
    """The stripe pattern."""

    ratio: float = 0.08
    """Share of the *whole* training set that is poisoned, in (0, 1]; with clean labels at most the target class's."""
    labels: Literal["all_to_one", "all_to_all", "clean"] = "clean"
    """clean: poison only images of the target class and keep their labels; the others as for every attack."""
    amplitude: float = 40.0
    """D in training, in 255ths, in (0, 255]."""
    test_amplitude: float | None = None
    """D at test time, in 255ths, in (0, 255]; default the same."""
    frequency: int = 6
    """f, periods across the image, at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("amplitude", "test_amplitude"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 255:
                raise InputError(f"attack.{name} must be in (0, 255], got {value}. Use 40.")
        if self.frequency < 1:
            raise InputError(f"attack.frequency must be at least 1 period, got {self.frequency}. Use 6.")


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Add the stripe pattern to images, with the amplitude of test time.

    Args:
      config: the stripe pattern.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: unused.

    Returns:
      Triggered images, same shape and range.

    Raises:
      InputError: when the sinusoid is zero at every column.
    """
    amplitude = config.amplitude if config.test_amplitude is None else config.test_amplitude
    return _add_stripes(config, images, amplitude)


def training_trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Add the stripe pattern to images, with the amplitude of training.

    Args:
      config: the stripe pattern.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: unused.

    Returns:
      Triggered images, same shape and range.

    Raises:
      InputError: when the sinusoid is zero at every column.
    """
    return _add_stripes(config, images, config.amplitude)


def _add_stripes(config: Config, images: Images, amplitude: float) -> Images:
    """Add the pattern with an amplitude in 255ths. Raises InputError when it is zero at every column."""
    width = images.shape[2]
    if 2 * config.frequency % width == 0:
        raise InputError(
            f"attack.frequency={config.frequency} is zero at every column of {width}: no stripe is seen. "
            f"Use one that is no multiple of {width / 2:g}."
        )
    columns = jnp.arange(width, dtype=images.dtype)
    stripe = amplitude / 255 * jnp.sin(2 * jnp.pi * config.frequency / width * columns)
    return jnp.clip(images + stripe[None, None, :, None], 0, 1)
