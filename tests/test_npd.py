"""NPD: the matrix as a layer of its own, its losses by hand, a perturbation and a step against a direct computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from tuned import KEY, MODEL, VICTIM, Seen, cross_entropy, view_of

from bdjax import models
from bdjax.defenses import npd
from bdjax.errors import InputError
from bdjax.types import DefenderView, Victim

HYPER = {name: getattr(npd.Config(), name) for name in npd._DYNAMIC}


def test_the_purified_kernel_is_a_1x1_convolution_before_the_layer():
    rng = np.random.default_rng(0)
    images, kernel, matrix = (
        jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 5, 5, 4), (3, 3, 4, 6), (4, 4))
    )

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    changed = npd.transformed({"params": {"conv": {"kernel": kernel}}}, "conv/kernel", matrix)
    inserted = conv(conv(images, matrix[None, None]), kernel)
    assert_allclose(conv(images, changed["params"]["conv"]["kernel"]), inserted, atol=1e-4)


def test_layer_is_the_release_s_in_resnets_and_the_last_convolution_of_small_networks():
    def chosen(name, shape):
        model = models.create(name, shape, 10)
        shapes = jax.eval_shape(model.init, KEY)
        victim = Victim(model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
        return npd.layer_at(victim, npd.Config().depth)

    assert chosen("preact_resnet18", (32, 32, 3)) == "Conv_18/kernel"  # of 20: Conv_19 is the last block's second
    assert chosen("cnn", (8, 8, 1)) == "Conv_2/kernel"
    assert npd.layer_at(VICTIM, 0.9) == "body"  # no convolution


def test_loss_by_hand():
    clean = np.array([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]], np.float32)
    perturbed = np.array([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]], np.float32)
    labels, goals = jnp.array([0, 1]), jnp.array([1, 2])
    hyper = {"lambda_consistent": 0.5, "lambda_untargeted": 0.3, "lambda_targeted": 0.2}
    value = npd.polarizing_loss(jnp.log(clean), jnp.log(perturbed), labels, goals, hyper)
    first = -np.log(0.7) - 0.5 * np.log(0.5) - 0.3 * np.log(1 - 0.3) - 0.2 * np.log(1 - 0.2)
    second = -np.log(0.3) - 0.5 * np.log(0.3) - 0.3 * np.log(1 - 0.3) - 0.2 * np.log(1 - 0.3)
    assert_allclose(value, (first + second) / 2, rtol=1e-5)


def test_perturbation_stays_in_the_ball_and_stops_when_enough_are_fooled(blobs):
    images = jnp.asarray(blobs[0][:8], jnp.float32) / 255 * 0.5 + 0.25  # far from the limits of the range
    goals = (MODEL.logits(VICTIM.variables, images).argmax(-1) + 1) % 4

    def logits_of(x):
        return MODEL.logits(VICTIM.variables, x)

    hyper = {"step": 0.1, "bound": 0.5, "fooled": 1.0}
    moved = npd.perturb(logits_of, images, goals, 1, hyper)
    gradient = jax.grad(lambda x: cross_entropy(logits_of(x), goals))(images)
    step = -0.1 * jnp.sign(gradient)  # of norm 0.8, so that it is scaled to 0.5
    assert_allclose(moved - images, step * 0.5 / 0.8, atol=1e-5)
    still = npd.perturb(logits_of, images, MODEL.logits(VICTIM.variables, images).argmax(-1), 2, hyper)
    assert_allclose(still, images)  # all are assigned to their goal before the first step


def test_one_step_equals_a_plain_computation(blobs):
    config = npd.Config(epochs=1, batch_size=12, augment="none", weight_decay=0.1)
    seen, start = Seen(), VICTIM.variables["params"]
    images = jnp.asarray(blobs[0][:12], jnp.float32) / 255
    predicted = np.asarray(MODEL.logits(VICTIM.variables, images).argmax(-1))
    labels = np.where(np.arange(12) < 6, predicted, (predicted + 1) % 4).astype(np.int32)  # half are fooled at first
    out = npd.purify(config, VICTIM, DefenderView(blobs[0][:12], labels, seen), KEY)["params"]

    def logits_of(matrix, x):
        return MODEL.logits({"params": {**start, "body": matrix @ start["body"]}, "batch_stats": {}}, x)

    unit, rows = jnp.eye(64), np.arange(12)
    goals = jnp.argsort(logits_of(unit, images).at[rows, labels].set(-1e9))[:, -1]
    moved = npd.perturb(lambda x: logits_of(unit, x), images, goals, 2, HYPER)
    assert float(abs(moved - images).max()) > 0.1

    def loss(matrix):
        clean, logits = logits_of(matrix, images), logits_of(matrix, moved)
        share = jax.nn.softmax(logits)
        wrong = share.at[rows, labels].set(0).max(-1)
        value = cross_entropy(clean, labels) + 0.4 * cross_entropy(logits, clean.argmax(-1))
        return value - 0.4 * (jnp.log(1 - wrong) + jnp.log(1 - share[rows, goals])).mean()

    matrix = unit - 0.01 * (jax.grad(loss)(unit) + 0.1 * unit)
    assert_allclose(out["body"], matrix @ start["body"], atol=1e-5)
    assert_allclose(out["head"]["kernel"], start["head"]["kernel"])
    assert len(seen.rows) == 1 and seen.rows[0]["loss"] == pytest.approx(float(loss(unit)), rel=1e-4)


def test_an_unknown_layer_is_named(blobs):
    with pytest.raises(InputError, match="defense.layer='nowhere'"):
        npd.purify(npd.Config(layer="nowhere"), VICTIM, view_of(blobs), KEY)
