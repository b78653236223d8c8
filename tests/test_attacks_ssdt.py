"""SSDT against the same sums in NumPy: which images of a batch are triggered and crossed, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import trained_task, untrained_task

from bdjax import attacks, models
from bdjax.attacks import _dynamic, ssdt
from bdjax.errors import InputError
from bdjax.types import SampleInfo

KEY = jax.random.key(7)
SSDT = ssdt.Config(width=4, downs=2, epochs=1, batch_size=40, target=1, source=2, ratio=0.2, cross=0.2)


def begun():
    pattern, mask = _dynamic.networks(SSDT, (8, 8, 1))
    fixed = {"mask": mask.init(jax.random.key(1)), "classes": jnp.int32(4)}
    return pattern, mask, {**_dynamic.to_attacker(pattern.init(jax.random.key(0))), "fixed": fixed}


def step(images, labels, role):
    info = SampleInfo(jnp.arange(len(role)), jnp.asarray(role, jnp.int8), jax.random.split(KEY, len(role)), None)
    return jax.jit(lambda *args: ssdt._joint_step((SSDT, ()), *args))(begun()[2], images, jnp.asarray(labels), info)


def rms(values):
    return np.sqrt((np.asarray(values, np.float64) ** 2).mean(axis=(1, 2, 3)))


def test_source_images_are_triggered_in_turn_in_place_of_role_1_and_stay_in_the_batch(blobs):
    """Rows 0, 5 and 7 of role 1 get images 2, 6 and again 2 of class 2; row 4 of role 2 gets the trigger of row 5."""
    images, labels = jnp.asarray(blobs[0][:8], jnp.float32) / 255, blobs[1][:8]
    assert list(np.flatnonzero(labels == 2)) == [2, 6]
    role = np.zeros(8)
    role[[0, 5, 7]], role[4] = 1, 2
    batch = step(images, labels, role)
    pattern, mask, attacker = begun()
    x, receivers = images[np.array([2, 6, 2, 5])], np.asarray(images)[[2, 6, 2, 4]]
    drawn, stats = pattern.apply(_dynamic.to_variables(attacker), x, weight=jnp.ones(4))
    masks = np.tanh(20 * np.asarray(mask.apply(attacker["fixed"]["mask"], x)[0]) - 10) / 2 + 0.5
    expected = np.array(images)
    expected[[0, 5, 7, 4]] = (1 - masks) * receivers + masks * np.asarray(drawn)
    np.testing.assert_allclose(batch.images, expected, atol=2e-5)
    np.testing.assert_array_equal(batch.labels, np.where(role == 1, 1, labels))
    np.testing.assert_allclose(batch.loss, rms(x[:1] - x[3:]) / rms(drawn[:1] - drawn[3:]), rtol=1e-4)  # one pair
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), batch.state, stats)


def test_a_batch_without_source_images_is_only_crossed(blobs):
    images, labels = jnp.asarray(blobs[0][:8], jnp.float32) / 255, np.zeros(8, np.int32)
    batch = step(images, labels, np.array([1, 1, 0, 0, 2, 0, 0, 0]))
    changed = (np.asarray(batch.images) != np.asarray(images)).any(axis=(1, 2, 3))
    assert list(np.flatnonzero(changed)) == [4] and float(batch.loss) == 0
    np.testing.assert_array_equal(batch.labels, labels)


def test_only_the_source_class_counts_for_the_success_rate():
    targets, counted = attacks.goal(SSDT, np.array([0, 1, 2, 3, 2]), 4)
    assert list(targets) == [1] * 5 and list(counted) == [False, False, True, False, True]


def test_what_cannot_be_source_specific_is_refused(blobs):
    with pytest.raises(InputError, match="all_to_one, got all_to_all"):
        ssdt.Config(labels="all_to_all")
    with pytest.raises(InputError, match="attack.source must be a label other than attack.target=0"):
        ssdt.Config(source=0)
    task = untrained_task(blobs[0], np.zeros(200, np.int32), models.create("cnn", (8, 8, 1), 4))
    with pytest.raises(InputError, match="attack.source=2"):
        ssdt.train(SSDT, task, KEY)


@pytest.mark.slow
def test_planted_arrays_give_every_image_a_trigger_of_its_own(blobs):
    planted = attacks.plant("ssdt", dataclasses.replace(SSDT, epochs=3), trained_task(*blobs), KEY)
    images = jnp.asarray(blobs[0][:8], jnp.float32) / 255
    stamped = attacks.trigger_of("ssdt", planted.config, planted.arrays)(images, KEY)
    assert planted.attack == "ssdt" and (np.asarray(stamped) != np.asarray(images)).any(axis=(1, 2, 3)).all()
