"""Visibility of a trigger: peak signal-to-noise ratio, structural similarity, and norms of the perturbation."""

import dm_pix
import jax
import jax.numpy as jnp

WINDOW = 11
"""Side of the window of :func:`ssim` in pixels."""


def psnr(clean: jax.Array, triggered: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio `-10 log10(mean((triggered - clean)^2))` in dB, over pixels and channels.

    Args:
      clean: float32 [N, H, W, C] in [0, 1].
      triggered: the same images with the trigger, float32 [N, H, W, C] in [0, 1].

    Returns:
      float32 [N]; infinite where the two images are equal.
    """
    return dm_pix.psnr(clean, triggered)


def ssim(clean: jax.Array, triggered: jax.Array) -> jax.Array:
    """Structural similarity (Wang et al., 2004), averaged over the positions of the window and over the channels.

    With means m, variances v and covariance c under a Gaussian window (11x11, sigma 1.5) that stays inside the image:

        (2 m1 m2 + C1) (2 c + C2) / ((m1^2 + m2^2 + C1) (v1 + v2 + C2)),    C1 = 0.01^2, C2 = 0.03^2

    Smaller images get a smaller window, see :func:`ssim_window`; its values are not comparable with those of 11x11.

    Args:
      clean: float32 [N, H, W, C] in [0, 1].
      triggered: the same images with the trigger, float32 [N, H, W, C] in [0, 1].

    Returns:
      float32 [N], at most 1.
    """
    size = ssim_window(*clean.shape[1:3])
    with jax.numpy_dtype_promotion("standard"):  # dm_pix adds Python floats to integers
        return dm_pix.ssim(clean, triggered, filter_size=size, filter_sigma=1.5, k1=0.01, k2=0.03)


def ssim_window(height: int, width: int) -> int:
    """Return the side of the window of :func:`ssim` in pixels: 11, or the largest odd number that fits the image."""
    side = min(height, width, WINDOW)
    return side - 1 + side % 2


def distance(clean: jax.Array, triggered: jax.Array) -> tuple[jax.Array, jax.Array]:
    """L2 and Linf norms of `triggered - clean`, over pixels and channels.

    Args:
      clean: float32 [N, H, W, C] in [0, 1].
      triggered: the same images with the trigger, float32 [N, H, W, C] in [0, 1].

    Returns:
      (L2 norm, Linf norm), float32 [N] each, in units of pixel values: L2 is at most sqrt(H W C), Linf at most 1.
    """
    difference = (triggered - clean).reshape(len(clean), -1)
    return jnp.linalg.norm(difference, axis=1), jnp.abs(difference).max(1)
