"""Linear centred kernel alignment (CKA): how alike two sets of features are (Kornblith et al., ICML 2019)."""

import jax
import jax.numpy as jnp


def linear_cka(x: jax.Array, y: jax.Array) -> jax.Array:
    """`<K, L> / (||K|| ||L||)` with the centred Gram matrices K = X X^T and L = Y Y^T, of all features of an image.

    The biased estimator. It equals `||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)` of centred features, and neither moving,
    scaling nor turning a feature set changes it. Features are brought to Frobenius norm one before they are
    multiplied, so that float32 is enough at any scale.

    Args: [N, ...] each, of the same N images in the same order.
    Returns: float32 scalar in [0, 1]; 1 for equal features, 0 where a set is constant (our choice for 0/0).
    """
    k, l = _gram(x), _gram(y)  # noqa: E741
    scale = jnp.linalg.norm(k) * jnp.linalg.norm(l)
    return jnp.clip(_over((k * l).sum(), scale), 0, 1)  # rounding may go beyond


def _gram(x: jax.Array) -> jax.Array:
    """[N, N], of trace one (or zero)."""
    x = x.reshape(len(x), -1).astype(jnp.float32)
    x = x - x[:1]  # exact for near values: a constant becomes zero and not noise
    x = _over(x, jnp.abs(x).max())
    x = x - x.mean(0)
    x = _over(x, jnp.linalg.norm(x))
    return jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)


def _over(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x / jnp.where(scale == 0, 1, scale)
