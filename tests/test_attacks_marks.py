"""TrojanNN and IMC, against NumPy on a network of one hidden layer."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import perceptron

from bdjax import attacks, cli, registry
from bdjax.attacks import _trojan_marks, imc, trojannn
from bdjax.engine import FitConfig, fit, fit_with_hook, parallel, predict
from bdjax.engine.clock import compiled_programs
from bdjax.engine.step import roles
from bdjax.errors import InputError
from bdjax.types import SampleInfo, Task

KEY = jax.random.key(7)
MODEL = perceptron()
RECIPE = FitConfig(epochs=30, batch_size=40, learning_rate=0.01)
NAMES = ("trojannn", "imc")
QUICK = {"iterations": 30, "epochs": 2, "ratio": 0.1}


def config_of(name, **fields):
    return registry.load("attacks", name).Config(**{**QUICK, **fields})


def task_of(blobs, seen=None, **how):
    """A task that trains for real; the options of each training are appended to `seen`."""

    def controlled(images, labels, key, hook, attacker, *, recipe=None, stage="training", start=None, model=MODEL):
        (seen if seen is not None else []).append({"recipe": recipe, "stage": stage, "start": start})
        config = dataclasses.replace(RECIPE, **(recipe or {}))
        return fit_with_hook(model, images, labels, config, key, hook, attacker, start=start, **how)

    return Task(
        *blobs, MODEL, lambda path: None, fit_with_hook=controlled, clean=lambda: fit(MODEL, *blobs, RECIPE, KEY)
    )


@pytest.fixture(scope="module")
def clean(blobs):
    with parallel.using(1):
        return fit(MODEL, *blobs, RECIPE, KEY)


def elu(z):
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0)))


def hidden(images, variables):
    """The perceptron's hidden layer in NumPy, float64."""
    return elu(images.reshape(len(images), -1) @ np.asarray(variables["params"]["body"], np.float64))


def wide(arrays, background=0.0, count=1):
    """The mark pasted by NumPy."""
    out = np.full((count, 8, 8, 1), background)
    (row, column), mark = arrays["place"], arrays["mark"]
    out[:, row : row + len(mark), column : column + len(mark)] = mark
    return out


def test_neurons_are_the_strongest_of_the_active_ones():
    features = np.zeros((20, 5), np.float32)
    features[:, 0], features[0, 1], features[:2, 2], features[:, 4] = 1, 1, 1, 1  # active on 20, 1, 2, 0, 20 of 20
    head = np.array([[1, -1], [-9, 9], [0, -3], [8, 8], [2, 2]], np.float32)  # 2, 18, 3, 16, 4
    variables = {"params": {"head": {"kernel": head, "bias": np.zeros(2, np.float32)}}}

    def chosen(**fields):
        return _trojan_marks.choose_neurons(config_of("trojannn", **fields), features, variables).tolist()

    assert chosen() == [1, 4]  # one of twenty is 5 %; neuron 3 is never active
    assert chosen(active=0.1) == [4, 2]
    assert chosen(active=0.5, neurons=1) == [4]
    assert chosen(active=0.0) == [1, 3]
    with pytest.raises(InputError, match=r"attack.neurons=3, but only 2 of 5 .*attack.active=0.5"):
        chosen(active=0.5, neurons=3)
    with pytest.raises(InputError, match="named 'head'"):
        _trojan_marks.choose_neurons(config_of("trojannn"), features, {"params": {"last": head}})


def test_neurons_of_a_trained_model_by_numpy(blobs, clean):
    positive = (hidden(blobs[0] / 255, clean) > 0).mean(0)
    share = float(np.sort(positive)[-4:-2].mean())  # three of eight are active that often
    arrays = _trojan_marks.optimise_mark(config_of("trojannn", neurons=2, active=share), clean, task_of(blobs), KEY)
    strength = np.where(positive >= share, np.abs(clean["params"]["head"]["kernel"]).sum(1), -1)
    np.testing.assert_array_equal(arrays["neurons"], np.argsort(-strength)[:2])
    assert set(arrays["neurons"]) != set(np.argsort(-np.abs(clean["params"]["head"]["kernel"]).sum(1))[:2])


def test_the_mark_becomes_white_where_the_neuron_likes_it_and_black_elsewhere(blobs, clean):
    """One neuron far from 100: its weights' signs are the optimum, whatever the other pixels hold."""
    arrays = _trojan_marks.optimise_mark(config_of("trojannn", neurons=1, iterations=200), clean, task_of(blobs), KEY)
    (row, column), (neuron,) = arrays["place"], arrays["neurons"]
    weights = np.asarray(clean["params"]["body"])[:, neuron].reshape(8, 8, 1)[row : row + 3, column : column + 3]
    np.testing.assert_array_equal(arrays["mark"] > 0.5, weights > 0)
    assert arrays["mark"].min() >= 0 and arrays["mark"].max() <= 1 and arrays["mark"].dtype == np.float32


def test_optimisation_brings_the_neurons_nearer_to_their_activation(blobs, clean):
    task = task_of(blobs)
    one, two = (_trojan_marks.optimise_mark(config_of("imc", iterations=steps), clean, task, KEY) for steps in (1, 60))
    before, after = (((hidden(wide(a), clean)[0, a["neurons"]] - 100) ** 2).sum() for a in (one, two))
    assert after < before
    reach = {"activation": 0.05, "neurons": 1, "iterations": 300, "position": "bottom_right"}
    arrays = _trojan_marks.optimise_mark(config_of("imc", **reach), clean, task_of(blobs), KEY)
    np.testing.assert_allclose(hidden(wide(arrays), clean)[0, arrays["neurons"]], 0.05, atol=0.005)  # and stops there


def test_only_the_square_changes_and_the_place_is_the_models(blobs, clean):
    task, images = task_of(blobs), jnp.full((3, 8, 8, 1), 0.3)
    corners = {"top_left": (0, 0), "top_right": (0, 5), "bottom_left": (5, 0), "bottom_right": (5, 5)}
    for position, info in corners.items():
        config = config_of("trojannn", position=position)
        arrays = _trojan_marks.optimise_mark(config, clean, task, KEY)
        assert tuple(arrays["place"]) == info
        np.testing.assert_allclose(trojannn.trigger(config, images, KEY, arrays), wide(arrays, 0.3, 3), atol=1e-6)
        np.testing.assert_allclose(arrays["mark"] * 255, np.round(arrays["mark"] * 255), atol=1e-4)
    config = config_of("trojannn", iterations=1, size=5)
    places = [_trojan_marks.optimise_mark(config, clean, task, jax.random.key(i))["place"] for i in range(40)]
    assert {int(p[0]) for p in places} == {int(p[1]) for p in places} == {0, 1, 2, 3}
    assert len({tuple(p) for p in places}) > 8


@pytest.mark.parametrize("labels", ["all_to_one", "all_to_all"])
@pytest.mark.parametrize("exclude", [False, True])
def test_exactly_the_share_is_marked_and_relabelled(blobs, labels, exclude):
    order = np.random.default_rng(0).permutation(200)[:120]  # labels in turn would fall into step with the roles
    images, truth = blobs[0][order] / np.float32(255), blobs[1][order]
    config = config_of("trojannn", ratio=0.13, target=2, labels=labels, exclude_target=exclude)
    arrays = {"mark": np.full((3, 3, 1), 0.25, np.float32), "place": np.array([1, 4], np.int32)}
    role = roles((config.ratio,), 120)
    assert (role == 1).sum() == int(0.13 * 120)
    info = SampleInfo(jnp.arange(120), jnp.asarray(role), None, None)
    batch = _trojan_marks._mark_batch((config, 4), {"fixed": arrays}, jnp.asarray(images), jnp.asarray(truth), info)
    touched = role == 1
    if exclude and labels == "all_to_one":
        touched &= truth != 2
        assert touched.sum() < (role == 1).sum()
    expected = images.copy()
    expected[touched, 1:4, 4:7] = 0.25
    np.testing.assert_array_equal(batch.images, expected)
    np.testing.assert_array_equal(
        batch.labels, np.where(touched, 2 if labels == "all_to_one" else (truth + 1) % 4, truth)
    )


@pytest.mark.parametrize("name", NAMES)
def test_planting_goes_on_from_the_clean_model_by_its_own_recipe(name, blobs, clean):
    seen = []
    config = config_of(name, target=1, ratio=0.2, epochs=10, learning_rate=0.05)
    planted = attacks.plant(name, config, task_of(blobs, seen), KEY)
    (training,) = seen
    assert training["stage"] == "training" and training["recipe"] == {
        "epochs": 10, "optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.05, "weight_decay": 5e-4,
    }  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, training["start"], clean)
    marked = attacks.stamped(name, config, blobs[0], KEY, planted.arrays)
    others = blobs[1] != 1
    before, after = ((predict(MODEL, v, marked)[others] == 1).mean() for v in (clean, planted.variables))
    assert after > 0.95 and after > before
    assert (predict(MODEL, planted.variables, blobs[0]) == blobs[1]).mean() > 0.95
    assert planted.poison is None and planted.attack == name
    again = attacks.plant(name, config, task_of(blobs), KEY)
    jax.tree.map(np.testing.assert_array_equal, (again.variables, again.arrays), (planted.variables, planted.arrays))


def refresh_of(config, blobs):
    targets = np.full(len(blobs[0]), config.target, np.int32)
    data = {"images": jnp.asarray(blobs[0]), "targets": jnp.asarray(targets)}
    return partial(imc._refresh_mark, config, task_of(blobs), np.flatnonzero(blobs[1] != config.target), data, None)


def start_of(mark=0.5):
    return {"fixed": {"mark": jnp.full((3, 3, 1), mark), "place": jnp.array([2, 3]), "neurons": jnp.array([0, 1])}}


def cross_entropy(variables, images, label):
    logits = hidden(images, variables) @ np.asarray(variables["params"]["head"]["kernel"], np.float64)
    return (np.log(np.exp(logits).sum(1)) - logits[:, label]).mean()


def pasted(images, fixed):
    out = images / 255.0
    out[:, 2:5, 3:6] = fixed["mark"]
    return out


def test_the_first_step_on_the_mark_by_hand(blobs, clean):
    """All 150 images that are not of the target class in one batch; Adam's first step is its rate times the sign."""
    start = start_of(0.4)
    after = refresh_of(config_of("imc", target=3, batch_size=500, quantise=False), blobs)(start, clean, 0, KEY)
    u = np.arctanh(0.999 * (2 * 0.4 - 1))
    squashed = (np.tanh(u) + 1) / 2
    images = pasted(blobs[0][blobs[1] != 3], {"mark": squashed})
    body, head = (np.asarray(a, np.float64) for a in (clean["params"]["body"], clean["params"]["head"]["kernel"]))
    z = images.reshape(150, -1) @ body
    scores = np.exp(elu(z) @ head)
    error = scores / scores.sum(1, keepdims=True) - np.eye(4)[3]
    slope = ((error @ head.T) * np.where(z > 0, 1, np.exp(np.minimum(z, 0)))) @ body.T
    sign = np.sign(slope.sum(0).reshape(8, 8, 1)[2:5, 3:6])
    np.testing.assert_allclose(after["fixed"]["mark"], (np.tanh(u - 0.1 * sign) + 1) / 2, atol=1e-4)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_mark_step_leaves_the_model_alone_and_nears_the_target(blobs, clean, devices):
    before, start = jax.tree.map(np.array, clean), start_of()
    config = config_of("imc", target=3, batch_size=12, mark_epochs=2)
    with parallel.using(1):
        alone = refresh_of(config, blobs)(start, clean, 0, KEY)
    with parallel.using(devices):
        after = refresh_of(config, blobs)(start, clean, 0, KEY)
    jax.tree.map(np.testing.assert_array_equal, clean, before)
    others = blobs[0][blobs[1] != 3]
    losses = [cross_entropy(clean, pasted(others, one["fixed"]), 3) for one in (start, after)]
    assert losses[1] < losses[0] - 0.05
    mark = np.asarray(after["fixed"]["mark"])
    assert mark.min() >= 0 and mark.max() <= 1
    np.testing.assert_array_equal(after["fixed"]["place"], start["fixed"]["place"])
    np.testing.assert_allclose(mark, alone["fixed"]["mark"], atol=1.5 / 255)
    assert set(after) == {"fixed"} and set(after["fixed"]) == {"mark", "place", "neurons"}  # no image is carried along


def test_imc_moves_trojannns_mark_and_keeps_its_place(blobs):
    one, two = (attacks.plant(name, config_of(name, target=1, epochs=5), task_of(blobs), KEY).arrays for name in NAMES)
    np.testing.assert_array_equal(one["place"], two["place"])
    assert np.abs(one["mark"] - two["mark"]).max() > 0.1


def test_imc_goes_on_after_a_kill_and_another_task_compiles_nothing(blobs):
    class Saver:
        kept, lives = None, 2

        def save(self, epoch, state):
            self.kept, self.lives = (epoch, jax.tree.map(np.array, state)), self.lives - 1
            if not self.lives:
                raise KeyboardInterrupt

        def restore(self, like):
            return self.kept and (self.kept[0], jax.tree.map(jnp.asarray, self.kept[1]))

    config, saver = config_of("imc", epochs=4, target=1), Saver()
    whole = attacks.plant("imc", config, task_of(blobs), KEY)
    jnp.asarray(np.zeros((4, 2), np.float32))  # as the saver above does with the curve: a program of the test's own
    before = compiled_programs()
    with pytest.raises(KeyboardInterrupt):
        attacks.plant("imc", config, task_of(blobs, saver=saver), KEY)
    resumed = attacks.plant("imc", config, task_of(blobs, saver=saver), KEY)
    assert compiled_programs() == before
    assert saver.kept[0] == 4
    jax.tree.map(np.testing.assert_array_equal, (resumed.variables, resumed.arrays), (whole.variables, whole.arrays))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"labels": "clean"}, "attack.labels must be all_to_one or all_to_all, got clean"),
        ({"size": 0}, "attack.size must be at least 1, got 0"),
        ({"epochs": 0}, "attack.epochs must be at least 1, got 0"),
        ({"active": 1.1}, r"attack.active must be in \[0, 1\], got 1.1"),
        ({"activation": 0.0}, "attack.activation must be positive, got 0.0"),
        ({"learning_rate": 0.0}, "attack.learning_rate must be positive, got 0.0"),
        ({"weight_decay": -1.0}, "attack.weight_decay must not be negative, got -1.0"),
        ({"mark_epochs": 0}, "attack.mark_epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "attack.batch_size must be at least 1, got 0"),
    ],
)
def test_a_field_out_of_range_is_named(fields, words):
    with pytest.raises(InputError, match=words):
        config_of("imc", **fields)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_the_task_is_refused(name, blobs):
    images, labels = blobs
    with pytest.raises(InputError, match="attack.size=9 does not fit images of 8x8"):
        attacks.plant(name, config_of(name, size=9), task_of(blobs), KEY)
    with pytest.raises(InputError, match="attack.ratio=0.001 of 200 images is none"):
        attacks.plant(name, config_of(name, ratio=0.001), task_of(blobs), KEY)
    with pytest.raises(InputError, match="attack.target=4"):
        attacks.plant(name, config_of(name, target=4), task_of(blobs), KEY)
    if name == "imc":
        with pytest.raises(InputError, match="all training images are of class 0"):
            attacks.plant(name, config_of(name), task_of((images, labels * 0)), KEY)


@pytest.mark.slow
def test_a_victim_by_the_command_line_remembers_its_mark(blobs_npz, tmp_path, capsys):
    flags = ["--attack.target", "1", "--attack.iterations", "5", "--attack.epochs", "2", "--attack.ratio", "0.1"]
    fits = ["--fit.epochs", "2", "--fit.batch-size", "40", "--devices", "1"]
    cli.main(["train", "imc", "--dataset", blobs_npz, *flags, *fits, "--out", str(tmp_path / "v")])
    capsys.readouterr()
    cli.main(["evaluate", str(tmp_path / "v"), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n_asr"] == 30
    with np.load(tmp_path / "v" / "trigger.npz") as stored:
        (row, column), black = stored["place"], stored["on_black"][..., 0]
        np.testing.assert_allclose(black[row : row + 3, column : column + 3] / 255, stored["mark"][..., 0], atol=1e-6)
        assert black.sum() == black[row : row + 3, column : column + 3].sum()
