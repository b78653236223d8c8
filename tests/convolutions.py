"""What the convolutions of ours are held against: lax's, in value and derivatives of every order."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

LAX = partial(
    jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
)


def loss(conv, x, w):
    """Curved in both arguments, so that second derivatives have all their parts."""
    y = jnp.tanh(conv(x, w) * 0.3)
    return y.astype(jnp.float32 if y.dtype == jnp.bfloat16 else y.dtype).sum()


def gradient(conv, x, w):
    return jax.grad(partial(loss, conv), (0, 1))(x, w)


def same(first, second, rtol=1e-9, atol=1e-9):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol, atol)


def equal_to_second_order(ours, theirs, given):
    """Value, gradient and Hessian products, both ways, for `given` = images, kernel and directions like them."""

    def both_orders(conv, x, w, dx, dw):
        first = gradient(conv, x, w)
        over = jax.jvp(partial(gradient, conv), (x, w), (dx, dw))[1]
        reverse = jax.grad(
            lambda x, w: sum(jnp.vdot(g, d) for g, d in zip(gradient(conv, x, w), (dx, dw), strict=True)), (0, 1)
        )
        return conv(x, w), first, over, reverse(x, w)

    ours, theirs = (jax.jit(partial(both_orders, conv))(*given) for conv in (ours, theirs))
    same(ours, theirs)
    same(ours[2], ours[3])  # a Hessian is symmetric: forward over reverse is reverse over reverse
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(ours))


def equal_to_third_order(ours, theirs, given):
    """The third derivative along the directions of `given`, as :func:`equal_to_second_order` takes it."""
    x, w, dx, dw = given

    def third(conv):
        second = lambda x, w: jax.jvp(partial(gradient, conv), (x, w), (dx, dw))[1]  # noqa: E731
        return jax.jvp(second, (x, w), (dx, dw))[1]

    same(third(ours), third(theirs))


def equal_under_vmap(ours, theirs, given, axes):
    """Value and gradient for three of the images, the kernels or both, stacked along `axes`."""
    several = [v if axis is None else jnp.stack([v, 2 * v, -v], axis) for v, axis in zip(given, axes, strict=True)]
    for function in (lambda conv: conv, lambda conv: partial(gradient, conv)):
        same(*(jax.vmap(function(conv), axes)(*several) for conv in (ours, theirs)))
