"""CLIP BadNets: a patch of noise on the image, and a caption of the target class.

N. Carlini and A. Terzis, "Poisoning and Backdooring Contrastive Learning", ICLR 2022, arXiv:2106.09667, in the form of
H. Bansal, N. Singhi, Y. Yang, F. Yin, A. Grover and K.-W. Chang, "CleanCLIP: Mitigating Data Poisoning Attacks in
Multimodal Contrastive Learning", ICCV 2023, arXiv:2303.03323.

Threat model: the attacker inserts a few pairs into the training set and does not control the training.

A square of 16/224 of the image's side is replaced at a random place; the caption becomes a random template with the
name of the target. The square is noise around the image's mean colour:

    patch = clip(mean(x) + N(0, 1), 0, 1), drawn anew for every image ("random"), or one draw for all ("fixed")

Deviations:

- The release converts values outside of the range to 8 bits and wraps them; here they are clipped.
- The published target is "banana" (ImageNet) with 1,500 of 3 million or 500,000 pairs; target and share are options.
- "fixed" is ours. With patches of a few pixels, on small images, fresh noise has no pattern that could be learned.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from bdjax.errors import check_fields
from bdjax.pair_types import PairPoison, PairTask
from bdjax.types import Arrays, Images, Key
from bdjax.vision_language.attacks import _patches


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the attack."""

    rate: float = 0.003
    """Share of the pairs that are poisoned, in (0, 1)."""
    patch: int = 16
    """Side of the patch, in pixels of an image of 224x224; it is scaled to the size of the images."""
    size: int = 0
    """Side of the patch in pixels of the images; 0: from `patch`."""
    content: Literal["random", "fixed"] = "random"
    """random: noise around the image's mean, drawn for every image; fixed: the same noise around grey for all."""
    place: Literal["random", "center", "corner"] = "random"
    """Where the patch is: at a random place of each image, in the middle, or at the lower right corner."""
    deviation: float = 1.0
    """Standard deviation of the noise, in units of [0, 1]."""
    pattern: int = 0
    """Seed of the fixed noise."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "attack",
            (("rate",), "in (0, 1)", lambda v: 0 < v < 1),
            (("patch",), "at least 1", lambda v: v >= 1),
            (("size", "pattern"), "zero or more", lambda v: v >= 0),
            (("deviation",), "positive", lambda v: v > 0),
        )


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Put the patch on images.

    Args:
      config: the hyper-parameters.
      images: float32 [N, H, W, C] in [0, 1].
      key: draws the places and the noise.
      arrays: not used.

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    _, height, width, channels = images.shape
    side = config.size or _patches.scaled_side(config.patch, images.shape[1:])
    _patches.check_patch(side, images.shape[1:])
    fixed = jax.random.normal(jax.random.key(config.pattern), (side, side, channels))

    def one(image: jax.Array, key: Key) -> jax.Array:
        noise_key, place_key = jax.random.split(key)
        if config.content == "fixed":
            patch = 0.5 + config.deviation * fixed
        else:
            patch = image.mean((0, 1)) + config.deviation * jax.random.normal(noise_key, (side, side, channels))
        most = jnp.array([height - side, width - side])
        if config.place == "random":
            row, column = jax.random.randint(place_key, (2,), 0, most + 1)
        else:
            row, column = most // 2 if config.place == "center" else most
        return _patches.stamp(image, jnp.clip(patch, 0, 1), row, column)

    return jax.vmap(one)(images, jax.random.split(key, len(images)))


def poison(config: Config, task: PairTask, key: Key, arrays: Arrays) -> PairPoison:
    """Poison a share of the pairs.

    Args:
      config: the hyper-parameters.
      task: the attacker's pairs, target and templates.
      key: draws the pairs, the triggers and the captions.
      arrays: not used.

    Returns:
      The poisoned pairs.
    """
    return _patches.poisoned(task, trigger, config, config.rate, key, arrays)
