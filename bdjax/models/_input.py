"""Preprocessing that a network expects, applied inside the model, so that its images are float32 in [0, 1]."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bdjax.errors import InputError
from bdjax.types import Images

MEANS, STDS = (-10.0, 1.0), (1e-5, 10.0)
"""Smallest and largest plausible values for images in [0, 1]. A network for images of 0 to 65535 has a std of 1.5e-5; a
std of 10 or more is for images of 0 to 255."""
LAYOUTS = ("chw", "hwc", "cwh", "whc")


@dataclass(frozen=True)
class Input:
    """Preprocessing of images: resize, swap height and width, swap channels, then (x - mean) / std, in this order."""

    mean: tuple[float, ...] = ()
    """Mean per channel of the network's input, for images in [0, 1]; one number: for all channels; (): 0."""
    std: tuple[float, ...] = ()
    """Standard deviation per channel, as `mean`; (): 1. A network for images of 0 to 255 has 1 / 255."""
    channels: str = "rgb"
    """Order of the channels, "rgb", or "bgr" for networks trained with OpenCV's images."""
    layout: str = "chw"
    """Axes of the network's original images: chw (PyTorch) or hwc; cwh or whc when height and width are swapped."""
    resize: int = 0
    """Side in pixels to which images are resized linearly; 0: no resizing."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not all(math.isfinite(value) for value in values):
                raise InputError(f"--input-{name} must be finite, got {','.join(map(str, values))}.")
        if any(value <= 0 for value in self.std):
            raise InputError(f"--input-std must be positive, got {','.join(map(str, self.std))}.")
        for name, (least, _) in (("mean", MEANS), ("std", STDS)):
            if any(value < least for value in getattr(self, name)):
                raise InputError(
                    f"--input-{name} must be at least {least:g}, got {','.join(map(str, getattr(self, name)))}: it is "
                    "for images in [0, 1]. Give the numbers that the owner of the network used."
                )
        if self.channels not in ("rgb", "bgr"):
            raise InputError(f"--channels must be rgb or bgr, got {self.channels!r}.")
        if self.layout not in LAYOUTS:
            raise InputError(f"--layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}.")
        if self.resize < 0:
            raise InputError(f"--resize must be a number of pixels, got {self.resize}.")

    def check(self, channels: int) -> None:
        """Raise InputError when the values do not fit the number of channels, or images in [0, 1]."""
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (0, 1, channels):
                raise InputError(f"--input-{name} has {len(values)} numbers; the network takes {channels} channels.")
        if any(value > MEANS[1] for value in self.mean) or any(value >= STDS[1] for value in self.std):
            scaled = {"mean": self.mean, "std": self.std or (1.0,) * len(self.mean)}
            flags = " ".join(
                f"--input-{name} {','.join(f'{value / 255:.6g}' for value in values)}"
                for name, values in scaled.items()
            )
            raise InputError(
                f"--input-mean {','.join(map(str, self.mean)) or '(none)'} with --input-std "
                f"{','.join(map(str, self.std)) or '(none)'} is not for images in [0, 1]. If it is for images of 0 to "
                f"255, divide by 255: {flags}."
            )
        if self.channels == "bgr" and channels != 3:
            raise InputError(f"--channels bgr is for 3 channels; the network takes {channels}.")

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the shape (H, W, C) of preprocessed images of `shape`."""
        height, width = (self.resize, self.resize) if self.resize else shape[:2]
        return (height, width, shape[2]) if self.layout in ("chw", "hwc") else (width, height, shape[2])

    def __call__(self, images: Images) -> Images:
        """Preprocess images [N, H, W, C] in [0, 1]."""
        if self.resize and images.shape[1:3] != (self.resize, self.resize):
            images = jax.image.resize(images, (len(images), self.resize, self.resize, images.shape[3]), "linear")
        if self.layout in ("cwh", "whc"):
            images = images.swapaxes(1, 2)
        if self.channels == "bgr":
            images = images[..., ::-1]
        if self.mean:
            images = images - jnp.asarray(self.mean, images.dtype)
        return images / jnp.asarray(self.std, images.dtype) if self.std else images
