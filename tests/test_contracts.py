"""What every method keeps, checked on each module of the registry: a new file is tested the moment it exists."""

import ast
import dataclasses
import functools
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import normalised, perceptron, untrained_task

from bdjax import attacks, models, registry
from bdjax.attacks import _poisoning
from bdjax.engine import FitConfig, fit
from bdjax.engine.clock import compiled_programs
from bdjax.errors import InputError
from bdjax.protocols import DefenseSpec
from bdjax.types import Callback, DefenderView, Victim

DEFENSES = registry.names("defenses")
DETECTING = [name for name in DEFENSES if registry.load("defenses", name).detect is not None]
DETECTORS = [("detectors", name) for name in registry.names("detectors")] + [("defenses", name) for name in DETECTING]
METHODS = [(kind, name) for kind in ("attacks", "defenses", "detectors") for name in registry.names(kind)]
ATTACKS = [name for name in registry.names("attacks") if registry.load("attacks", name).trigger is not None]
SHAPE = (16, 16, 3)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (60, *SHAPE)).astype(np.uint8), np.tile(np.arange(10, dtype=np.int32), 6)


@pytest.fixture(scope="module")
def task(images):
    model = models.create("cnn", SHAPE, 10)
    return untrained_task(*images, model)


PREPARED = {}
"""What attacks prepared, by name and Config."""


def arrays_of(name, config, task):
    if (name, config) not in PREPARED:
        PREPARED[name, config] = prepare(name, config, task)
    return PREPARED[name, config]


def prepare(name, config, task):
    spec, key = registry.load("attacks", name), jax.random.key(5)
    if spec.edit is not None and config.labels != "clean":  # its default share may be less than one of so few images
        config = dataclasses.replace(config, ratio=0.5)
    if spec.replaces_training:
        return attacks.plant(name, config, task, key).arrays
    return spec.prepare(config, task, key) if spec.prepare is not None else {}


QUICK = {"iterations": 2, "epochs": 1, "surrogate_epochs": 1, "images": 3}
"""Fields by which methods say how long they optimise, and on how many images; here two steps must do."""
RECOVERY = {"hidden": 8, "noise_size": 8, "samples": 2, "asr_threshold": 0.0}  # every trigger is kept
INVERSION = {"rounds": 1, "pretrain_epochs": 1, "mask_epochs": 1, "generator_epochs": 1, "width": 4, "downs": 1}
SMALL = {
    "multi_target": {"parts": ("badnets:0", "blended:3", "l0_inv:4")},
    "baeraser": {"largest_drop": 1.0, **RECOVERY},
    "mesa_finetune": RECOVERY,
    "clp": {"u": 0.0},
    "bnp": {"u": 0.0},
    "ep": {"u": 0.0},
    "anp": {"threshold": 1.0, "batch_size": 8, "augment": "none"},  # whatever the masks are, some channel goes
    "rnp": {"threshold": 1.0, "mask_epochs": 1, "augment": "none"},
    "ban_finetune": {"augment": "none"},
    "fine_pruning": {"augment": "none"},
    "fst": {"augment": "none"},
    "nad": {"teacher_epochs": 1},
    "btidbf": INVERSION,
    "pam": INVERSION,
    "auto": {"methods": ("finetune",), "largest_drop": 1.0},
    "neural_cleanse": {"threshold": 0.01, "anomaly": 1e-6, "unlearning_epochs": 1},  # somebody is suspected
    "deepinspect": {"anomaly": 1e-6, "unlearning_epochs": 1, "hidden": 8, "noise_size": 8},
    "tabor": {"threshold": 0.01, "anomaly": 1e-6, "unlearning_epochs": 1},
}
"""What else a method's contract is tested with, where its defaults take long."""


def quick_changes(name, config):
    return {field: value for field, value in QUICK.items() if hasattr(config, field)} | {
        field: value for field, value in SMALL.get(name, {}).items() if hasattr(config, field)
    }


def config_of(name, **changes):
    config = registry.load("attacks", name).Config()
    quick = quick_changes(name, config)
    if config.ratio * 60 < 1:  # of 60 images, three
        quick["ratio"] = 0.05
    return dataclasses.replace(config, **{**quick, **changes})


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_config_is_frozen_hashable_documented_and_has_defaults(kind, name):
    module = registry.load_module(kind, name)
    config = module.Config()
    assert hash(config) == hash(module.Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, 1)
    body = next(
        n for n in ast.parse(inspect.getsource(module)).body if isinstance(n, ast.ClassDef) and n.name == "Config"
    )
    for node, following in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(following, ast.Expr), f"{name}.Config.{ast.unparse(node.target)} has no docstring"


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_method_opens_nothing_prints_nothing_reads_no_clock(kind, name):
    tree = ast.parse(Path(inspect.getfile(registry.load_module(kind, name))).read_text())
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"open", "print", "jax.devices", "jax.local_devices", "time.time", "time.perf_counter"}
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Assert)]


@pytest.mark.parametrize("name", ATTACKS)
class TestAttack:
    def test_trigger_keeps_range_dtype_shape(self, name, images, task):
        config = config_of(name)
        trigger = attacks.trigger_of(name, config, arrays_of(name, config, task))
        clean = jnp.asarray(images[0][:8], jnp.float32) / 255
        out = trigger(clean, jax.random.key(0))
        assert out.shape == clean.shape and out.dtype == jnp.float32
        assert float(out.min()) >= 0 and float(out.max()) <= 1
        if name != "clean":
            assert bool((out != clean).any(axis=(1, 2, 3)).all()), "some image carries no trigger"

    def test_trigger_is_the_same_for_the_same_key_and_under_jit_and_vmap(self, name, images, task):
        config, module = config_of(name), registry.load("attacks", name)
        arrays = arrays_of(name, config, task)
        clean, keys = jnp.asarray(images[0][:4], jnp.float32) / 255, jax.random.split(jax.random.key(3), 3)

        def call(key):
            return module.trigger(config, clean, key, arrays)

        eager = jnp.stack([call(key) for key in keys])
        np.testing.assert_array_equal(eager[0], call(keys[0]))
        np.testing.assert_allclose(jax.jit(call)(keys[0]), eager[0], atol=1e-5)  # networks sum in another order
        np.testing.assert_allclose(jax.vmap(call)(keys), eager, atol=1e-5)

    def test_trigger_compiles_once(self, name, images, task):
        config = config_of(name)
        arrays = arrays_of(name, config, task)
        clean = jnp.asarray(images[0][:5], jnp.float32) / 255
        attacks.trigger_of(name, config, arrays)(clean, jax.random.key(0)).block_until_ready()
        other, before = jax.random.key(1), compiled_programs()
        attacks.trigger_of(name, config_of(name), arrays)(clean, other)
        assert compiled_programs() == before

    @pytest.mark.parametrize("labels", ["all_to_one", "all_to_all", "clean"])
    def test_poisons_exactly_its_ratio_and_relabels(self, name, labels, images, task):
        spec = registry.load("attacks", name)
        if spec.replaces_training or spec.parts is not None:
            pytest.skip("controls training itself, or is tested with its parts")
        ratio = 0.05 if labels == "clean" else 0.25
        config = config_of(name, labels=labels, ratio=ratio, target=3, exclude_target=True)
        planted = attacks.plant(name, config, task, jax.random.key(0))
        poison, (x, y) = planted.poison, images
        wanted, cover = int(ratio * len(x)), int(getattr(config, "cover", 0) * len(x))  # a cover keeps its label
        assert len(poison.indices) == wanted + cover and (np.diff(poison.indices) > 0).all()
        assert poison.images.dtype == np.uint8 and poison.labels.dtype == np.int32
        before = y[poison.indices]
        changed = poison.labels != before
        assert changed.sum() == (0 if labels == "clean" else wanted)
        if labels == "clean":
            assert wanted <= (before == 3).sum() <= wanted + cover
        else:
            np.testing.assert_array_equal(
                poison.labels[changed], 3 if labels == "all_to_one" else (before[changed] + 1) % 10
            )
        again = attacks.plant(name, config, task, jax.random.key(0)).poison
        np.testing.assert_array_equal(again.indices, poison.indices)
        np.testing.assert_array_equal(again.images, poison.images)

    def test_quantise_decides_what_is_stored(self, name, images, task):
        config = config_of(name, quantise=False)
        given = images[0][:3], jax.random.key(0), arrays_of(name, config, task)
        floats, stored = (attacks.stamped(name, own, *given) for own in (config, config_of(name)))
        assert floats.dtype == np.float32 and stored.dtype == np.uint8
        np.testing.assert_allclose(floats, stored / np.float32(255), atol=0.5 / 255 + 1e-6)


NORMED = ("anp", "ban_finetune", "bnp", "clp", "ep", "rnp")
"""Defenses that need batch normalisation."""


def view_of(spec, callback=None):
    needs_trigger = isinstance(spec, DefenseSpec) and spec.needs_trigger(spec.Config())
    return DefenderView(
        np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1)).astype(np.uint8),
        np.tile(np.arange(4, dtype=np.int32), 5),
        callback or Callback(),
        (lambda images, key: images.at[:, -2:, -2:].set(1.0)) if needs_trigger else None,
    )


@pytest.mark.parametrize(("kind", "name"), DETECTORS)
def test_detect_scores_every_class_and_gives_a_verdict(kind, name):
    model, module = perceptron(), registry.load(kind, name)
    victim = Victim(model, model.init(jax.random.key(0)))
    config = module.Config()
    if hasattr(config, "iterations"):
        config = dataclasses.replace(config, **quick_changes(name, config))
    found = module.detect(config, victim, view_of(module), jax.random.key(0))
    again = module.detect(config, victim, view_of(module), jax.random.key(0))
    assert found.classes.shape == (4,) and found.classes.dtype == np.float32
    assert found.target == np.nanargmax(found.classes) and found.score == found.classes[found.target]
    assert isinstance(found.poisoned, bool) and isinstance(found.target, int) and isinstance(found.score, float)
    np.testing.assert_array_equal(again.classes, found.classes)


def purify(name, seed=0, callback=None):
    """(variables of the victim, purified variables)."""
    model, module = normalised() if name in NORMED else perceptron(), registry.load("defenses", name)
    variables = model.init(jax.random.key(0))
    view, config = view_of(module, callback), module.Config()
    config = dataclasses.replace(config, **quick_changes(name, config))
    if module.train is not None:
        task = dataclasses.replace(untrained_task(view.images, view.labels, model), callback=view.callback)
        return variables, module.train(config, task, jax.random.key(seed))
    return variables, module.purify(config, Victim(model, variables), view, jax.random.key(seed))


purified = functools.cache(purify)
"""The same, computed once for all tests that ask for the same arguments."""


SLOW = ("btidbf", "pam")
"""Defenses with a network of their own, which takes seconds to compile."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in DEFENSES])
class TestDefense:
    def test_returns_finite_variables_of_the_same_structure_and_leaves_the_victim_alone(self, name):
        variables, cleaned = purified(name)
        assert jax.tree.structure(variables) == jax.tree.structure(cleaned)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(cleaned))
        assert all(
            a.dtype == b.dtype for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(cleaned), strict=True)
        )
        assert any(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (variables, cleaned)), strict=True))

    def test_same_key_same_result_whatever_watches(self, name):
        seen = []

        class Nosy(Callback):
            def on_round_end(self, step, variables, **arrays):
                seen.append((step, jax.tree.map(np.asarray, variables)))

        _, one = purified(name)
        _, two = purify(name, callback=Nosy())
        jax.tree.map(np.testing.assert_array_equal, one, two)
        assert [step for step, _ in seen] == list(range(1, len(seen) + 1)) and seen
        jax.tree.map(np.testing.assert_array_equal, seen[-1][1], one)

    def test_second_run_compiles_nothing(self, name):
        purified(name)
        before = compiled_programs()
        purify(name, seed=1)
        assert compiled_programs() == before


def test_selection_draws_all_when_asked_and_names_the_largest_ratio():
    labels = np.tile(np.arange(4, dtype=np.int32), 5)
    config = _poisoning.PoisonConfig(ratio=0.75, target=1)
    chosen = _poisoning.select(config, labels, jax.random.key(0))
    np.testing.assert_array_equal(chosen, np.flatnonzero(labels != 1))
    with pytest.raises(InputError, match="0.75"):
        _poisoning.select(dataclasses.replace(config, ratio=0.8), labels, jax.random.key(0))


def test_fit_is_a_task_recipe(blobs):
    """The lift hands poisoned data to the recipe: what comes back is a trained model."""
    model = perceptron()
    recipe = FitConfig(epochs=1, batch_size=50)
    task = dataclasses.replace(untrained_task(*blobs, model), fit=lambda x, y, key: fit(model, x, y, recipe, key))
    planted = attacks.plant("badnets", config_of("badnets", target=0), task, jax.random.key(0))
    assert jax.tree.structure(planted.variables) == jax.tree.structure(model.init(jax.random.key(0)))
