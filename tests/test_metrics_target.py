"""CTCA, AGE's score and detection rates, against values computed by hand and published values."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic_results import PAPERS

from bdjax.metrics import accuracy, anomaly_index, class_accuracy, ctca, detection, score


def ints(*values: int) -> jax.Array:
    return jnp.array(values, jnp.int32)


def test_ctca_counts_only_images_of_the_target_class():
    labels, predictions = ints(2, 2, 2, 0, 1, 1), ints(2, 0, 2, 2, 1, 0)
    assert jax.jit(ctca)(predictions, labels, 2) == pytest.approx(2 / 3)
    assert ctca(predictions, labels, 0) == 0 and ctca(predictions, labels, 1) == 0.5
    assert np.isnan(ctca(predictions, labels, 3))


def test_accuracy_by_class_averages_to_the_accuracy():
    rng = np.random.default_rng(0)
    labels, predictions = (jnp.asarray(rng.integers(0, 4, 100), jnp.int32) for _ in range(2))
    found = jax.jit(class_accuracy, static_argnums=2)(predictions, labels, 5)
    assert found.shape == (5,) and found.dtype == jnp.float32 and np.isnan(found[4])
    np.testing.assert_allclose(found[:4], [ctca(predictions, labels, c) for c in range(4)], rtol=1e-6)
    weights = np.bincount(labels, minlength=4) / 100
    assert float((found[:4] * weights).sum()) == pytest.approx(float(accuracy(predictions, labels)))


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ((0.0, 0.9, 0.7, 0.7), 1.0),  # as good as retraining
        ((0.9, 0.9, 0.7, 0.7), 0.0),  # the backdoor is there as before
        ((0.1, 0.8, 0.6, 0.75), 0.7),
        ((1.0, 0.8, 0.6, 0.6), -0.25),  # worse than before
        ((0.0, 0.9, 0.8, 0.4), 2.0),
    ],
)
def test_the_score_by_hand(rates, expected):
    found = jax.jit(score)(*map(jnp.float32, rates))
    assert found == pytest.approx(expected, abs=1e-6) and found.dtype == jnp.float32


def test_the_score_without_a_backdoor_or_a_reference_is_undefined():
    assert np.isnan(score(*map(jnp.float32, (0.0, 0.0, 0.5, 0.5)))) and np.isnan(
        score(*map(jnp.float32, (0.0, 0.9, 0.5, 0.0)))
    )
    gradient = jax.grad(score)(*map(jnp.float32, (0.1, 0.0, 0.5, 0.5)))
    assert np.isfinite(gradient)


def test_the_score_of_the_published_means_is_near_the_published_score():
    """Table 6, whose retrained model has ACC 70.27; the paper averages over runs, hence the point."""
    rows = list(csv.DictReader((PAPERS / "age.csv").read_text(encoding="utf-8").splitlines()))
    victim = next(float(r["value"]) for r in rows if r["table"] == "3" and r["metric"] == "ASR")
    table = [r for r in rows if r["table"] == "6" and r["defense"] != "Retraining"]
    checked = 0
    for setting in {(r["defense"], r["defense_setting"]) for r in table}:
        own = {r["metric"]: float(r["value"]) for r in table if (r["defense"], r["defense_setting"]) == setting}
        found = 100 * float(score(*map(jnp.float32, (own["ASR"], victim, own["ACC"], 70.27))))
        assert found == pytest.approx(own["SCORE"], abs=1.2), setting
        checked += 1
    assert checked == 12


def test_anomaly_index_by_hand():
    """Median 3, deviations 2 1 0 1 7: their median is 1. A NaN is left out."""
    found = jax.jit(anomaly_index)(jnp.array([1.0, 2.0, 3.0, 4.0, jnp.nan, 10.0]))
    expected = np.array([-2, -1, 0, 1, np.nan, 7]) / 1.4826
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    among_equals = anomaly_index(jnp.array([0.5, 0.5, 0.5, 0.9]))
    np.testing.assert_allclose(among_equals, [0, 0, 0, 0.4 / (1.2533 * 0.1)], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(anomaly_index(jnp.full(4, 0.3)), 0)


def test_anomaly_index_of_normal_numbers_is_their_standard_score():
    values = 2 + 3 * jax.random.normal(jax.random.key(0), (20_000,))
    assert float(anomaly_index(values).std()) == pytest.approx(1, abs=0.02)


def test_verdicts_by_hand():
    """Models: right target; wrong one; all-to-all; missed; clean, spared; clean, accused."""
    named, targets = ints(2, 3, 5, 1, 4, 0), ints(2, 1, -1, 1, -1, -1)
    called = jnp.array([True, True, True, False, False, True])
    poisoned = jnp.array([True, True, True, True, False, False])
    found = jax.jit(detection)(named, called, targets, poisoned)
    assert [float(share) for share in found] == pytest.approx([2 / 3, 3 / 4, 1 / 2, 5 / 8])
    only = detection(named[:4], called[:4], targets[:4], poisoned[:4])
    assert np.isnan(only.clean) and np.isnan(only.balanced) and only.poisoned == 0.75
