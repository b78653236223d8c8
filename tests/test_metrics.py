"""Accuracy, ASR and the similarity of triggered images, against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.metrics import accuracy, attack_success_rate, distance, psnr, ssim, ssim_window


def ints(*values: int) -> jax.Array:
    return jnp.array(values, jnp.int32)


def test_accuracy_is_the_share_of_hits():
    rate = accuracy(ints(0, 1, 2, 3), ints(0, 1, 2, 0))
    assert rate == 0.75 and rate.shape == () and rate.dtype == jnp.float32


def test_masked_images_count_in_neither_numerator_nor_denominator():
    mask = jnp.array([True, False, True, True])
    assert accuracy(ints(0, 9, 1, 1), ints(0, 9, 1, 2), mask) == pytest.approx(2 / 3)


def test_asr_excludes_images_of_the_target_class():
    labels, predictions = ints(0, 0, 1, 2, 3), ints(0, 0, 0, 2, 0)
    assert attack_success_rate(predictions, jnp.zeros_like(labels), labels != 0) == pytest.approx(2 / 3)
    assert attack_success_rate(predictions, jnp.zeros_like(labels)) == pytest.approx(4 / 5)


def test_asr_of_an_all_to_all_attack_uses_the_next_label():
    labels = ints(0, 1, 2)
    assert attack_success_rate(ints(1, 2, 2), (labels + 1) % 3) == pytest.approx(2 / 3)


def test_jit_agrees_for_any_mask():
    rng = np.random.default_rng(0)
    predictions, labels = (jnp.asarray(rng.integers(0, 3, 50), jnp.int32) for _ in range(2))
    jitted = jax.jit(accuracy)
    for mask in (labels == 0, labels != 0):
        counted = np.asarray(mask)
        expected = (np.asarray(predictions) == np.asarray(labels))[counted].mean()
        assert jitted(predictions, labels, mask) == pytest.approx(expected)


@pytest.mark.parametrize("rate", [accuracy, attack_success_rate])
def test_rates_of_no_images_are_nan(rate):
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


def pair(*shape: int, noise: float = 0.1) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(2)
    clean = rng.random(shape, np.float32)
    return jnp.asarray(clean), jnp.asarray(np.clip(clean + noise * rng.standard_normal(shape), 0, 1), jnp.float32)


def ssim_by_loops(a: np.ndarray, b: np.ndarray, side: int) -> float:
    """The definition, window by window, in float64."""
    at = np.arange(side) - side // 2
    weights = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for channel in range(a.shape[2]):
        for i in range(a.shape[0] - side + 1):
            for j in range(a.shape[1] - side + 1):
                x, y = (v[i : i + side, j : j + side, channel].astype(float) for v in (a, b))
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                cov = (weights * (x - mx) * (y - my)).sum()
                values.append(
                    (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
                )  # fmt: skip
    return float(np.mean(values))


@pytest.mark.parametrize(
    ("shape", "side"), [((32, 32, 3), 11), ((28, 28, 1), 11), ((11, 13, 1), 11), ((10, 16, 3), 9), ((8, 8, 1), 7)]
)
def test_ssim_is_its_definition(shape, side):
    assert ssim_window(*shape[:2]) == side
    clean, triggered = pair(3, *shape)
    expected = [ssim_by_loops(np.asarray(a), np.asarray(b), side) for a, b in zip(clean, triggered, strict=True)]
    for function in (ssim, jax.jit(ssim)):
        np.testing.assert_allclose(function(clean, triggered), expected, atol=2e-6)


def test_ssim_of_flat_images_compares_their_means():
    found = ssim(jnp.full((1, 16, 16, 3), 0.2), jnp.full((1, 16, 16, 3), 0.6))
    assert found == pytest.approx(
        (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-4
    )  # float32 sees a variance of 1e-7 there


def test_ssim_of_an_image_with_itself_and_its_negative():
    clean, _ = pair(2, 16, 16, 1)
    np.testing.assert_allclose(ssim(clean, clean), 1, atol=1e-6)
    assert (ssim(clean, 1 - clean) < 0).all()


def test_ssim_window_is_odd_and_fits():
    assert [ssim_window(side, 40) for side in (1, 2, 3, 10, 11, 12, 40)] == [1, 1, 3, 9, 11, 11, 11]


def test_psnr_and_norms_by_hand():
    """12 values of which two differ, by 0.5 and 0.1; and nothing at all."""
    clean = jnp.full((2, 2, 2, 3), 0.25)
    triggered = clean.at[0, 0, 0, 0].set(0.75).at[0, 1, 1, 2].set(0.15)
    l2, linf = jax.jit(distance)(clean, triggered)
    np.testing.assert_allclose(l2, [0.26**0.5, 0], atol=1e-6)
    np.testing.assert_allclose(linf, [0.5, 0], atol=1e-6)
    decibel = jax.jit(psnr)(clean, triggered)
    assert decibel[0] == pytest.approx(-10 * np.log10(0.26 / 12), abs=1e-4)
    assert np.isposinf(decibel[1]) and decibel.dtype == jnp.float32
