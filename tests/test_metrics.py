"""The rates by hand: what is counted, what is not, and how they relate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.metrics import accuracy, attack_success_rate


def ints(*values: int) -> jax.Array:
    return jnp.array(values, jnp.int32)


def test_accuracy_is_the_share_of_hits():
    rate = accuracy(ints(0, 1, 2, 3), ints(0, 1, 2, 0))
    assert rate == 0.75 and rate.shape == () and rate.dtype == jnp.float32


def test_masked_images_count_neither_above_nor_below_the_line():
    mask = jnp.array([True, False, True, True])
    assert accuracy(ints(0, 9, 1, 1), ints(0, 9, 1, 2), mask) == pytest.approx(2 / 3)


def test_asr_leaves_out_images_that_are_of_the_target_class_already():
    labels, predictions = ints(0, 0, 1, 2, 3), ints(0, 0, 0, 2, 0)
    assert attack_success_rate(predictions, jnp.zeros_like(labels), labels != 0) == pytest.approx(2 / 3)
    assert attack_success_rate(predictions, jnp.zeros_like(labels)) == pytest.approx(4 / 5)


def test_asr_of_an_all_to_all_attack_wants_the_next_label():
    labels = ints(0, 1, 2)
    assert attack_success_rate(ints(1, 2, 2), (labels + 1) % 3) == pytest.approx(2 / 3)


def test_jit_gives_the_same_whatever_the_mask():
    rng = np.random.default_rng(0)
    predictions, labels = (jnp.asarray(rng.integers(0, 3, 50), jnp.int32) for _ in range(2))
    jitted = jax.jit(accuracy)
    for mask in (labels == 0, labels != 0):
        counted = np.asarray(mask)
        expected = (np.asarray(predictions) == np.asarray(labels))[counted].mean()
        assert jitted(predictions, labels, mask) == pytest.approx(expected)


@pytest.mark.parametrize("rate", [accuracy, attack_success_rate])
def test_nothing_counted_is_not_a_number(rate):
    assert np.isnan(rate(ints(1, 2), ints(1, 2), jnp.array([False, False])))
    assert np.isnan(rate(ints(), ints()))


def test_the_two_conventions_of_asr_differ_by_the_target_class():
    """On balanced classes: ASR with the target class = (C - 1) / C * ASR without it + 1 / C * the target's accuracy."""
    classes, target = 5, 2
    labels = jnp.tile(jnp.arange(classes, dtype=jnp.int32), 20)
    predictions = jnp.asarray(np.random.default_rng(1).integers(0, classes, len(labels)), jnp.int32)
    wanted = jnp.full_like(labels, target)
    without = float(attack_success_rate(predictions, wanted, labels != target))
    of_target = float(accuracy(predictions, labels, labels == target))
    expected = (classes - 1) / classes * without + of_target / classes
    assert attack_success_rate(predictions, wanted) == pytest.approx(expected)
