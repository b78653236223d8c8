"""Memory that the steps of a dual encoder need on one device, by XLA's own estimate; nothing is computed."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bdjax import models
from bdjax.engine.contrastive import clip_loss, pair_step
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError
from bdjax.models import ClipConfig
from bdjax.vision_language.defenses import _blind_pairs, bibau_clip, cleanclip

STEPS = ("train", "cleanclip", "bibau_clip")


@dataclass(frozen=True)
class Memory:
    """Bytes of a compiled step."""

    arguments: int
    """Weights, optimiser state, constants of the step, and one batch of images."""
    temporary: int
    """Activations and gradients."""

    @property
    def total(self) -> int:
        """All bytes; the results replace the arguments, whose buffers are donated."""
        return self.arguments + self.temporary


def estimate(config: ClipConfig, batch_size: int, step: str = "train", dtype: Any = jnp.float32) -> Memory:
    """Compile a step for the default device and return XLA's estimate of its memory.

    The set of images is as large as one batch; a larger one adds its uint8 pixels.

    Args:
      config: sizes of the dual encoder.
      batch_size: pairs per step on this device.
      step: one of STEPS.
      dtype: dtype of the activations.

    Returns:
      The estimate.

    Raises:
      InputError: when the device's compiler gives none.
    """
    encoder = models.dual_encoder(config, dtype)
    variables = jax.eval_shape(encoder.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch_size, *config.shape), jnp.uint8)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    index, rate = jax.ShapeDtypeStruct((batch_size,), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    if step == "bibau_clip":
        visual, settings = variables["params"]["visual"], bibau_clip.Config()
        static = _blind_pairs.Static(*(getattr(settings, name) for name in _blind_pairs.Static._fields))
        static = static._replace(steps=2)  # the steps of PGD follow one another: twenty need no more memory than two
        function = _blind_pairs.unlearning_step(encoder, static)
        state: Any = {"visual": visual, "opt": jax.eval_shape(direction("adam").init, visual)}
        batch: Any = {"index": index, "key": keys}
        texts = jax.ShapeDtypeStruct((batch_size, config.dimension), jnp.float32)
        hyper = {name: rate for name in bibau_clip.DYNAMIC}
        constants: Any = {
            "images": images, "texts": texts, "original": visual, "stats": variables["batch_stats"], "scale": rate,
            "hyper": hyper, "fisher_clean": visual, "fisher_unlearning": visual,
        }  # fmt: skip
    else:
        function = pair_step(encoder, cleanclip.cleanclip_loss if step == "cleanclip" else clip_loss)
        state = {**variables, "opt": jax.eval_shape(optax.scale_by_adam().init, variables["params"])}
        batch = {"index": index, "augment": keys, "dropout": keys}
        extra = {name: rate for name in ("cross", "in_modal", "jitter", "text_rate")}
        tokens = jax.ShapeDtypeStruct((batch_size, config.context), jnp.int32)
        constants = {"images": images, "tokens": tokens, "extra": extra, "weight_decay": rate, "largest_scale": rate}
    compiled = jax.jit(partial(function, axis=None), donate_argnums=0)
    analysis = compiled.lower(state, batch, {"rate": rate}, constants).compile().memory_analysis()
    if analysis is None:
        raise InputError(f"{jax.default_backend()} gives no estimate of memory. Try JAX_PLATFORMS=cpu.")
    return Memory(int(analysis.argument_size_in_bytes), int(analysis.temp_size_in_bytes))
