"""TAC, CKA, BEC, t-SNE and silhouettes: against values computed by hand and by other formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import models
from bdjax.engine import activation_changes, activations, feature_map_names
from bdjax.metrics import bec, bec_sigmoid, linear_cka, silhouette, tac, tsne


def features(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cka_of_features(x: np.ndarray, y: np.ndarray) -> float:
    """||Y^T X||^2 / (||X^T X|| ||Y^T Y||), in float64."""
    x, y = (v.reshape(len(v), -1).astype(np.float64) for v in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    return norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


@pytest.mark.parametrize("shape", [(40, 7), (12, 5, 5, 3)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_cka_is_the_formula_on_features(shape, offset):
    x = features(*shape) + np.float32(offset)
    y = x + 3 * features(*shape, seed=1)
    expected = cka_of_features(x, y)
    assert 0.1 < expected < 0.9
    assert linear_cka(jnp.asarray(x), jnp.asarray(y)) == pytest.approx(expected, abs=1e-5)


def test_cka_of_different_widths_and_of_unrelated_features():
    x, y = features(4000, 3), features(4000, 5, seed=1)
    assert linear_cka(jnp.asarray(x), jnp.asarray(y)) == pytest.approx(cka_of_features(x, y), abs=1e-6)
    assert linear_cka(jnp.asarray(x), jnp.asarray(y)) < 0.01


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cka_is_invariant_to_rotation_scaling_and_translation(scale):
    x, y = features(30, 6), features(30, 6) + features(30, 6, seed=1)
    turn, _ = np.linalg.qr(features(6, 6, seed=2))
    before = float(linear_cka(jnp.asarray(x), jnp.asarray(y)))
    after = jax.jit(linear_cka)(jnp.asarray((x @ turn + 3) * np.float32(scale)), jnp.asarray(y))
    assert after == pytest.approx(before, abs=1e-5) and before < 0.95


def test_cka_is_one_for_equals_and_zero_for_a_constant():
    x = jnp.asarray(features(30, 4, 4, 2))
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-6) and linear_cka(x, x) <= 1
    for constant in (x * 0, x * 0 - 1e20, jnp.tile(x[:1], (30, 1, 1, 1)) + 0.1):
        assert linear_cka(x, constant) == 0 == linear_cka(constant, constant)
    assert linear_cka(x.astype(jnp.bfloat16), x) == pytest.approx(1, abs=1e-3)


def test_cka_propagates_nan():
    x = jnp.asarray(features(5, 3))
    assert np.isnan(linear_cka(x.at[2, 1].set(jnp.nan), x))


def test_tac_by_hand():
    """Two images of 1x2 pixels and three channels: changes (3, 4) and (0, 0), (1, 0) and (0, -1), none."""
    clean = jnp.asarray(features(2, 1, 2, 3))
    change = np.zeros((2, 1, 2, 3), np.float32)
    change[0, 0, :, 0], change[0, 0, :, 1], change[1, 0, :, 1] = (3, 4), (1, 0), (0, -1)
    np.testing.assert_allclose(jax.jit(tac)(clean, clean + change), [2.5, 1, 0], atol=1e-6)
    np.testing.assert_allclose(tac(clean[:, 0, 0], clean[:, 0, 0] + change[:, 0, 0]), [1.5, 0.5, 0], atol=1e-6)


def test_bec_anchors_and_clipping():
    clean = jnp.array([0.5, 0.6, 0.9999])
    found = jax.jit(bec)(jnp.array([0.9, 0.4, 1.0]), clean)
    np.testing.assert_allclose(found.layers, [0.8, -0.5, 0.1], atol=1e-4)
    assert found.clipped == 1 and found.mean == pytest.approx(0.4 / 3, abs=1e-4)
    assert bec(jnp.ones(2), clean[:2]).mean == 1 and bec(jnp.ones(2), clean[:2]).clipped == 0
    assert bec(clean, clean).mean == 0


def test_sigmoid_of_bec():
    np.testing.assert_allclose(bec_sigmoid(jnp.array([0.0, 0.5, 1.0])), [0.0066929, 0.5, 0.9933071], atol=1e-6)
    assert bec_sigmoid(jnp.float32(2), 1.0, 0.0) == pytest.approx(1 / (1 + np.exp(-2)))


def test_silhouette_by_hand():
    """0, 1 against 10, 11: a is 1; b 10.5 and 9.5. A group of one is ignored; a single group has none."""
    points, groups = np.array([[0.0], [1], [10], [11], [99]]), np.array([0, 0, 1, 1, 2])
    assert silhouette(points, groups) == pytest.approx((9.5 / 10.5 + 8.5 / 9.5) / 2)
    assert silhouette(points[[0, 1, 4]], groups[[0, 1, 4]]) is None and silhouette(points[:0], groups[:0]) is None


def test_tsne_separates_distant_groups_and_depends_on_its_seed():
    x = features(40, 60)
    x[20:] += 30
    at = tsne(x, 3)
    assert at.shape == (40, 2) and at.dtype == np.float32
    assert silhouette(at, np.arange(40) < 20) > 0.5
    np.testing.assert_array_equal(at, tsne(x, 3))
    assert not tsne(np.ones((12, 5), np.float32)).any()


def test_layers_are_in_the_order_of_the_network():
    model = models.create("small_vgg", (8, 8, 3), 4)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    assert feature_map_names(model, variables) == (
        "conv1", "conv2", "block1", "conv3", "conv4", "block2", "conv5", "conv6", "block3",
    )  # fmt: skip


def test_activations_and_changes_of_parts_are_those_of_the_whole():
    """15 images in batches of 4, the last of them padded."""
    model = models.create("cnn", (8, 8, 1), 4)
    variables = model.init(jax.random.key(0))
    clean = np.random.default_rng(0).integers(0, 256, (15, 8, 8, 1), np.uint8)
    triggered = clean.copy()
    triggered[:, -2:, -2:] = 255
    (_, before, _), (_, after, _) = (
        model.apply(variables, jnp.asarray(x / 255, jnp.float32)) for x in (clean, triggered)
    )
    found = activation_changes(model, variables, clean, triggered, batch_size=4)
    assert list(found) == ["block1", "block2", "block3"]
    for name, values in found.items():
        by_hand = np.sqrt(((np.asarray(after[name], float) - np.asarray(before[name])) ** 2).sum((1, 2))).mean(0)
        np.testing.assert_allclose(values, by_hand, atol=1e-5)
    chosen = {"block2": np.array([30, 2], np.int32)}
    inside, last = activations(model, variables, clean, chosen, batch_size=4)
    np.testing.assert_allclose(inside["block2"], np.asarray(before["block2"])[..., [30, 2]], atol=1e-5)
    np.testing.assert_allclose(last, before["flat"], atol=1e-5)
