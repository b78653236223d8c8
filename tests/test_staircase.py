"""Recovered triggers reach their thresholds and have high entropy; the pool of triggers and the stamping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import perceptron
from numpy.testing import assert_allclose, assert_array_equal

from bdjax.defenses import _pool
from bdjax.defenses._staircase import RecoveryConfig, recover
from bdjax.engine import parallel
from bdjax.engine.clock import compiled_programs
from bdjax.errors import InputError
from bdjax.types import Callback, DefenderView, Model, Victim

KEY = jax.random.key(0)
QUICK = RecoveryConfig(
    hidden=16, noise_size=8, iterations=200, recovery_batch=32, generator_rate=5e-3, thresholds=(0.5, 0.9),
    trigger_noise=0.05, samples=32, place_rate=0.0,
)  # fmt: skip
FEW = dataclasses.replace(QUICK, iterations=4, samples=3, asr_threshold=0.3)


def _bright(variables, images, train=False, keys=None, axis_name=None):
    total = images.sum((1, 2, 3)) * variables["params"]["scale"]
    return jnp.stack([0 * total, 2 * (total - 7), 0 * total - 5], 1), {}, {}


BRIGHT = Model("bright", (8, 8, 1), 3, lambda key: {"params": {"scale": jnp.float32(1)}, "batch_stats": {}}, _bright)
"""A model that assigns dark images to class 0, those with a bright patch anywhere to class 1, none to class 2."""


@pytest.fixture(scope="module")
def dark():
    images = np.random.default_rng(0).integers(0, 26, (60, 8, 8, 1)).astype(np.uint8)
    return DefenderView(images, np.zeros(60, np.int32))


@pytest.fixture(scope="module")
def pools(dark):
    """Pools recovered without and with the mutual information, from the same initial networks."""
    with parallel.using(1):
        return [
            recover(dataclasses.replace(QUICK, mi_weight=weight), Victim(BRIGHT, BRIGHT.init(KEY)), dark, KEY)
            for weight in (0.0, 0.5)
        ]


def spread(triggers):
    """Mean distance between two triggers, and the differential entropy of a Gaussian with their covariance, in nats."""
    flat = np.asarray(triggers, np.float64).reshape(len(triggers), -1)
    distance = np.linalg.norm(flat[:, None] - flat[None], axis=-1).mean()
    covariance = np.cov(flat.T) + 1e-6 * np.eye(flat.shape[1])
    return distance, np.linalg.slogdet(2 * np.pi * np.e * covariance)[1] / 2


def test_triggers_reach_their_thresholds_and_only_the_reachable_label_is_suspected(pools, dark):
    clean = np.asarray(dark.images, np.float64).sum((1, 2, 3)) / 255 * (1 - 9 / 64)
    for pool in pools:
        assert_array_equal(pool.suspected_labels(), [1])
        labels, accepted = np.asarray(pool.labels), np.asarray(pool.accepted)
        assert_array_equal(labels, np.repeat([0, 1, 2], 64))
        assert accepted[labels == 1].all() and not accepted[labels != 1].any()  # images of class 0 itself do not count
        for begin, threshold in ((64, 0.5), (96, 0.9)):
            total = clean[:, None] + np.asarray(pool.triggers[begin : begin + 32]).sum((1, 2, 3))
            probability = 1 / (1 + np.exp(-2 * (total - 7)) + np.exp(-5 - 2 * (total - 7)))
            assert np.maximum(0, threshold - probability).mean() < 0.03
    assert pools[0].triggers[64:96].sum((1, 2, 3)).mean() < pools[0].triggers[96:128].sum((1, 2, 3)).mean()


def test_the_mutual_information_spreads_the_triggers(pools):
    for begin in (64, 96):
        (near, low), (far, high) = (spread(pool.triggers[begin : begin + 32]) for pool in pools)
        assert far > 1 and far > 1.5 * near
        assert high > low + 2 > -20  # of a single point: 9 / 2 log(2 pi e 1e-6) = -49


def _corner(variables, images, train=False, keys=None, axis_name=None):
    seen = images[:, 5:8, 1:4].mean((1, 2, 3)) * variables["params"]["scale"]
    return jnp.stack([0 * seen, 30 * (seen - 0.5), 0 * seen - 9], 1), {}, {}


@pytest.mark.slow
def test_the_position_is_learned_when_the_backdoor_responds_at_one_position_only(dark):
    """Class 1: bright in rows 5 to 7, columns 1 to 3 of 8. No patch at random positions is universal."""
    model = Model("corner", (8, 8, 1), 3, BRIGHT.init, _corner)
    config = dataclasses.replace(QUICK, place_rate=0.1, iterations=300, samples=4)
    uniform, learned = (
        recover(dataclasses.replace(config, place_rate=rate), Victim(model, model.init(KEY)), dark, KEY)
        for rate in (0.0, 0.1)
    )
    assert not len(uniform.suspected_labels()) and np.ptp(uniform.position_logits[0]) == 0
    assert_array_equal(learned.suspected_labels(), [1])
    chances = [np.asarray(jax.nn.softmax(logits)) for logits in learned.position_logits]
    for chance, expected in zip(chances, (5, 1), strict=True):
        assert chance.shape == (24, 6)
        assert (chance[8:16].argmax(1) == expected).all() and chance[8:16, expected].min() > 0.5
        assert chance[16:].max() < 0.5  # class 2 cannot be reached at any position: nothing is learned
    flat = dataclasses.replace(config, place_entropy=10.0)  # with so large a weight the distribution stays uniform
    position_logits = recover(flat, Victim(model, model.init(KEY)), dark, KEY).position_logits
    assert max(np.asarray(jax.nn.softmax(logits)).max() for logits in position_logits) < 0.3


def test_a_pool_puts_patches_at_their_learned_positions():
    rows = jnp.full((2, 6), -50.0).at[:, 4].set(50.0)
    columns = jnp.full((2, 6), -50.0).at[0, 1].set(50.0).at[1, 3].set(50.0)
    pool = _pool.Pool(
        jnp.stack([jnp.full((3, 3, 1), v) for v in (0.4, 0.8)]),
        jnp.array([7, 9]),
        jnp.ones(2),
        jnp.ones(2, bool),
        (rows, columns),
    )
    out, labels = _pool.stamper("patch")(pool, jnp.zeros((40, 8, 8, 1)), jax.random.split(KEY, 40))
    assert set(np.asarray(labels)) == {7, 9}
    for image, label in zip(np.asarray(out)[..., 0], np.asarray(labels), strict=True):
        column, value = (1, 0.4) if label == 7 else (3, 0.8)
        expected = np.zeros((8, 8))
        expected[4:7, column : column + 3] = value
        assert_allclose(image, expected, rtol=1e-6)


@pytest.mark.slow
def test_labels_in_groups_give_the_same_triggers_as_all_at_once(blobs):
    victim, view = Victim(perceptron(), perceptron().init(KEY)), DefenderView(blobs[0][:50], blobs[1][:50])
    together, *groups = (recover(dataclasses.replace(FEW, together=count), victim, view, KEY) for count in (0, 1, 3))
    untrained = recover(dataclasses.replace(FEW, generator_rate=1e-9), victim, view, KEY)
    assert np.abs(np.asarray(together.triggers - untrained.triggers)).max() > 1e-3
    for group in groups:  # three of four labels: the second group is padded
        assert_array_equal(group.labels, together.labels)
        assert_allclose(group.triggers, together.triggers, atol=2e-5)
        assert_allclose(group.asr, together.asr, atol=0.05)


@pytest.mark.slow
def test_two_devices_give_the_triggers_of_one(blobs):
    victim, view = Victim(perceptron(), perceptron().init(KEY)), DefenderView(blobs[0][:50], blobs[1][:50])
    for changes in ({"form": "additive", "strength": 0.5}, {"place_rate": 0.1, "thresholds": (0.9, 1.0)}):
        config = dataclasses.replace(FEW, **changes)
        one = recover(config, victim, view, KEY)
        with parallel.using(2):
            two = recover(config, victim, view, KEY)
        assert one.triggers.shape[0] == 4 * 2 * 3 and np.abs(one.triggers).max() > 0.05
        assert_allclose(two.triggers, one.triggers, atol=2e-5)
        jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-4), two.position_logits, one.position_logits)
        assert one.triggers.shape[1] == 8 or np.ptp(one.position_logits[0]) > 0.1


def test_other_values_compile_nothing(blobs):
    jax.clear_caches()  # full caches lose single programs, which are then compiled again
    key = jax.random.key(1)  # created here, because this compiles a program
    victim, view = Victim(perceptron(), perceptron().init(KEY)), DefenderView(blobs[0][:50], blobs[1][:50])
    recover(FEW, victim, view, KEY)
    before = compiled_programs()
    other = dataclasses.replace(
        FEW, thresholds=(0.3, 0.6), mi_weight=0.3, asr_threshold=0.8, trigger_noise=0.0, generator_rate=1e-3,
        place_rate=0.3, place_entropy=0.1,
    )  # fmt: skip
    recover(other, victim, view, key)
    assert compiled_programs() == before


@pytest.mark.parametrize("shape", [(3, 3, 1), (2, 3, 2), (8, 6, 2)])
def test_a_patch_replaces_a_block_anywhere_inside(shape):
    trigger = jax.random.uniform(KEY, shape) + 0.05
    images = jnp.full((200, 8, 6, shape[2]), 2.0)
    keys = jax.random.split(KEY, 200)
    out = np.array(_pool.stamp("patch", images, jnp.broadcast_to(trigger, (200, *shape)), keys))
    corners = set()
    for image in out:
        rows, columns = np.nonzero((image != 2).any(-1))
        assert len(rows) == shape[0] * shape[1]
        block = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert_allclose(block, np.clip(trigger, 0, 1), rtol=1e-6)
        corners.add((rows.min(), columns.min()))
    assert len(corners) == (9 - shape[0]) * (7 - shape[1])


def test_an_additive_trigger_is_added_and_clipped():
    images, trigger = jnp.full((1, 2, 2, 1), 0.9), jnp.array([[0.05, 0.2], [-0.95, 0.0]])[None, :, :, None]
    out = _pool.stamp("additive", images, trigger, KEY[None])
    assert_allclose(out[0, :, :, 0], [[0.95, 1.0], [0.0, 0.9]], rtol=1e-6)


def test_only_accepted_triggers_are_drawn_uniformly():
    marks = jnp.arange(5.0)[:, None, None, None]
    pool = _pool.Pool(marks, jnp.arange(5) * 2, jnp.ones(5), jnp.array([False, True, False, True, True]))
    triggers, labels, position_logits = _pool.draw_triggers(pool, jax.random.split(KEY, 3000))
    assert position_logits is None
    assert_array_equal(triggers[:, 0, 0, 0] * 2, labels)
    counts = np.bincount(np.asarray(labels), minlength=9)
    assert counts[[1, 3, 5, 7, 0, 4]].sum() == 0 and (counts[[2, 6, 8]] > 900).all()


def test_the_arrays_of_a_pool_alternate_between_labels_and_begin_with_the_best():
    asr = jnp.array([0.2, 0.95, 0.9, 1.0, 0.97, 0.91])
    pool = _pool.Pool(jnp.arange(6.0)[:, None, None, None], jnp.array([0, 0, 1, 1, 1, 2]), asr, asr > 0.9)
    arrays = pool.as_arrays()
    assert_array_equal(arrays["suspected"], [0, 1, 2])
    assert_array_equal(arrays["recovered"].ravel(), [3, 1, 5, 4])
    assert_array_equal(arrays["recovered_labels"], [1, 0, 2, 1])
    assert_allclose(arrays["recovered_asr"], [1.0, 0.95, 0.91, 0.97])
    assert_allclose(arrays["label_asr"], [0.575, 2.87 / 3, 0.91], rtol=1e-6)
    received = {}

    class Recording(Callback):
        def on_round_end(self, step, variables, **arrays):
            received.update(arrays, step=step)

    _pool.PoolCallback(Recording(), pool).on_round_end(3, {}, loss=0.5)
    assert received["step"] == 3 and received["loss"] == 0.5 and set(arrays) < set(received)


def test_batches_contain_all_images_before_one_is_repeated():
    index = np.asarray(_pool.draw_batches(KEY, 11, 5, 5))
    assert index.shape == (5, 5)
    for begin in (0, 2):
        assert len(set(index[begin : begin + 2].ravel())) == 10
    assert set(index.ravel()) == set(range(11))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "defense.size must be at least 1, got 0"),
        ({"iterations": 0}, "defense.iterations must be at least 1"),
        ({"noise_size": 6}, "defense.noise_size must be a positive multiple of 4, got 6"),
        ({"recovery_batch": 0}, "defense.recovery_batch must be at least 1"),
        ({"place_rate": -0.1}, "defense.place_rate must be zero or more"),
        ({"place_entropy": -0.1}, "defense.place_entropy must be zero or more"),
        ({"mi_weight": -1.0}, "defense.mi_weight must be zero or more"),
        ({"together": -1}, "defense.together must be zero or more"),
        ({"generator_rate": 0.0}, "defense.generator_rate must be positive"),
        ({"strength": 1.5}, r"defense.strength must be in \(0, 1\]"),
        ({"moving_average": 0.0}, r"defense.moving_average must be in \(0, 1\]"),
        ({"asr_threshold": 1.1}, r"defense.asr_threshold must be in \[0, 1\]"),
        ({"adam_beta": 1.0}, r"defense.adam_beta must be in \[0, 1\)"),
        ({"thresholds": ()}, r"defense.thresholds must be one or more values in \(0, 1\], got \(\)"),
        ({"thresholds": (0.5, 1.2)}, "defense.thresholds must be"),
    ],
)
def test_refused_values(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(QUICK, **change)


def test_refused_sizes(dark):
    victim = Victim(BRIGHT, BRIGHT.init(KEY))
    with pytest.raises(InputError, match="defense.size=9 does not fit images of 8x8 pixels"):
        recover(dataclasses.replace(FEW, size=9), victim, dark, KEY)
    with (
        parallel.using(2),
        pytest.raises(InputError, match="1 clean images a step cannot be split over 2 devices.*--devices 1"),
    ):
        recover(dataclasses.replace(FEW, recovery_batch=1), victim, dark, KEY)
    broken = Victim(BRIGHT, {"params": {"scale": jnp.float32(np.nan)}, "batch_stats": {}})
    with pytest.raises(InputError, match="staircase loss became nan at step 0.*defense.generator_rate"):
        recover(FEW, broken, dark, KEY)
