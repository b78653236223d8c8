"""Convolutions by matrix products, of stride 2 and by Winograd's filtering, equal lax's to second order."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolutions import LAX, equal_to_second_order, equal_to_third_order, equal_under_vmap, gradient

from bdjax.models import _layers
from bdjax.models.cpu import convolution, strided, winograd

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

LAX_STRIDED = partial(
    jax.lax.conv_general_dilated,
    window_strides=(2, 2),
    padding=((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)


def arrays(dtype=jnp.float64, shape=(5, 6, 4, 3), outputs=2, seed=0):
    """Images, a kernel [3, 3, I, O] and directions like them."""
    rng = np.random.default_rng(seed)
    shapes = [shape, (3, 3, shape[-1], outputs)] * 2
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.fixture(params=[(256, 2048), (1, 2048), (256, 6), (256, 12), (256, 18)])
def way(request, monkeypatch):
    """Ways to the strided convolution: of few and many channels; five images at once, one, two or three at a time."""
    for name, value in zip(("_MANY", "_PIXELS"), request.param, strict=True):
        monkeypatch.setattr(strided, name, value)
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_stride_2_to_second_order(double, way):
    equal_to_second_order(strided.conv, LAX_STRIDED, arrays())


def test_stride_2_to_third_order(double):
    equal_to_third_order(strided.conv, LAX_STRIDED, arrays())


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 4)])
def test_stride_2_under_vmap(double, axes):
    equal_under_vmap(strided.conv, LAX_STRIDED, arrays()[:2], axes)


def test_a_mapped_strided_convolution_keeps_its_derivatives(double):
    """With one kernel for all it is the primitive still, so what is differentiated after vmap is not lax's either."""
    x, w, *_ = arrays()
    mapped = lambda w: jnp.tanh(jax.vmap(strided.conv, (0, None))(jnp.stack([x, -2 * x]), w)).sum()  # noqa: E731
    assert "strided_conv_kernel_gradient" in str(jax.make_jaxpr(jax.grad(mapped))(w))


@pytest.mark.parametrize(("kernel", "size", "ours"), [(3, (6, 4), True), (1, (5, 4), True), (3, (5, 4), False)])
def test_the_layer_takes_stride_2_where_it_fits(kernel, size, ours):
    x = arrays(jnp.float32, (5, *size, 3))[0]
    layer = _layers.conv(4, jnp.float32, kernel, 2)
    variables = layer.init(jax.random.key(0), x)
    traced = str(jax.make_jaxpr(layer.apply)(variables, x))
    assert (("strided_conv" in traced) or ("plain_conv" in traced)) == (ours and jax.default_backend() == "cpu")
    theirs = jax.lax.conv_general_dilated(
        x, variables["params"]["kernel"], (2, 2), ((kernel // 2,) * 2,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer.apply(variables, x), theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture
def forced_winograd(request, monkeypatch):
    """Every convolution that Winograd's filtering supports uses it, in slices of `param` tiles."""
    monkeypatch.setattr(winograd, "is_faster", lambda x, shape, **_: shape[0] == 3)
    monkeypatch.setattr(winograd, "_TILES", request.param)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("forced_winograd", [6, 12, 18, 1024], indirect=True)
def test_winograd_to_second_order(double, forced_winograd):
    """Five images of 6 tiles: pieces of one, two with one left, three with two left, and all at once."""
    equal_to_second_order(convolution.conv, LAX, arrays())


@pytest.mark.parametrize("forced_winograd", [12], indirect=True)
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_winograd_under_vmap(double, forced_winograd, axes):
    equal_under_vmap(convolution.conv, LAX, arrays()[:2], axes)


def test_winograd_by_hand():
    """An image of 2x2 pixels is one tile; a kernel that is 1 in its centre gives it back, one at a side shifts it."""
    image = jnp.arange(1.0, 5.0).reshape(1, 2, 2, 1)
    centre, left = (jnp.zeros((3, 3, 1, 1)).at[1, b].set(1.0) for b in (1, 0))
    assert winograd.convolve(image, centre).ravel().tolist() == [1, 2, 3, 4]
    assert winograd.convolve(image, left).ravel().tolist() == [0, 1, 0, 3]
    assert winograd.kernel_gradient(image, image).squeeze().tolist() == [[4, 11, 6], [14, 30, 14], [6, 11, 4]]


@pytest.mark.parametrize(
    ("shape", "outputs", "dtype", "wanted"),
    [
        ((16, 8, 8, 128), 256, jnp.float32, True),
        ((16, 8, 8, 128), 256, jnp.bfloat16, False),
        ((16, 7, 8, 128), 256, jnp.float32, False),
        ((1, 8, 8, 128), 256, jnp.float32, False),
        ((16, 8, 8, 128), 64, jnp.float32, False),
    ],
    ids=["deep", "bfloat16", "odd", "few pixels", "few channels"],
)
def test_deep_layers_are_convolved_by_winograd(shape, outputs, dtype, wanted):
    """By the program that is compiled; as exact as lax's convolution, in value and gradient."""
    x, w, *_ = arrays(dtype, shape, outputs)
    program = jax.jit(partial(gradient, convolution.conv)).lower(x, w).as_text()
    assert ("stablehlo.convolution" not in program) == wanted
    if wanted:
        w = w / 30  # tanh stays curved
        for ours, theirs in zip(gradient(convolution.conv, x, w), gradient(LAX, x, w), strict=True):
            assert float(jnp.abs(ours - theirs).max()) < 1e-5 * float(jnp.abs(theirs).max())
