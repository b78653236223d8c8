"""NAD: attention maps by hand, the choice of layers, and a step against a direct computation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from tuned import KEY, MODEL, VICTIM, Seen, cross_entropy, view_of

from bdjax import models, registry
from bdjax.defenses import nad
from bdjax.errors import InputError
from bdjax.types import Victim


def test_attention_of_a_small_map():
    places = jnp.array([[[[1.0, 0.0], [0.0, -2.0]], [[2.0, 1.0], [0.0, 0.0]]]])  # [1, 2, 2, 2]: masses 1, 4, 5, 0
    assert_allclose(nad.attention(places), [np.array([1, 4, 5, 0]) / (42**0.5 + 1e-6)], rtol=1e-6)
    assert_allclose(nad.attention(places.reshape(1, 4, 2)), nad.attention(places))  # tokens
    assert_allclose(nad.attention(jnp.array([[3.0, 0.0, -4.0]])), [np.array([9, 0, 16]) / 337**0.5], rtol=1e-5)
    empty = jax.grad(lambda f: nad.attention(f).sum())(jnp.zeros((1, 2, 2, 3)))
    assert bool((empty == 0).all())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cnn", ("block1", "block2", "block3")),
        ("small_vgg", ("conv4", "conv6", "block3")),
        ("mnist_cnn", ("conv1", "conv2")),
        ("preact_resnet18", ("stage2", "stage3", "stage4")),
        pytest.param("wide_resnet", ("stage1", "stage2", "stage3"), marks=pytest.mark.slow),
        pytest.param("vit_b_16", ("block3", "block8", "block12"), marks=pytest.mark.slow),
        pytest.param("vgg16", ("block2", "block3", "block4"), marks=pytest.mark.slow),  # its block5 has one position
    ],
)
def test_default_layers_are_the_last_of_each_resolution(name, expected):
    model = models.create(name, (32, 32, 3), 10)
    variables = jax.eval_shape(model.init, KEY)
    assert nad.default_layers(model, variables, 3) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.names("models"))
def test_every_model_has_maps_to_match(name):
    model = models.create(name, (64, 64, 3), 10)
    variables = jax.eval_shape(model.init, KEY)
    names = nad.default_layers(model, variables, 3)
    assert 1 <= len(names) <= 3
    nad._check_layers(names, model, variables)


@pytest.mark.slow
def test_one_step_of_nad_equals_a_plain_computation(blobs):
    config = nad.Config(
        teacher_epochs=1, epochs=1, batch_size=40, betas=(300.0,), rates=(0.05,), begins=(0,), augment="none",
        weight_decay=0.01,
    )  # fmt: skip
    seen = Seen()
    out = nad.purify(config, VICTIM, view_of(blobs, callback=seen), KEY)["params"]
    images, labels = jnp.asarray(blobs[0][:40], jnp.float32) / 255, blobs[1][:40]

    def run(params):
        logits, features, _ = MODEL.apply({"params": params, "batch_stats": {}}, images)
        return logits, features["flat"]

    def look(features):
        mass = features**2
        return mass / (jnp.linalg.norm(mass, axis=1, keepdims=True) + 1e-6)

    def step(loss):
        start = VICTIM.variables["params"]
        gradient = jax.tree.map(lambda g, p: g + 0.01 * p, jax.grad(loss)(start), start)
        return jax.tree.map(lambda p, g: p - 0.05 * 1.9 * g, start, gradient)  # Nesterov's first step

    teacher = step(lambda params: cross_entropy(run(params)[0], labels))
    wanted = look(run(teacher)[1])

    def loss(params):
        logits, features = run(params)
        return cross_entropy(logits, labels) + 300 * ((look(features) - wanted) ** 2).mean()

    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), out, step(loss))
    assert seen.rows[0]["loss"] == pytest.approx(float(loss(VICTIM.variables["params"])), rel=1e-4)
    assert seen.rows[0]["attention_loss"] > 1e-4  # the term is present


def test_nad_names_missing_feature_maps(blobs):
    with pytest.raises(InputError, match="'block9', but the features of model 'perceptron' are flat"):
        nad.purify(nad.Config(layers=("block9",), betas=(1.0,)), VICTIM, view_of(blobs), KEY)
    mute = dataclasses.replace(MODEL, apply=lambda *args: (MODEL.apply(*args)[0], {}, {}))
    with pytest.raises(InputError, match="'perceptron' exposes no feature maps, which NAD compares"):
        nad.purify(nad.Config(), Victim(mute, VICTIM.variables), view_of(blobs), KEY)


def test_rates_of_nad_change_at_their_epochs():
    rates = nad._learning_rates(nad.Config(), 22, 3)
    assert rates.shape == (22, 3)
    assert_allclose(rates[[0, 1, 2, 19, 20, 21], 0], [0.1, 0.1, 0.01, 0.01, 1e-4, 1e-4])
