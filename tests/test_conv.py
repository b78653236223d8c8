"""The convolution with plain derivatives equals lax's, in value and derivatives of every order we use."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolutions import LAX, equal_to_second_order, equal_to_third_order, gradient, same

from bdjax.models import _layers
from bdjax.models.cpu import convolution

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

SIDES, BATCHES = [1, 3, 5], [1, 19, 20, 45]  # the kernel's gradient goes over the batch in pieces of 20


def arrays(side=3, batch=4, dtype=jnp.float32, seed=0):
    """Images [N, 6, 5, 3], a kernel [K, K, 3, 2] and directions like them."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, 6, 5, 3), (side, side, 3, 2)] * 2
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_lax_to_second_order(double, side, batch):
    equal_to_second_order(convolution.conv, LAX, arrays(side, batch, jnp.float64))


def test_third_order(double):
    equal_to_third_order(convolution.conv, LAX, arrays(dtype=jnp.float64))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float64, 1e-12), (jnp.bfloat16, 0.04)])
@pytest.mark.parametrize("batch", [4, 45])
def test_dtype_is_kept(double, dtype, tolerance, batch):
    x, w, *_ = arrays(3, batch, dtype)
    ours, theirs = ((conv(x, w), gradient(conv, x, w)) for conv in (convolution.conv, LAX))
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(dtype)}
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    same(ours, theirs, 0, tolerance * largest)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, None), (1, 4)])
def test_vmap(double, axes):
    x, w, *_ = arrays(dtype=jnp.float64)
    rng = np.random.default_rng(1)

    def several(leaf, axis):
        """Three of them, stacked along `axis`."""
        return leaf if axis is None else jnp.stack([leaf * float(s) for s in rng.normal(size=3)], axis)

    x, w = several(x, axes[0]), several(w, axes[1])
    for function in (lambda conv: conv, lambda conv: partial(gradient, conv)):
        same(*(jax.vmap(function(conv), axes)(x, w) for conv in (convolution.conv, LAX)))


def test_vmap_of_the_kernel_gradient_with_one_argument_mapped(double):
    """A gradient for each of three cotangents of the same images, as jax.jacrev takes them."""
    x, w, *_ = arrays(dtype=jnp.float64)
    cotangents = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 6, 5, 2)))
    same(*(jax.vmap(jax.vjp(conv, x, w)[1])(cotangents) for conv in (convolution.conv, LAX)))


def test_pmap_over_four_devices(double):
    assert len(jax.devices()) == 4
    x, w, *_ = arrays(batch=44, dtype=jnp.float64)

    def share(conv, x, w):
        return jax.lax.psum(gradient(conv, x, w)[1], "data")

    mapped = jax.pmap(partial(share, convolution.conv), "data", in_axes=(0, None))(x.reshape(4, 11, 6, 5, 3), w)
    for device in range(4):
        np.testing.assert_allclose(mapped[device], gradient(LAX, x, w)[1], rtol=1e-9, atol=1e-9)


def test_a_gradient_inside_scan_is_the_loop(double):
    """Gradient descent on kernel and images, and the derivative of all of it."""
    x, w, *_ = arrays(batch=21, dtype=jnp.float64)

    def step(conv, state):
        return jax.tree.map(lambda v, g: v - 0.05 * g, state, gradient(conv, *state))

    def scanned(w):
        (x_last, w_last), _ = jax.lax.scan(lambda s, _: (step(convolution.conv, s), None), (x, w), None, length=5)
        return (x_last**2).sum() + (w_last**2).sum()

    def looped(w):
        state = (x, w)
        for _ in range(5):
            state = step(LAX, state)
        return sum((v**2).sum() for v in state)

    same(*(jax.jit(jax.value_and_grad(f))(w) for f in (scanned, looped)))


def test_eager_is_jit():
    x, w, *_ = arrays()
    same(convolution.conv(x, w), jax.jit(convolution.conv)(x, w), 1e-6, 1e-6)


def primitives(function, *args):
    """Names of the primitives that a traced function uses, its sub-programs included."""
    return set(str(jax.make_jaxpr(function)(*args)).replace("[", " ").split())


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (1, 1), (3, 2), (1, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_picks_the_convolution_and_equals_nn_conv(kernel, stride, bias):
    x = arrays()[0]
    ours = _layers.conv(4, jnp.float32, kernel, stride, bias)
    theirs = nn.Conv(4, (kernel, kernel), strides=stride, padding=kernel // 2, use_bias=bias)
    variables = ours.init(jax.random.key(0), x)
    assert jax.tree.structure(variables) == jax.tree.structure(theirs.init(jax.random.key(0), x))
    used = primitives(ours.apply, variables, x)
    ours_too = jax.default_backend() == "cpu" and (kernel == 1 or stride == 1)  # 6x5 pixels: none for 3x3 of stride 2
    assert ("plain_conv" in used) == ours_too and ("conv_general_dilated" in used) != ours_too

    def both(layer):
        objective = lambda v, x: jnp.tanh(layer.apply(v, x)).sum()  # noqa: E731
        return layer.apply(variables, x), jax.grad(objective, (0, 1))(variables, x)

    same(both(ours), both(theirs), 1e-5, 1e-5)
