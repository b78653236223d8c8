"""Trigger-activated change (TAC): how much the trigger moves each channel of a layer (Zheng et al., ECCV 2022)."""

import jax
import jax.numpy as jnp


def tac(clean: jax.Array, triggered: jax.Array) -> jax.Array:
    """`TAC_k = mean_x || F_k(x) - F_k(A(x)) ||_2`, the norm over the channel's map, the mean over images.

    Not scaled, as in the paper on channel Lipschitzness; BackdoorBench shows L1 norms of the mean difference instead.
    What one image adds is `tac` of that image alone, so a set may be measured in parts.

    Args: features [N, ..., C] of the same images in the same order, clean and triggered, in evaluation mode.
    Returns: float32 [C], not negative.
    """
    change = triggered.astype(jnp.float32) - clean.astype(jnp.float32)
    return jnp.linalg.norm(change.reshape(len(change), -1, change.shape[-1]), axis=1).mean(0)
