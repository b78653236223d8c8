"""CLP, BNP and EP against values computed by hand or by NumPy; refused inputs; common networks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import large_are_slow, perceptron
from numpy.testing import assert_allclose, assert_array_equal
from pruned import KEY, MODEL, Seen, victim_of

from bdjax import models, registry
from bdjax.defenses import _outliers, anp, bnp, clp, ep, fine_pruning, fst, rnp
from bdjax.errors import InputError
from bdjax.types import DefenderView, Victim

NORMED = (anp, bnp, clp, ep, rnp)


@pytest.fixture(scope="module")
def victim(blobs):
    return victim_of(blobs)


def norm_input(victim, images):
    """Input of the normalisation, computed by the convolution alone: float32 [N, 8, 8, 6]."""
    conv = victim.variables["params"]["conv"]
    x = jnp.asarray(images, jnp.float32) / 255
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, conv["kernel"], (1, 1), "SAME", dimension_numbers=layout) + conv["bias"]


# --- which convolution a normalisation follows


def paired_norms(name):
    spec = registry.load("models", name)
    least = max(8, spec.smallest)
    model = models.create(name, (least, least, 3), 10)
    pairs, like = models.norm_kernels(model), jax.eval_shape(model.init, KEY)
    leaves = models.kernels(like["params"])
    for norm, kernel in pairs.items():
        assert leaves[kernel].ndim == 4 and leaves[kernel].shape[-1:] == leaves[f"{norm}/scale"].shape
    return pairs, sum(path.endswith("/var") for path in models.kernels(like["batch_stats"]))


def test_every_normalisation_of_a_plain_network_is_paired_with_its_convolution():
    pairs, norms = paired_norms("cnn")  # with pooling in between
    assert pairs == {f"BatchNorm_{i}": f"Conv_{i}/kernel" for i in range(3)} and norms == 3
    assert models.norm_kernels(MODEL) == {"norm": "conv/kernel"} and models.norm_kernels(perceptron()) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small_vgg", "resnet18", "vgg16_bn", "mobilenet_v2", "resnet", "googlenet"])
def test_every_normalisation_after_a_convolution_is_paired(name):
    pairs, norms = paired_norms(name)
    assert len(pairs) == norms == len(set(pairs.values()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("preact_resnet18", 8), ("wide_resnet", 6), ("senet18", 9)])
def test_only_the_second_normalisation_of_a_preactivation_block_is_paired(name, number):
    pairs, norms = paired_norms(name)
    assert len(pairs) == number < norms
    if name == "wide_resnet":
        assert set(pairs) == {f"block{i}.layer.{j}.bn2" for i in (1, 2, 3) for j in (0, 1)}
        assert all(kernel == f"{norm.removesuffix('bn2')}conv1/kernel" for norm, kernel in pairs.items())


# --- clp


def test_lipschitz_bound_is_the_largest_singular_value_of_each_channel():
    rng = np.random.default_rng(2)
    kernel, scale = rng.normal(size=(3, 3, 5, 7)).astype(np.float32), rng.normal(size=7).astype(np.float32)
    variance = rng.uniform(0.1, 2, 7).astype(np.float32)
    for channel, found in enumerate(clp.lipschitz_bounds(kernel, scale, variance)):
        matrix = np.array([[kernel[i, j, c, channel] for i in range(3) for j in range(3)] for c in range(5)], float)
        largest = math.sqrt(np.linalg.eigvalsh(matrix @ matrix.T)[-1])
        assert found == pytest.approx(largest * abs(scale[channel]) / math.sqrt(variance[channel]), rel=1e-6)
    assert_allclose(
        clp.lipschitz_bounds(np.ones((3, 3, 4, 1)), np.array([-2.0]), np.array([4.0])), [6.0]
    )  # of rank one: 36 ones
    assert_allclose(
        clp.lipschitz_bounds(np.full((3, 3, 1, 1), 2.0), np.ones(1), np.ones(1)), [6.0]
    )  # of a depthwise one


def test_clp_zeroes_scale_and_bias_of_outliers_only(victim):
    params = victim.variables["params"]
    kernel = jnp.ones_like(params["conv"]["kernel"]).at[..., 4].mul(50.0)
    own = {**victim.variables, "params": {**params, "conv": {**params["conv"], "kernel": kernel}}}
    callback = Seen()
    view = DefenderView(np.zeros((1, 8, 8, 1), np.uint8), np.zeros(1, np.int32), callback)
    cleaned = clp.purify(clp.Config(u=1.5), Victim(MODEL, own), view, KEY)
    others = np.arange(6) != 4
    for leaf in ("scale", "bias"):
        assert_array_equal(cleaned["params"]["norm"][leaf], np.where(others, params["norm"][leaf], 0))
    assert_array_equal(cleaned["params"]["conv"]["kernel"], kernel)
    assert callback.rounds[0][2] == {"pruned": 1}
    untouched = clp.purify(clp.Config(), Victim(MODEL, own), view, KEY)  # 6 channels: at most 5 / sqrt(6) = 2.04
    jax.tree.map(assert_array_equal, untouched, own)


def test_outliers_are_above_the_mean_by_the_sample_standard_deviation():
    measure = np.array([1.0, 2.0, 3.0, 10.0])  # mean 4, deviation sqrt(50 / 3) = 4.0825
    assert_array_equal(_outliers.is_outlier(measure, 6 / 4.09), [False, False, False, True])
    assert not _outliers.is_outlier(measure, 6 / 4.08).any()  # with n instead of n - 1 it is 3.54, and 10 is an outlier
    assert_array_equal(
        _outliers.is_outlier(np.array([1.0, 2, 3, 10, np.nan]), 6 / 4.09), [False, False, False, True, False]
    )
    assert (
        not _outliers.is_outlier(np.array([np.inf, 1.0]), 0.0).any() and not _outliers.is_outlier(np.ones(4), 0.0).any()
    )


# --- bnp


def test_kl_divergence_of_two_normal_distributions():
    assert_allclose(bnp.kl_divergence([0.0], [1.0], [1.0], [4.0]), [math.log(2) + 2 / 8 - 0.5])
    x = np.linspace(-30, 30, 400_001)

    def density(mean, variance):
        return np.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)

    ours, stored = density(0.3, 2.25), density(-0.5, 0.81)
    integral = np.trapezoid(ours * ((0.81**-1 * (x + 0.5) ** 2 - (x - 0.3) ** 2 / 2.25) / 2 + math.log(0.9 / 1.5)), x)
    assert stored.max() > 0 and bnp.kl_divergence([0.3], [2.25], [-0.5], [0.81])[0] == pytest.approx(integral, rel=1e-6)
    assert_array_equal(bnp.kl_divergence([1.0], [0.0], [1.0], [0.0]), [0.0])  # a dead channel


def test_bnp_prunes_the_channel_whose_clean_statistics_differ_from_the_running_ones(victim, blobs):
    images = blobs[0][:130]  # two parts, of 100 and 30
    x = np.asarray(norm_input(victim, images), np.float64)
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    found = bnp.norm_input_moments(MODEL, victim.variables, images)
    assert_allclose(found["norm"][0], mean, rtol=1e-4, atol=1e-6)
    assert_allclose(found["norm"][1], variance, rtol=1e-4)
    stats = {"mean": jnp.asarray(mean, jnp.float32).at[2].add(0.5), "var": jnp.asarray(variance, jnp.float32)}
    own = {**victim.variables, "batch_stats": {"norm": stats}}
    cleaned = bnp.purify(bnp.Config(u=1.9), Victim(MODEL, own), DefenderView(images, blobs[1][:130]), KEY)
    before = victim.variables["params"]["norm"]
    assert_array_equal(cleaned["params"]["norm"]["scale"], np.where(np.arange(6) != 2, before["scale"], 0))
    assert_array_equal(cleaned["params"]["norm"]["bias"], before["bias"])


# --- ep


def naive_entropy(values, width):
    """Entropy as in the release: bins open at both ends, the incomplete last one not counted."""
    z = (values - values.mean(0)) / values.std(0, ddof=1)
    least, found = z.min(), np.zeros(z.shape[1])
    for n in range(int((z.max() - least) / width)):
        share = ((z > least + n * width) & (z < least + (n + 1) * width)).mean(0)
        found -= np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0)
    return found


def test_entropies_use_open_bins_over_the_range_of_the_layer():
    values = np.random.default_rng(3).normal(size=(200, 5)) * [1, 2, 3, 4, 5]
    for width in (0.01, 0.1, 0.7):
        assert_allclose(ep.entropies(values, width), naive_entropy(values, width), atol=1e-9)
    # z = ±0.866: bins of 1.5 from -0.866 contain only edges and values beyond the last whole bin
    assert_array_equal(ep.entropies([[0.0], [1.0], [0.0], [1.0]], 1.5), [0.0])
    # z = (-1.5, -0.5, 0, 0.5, 1.5) / 1.118: four shares of 1/5, two of them in one bin; the least is an edge
    five = np.array([[-1.5], [-0.5], [0.0], [0.5], [1.5]])
    expected = -(0.4 * math.log(0.4) + 0.2 * math.log(0.2))
    assert_allclose(ep.entropies(five, 1.2 / math.sqrt(1.25)), [expected])
    constant = np.column_stack([values[:, 0], np.full(200, 3.0)])
    assert np.isnan(ep.entropies(constant, 0.1)[1]) and np.isfinite(ep.entropies(constant, 0.1)[0])


def test_ep_prunes_the_channel_that_the_trigger_splits(victim, blobs):
    """Channel 3 copies the pixel value, which the trigger makes forty times as bright."""
    params = victim.variables["params"]
    kernel = jnp.asarray(np.random.default_rng(4).normal(0, 1, (3, 3, 1, 6)), jnp.float32)
    kernel = kernel.at[..., 3].set(0.0).at[1, 1, 0, 3].set(1.0)
    own = {**victim.variables, "params": {**params, "conv": {"kernel": kernel, "bias": jnp.zeros(6)}}}
    images = (blobs[0] // 8).astype(np.uint8)

    def trigger(images, key):
        return images.at[:, ::2, ::2].set(40.0)  # outside the range of pixels, so that only one channel separates them

    view = DefenderView(images, blobs[1], trigger=trigger)
    config = ep.Config(u=0.0, bin_width=0.05)
    cleaned = ep.purify(config, Victim(MODEL, own), view, KEY)
    pruned = np.flatnonzero(np.asarray(cleaned["params"]["norm"]["scale"]) == 0)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(KEY, 1), 200))
    mixed = np.concatenate([
        np.asarray(trigger(jnp.asarray(images, jnp.float32) / 255, KEY))[order[:20]], images[order[20:]] / 255
    ])  # fmt: skip
    highest = np.asarray(norm_input(Victim(MODEL, own), mixed * 255)).max((1, 2))
    expected = naive_entropy(highest.astype(np.float64), 0.05)
    assert_array_equal(pruned, np.flatnonzero(expected < expected.mean()))
    assert 0 < len(pruned) < 6
    with pytest.raises(InputError, match="ep needs the true trigger"):
        ep.purify(config, victim, DefenderView(images, blobs[1]), KEY)


# --- refused inputs


@pytest.mark.parametrize("module", NORMED, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_model_without_batch_normalisation_is_refused_with_a_remedy(module, blobs):
    model, name = perceptron(), module.__name__.rpartition(".")[2]
    victim = Victim(model, model.init(KEY))
    with pytest.raises(InputError, match=rf"{name} .*'perceptron'.*fine_pruning"):
        module.purify(module.Config(), victim, DefenderView(*blobs), KEY)


@pytest.mark.parametrize("module", [fine_pruning, fst])
def test_a_model_without_a_head_is_refused(module, blobs, victim):
    params = {name: leaf for name, leaf in victim.variables["params"].items() if name != "head"}
    with pytest.raises(InputError, match="no dense layer named 'head'"):
        own = Victim(MODEL, {**victim.variables, "params": params})
        module.purify(module.Config(), own, DefenderView(*blobs), KEY)


@pytest.mark.parametrize(
    ("module", "field", "value"),
    [
        (anp, "epsilon", -0.1), (anp, "noise_steps", 0), (anp, "iterations", 0), (anp, "batch_size", 0),
        (anp, "alpha", 1.1), (anp, "learning_rate", 0.0), (anp, "momentum", 1.0), (anp, "threshold", 1.5),
        (anp, "highest_threshold", -0.1), (anp, "threshold_step", 0.0), (anp, "largest_drop", 1.5),
        (rnp, "epochs", 0), (rnp, "stop_accuracy", 1.5), (rnp, "mask_learning_rate", 0.0), (rnp, "weight_decay", -1.0),
        (rnp, "mask_epochs", 0), (rnp, "threshold", -0.1), (clp, "u", math.inf), (bnp, "u", math.nan),
        (bnp, "images", 0), (ep, "images", 0), (ep, "poisoned_share", 0.0), (ep, "poisoned_share", 1.0),
        (ep, "bin_width", 0.0), (fine_pruning, "step", 0.0), (fine_pruning, "largest_drop", 2.0),
        (fine_pruning, "epochs", -1), (fine_pruning, "learning_rate", 0.0), (fst, "alpha", -0.1), (fst, "epochs", 0),
        (fst, "batch_size", 0), (fst, "learning_rate", -1.0), (fst, "weight_decay", -1.0),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(module, field, value):
    with pytest.raises(InputError, match=rf"defense\.{field} must be"):
        module.Config(**{field: value})


# --- common networks


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", large_are_slow(["cnn", "small_vgg", "resnet18", "preact_resnet18", "vgg16_bn", "mobilenet_v2"])
)
def test_all_methods_run_on_common_networks(name):
    from test_models import ready

    model, variables = ready(name)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, *model.shape)).astype(np.uint8)
    view = DefenderView(images, np.arange(24, dtype=np.int32) % 4, trigger=lambda images, key: images.at[:, 0].set(1.0))
    cases = {
        clp: {"u": 0.0}, bnp: {"u": 0.0}, ep: {"u": 0.0}, fst: {"epochs": 1}, fine_pruning: {"epochs": 1},
        anp: {"iterations": 1, "batch_size": 8, "threshold": 1.0},
        rnp: {"epochs": 1, "mask_epochs": 1, "threshold": 1.0},
    }  # fmt: skip
    for module, fields in cases.items():
        cleaned = module.purify(module.Config(**fields), Victim(model, variables), view, KEY)
        assert jax.tree.structure(cleaned) == jax.tree.structure(dict(variables)), module
        leaves = list(zip(jax.tree.leaves(cleaned), jax.tree.leaves(variables), strict=True))
        assert all(bool(jnp.isfinite(a).all()) and a.dtype == b.dtype for a, b in leaves), module
        assert any(bool((a != b).any()) for a, b in leaves), module
