"""The inversion of BTI-DBF, its unlearning, and PAM."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import perceptron
from numpy.testing import assert_allclose

from bdjax import models
from bdjax.defenses import _inversion, _inversion_steps, btidbf, pam
from bdjax.defenses._tuning import training_state
from bdjax.engine import parallel
from bdjax.errors import InputError
from bdjax.types import Callback, DefenderView, Model, Victim

KEY, MODEL = jax.random.key(0), perceptron()
START, ELSEWHERE = (MODEL.init(jax.random.key(seed)) for seed in (3, 4))
SMALL = {"rounds": 2, "pretrain_epochs": 2, "mask_epochs": 2, "generator_epochs": 2, "width": 4, "downs": 1}


def shifting(params, images):
    """A generator with one parameter, added to every pixel."""
    return images + params["shift"]


def batch_of(blobs, count=20):
    images, labels = jnp.asarray(blobs[0][:count]), jnp.asarray(blobs[1][:count])
    keys = jax.random.split(KEY, count)
    return {"images": images, "labels": labels}, {"index": jnp.arange(count), "augment": keys, "dropout": keys}


def cross_entropy(logits, labels):
    return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()


def mse(a, b):
    return float(((np.asarray(a) - np.asarray(b)) ** 2).mean())


# The mask.


def test_feature_mask_is_in_the_unit_interval():
    assert_allclose(
        _inversion_steps.feature_mask(jnp.array([0.0, 0.5, 100.0, -100.0])),
        [0.5, 0.5 + np.tanh(0.5) / 2, 1, 0],
        atol=1e-6,
    )


FEATURES = np.array([[1.0, 2.0], [0.5, -1.0], [-2.0, 0.3]], np.float32)
KERNEL, BIAS = np.array([[1.0, -1.0, 0.5], [0.2, 0.4, -0.3]], np.float32), np.array([0.1, 0.0, -0.2], np.float32)
OF_MASK = np.array([0, 2, 1])


def numpy_mask_loss(values):
    mask, total = np.tanh(values) / 2 + 0.5, 0.0
    for sign, part in ((1, mask), (-1, 1 - mask)):
        logits = (part * FEATURES).astype(np.float64) @ KERNEL + BIAS
        total += sign * np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(3), OF_MASK])
    return total


def test_mask_loss_and_its_gradient_equal_numpy():
    params, values = {"head": {"kernel": jnp.asarray(KERNEL), "bias": jnp.asarray(BIAS)}}, np.array([0.3, -0.8])
    value, slope = jax.value_and_grad(_inversion_steps.mask_loss)(
        jnp.asarray(values, jnp.float32), params, jnp.asarray(FEATURES), jnp.asarray(OF_MASK)
    )
    assert_allclose(value, numpy_mask_loss(values), rtol=1e-5)
    for at in range(2):
        ahead, behind = (numpy_mask_loss(values + sign * 1e-5 * np.eye(2)[at]) for sign in (1, -1))
        assert_allclose(slope[at], (ahead - behind) / 2e-5, rtol=1e-3)


def _moving_apply(variables, images, train=False, keys=None, axis_name=None):
    logits, features, _ = MODEL.apply(variables, images)
    return (
        logits,
        features,
        jax.tree.map(lambda s: s + 1, variables["batch_stats"]) if train else variables["batch_stats"],
    )


MOVING = Model("moving", MODEL.shape, 4, MODEL.init, _moving_apply)
"""The perceptron with a statistic that counts forward passes in training mode."""


@pytest.mark.slow
def test_mask_step_updates_the_mask_and_the_statistics_of_a_copy(blobs):
    shared, split = batch_of(blobs)
    values = jax.random.normal(KEY, (8,))
    model = {"params": START["params"], "batch_stats": {"seen": jnp.float32(7)}}
    state = training_state({"params": values, "batch_stats": {"seen": jnp.float32(0)}}, "adam")
    step = _inversion_steps.mask_step(MOVING, "none")
    after, metrics = step(state, split, {"rate": jnp.float32(0.01)}, {**shared, "model": model}, None)
    features = MODEL.apply(START, shared["images"].astype(jnp.float32) / 255)[1]["flat"]
    value, slope = jax.value_and_grad(_inversion_steps.mask_loss)(values, START["params"], features, shared["labels"])
    assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert_allclose(after["params"], values - 0.01 * jnp.sign(slope), atol=1e-5)  # Adam's first step
    assert float(after["batch_stats"]["seen"]) == 1 and float(model["batch_stats"]["seen"]) == 7


# The generator.


def run_generator(step, blobs, shift, **more):
    shared, split = batch_of(blobs)
    state = training_state({"params": {"shift": jnp.float32(shift)}, "batch_stats": {}}, "adam")
    after, metrics = step(state, split, {"rate": jnp.float32(0.01)}, {**shared, "model": {**START}, **more}, None)
    images = shared["images"].astype(jnp.float32) / 255
    both = [MODEL.apply(START, x) for x in (images, images + shift)]
    return float(after["params"]["shift"]), metrics, both, images


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "weight"), [(0.5, 100.0), (0.2, 0.01)])  # squares of 0.25 and 0.04
def test_copy_step_uses_probabilities_as_logits_and_weights_the_image_loss(blobs, shift, weight):
    _, metrics, both, _ = run_generator(_inversion_steps.copy_step(MODEL, shifting, "none"), blobs, shift)
    wanted, given = (np.asarray(jax.nn.softmax(b[0])) for b in (both[1], both[0]))
    predicted = -(wanted * np.asarray(jax.nn.log_softmax(jnp.asarray(given)))).sum(1).mean()
    assert_allclose(
        metrics["loss"], predicted + mse(both[0][1]["flat"], both[1][1]["flat"]) + weight * shift**2, rtol=1e-4
    )


HYPER = {"image_bound": jnp.float32(0.3), "feature_bound": jnp.float32(3.0), "benign": jnp.float32(0.01)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shift", "feature_bound", "pull", "copies"),
    [(0.7, 1e9, 0.0, True), (0.1, 1e9, 0.0, False), (0.1, 0.0, 0.0, True), (0.1, 1e9, 1.0, False)],
)
def test_inversion_step_changes_backdoor_features_within_bounds(blobs, shift, feature_bound, pull, copies):
    mask = jnp.linspace(0, 1, 8)
    after, metrics, both, _ = run_generator(
        _inversion_steps.inversion_step(MODEL, shifting, "none"), blobs, shift, mask=mask, target=jnp.int32(2),
        pull=jnp.float32(pull), hyper={**HYPER, "feature_bound": jnp.float32(feature_bound)},
    )  # fmt: skip
    was, now = (b[1]["flat"] for b in both)
    benign, backdoor = mse(mask * was, mask * now), mse((1 - mask) * was, (1 - mask) * now)
    expected = shift**2 if copies else 0.01 * benign - backdoor
    expected += pull * float(cross_entropy(both[1][0], np.full(20, 2)))
    assert_allclose(metrics["loss"], expected, rtol=1e-3, atol=1e-6)
    if copies:
        assert after == pytest.approx(shift - 0.01, abs=1e-4)  # towards the image


# The generator's positions.


@pytest.mark.parametrize(
    ("share", "size", "count"), [(0.1, 128, 13), (0.2, 128, 26), (0.1, 20, 3), (0.0, 20, 1), (0.9, 4, 4)]
)
def test_chosen_positions_are_spread_evenly_over_the_devices(share, size, count):
    places = np.asarray(_inversion_steps.choose_positions(share, 3, size, KEY)["chosen"])
    assert places.shape == (3, size) and (places.sum(1) == count).all()
    for devices in (1, 2, 4):
        most = -(-count // devices)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel, "size", lambda axis, devices=devices: devices)
            assert _inversion_steps.max_chosen(share, size, "data") == most
        assert places.reshape(3, devices, -1).sum(2).max() <= most


def test_mix_generated_changes_only_the_chosen_positions():
    images = jnp.arange(24.0).reshape(6, 2, 2, 1)
    for chosen in ([0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1], [0] * 6):
        out = _inversion_steps.mix_generated(shifting, {"shift": 100.0}, images, jnp.array(chosen, bool), 3)
        assert_allclose(out, np.asarray(images) + 100 * np.array(chosen)[:, None, None, None])


# Unlearning.


@pytest.mark.slow
def test_step_of_btidbf_equals_a_plain_computation(blobs):
    shared, split = batch_of(blobs)
    chosen = _inversion_steps.choose_positions(0.2, 1, 20, KEY)["chosen"][0]
    step = btidbf._step(MODEL, shifting, "none", 0.2, 20)
    shared["generator"] = {"shift": jnp.float32(0.4)}
    whole = {"rate": jnp.float32(0.01)}
    after, metrics = step(training_state(START, "adam"), {**split, "chosen": chosen}, whole, shared, None)
    clean = shared["images"].astype(jnp.float32) / 255
    changed = clean + 0.4 * np.asarray(chosen)[:, None, None, None]

    def loss(params):
        (_, was, _), (logits, now, _) = (
            MODEL.apply({"params": params, "batch_stats": {}}, x) for x in (clean, changed)
        )
        return cross_entropy(logits, shared["labels"]) + ((was["flat"] - now["flat"]) ** 2).mean()

    value, gradient = jax.value_and_grad(loss)(START["params"])
    assert_allclose(metrics["loss"], value, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.01 * g / (jnp.abs(g) + 1e-8), START["params"], gradient)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-4), after["params"], expected)


def test_step_towards_has_its_length_over_all_parameters():
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    original = {"a": jnp.array([4.0, 2.0]), "b": jnp.array([7.0])}  # 5 away
    found = pam.step_towards(params, original, 0.5)
    assert_allclose(found["a"], [1.3, 2.0], rtol=1e-6)
    assert_allclose(found["b"], [3.4], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, pam.step_towards(params, params, 0.5), params)  # the first step


@pytest.mark.slow
def test_step_of_pam_takes_the_gradient_between_the_weights_and_the_victims(blobs):
    shared, split = batch_of(blobs)
    chosen = _inversion_steps.choose_positions(0.2, 1, 20, KEY)["chosen"][0]
    shared |= {
        "generator": {"shift": jnp.float32(0.4)}, "original": ELSEWHERE["params"],
        "hyper": {"rho": jnp.float32(0.5), "momentum": jnp.float32(0.1)},
    }  # fmt: skip
    step = pam._step(MODEL, shifting, "none", 0.2, 20)
    whole = {"rate": jnp.float32(0.1)}
    after, metrics = step(training_state(START, "sgd"), {**split, "chosen": chosen}, whole, shared, None)
    images = shared["images"].astype(jnp.float32) / 255 + 0.4 * np.asarray(chosen)[:, None, None, None]
    pairs = list(zip(*map(jax.tree.leaves, (START["params"], ELSEWHERE["params"])), strict=True))
    length = sum(float(((b - a) ** 2).sum()) for a, b in pairs) ** 0.5
    there = jax.tree.map(lambda a, b: a + 0.5 * (b - a) / length, START["params"], ELSEWHERE["params"])

    def loss(params):
        return cross_entropy(MODEL.logits({"params": params, "batch_stats": {}}, images), shared["labels"])

    value, gradient = jax.value_and_grad(loss)(there)
    assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert float(value) != pytest.approx(float(loss(START["params"])), rel=1e-3)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, START["params"], gradient)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), after["params"], expected)


# The complete methods.


class Seen(Callback):
    def __init__(self):
        self.rows = []

    def on_round_end(self, step, variables, **arrays):
        self.rows.append((step, {name: np.asarray(value) for name, value in arrays.items()}))


def view_of(blobs, callback=None):
    return DefenderView(blobs[0][:40], blobs[1][:40], callback or Callback())


@pytest.mark.slow
@pytest.mark.parametrize("module", [btidbf, pam], ids=["btidbf", "pam"])
def test_each_round_reports_the_perturbation_of_the_generator(blobs, module):
    seen = Seen()
    config = module.Config(**SMALL, epochs=2, batch_size=20)
    module.purify(config, Victim(MODEL, START), view_of(blobs, seen), KEY)
    assert [step for step, _ in seen.rows] == [1, 2, 3, 4]
    for _, row in seen.rows:
        assert row["perturbation"].shape == (4, 8, 8, 1) and row["suspected"].shape == (1,)
    first, last = seen.rows[0][1]["perturbation"], seen.rows[-1][1]["perturbation"]
    assert not np.allclose(first, last)  # it is trained on in the second round


@pytest.mark.slow
@pytest.mark.parametrize("module", [btidbf, pam], ids=["btidbf", "pam"])
def test_early_stop_at_a_round_with_another_target(blobs, module, monkeypatch):
    found = iter([1, 3, 1, 1])
    monkeypatch.setattr(_inversion.Inversion, "_most_predicted", lambda *_: next(found))
    config = module.Config(**SMALL, epochs=1, batch_size=20, early_stop=True)
    seen = Seen()
    module.purify(config, Victim(MODEL, START), view_of(blobs, seen), KEY)
    assert len(seen.rows) == 1
    seen.rows.clear()
    module.purify(config, Victim(MODEL, START), view_of(blobs, seen), KEY)
    assert len(seen.rows) == 2


@pytest.mark.slow
@pytest.mark.parametrize("module", [btidbf, pam], ids=["btidbf", "pam"])
def test_four_devices_agree_with_one(blobs, module):
    def run(devices):
        config = module.Config(**SMALL | {"rounds": 1}, epochs=1, batch_size=20)
        with parallel.using(devices):
            return module.purify(config, Victim(MODEL, START), view_of(blobs), KEY)

    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-4), run(1), run(4))


@pytest.mark.slow
@pytest.mark.parametrize("module", [btidbf, pam], ids=["btidbf", "pam"])
def test_real_networks_and_their_statistics_are_updated(blobs, module):
    model = models.create("cnn", (8, 8, 1), 4)
    given = model.init(KEY)
    out = module.purify(module.Config(**SMALL, epochs=1, batch_size=20), Victim(model, given), view_of(blobs), KEY)
    moved = [(a != b).any() for a, b in zip(*(jax.tree.leaves(v["batch_stats"]) for v in (out, given)), strict=True)]
    assert all(map(bool, moved)) and all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(out))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 32, 3), (7, 9, 2), (28, 28, 1), (2, 2, 1)])
def test_unet_keeps_the_shape_of_any_image(shape):
    net = models.unet(shape, 4, 4)
    variables = net.init(KEY)
    images = jax.random.uniform(KEY, (2, *shape))
    out, stats = net.apply(variables, images)
    assert out.shape == images.shape and not stats
    assert float(abs(out[0] - out[1]).max()) > 0


def test_a_model_without_a_head_is_refused(blobs):
    other = dataclasses.replace(MODEL, init=None)
    variables = {"params": {"body": START["params"]["body"]}, "batch_stats": {}}
    for module in (btidbf, pam):
        with pytest.raises(InputError, match="no dense layer named 'head'"):
            module.purify(module.Config(), Victim(other, variables), view_of(blobs), KEY)


@pytest.mark.parametrize(
    ("module", "changes", "said"),
    [
        (btidbf, {"rounds": 0}, "defense.rounds must be at least 1, got 0"),
        (btidbf, {"fraction": 1.0}, r"defense.fraction must be in \[0, 1\), got 1.0"),
        (btidbf, {"mask_rate": 0.0}, "defense.mask_rate must be positive, got 0.0"),
        (btidbf, {"pretrain_epochs": -1}, "defense.pretrain_epochs must be zero or more, got -1"),
        (btidbf, {"learning_rate": -1.0}, "defense.learning_rate must be positive, got -1.0"),
        (pam, {"epochs": 0}, "defense.epochs must be at least 1, got 0"),
        (pam, {"rho": -0.5}, "defense.rho must be zero or more, got -0.5"),
        (pam, {"momentum": 1.0}, r"defense.momentum must be in \[0, 1\), got 1.0"),
        (pam, {"downs": 0}, "defense.downs must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(module, changes, said):
    with pytest.raises(InputError, match=said):
        module.Config(**changes)
