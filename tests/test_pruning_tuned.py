"""ANP, RNP, fine-pruning and FST: each against NumPy or a direct computation, and the calls of the callback."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from pruned import KEY, MODEL, Seen, victim_of

from bdjax.defenses import _masks, anp, fine_pruning, fst, rnp
from bdjax.defenses._epochs import train_epochs
from bdjax.engine import FitConfig, parallel, predict
from bdjax.types import Callback, DefenderView, Model


@pytest.fixture(scope="module")
def victim(blobs):
    return victim_of(blobs)


# --- masks


def toy():
    """Batch normalisation of five pixels and a dense layer, small enough to differentiate in NumPy."""
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(not train, epsilon=1e-5, name="norm")(x.reshape(len(x), -1)[:, :5])
            return nn.Dense(3, name="head")(x)

    def apply(variables, images, train=False, keys=None, axis_name=None):
        logits, state = Net().apply(variables, images, train, mutable=["batch_stats"])
        return logits, {}, state["batch_stats"]

    return Model("toy", (2, 3, 1), 3, lambda key: dict(Net().init(key, jnp.zeros((1, 2, 3, 1)), True)), apply)


@pytest.mark.parametrize(
    "noise_steps", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_mask_steps_equal_numpy(noise_steps):
    model, rng = toy(), np.random.default_rng(5)
    images, labels = rng.random((16, 2, 3, 1)).astype(np.float32), rng.integers(0, 3, 16).astype(np.int32)
    params = {"norm": {"scale": rng.uniform(0.5, 2, 5), "bias": rng.normal(size=5)},
              "head": {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3)}}  # fmt: skip
    stats = {"norm": {"mean": np.full(5, 9.0), "var": np.full(5, 9.0)}}  # not used in training mode
    variables = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), {"params": params, "batch_stats": stats})
    alpha, epsilon, rate, momentum = 0.3, 0.4, 2.0, 0.7
    order = jnp.asarray(rng.integers(0, 16, (3, 8)), jnp.int32)
    found = _masks.learn_masks(
        model, variables, DefenderView(images, labels), order, _masks.MaskOptimizer(rate, momentum, alpha, epsilon),
        noise_steps, "none", KEY, "masks",
    )  # fmt: skip

    def slopes(x, y, scale, shift):
        """Gradients of the mean cross-entropy by scale and shift of the normalised pixels."""
        n = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        logits = (n * scale + shift) @ params["head"]["kernel"] + params["head"]["bias"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        back = (p / p.sum(1, keepdims=True) - np.eye(3)[y]) @ params["head"]["kernel"].T / len(x)
        return (back * n).sum(0), back.sum(0)

    masks, velocity = np.ones(5), np.zeros(5)
    gamma, beta = params["norm"]["scale"], params["norm"]["bias"]
    for place, key in zip(np.asarray(order), jax.random.split(jax.random.fold_in(KEY, 1), 3), strict=True):
        x, y = images.reshape(16, -1)[place, :5].astype(np.float64), labels[place]
        gradient = alpha * slopes(x, y, masks * gamma, beta)[0] * gamma
        if noise_steps:
            drawn = _masks.draw_noise(key, {"norm": jnp.ones(5)}, jnp.float32(epsilon))
            xi, delta = (np.asarray(drawn[kind]["norm"], np.float64) for kind in ("scale", "bias"))
            assert np.abs([xi, delta]).max() <= epsilon and not np.allclose(xi, delta)
            for _ in range(noise_steps):
                by_scale, by_shift = slopes(x, y, (masks + xi) * gamma, (1 + delta) * beta)
                xi = xi + epsilon / noise_steps * np.sign(by_scale * gamma)
                delta = delta + epsilon / noise_steps * np.sign(by_shift * beta)
            gradient = gradient + (1 - alpha) * slopes(x, y, (masks + xi) * gamma, (1 + delta) * beta)[0] * gamma
        velocity = momentum * velocity + gradient
        masks = np.clip(masks - rate * velocity, 0, 1)
    assert_allclose(found["norm"], masks, atol=1e-5)
    assert set(masks) - {0, 1} and {0, 1} & set(masks)  # some are clipped


@pytest.mark.slow
def test_masks_are_the_same_on_two_devices(victim, blobs):
    order = jnp.asarray(np.random.default_rng(6).integers(0, 200, (3, 8)), jnp.int32)
    values = _masks.MaskOptimizer(0.5, 0.9, 0.2, 0.4)
    given = MODEL, victim.variables, DefenderView(*blobs), order, values, 1, "none", KEY, "m"
    one = _masks.learn_masks(*given)["norm"]
    with parallel.using(2):
        assert_allclose(_masks.learn_masks(*given)["norm"], one, atol=1e-5)


def test_the_largest_threshold_at_which_accuracy_holds_is_chosen(victim, blobs):
    images, callback = blobs[0][:60], Seen()
    judged = DefenderView(images, np.asarray(predict(MODEL, victim.variables, images)))  # all correct at first
    masks = {"norm": np.array([0.0, 0.05, 0.3, 0.31, 0.9, 1.0], np.float32)}
    config = _masks.SweepConfig(highest_threshold=0.5, threshold_step=0.1, largest_drop=0.3)
    assert config.thresholds() == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    cleaned = _masks.sweep_thresholds(victim, masks, config, judged, callback)
    rows = [row for _, _, row in callback.rounds]
    assert [int(row["pruned"]) for row in rows[:-1]] == [1, 2, 2, 3, 4, 4]
    for (_, variables, row), threshold in zip(callback.rounds[:-1], config.thresholds(), strict=True):
        norm = variables["params"]["norm"]
        assert_array_equal(norm["scale"] == 0, masks["norm"] <= threshold)
        assert_array_equal(norm["bias"], victim.variables["params"]["norm"]["bias"])
        right = (np.asarray(predict(MODEL, variables, images)) == judged.labels).mean()
        assert row["validation_accuracy"] == pytest.approx(right)
    held = [float(row["threshold"]) for row in rows[:-1] if row["validation_accuracy"] >= 0.7]
    assert float(rows[-1]["chosen_threshold"]) == max(held, default=-1)
    jax.tree.map(assert_array_equal, callback.rounds[-1][1], jax.tree.map(np.asarray, dict(cleaned)))


def test_the_model_is_unchanged_if_accuracy_never_holds_and_a_fixed_threshold_ignores_accuracy(victim, blobs):
    images, masks, callback = blobs[0][:60], {"norm": np.zeros(6, np.float32)}, Seen()
    judged = DefenderView(images, np.asarray(predict(MODEL, victim.variables, images)))
    assert len(np.unique(judged.labels)) > 1  # so that a model without channels makes errors
    kept = _masks.sweep_thresholds(victim, masks, _masks.SweepConfig(largest_drop=0.0), judged, callback)
    jax.tree.map(assert_array_equal, kept, dict(victim.variables))
    assert callback.rounds[-1][2]["chosen_threshold"] == -1
    gone = _masks.sweep_thresholds(victim, masks, _masks.SweepConfig(threshold=0.2, largest_drop=0.0), judged, callback)
    assert not np.asarray(gone["params"]["norm"]["scale"]).any()


def test_a_fifth_is_held_out_where_there_are_no_validation_images(blobs):
    view = DefenderView(*blobs)
    learn, judged = _masks.split_validation(view, KEY)
    assert len(learn.labels) == 160 and len(judged.labels) == 40
    few = DefenderView(blobs[0][:40], blobs[1][:40])
    assert _masks.split_validation(few, KEY) == (few, few)
    given = dataclasses.replace(view, validation=few)
    assert _masks.split_validation(given, KEY) == (given, few)


@pytest.mark.slow
def test_anp_prunes_by_its_trained_masks(victim, blobs):
    callback = Seen()
    view = DefenderView(*blobs, callback=callback, validation=DefenderView(*blobs))
    config = anp.Config(iterations=4, batch_size=16, learning_rate=3.0, largest_drop=1.0)
    cleaned = anp.purify(config, victim, view, KEY)
    order = jax.random.randint(jax.random.fold_in(KEY, 1), (4, 16), 0, 200)
    values = _masks.MaskOptimizer(3.0, 0.9, 0.2, 0.4)
    masks = _masks.learn_masks(
        MODEL, victim.variables, view, order, values, 1, "crop", jax.random.fold_in(KEY, 2), "m"
    )  # fmt: skip
    gone = np.asarray(masks["norm"]) <= 0.95
    assert_array_equal(np.asarray(cleaned["params"]["norm"]["scale"]) == 0, gone)
    assert gone.any() and not gone.all()
    jax.tree.map(assert_array_equal, cleaned["batch_stats"], victim.variables["batch_stats"])
    assert ("training masks", 4, 4) in callback.ticks and len(callback.rounds) == 21


# --- rnp


@pytest.mark.slow
def test_unlearning_stops_after_the_first_epoch_of_low_accuracy(victim, blobs):
    view = DefenderView(blobs[0][:80], blobs[1][:80])
    config = rnp.Config(batch_size=40, learning_rate=0.3, augment="none", stop_accuracy=0.0, epochs=12)
    recipe = FitConfig(12, 40, "sgd", 0.3, 0.9, 5e-4)

    def rate(epoch):
        return 0.3 if epoch < 10 else 0.03

    whole = [
        (done.number, done.accuracy, jax.tree.map(np.array, done.variables))
        for done in train_epochs(victim, *blobs_of(view), recipe, KEY, Callback(), "s", sign=-1.0, rates=rate)
    ]
    assert len(whole) == 12
    last = rnp.unlearn(config, victim, view, KEY)  # never that low, or only at the end
    assert last.number == next((number for number, right, _ in whole if right <= 0.0), 12)
    rates = [right for _, right, _ in whole]
    bar = sorted(rates)[3]
    expected = next(number for number, right, _ in whole if right <= bar)
    stopped = rnp.unlearn(dataclasses.replace(config, stop_accuracy=bar), victim, view, KEY)
    assert stopped.number == expected < 12
    jax.tree.map(assert_array_equal, jax.tree.map(np.asarray, stopped.variables), whole[expected - 1][2])


def blobs_of(view):
    return view.images, view.labels


@pytest.mark.slow
def test_a_step_of_unlearning_ascends_and_decays(victim, blobs):
    view = DefenderView(blobs[0][:40], blobs[1][:40])
    config = rnp.Config(batch_size=40, learning_rate=0.1, weight_decay=0.01, augment="none", epochs=1)
    found = rnp.unlearn(config, victim, view, KEY).variables["params"]
    params, images = victim.variables["params"], jnp.asarray(view.images, jnp.float32) / 255

    def loss(params):
        logits = MODEL.apply({**victim.variables, "params": params}, images, True)[0]
        return -jax.nn.log_softmax(logits)[jnp.arange(40), view.labels].mean()

    expected = jax.tree.map(lambda p, g: p + 0.1 * g - 0.1 * 0.01 * p, params, jax.grad(loss)(params))
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.slow
def test_rnp_prunes_the_victim_and_not_the_unlearned_model(victim, blobs):
    callback = Seen()
    view = DefenderView(*blobs, callback=callback, validation=DefenderView(*blobs))
    config = rnp.Config(epochs=2, mask_epochs=2, mask_learning_rate=2.0, largest_drop=1.0, batch_size=50)
    cleaned = rnp.purify(config, victim, view, KEY)
    norm, before = cleaned["params"]["norm"], victim.variables["params"]["norm"]
    kept = np.asarray(norm["scale"]) != 0
    assert_array_equal(np.asarray(norm["scale"])[kept], np.asarray(before["scale"])[kept])
    for layer in ("conv", "head"):
        jax.tree.map(assert_array_equal, cleaned["params"][layer], victim.variables["params"][layer])
    assert {stage for stage, *_ in callback.ticks} == {"unlearning", "recovering"}
    assert callback.ticks[-1] == ("recovering", 8, 8) and len(callback.rounds) == 20  # 0 to 0.9, and the choice


# --- fine-pruning


def test_units_are_ranked_by_their_positive_activation():
    features = np.array([[-9.0, 0.2, 3.0, 0.0], [1.0, 0.2, -3.0, 0.0]])  # 0.5, 0.2, 1.5, 0
    assert_array_equal(fine_pruning.rank_units(features), [3, 1, 0, 2])
    assert_array_equal(fine_pruning.rank_units(np.zeros((2, 5))), np.arange(5))  # ties by index


@pytest.mark.parametrize(("drop", "expected"), [(0.1, 2), (0.3, 3), (0.55, 4), (1.0, 9)])
def test_pruning_stops_at_the_last_step_within_the_budget(drop, expected):
    """Ten units, each of the first eight decisive for one image; the others are idle. Pruning i costs an eighth."""
    features, labels = np.zeros((8, 10)), np.zeros(8, np.int32)
    features[np.arange(8), np.arange(8)] = 1
    params = {"head": {"kernel": jnp.zeros((10, 2)).at[:8, 0].set(1.0), "bias": jnp.asarray([0.0, 0.5])}}
    order = np.array([8, 9, 0, 1, 2, 3, 4, 5, 6, 7])
    config = fine_pruning.Config(step=0.1, largest_drop=drop)
    found = fine_pruning.count_prunable(order, features, labels, params, config)
    budget = max(k for k in range(9) if k == 0 or k / 8 < drop)
    assert found == min(2 + budget, 9) and (drop != 1.0 or found == 9)
    assert expected <= found


@pytest.mark.slow
def test_pruned_rows_stay_zero_during_fine_tuning(victim, blobs):
    callback = Seen()
    view = DefenderView(*blobs, callback=callback, validation=DefenderView(*blobs))
    config = fine_pruning.Config(step=0.3, largest_drop=0.9, epochs=2, batch_size=40)
    cleaned = fine_pruning.purify(config, victim, view, KEY)
    features = np.asarray(MODEL.apply(victim.variables, jnp.asarray(blobs[0], jnp.float32) / 255)[1]["flat"])
    count = int(callback.rounds[0][2]["pruned"])
    gone = np.argsort(features.mean(0))[:count]  # ReLU: nothing is negative
    assert count in (2, 4)  # ceil(0.3 * 6) at a time, and one unit stays
    for _, variables, _ in callback.rounds:
        rows = np.asarray(variables["params"]["head"]["kernel"])
        assert set(np.flatnonzero(~rows.any(1))) == set(gone)
    before, after = (v["params"]["head"]["kernel"] for v in (victim.variables, cleaned))
    kept = np.setdiff1d(np.arange(6), gone)
    assert_array_equal(callback.rounds[0][1]["params"]["head"]["kernel"][kept], np.asarray(before)[kept])
    assert (np.asarray(after)[kept] != np.asarray(before)[kept]).all()
    assert [step for step, *_ in callback.rounds] == [1, 2, 3] and callback.ticks[-1] == ("fine-tuning", 10, 10)


# --- fst


@pytest.mark.slow
def test_a_step_of_feature_shift_tuning_and_its_rescaling(victim, blobs):
    view = DefenderView(blobs[0][:40], blobs[1][:40])
    config = fst.Config(alpha=0.3, epochs=1, batch_size=40, learning_rate=0.1, augment="none")
    found = fst.purify(config, victim, view, KEY)["params"]
    old, images = victim.variables["params"]["head"]["kernel"], jnp.asarray(view.images, jnp.float32) / 255
    params = fst.reinitialise_head(victim.variables["params"], jax.random.fold_in(KEY, 0))

    def loss(params):
        logits = MODEL.apply({**victim.variables, "params": params}, images, True)[0]
        cross = -jax.nn.log_softmax(logits)[jnp.arange(40), view.labels].mean()
        return cross + 0.3 * (params["head"]["kernel"] * old).sum()

    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
    kernel = expected["head"]["kernel"]
    expected["head"]["kernel"] = kernel * np.linalg.norm(old) / np.linalg.norm(kernel)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), found, expected)
    assert np.linalg.norm(found["head"]["kernel"]) == pytest.approx(np.linalg.norm(old), rel=1e-5)


def test_the_last_layer_is_reinitialised_within_pytorchs_bounds(victim):
    params = {**victim.variables["params"], "head": {"kernel": jnp.full((400, 4), 7.0), "bias": jnp.full(4, 7.0)}}
    drawn = fst.reinitialise_head(params, KEY)
    for leaf in jax.tree.leaves(drawn["head"]):
        assert 0 < np.abs(leaf).max() <= 1 / 20
    assert np.abs(drawn["head"]["kernel"]).max() > 0.0495 and np.asarray(drawn["head"]["kernel"]).mean() < 0.005
    jax.tree.map(assert_array_equal, drawn["conv"], params["conv"])
