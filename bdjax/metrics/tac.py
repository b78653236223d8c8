"""Trigger-activated change (TAC): how much the trigger changes each channel of a layer.

R. Zheng, R. Tang, J. Li and L. Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022,
arXiv:2208.03111.
"""

import jax
import jax.numpy as jnp


def tac(clean: jax.Array, triggered: jax.Array) -> jax.Array:
    """Trigger-activated change `TAC_k = mean_x || F_k(x) - F_k(A(x)) ||_2` of each channel k.

    The norm is over the channel's map, the mean over images. TAC is not scaled, as in the paper; BackdoorBench shows L1
    norms of the mean difference instead. The contribution of an image is its own TAC, so a set may be measured in
    parts.

    Args:
      clean: features of clean images in evaluation mode, [N, ..., C].
      triggered: features of the same images with the trigger, in the same order, [N, ..., C].

    Returns:
      float32 [C], not negative.
    """
    change = triggered.astype(jnp.float32) - clean.astype(jnp.float32)
    return jnp.linalg.norm(change.reshape(len(change), -1, change.shape[-1]), axis=1).mean(0)
