"""IAD against the same sums in NumPy: what a step makes of a batch, what the networks learn by."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import trained_task

from bdjax import attacks, models
from bdjax.attacks import _dynamic, _generators, iad
from bdjax.engine import capacity
from bdjax.engine.step import roles
from bdjax.types import SampleInfo

KEY = jax.random.key(7)
IAD = iad.Config(width=4, downs=2, epochs=1, batch_size=40, target=1)


def place_of(role):
    return SampleInfo(jnp.arange(len(role)), jnp.asarray(role, jnp.int8), jax.random.split(KEY, len(role)), None)


def begun(config, shape, seed=0):
    """G and M of a Config, freshly drawn, as the joint step gets them: (G, M, attacker)."""
    pattern, mask = _dynamic.networks(config, shape)
    keys = jax.random.split(jax.random.key(seed))
    fixed = {"mask": mask.init(keys[1]), "classes": jnp.int32(4)}
    return pattern, mask, {**_dynamic.to_attacker(pattern.init(keys[0])), "fixed": fixed}


def rms(values):
    return np.sqrt((np.asarray(values, np.float64) ** 2).mean(axis=(1, 2, 3)))


def test_masks_are_almost_binary():
    drawn = _dynamic.threshold(jnp.array([0.0, 0.45, 0.5, 0.55, 1.0]))
    np.testing.assert_allclose(drawn, [0, 0.1192029, 0.5, 0.8807971, 1], atol=1e-6)


def test_diversity_is_the_mean_quotient_of_the_pairs_that_count_and_has_a_gradient_where_patterns_agree():
    x, z, p, q = np.random.default_rng(0).random((4, 5, 6, 7, 3)).astype(np.float32)
    counts = np.array([True, False, True, True, False])
    expected = (rms(x - z) / (rms(p - q) + 1e-7))[counts].mean()
    np.testing.assert_allclose(_dynamic.diversity_of(x, z, p, q, jnp.asarray(counts)), expected, rtol=1e-5)
    assert float(_dynamic.diversity_of(x, z, p, q, jnp.zeros(5, bool))) == 0
    gradient = jax.grad(lambda p: _dynamic.diversity_of(x, z, p, q, jnp.asarray(counts)))
    assert bool(jnp.isfinite(gradient(jnp.asarray(q))).all()) and bool((gradient(jnp.asarray(p))[1] == 0).all())


@pytest.mark.parametrize("labels", ["all_to_one", "all_to_all"])
def test_a_step_triggers_its_share_crosses_its_share_and_leaves_the_rest(blobs, labels):
    """Places 4 and 9 of role 1, 3, 6 and 11 of role 2, whose neighbours are 2, 7 and 10."""
    config = dataclasses.replace(IAD, labels=labels, ratio=0.2, cross=0.3)
    images, before = jnp.asarray(blobs[0][:12], jnp.float32) / 255, blobs[1][:12]
    role = np.zeros(12)
    own, others, givers = [4, 9], [3, 6, 11], [2, 7, 10]
    role[own], role[others] = 1, 2
    pattern, mask, attacker = begun(config, (8, 8, 1))
    batch = jax.jit(lambda *args: iad._joint_step((config, ()), *args))(
        attacker, images, jnp.asarray(before), place_of(role)
    )
    x = images[np.array(own + givers)]
    variables = {"params": attacker["params"], "batch_stats": attacker["state"]}
    drawn, stats = pattern.apply(variables, x, weight=jnp.ones(5))  # without the places that stand for nothing
    masks = np.tanh(20 * np.asarray(mask.apply(attacker["fixed"]["mask"], x)[0]) - 10) / 2 + 0.5
    expected, drawn = np.array(images), np.asarray(drawn)
    for info, p, m in zip(own + others, drawn, masks, strict=True):
        expected[info] = (1 - m) * expected[info] + m * p
    np.testing.assert_allclose(batch.images, expected, atol=2e-5)
    assert (np.asarray(batch.images) != np.asarray(images)).any(axis=(1, 2, 3)).sum() == 5
    after = before.copy()
    after[own] = 1 if labels == "all_to_one" else (before[own] + 1) % 4
    np.testing.assert_array_equal(batch.labels, after)
    apart = rms(x[:2] - x[2:4]) / rms(drawn[:2] - drawn[2:4])
    np.testing.assert_allclose(batch.loss, apart.mean(), rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), batch.state, stats)


@pytest.mark.slow
def test_images_of_the_target_class_are_left_as_they_are_when_asked(blobs):
    config = dataclasses.replace(IAD, exclude_target=True)
    images, labels = jnp.asarray(blobs[0][:20], jnp.float32) / 255, jnp.asarray(blobs[1][:20])
    batch = iad._joint_step((config, ()), begun(config, (8, 8, 1))[2], images, labels, place_of([1, 1] + [0] * 18))
    changed = (np.asarray(batch.images) != np.asarray(images)).any(axis=(1, 2, 3))
    assert list(np.flatnonzero(changed)) == [0] and labels[1] == 1 and float(batch.loss) == 0  # no pair


def test_an_epoch_holds_exactly_its_shares_and_no_batch_on_any_device_more_than_its_capacity():
    rng = np.random.default_rng(0)
    for trial in range(300):
        ratio = rng.choice([0.1, 0.05, 0.25, 0.5]) if trial % 2 else rng.uniform(0.01, 0.99)
        cross = min(ratio, 1 - ratio) if trial % 3 else rng.uniform(0, 1 - ratio)
        batch, devices, steps = int(rng.integers(1, 40)), int(rng.choice([1, 2, 4])), int(rng.integers(1, 30))
        cut = roles((ratio, cross), steps * batch * devices).reshape(steps * devices, batch)
        for role, share in ((1, ratio), (2, cross)):
            found = (cut == role).sum(1)
            assert found.max() <= capacity(share, batch), (ratio, cross, batch, devices, steps)
            assert found.sum() == int(share * cut.size + 1e-6)


@pytest.mark.slow
def test_a_batch_as_full_as_its_capacity_is_triggered_whole(blobs):
    config, images = dataclasses.replace(IAD, ratio=0.1, cross=0.1), jnp.asarray(blobs[0][:30], jnp.float32) / 255
    most = capacity(0.1, 30)
    role = [1] * most + [2] * most + [0] * (30 - 2 * most)
    batch = iad._joint_step(
        (config, ()), begun(config, (8, 8, 1))[2], images, jnp.full(30, 2, jnp.int32), place_of(role)
    )
    changed = (np.asarray(batch.images) != np.asarray(images)).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(changed, np.array(role) > 0)
    np.testing.assert_array_equal(batch.labels, np.where(np.array(role) == 1, 1, 2))


def test_the_mask_network_learns_by_the_sum_of_the_paper(blobs):
    images = jnp.asarray(blobs[0][:9], jnp.float32) / 255
    mask = _dynamic.networks(IAD, (8, 8, 1))[1]
    variables = mask.init(KEY)
    setting = dataclasses.replace(IAD, sparsity=3.0, diversity=0.5, density=0.2), ()
    attacker = _dynamic.to_attacker(variables)
    batch = _dynamic.mask_step(setting, attacker, images, jnp.zeros(9, jnp.int32), place_of([0] * 9))
    masks = np.tanh(20 * np.asarray(mask.apply(variables, images, weight=jnp.ones(9))[0]) - 10) / 2 + 0.5
    mates = np.array([1, 0, 3, 2, 5, 4, 7, 6, 7])
    apart = rms(images - images[mates]) / rms(masks - masks[mates])
    np.testing.assert_allclose(batch.loss, 3 * np.maximum(masks - 0.2, 0).mean() + 0.5 * apart.mean(), rtol=1e-4)
    np.testing.assert_array_equal(batch.images, images)


@pytest.mark.slow
def test_masks_become_sparse_and_patterns_differ(blobs):
    planted = attacks.plant("iad", dataclasses.replace(IAD, epochs=12), trained_task(*blobs), KEY)
    images = jnp.asarray(blobs[0][:20], jnp.float32) / 255
    pattern, mask = _dynamic.networks(IAD, (8, 8, 1))
    area = _dynamic.threshold(mask.apply(_generators.unflatten_variables("mask", planted.arrays), images)[0]).mean()
    drawn = pattern.apply(_generators.unflatten_variables("pattern", planted.arrays), images)[0]
    assert 0 < float(area) < 0.1 and rms(drawn[:10] - drawn[10:]).min() > 0.01
    assert planted.poison is None and jax.tree.structure(planted.variables["params"]).num_leaves == 2


def test_networks_have_the_authors_sizes():
    """G for CIFAR-10: 13 convolutions of 3x3 without biases, which batch normalisation (2 a channel) takes away."""
    net = models.autoencoder((32, 32, 3), 3, 32, 3)
    pairs = [(3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 128)]
    pairs += [(128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (32, 3)]
    params = jax.tree.leaves(jax.eval_shape(net.init, KEY)["params"])
    assert sum(np.prod(leaf.shape) for leaf in params) == sum(9 * a * b + 2 * b for a, b in pairs)
    small = _dynamic.networks(iad.Config(), (28, 28, 1))[0]
    assert jax.eval_shape(small.init, KEY)["params"]["Conv_0"]["kernel"].shape == (3, 3, 1, 16)


def test_nobody_among_the_images_leaves_the_statistics_alone():
    net = models.autoencoder((8, 8, 1), 1, 4, 1)
    variables = net.init(KEY)
    _, stats = net.apply(variables, jnp.ones((3, 8, 8, 1)), weight=jnp.zeros(3))
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])
