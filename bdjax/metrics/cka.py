"""Linear centred kernel alignment (CKA): the similarity of two sets of features.

S. Kornblith, M. Norouzi, H. Lee and G. Hinton, "Similarity of Neural Network Representations Revisited", ICML 2019,
arXiv:1905.00414.
"""

import jax
import jax.numpy as jnp


def linear_cka(x: jax.Array, y: jax.Array) -> jax.Array:
    """Linear CKA `<K, L> / (||K|| ||L||)` with the centred Gram matrices K = X X^T and L = Y Y^T.

    This is the biased estimator. It equals `||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)` of centred features, and is
    invariant to translation, isotropic scaling and orthogonal transformation of a feature set. Features are normalised
    to Frobenius norm one before they are multiplied, so that float32 is precise enough at any scale.

    Args:
      x: features of N images, [N, ...].
      y: other features of the same images in the same order, [N, ...].

    Returns:
      float32 scalar in [0, 1]; 1 for equal features, 0 where a set is constant (our choice for 0/0).
    """
    k, l = _gram(x), _gram(y)  # noqa: E741
    scale = jnp.linalg.norm(k) * jnp.linalg.norm(l)
    return jnp.clip(_divide((k * l).sum(), scale), 0, 1)  # rounding may exceed the range


def _gram(x: jax.Array) -> jax.Array:
    """Return the centred Gram matrix [N, N], normalised to trace one (or zero)."""
    x = x.reshape(len(x), -1).astype(jnp.float32)
    x = x - x[:1]  # exact for close values, so that constant features become zero instead of rounding noise
    x = _divide(x, jnp.abs(x).max())
    x = x - x.mean(0)
    x = _divide(x, jnp.linalg.norm(x))
    return jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)


def _divide(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Return x / scale, or x where the scale is zero."""
    return x / jnp.where(scale == 0, 1, scale)
