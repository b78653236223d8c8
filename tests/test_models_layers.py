"""The layers that models share, against other ways to compute them; what stands before a network; sizes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import models
from bdjax.errors import InputError
from bdjax.models import Input, _layers


def pictures(count=3, shape=(8, 8, 1), seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((count, *shape)), jnp.float32)


def same(a, b):
    return bool(np.array_equal(a, b))


# --- layers


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (2, 3)])
def test_max_pool_is_that_of_flax(size):
    x = pictures(2, (*size, 3)) - 0.5
    np.testing.assert_array_equal(_layers.max_pool(x), nn.max_pool(x, (2, 2), (2, 2)))


@pytest.mark.parametrize(
    ("window", "first"),
    [([5, 5, 5, 5], 0), ([0, 5, 5, 5], 1), ([0, 0, 5, 5], 2), ([0, 5, 0, 5], 1), ([5, 0, 5, 0], 0), ([0, 0, 0, 5], 3)],
)
def test_max_pool_sends_the_gradient_of_a_tie_to_the_first(window, first):
    x = jnp.array(window, jnp.float32).reshape(1, 2, 2, 1)
    gradient = jax.grad(lambda x: _layers.max_pool(x).sum())(x)
    np.testing.assert_array_equal(gradient.ravel(), np.eye(4)[first])


def test_dropout_keeps_its_share_and_the_mean():
    x = jnp.ones((8, 1000))
    kept = _layers.dropout(x, 0.3, jax.random.split(jax.random.key(0), 8), 1)
    assert set(np.unique(kept)) == {0, np.float32(1 / 0.7)}
    assert float((kept == 0).mean()) == pytest.approx(0.3, abs=0.02)
    assert _layers.dropout(x, 0.3, None, 1) is x


def test_dropout_draws_by_image_and_layer_not_by_batch():
    x, keys = jnp.ones((4, 6, 6, 2)), jax.random.split(jax.random.key(0), 4)
    whole = _layers.dropout(x, 0.5, keys, 1)
    parts = [_layers.dropout(x[i : i + 2], 0.5, keys[i : i + 2], 1) for i in (0, 2)]
    assert same(whole, jnp.concatenate(parts)) and same(whole, _layers.dropout(x, 0.5, keys, 1))
    assert not same(whole[0], whole[1]) and not same(whole, _layers.dropout(x, 0.5, keys, 2))


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (9, 6), (3, 4)])
@pytest.mark.parametrize(("window", "stride", "padding", "ceil"), [
    (3, 2, 1, False), (3, 2, 0, True), (2, 2, 0, True), (3, 1, 1, False), (3, 2, 0, False), (3, 2, 1, True),
])  # fmt: skip
def test_window_max_is_the_largest_of_every_window(size, window, stride, padding, ceil):
    x = np.asarray(pictures(2, (*size, 3)) - 0.5)
    found = _layers.window_max(jnp.asarray(x), window, stride, padding, ceil)
    starts = [
        [at for at in range(-padding, n + padding, stride)
         if (at < n if ceil else at + window <= n + padding) and (at + window - stride < n + padding or at == -padding)]
        for n in size
    ]  # fmt: skip
    assert found.shape[1:3] == tuple(map(len, starts))
    for i, top in enumerate(starts[0]):
        for j, left in enumerate(starts[1]):
            part = x[:, max(top, 0) : top + window, max(left, 0) : left + window]
            np.testing.assert_array_equal(found[:, i, j], part.max((1, 2)))


def test_window_max_sends_the_gradient_of_a_tie_to_the_first_and_has_a_second_derivative():
    x = jnp.zeros((1, 3, 3, 1))
    gradient = jax.grad(lambda x: _layers.window_max(x, 3, 2, padding=1).sum())(x)
    assert gradient.sum() == 4 and gradient[0, 0, 0, 0] == 1 and bool(jnp.isfinite(gradient).all())
    x = pictures(1, (7, 7, 2))

    def square(x):
        return (_layers.window_max(x, 3, 2, padding=1) ** 2).sum()

    curvature = jax.jvp(jax.grad(square), (x,), (jnp.ones_like(x),))[1]
    np.testing.assert_array_equal(curvature > 0, jax.grad(square)(x) > 0)


@pytest.mark.parametrize(("size", "side"), [(1, 7), (2, 7), (3, 7), (7, 7), (8, 7), (14, 7), (10, 3), (5, 1)])
def test_adaptive_mean_is_over_pytorchs_boxes(size, side):
    x = np.asarray(pictures(2, (size, size + 1, 3)))
    found = _layers.adaptive_mean(jnp.asarray(x), side)
    for i in range(side):
        for j in range(side):
            rows = slice(i * size // side, -(-(i + 1) * size // side))
            columns = slice(j * (size + 1) // side, -(-(j + 1) * (size + 1) // side))
            np.testing.assert_allclose(found[:, i, j], x[:, rows, columns].mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_mean_pool_is_that_of_flax(size):
    x = pictures(2, (*size, 3))
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(_layers.mean_pool(x), nn.avg_pool(x, (2, 2), (2, 2)), rtol=1e-6)


# --- what stands before a network


def test_a_width_is_of_models_that_have_one():
    with pytest.raises(InputError, match="'cnn' cannot have a width of 3 channels"):
        models.create("cnn", (8, 8, 1), 4, width=3)
    with pytest.raises(InputError, match="multiple of 12, got 7"):
        model = models.create("vit_b_32", (32, 32, 3), 4, width=7)
        jax.eval_shape(model.init, jax.random.key(0))


def test_what_stands_before_a_network_is_done_in_its_order():
    images = np.asarray(pictures(2, (4, 6, 3)))
    done = Input((0.1, 0.2, 0.3), (0.5, 0.25, 2.0), "bgr", "cwh")(jnp.asarray(images))
    wanted = (images.swapaxes(1, 2)[..., ::-1] - np.float32([0.1, 0.2, 0.3])) / np.float32([0.5, 0.25, 2.0])
    np.testing.assert_allclose(done, wanted, rtol=1e-6)
    assert same(Input(layout="hwc")(jnp.asarray(images)), images) and same(Input(resize=0)(images), images)
    constant = Input(resize=9)(jnp.full((1, 4, 6, 3), 0.25))
    assert constant.shape == (1, 9, 9, 3) and jnp.allclose(constant, 0.25)
    assert Input(layout="cwh").output_shape((4, 6, 3)) == (6, 4, 3)
    assert Input(resize=9).output_shape((4, 6, 3)) == (9, 9, 3)


def test_a_model_with_an_input_is_the_model_of_what_the_input_makes():
    given = Input((0.5,), (0.25,), layout="cwh")
    plain, inside = (models.create("cnn", (8, 12, 1), 4, input=each) for each in (None, given))
    turned, images, rng = models.create("cnn", (12, 8, 1), 4), pictures(3, (8, 12, 1)), np.random.default_rng(0)
    like, other = (jax.eval_shape(model.init, jax.random.key(0)) for model in (inside, plain))
    assert jax.tree.structure(like) == jax.tree.structure(other)
    again = jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape, np.float32)), like)
    before = (images.swapaxes(1, 2) - 0.5) / 0.25
    np.testing.assert_allclose(jax.jit(inside.logits)(again, images), jax.jit(turned.logits)(again, before), rtol=1e-5)
    double = models.as_dtype(inside, jnp.bfloat16)
    features = jax.eval_shape(double.apply, again, images)[1]
    assert double.options == inside.options and features["flat"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"std": (0.0,)}, "--input-std must be positive, got 0.0"),
        ({"mean": (float("nan"),)}, "--input-mean must be finite"),
        ({"channels": "gbr"}, "--channels must be rgb or bgr, got 'gbr'"),
        ({"layout": "nchw"}, "--layout must be one of chw, hwc, cwh, whc, got 'nchw'"),
        ({"resize": -1}, "--resize must be a number of pixels, got -1"),
        ({"mean": (0.5, 0.5)}, "--input-mean has 2 numbers; the network takes 3 channels"),
    ],
)
def test_an_input_that_cannot_be_is_refused(given, words):
    with pytest.raises(InputError, match=words):
        models.create("cnn", (8, 8, 3), 4, input=Input(**given))
    with pytest.raises(InputError, match="bgr is for 3 channels; the network takes 1"):
        models.create("cnn", (8, 8, 1), 4, input=Input(channels="bgr"))
