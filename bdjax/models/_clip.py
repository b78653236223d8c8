"""CLIP as a dual encoder, of any size.

A. Radford, J. W. Kim, C. Hallacy, A. Ramesh, G. Goh, S. Agarwal, G. Sastry, A. Askell, P. Mishkin, J. Clark, G. Krueger
and I. Sutskever, "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv:2103.00020.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bdjax.errors import InputError, check_fields
from bdjax.models._clip_resnet import ClipResnet
from bdjax.models._clip_towers import ClipText, ClipVit
from bdjax.models._input import Input
from bdjax.pair_types import DualEncoder
from bdjax.types import Images, Key, Variables

NORMALISATION = Input((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of the images that OpenAI's weights are for."""
_INITIAL_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of a dual encoder."""

    shape: tuple[int, int, int] = (224, 224, 3)
    """(H, W, C) of an image."""
    vision: Literal["vit", "resnet"] = "vit"
    """Image encoder: vision transformer or modified ResNet."""
    vision_width: int = 768
    """Dimension of a patch's token, or channels of the first stage."""
    vision_depths: tuple[int, ...] = (12,)
    """Number of blocks of the transformer, or of the four stages of the ResNet."""
    vision_heads: int = 12
    """Attention heads of the transformer's blocks, or of the attention pooling."""
    patch: int = 32
    """Side of a patch in pixels; not used by the ResNet."""
    text_width: int = 512
    """Dimension of a word's token."""
    text_depth: int = 12
    """Blocks of the text transformer."""
    text_heads: int = 8
    """Attention heads of the text transformer."""
    context: int = 77
    """Tokens of a caption, with the start and the end token."""
    vocabulary: int = 49408
    """Number of tokens."""
    dimension: int = 512
    """Dimension of the embeddings."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of the transformers: quick_gelu (OpenAI) or gelu (most of OpenCLIP). No weight file records it."""
    input: Input | None = field(default=NORMALISATION)
    """Preprocessing of images in [0, 1] inside the model; None: none."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "model",
            (("vision_width", "vision_heads", "patch", "text_width", "text_depth", "text_heads", "dimension"),
             "at least 1", lambda v: v >= 1),
            (("context", "vocabulary"), "at least 3", lambda v: v >= 3),
            (("vision_depths",), "numbers of blocks, each at least 1", lambda v: len(v) > 0 and min(v) >= 1),
        )  # fmt: skip
        _check_sizes(self)

    @property
    def vision_features(self) -> int:
        """Dimension of the features before the projection."""
        return self.vision_width if self.vision == "vit" else 32 * self.vision_width


def _check_sizes(config: ClipConfig) -> None:
    """Raise InputError for sizes that contradict each other."""
    pairs = [("text_width", config.text_width, "text_heads", config.text_heads)]
    width = "vision_width" if config.vision == "vit" else "32 vision_width"
    pairs.append((width, config.vision_features, "vision_heads", config.vision_heads))
    for name, size, divisor, heads in pairs:
        if size % heads:
            raise InputError(f"model.{name} must be a multiple of {divisor}={heads}, got {size}.")
    count = 1 if config.vision == "vit" else 4
    if len(config.vision_depths) != count:
        raise InputError(
            f"model.vision_depths must have {count} numbers for {config.vision}, got {config.vision_depths}."
        )
    height, side = min(config.shape[:2]), config.patch if config.vision == "vit" else 32
    if height < side:
        raise InputError(f"the image encoder needs images of at least {side}x{side} pixels, got {config.shape[:2]}.")
    if config.input is not None:
        config.input.check(config.shape[2])


PRESETS: Mapping[str, ClipConfig] = {
    "vit_b_32": ClipConfig(),
    "vit_b_16": ClipConfig(patch=16),
    "vit_l_14": ClipConfig(vision_width=1024, vision_depths=(24,), vision_heads=16, patch=14, text_width=768,
                           text_heads=12, dimension=768),
    "rn50": ClipConfig(vision="resnet", vision_width=64, vision_depths=(3, 4, 6, 3), vision_heads=32, dimension=1024),
    "small": ClipConfig((32, 32, 3), "vit", 128, (6,), 4, 4, 128, 2, 4, 48, 514, 128),
    "tiny": ClipConfig((32, 32, 3), "vit", 64, (3,), 2, 8, 64, 2, 2, 48, 514, 64),
}  # fmt: skip
"""Sizes by name. "small" and "tiny" are for images of 32x32 pixels and captions by bytes."""


@lru_cache
def dual_encoder(config: ClipConfig, dtype: Any = jnp.float32, name: str = "clip") -> DualEncoder:
    """Create a dual encoder.

    Args:
      config: its sizes.
      dtype: dtype of the activations (float32 or bfloat16); parameters and embeddings are float32.
      name: its name in messages.

    Returns:
      The dual encoder; equal arguments give the same object.
    """
    visual: Any
    common = {"heads": config.vision_heads, "dimension": config.dimension, "dtype": dtype}
    if config.vision == "vit":
        visual = ClipVit(config.vision_width, config.vision_depths[0], patch=config.patch,
                         activation=config.activation, **common)  # fmt: skip
    else:
        visual = ClipResnet(config.vision_width, config.vision_depths, **common)
    text = ClipText(
        config.vocabulary, config.context, config.text_width, config.text_depth, config.text_heads, config.dimension,
        config.activation, dtype,
    )  # fmt: skip
    return DualEncoder(
        name, config.shape, config.context, config.vocabulary, config.dimension,
        partial(_init, visual, text, config), partial(_visual, visual, config.input), partial(_text, text), config,
    )  # fmt: skip


def _init(visual: Any, text: Any, config: ClipConfig, key: Key) -> Variables:
    image_key, text_key = jax.random.split(key)
    shape = config.shape if config.input is None else config.input.output_shape(config.shape)
    of_visual = visual.init(image_key, jnp.zeros((1, *shape), jnp.float32))
    of_text = text.init(text_key, jnp.zeros((1, config.context), jnp.int32))
    params = {"visual": of_visual["params"], "text": of_text["params"], "logit_scale": jnp.float32(_INITIAL_SCALE)}
    return {"params": params, "batch_stats": of_visual.get("batch_stats", {})}


def _visual(
    net: Any, input: Input | None, variables: Variables, images: Images, train: bool = False,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array, Any]:  # fmt: skip
    images = images if input is None else input(images)
    state = {"params": variables["params"]["visual"], "batch_stats": variables["batch_stats"]}
    with jax.numpy_dtype_promotion("standard"):  # BatchNorm mixes bfloat16 activations with float32 statistics
        if not train:
            embeddings, features = net.apply(state, images)
            return embeddings, features["flat"].astype(jnp.float32), variables["batch_stats"]
        net = net.clone(axis_name=axis_name)
        (embeddings, features), new = net.apply(state, images, True, mutable=["batch_stats"])
    return embeddings, features["flat"].astype(jnp.float32), new.get("batch_stats", variables["batch_stats"])


def _text(net: Any, variables: Variables, tokens: jax.Array) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
        embeddings: jax.Array = net.apply({"params": variables["params"]["text"]}, tokens)
    return embeddings
