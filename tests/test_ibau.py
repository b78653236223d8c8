"""I-BAU against an independent computation of the release's procedure, and the effect of every field."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import perceptron

from bdjax import models
from bdjax.defenses import _batch, ibau
from bdjax.defenses._targeted_search import TargetedSearch
from bdjax.engine import parallel
from bdjax.errors import InputError
from bdjax.types import Callback, DefenderView, Victim, to_float


class Last(Callback):
    def on_round_end(self, step, variables, perturbation, **scalars):
        self.perturbation = perturbation


def problem(number=24, seed=0, model=None):
    model = model or perceptron()
    rng = np.random.default_rng(seed)
    view = DefenderView(
        rng.integers(0, 256, (number, 8, 8, 1)).astype(np.uint8), rng.integers(0, 4, number).astype(np.int32), Last()
    )
    return Victim(model, model.init(jax.random.key(seed))), view


def purify(config, number=24, key=7, model=None):
    victim, view = problem(number, model=model)
    cleaned = ibau.purify(config, victim, view, jax.random.key(key))
    return victim, view, cleaned


def release_round(victim, view, config, key):
    """One round of the release, written plainly: every gradient by jax.grad, the solver as its fixed point."""
    images, labels = to_float(view.images), jnp.asarray(view.labels)
    stats, size = victim.variables["batch_stats"], config.batch_size
    batches = [np.arange(s, min(s + size, len(labels))) for s in range(0, len(labels), size)]

    def ce(params, x, y):
        logits = victim.model.apply({"params": params, "batch_stats": stats}, x)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    params, delta = victim.variables["params"], jnp.zeros((1, 8, 8, 1))
    for b in batches:
        guess = victim.model.logits(victim.variables, images[b]).argmax(-1)
        delta = delta - config.inner_lr * jax.grad(
            lambda d, b=b, guess=guess: -ce(params, images[b] + d, guess) + config.penalty * (d**2).sum()
        )(delta)
    norm = jnp.linalg.norm(delta)
    delta = delta * jnp.minimum(1.0, config.norm_bound / norm)
    weight = jnp.stack([jnp.pad(jnp.ones(len(b)), (0, size - len(b))) for b in batches])
    count = max(1, int(config.patched_fraction * size))
    patched = np.asarray(_batch.draw_patched(weight, size, count, jax.random.fold_in(key, 0)))
    mean = second = jax.tree.map(jnp.zeros_like, params)
    for step, b in enumerate(batches, 1):
        chosen = patched[step - 1, : len(b)]
        assert chosen.sum() == min(count, len(b))

        def outer(d, p, b=b, chosen=chosen):
            return ce(p, images[b] + jnp.where(chosen[:, None, None, None], d, 0), labels[b])

        def phi(d, p):
            first = batches[0]
            grad = jax.grad(lambda d: -ce(p, images[first] + d, labels[first]) + config.penalty * (d**2).sum())(d)
            return d - config.solver_step * grad

        cotangent, direct = jax.grad(outer, (0, 1))(delta, params)
        v = jnp.zeros_like(delta)
        for _ in range(config.solver_iterations):  # v <- (dPhi/d delta)^T v + e, from zero
            v = jax.vjp(lambda d, params=params: phi(d, params), delta)[1](v)[0] + cotangent
        indirect = jax.vjp(lambda p: phi(delta, p), params)[1](v)[0]
        gradient = jax.tree.map(jnp.add, direct, indirect)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradient)
        second = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, second, gradient)
        scale = np.float32(1 - 0.9**step), np.float32(1 - 0.999**step)
        params = jax.tree.map(
            lambda p, m, s, scale=scale: p - config.outer_lr * (m / scale[0]) / (jnp.sqrt(s / scale[1]) + 1e-8),
            params, mean, second,
        )  # fmt: skip
    return params, delta


@pytest.mark.parametrize("number", [24, 20])  # 20: the last batch has 4 of 8 images
def test_release_round_equals_a_plain_computation(number):
    config = ibau.Config(schedule="release", rounds=1, batch_size=8, norm_bound=3.0)
    victim, view, cleaned = purify(config, number)
    params, delta = release_round(victim, view, config, jax.random.key(7))
    np.testing.assert_allclose(view.callback.perturbation, delta, rtol=1e-3, atol=1e-4)
    # Adam divides by the gradient's size: tiny gradients differ in the last digits, steps of 1e-3 in less
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), cleaned["params"], params)


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_four_devices_equal_one(fraction):
    """Batches of 10, 10 and 6 are padded to 12 on four devices; SGD, for Adam would enlarge rounding."""
    config = ibau.Config(
        schedule="release",
        rounds=2,
        batch_size=10,
        outer_optimizer="sgd",
        outer_lr=0.01,
        inner_lr=1.0,
        patched_fraction=fraction,
    )
    _, first, one = purify(config, 26)
    with parallel.using(4):
        _, second, four = purify(config, 26)
    np.testing.assert_allclose(first.callback.perturbation, second.callback.perturbation, rtol=1e-3, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one["params"], four["params"])


def test_paper_schedule_ascends_the_full_objective():
    """T full-batch steps on true labels, one step of θ on all images, clipped to [0, 1]."""
    config = ibau.Config(schedule="paper", rounds=1, inner_steps=3, norm_bound=float("inf"))
    victim, view, _ = purify(config, 12)
    images, labels = to_float(view.images), jnp.asarray(view.labels)

    def ascent(delta):
        logits = victim.model.logits(victim.variables, jnp.clip(images + delta, 0, 1))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    delta = jnp.zeros((1, 8, 8, 1))
    for _ in range(3):
        delta = delta + 0.1 * jax.grad(ascent)(delta)
    np.testing.assert_allclose(view.callback.perturbation, delta, atol=1e-6)
    batched = dataclasses.replace(config, batch_size=5)  # batches of 5, 5 and 2 gather the same gradient
    np.testing.assert_allclose(purify(batched, 12)[1].callback.perturbation, delta, atol=1e-6)


def test_projection_bounds_the_norm_and_infinity_does_not():
    bounded = purify(ibau.Config(schedule="release", rounds=1, batch_size=8, norm_bound=0.5))[1].callback.perturbation
    free = purify(ibau.Config(schedule="release", rounds=1, batch_size=8, norm_bound=float("inf")))[
        1
    ].callback.perturbation
    np.testing.assert_allclose(jnp.linalg.norm(bounded), 0.5, rtol=1e-5)
    np.testing.assert_allclose(free / jnp.linalg.norm(free), bounded / 0.5, atol=1e-5)


CHANGES = {
    "rounds": 2, "batch_size": 12, "inner_labels": "true", "inner_data": "all", "inner_steps": 2,
    "inner_optimizer": "adam", "inner_lr": 1.0, "penalty": 0.5, "norm_bound": 1.0, "clamp": True,
    "patched_fraction": 1.0, "outer_steps": 1, "hessian_data": "same_batch", "outer_optimizer": "sgd",
    "outer_lr": 1e-2, "batch_norm": "batch", "solver": "neumann", "solver_iterations": 2, "solver_step": 0.5,
    "ridge": 5.0, "products": "bfloat16",
}  # fmt: skip


TARGETED = {"perturbations": 2, "patches": 0, "distillation": 0.1}
"""Fields of the targeted schedule alone."""


def test_every_field_is_tested():
    assert set(CHANGES) | {"schedule", *TARGETED} == {f.name for f in dataclasses.fields(ibau.Config)}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("batch_norm", "products") else n for n in CHANGES]
)
def test_every_field_changes_the_result(name):
    base = ibau.Config(schedule="release", rounds=1, batch_size=8, outer_lr=1e-3)
    model = models.create("cnn", (8, 8, 1), 4) if name in ("batch_norm", "products") else None
    _, _, one = purify(base, model=model)
    _, _, two = purify(dataclasses.replace(base, **{name: CHANGES[name]}), model=model)
    assert any(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["perturbations", "patches", "distillation", "rounds", "inner_steps", "outer_steps", "outer_lr",
             "patched_fraction", "solver", "solver_iterations", "solver_step", "ridge", "penalty", "batch_size"]
)  # fmt: skip
def test_fields_of_the_targeted_schedule_change_its_result(name, monkeypatch):
    monkeypatch.setattr(
        TargetedSearch, "is_exhausted", False
    )  # this network has no backdoor, so the search would stop at once
    base = ibau.Config(
        rounds=1, batch_size=8, inner_steps=2, outer_steps=2, outer_lr=1e-3, perturbations=3, patched_fraction=0.8
    )
    changes = {**CHANGES, **TARGETED, "inner_steps": 1, "outer_steps": 3, "outer_lr": 2e-2, "solver_iterations": 5}
    one, two = (purify(config)[2] for config in (base, dataclasses.replace(base, **{name: changes[name]})))
    assert any(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True))


def test_the_default_is_targeted_and_distils_the_given_model():
    """With all weight on the given model's predictions, and no indirect term, a round hardly moves it."""
    config = ibau.Config()
    assert (config.schedule, config.rounds, config.batch_size, config.outer_steps) == ("targeted", 10, 64, 10)
    still = ibau.Config(rounds=1, inner_steps=1, outer_steps=2, distillation=1.0, solver="none", outer_lr=1e-3)
    moving = dataclasses.replace(still, distillation=0.0)
    victim = problem(24)[0]

    def change(config):
        view = problem(24)[1]
        cleaned = ibau.purify(config, victim, view, jax.random.key(7))
        before, after = (np.asarray(victim.model.logits(v, to_float(view.images))) for v in (victim.variables, cleaned))
        return np.abs(before - after).mean()

    assert 0 < change(still) < change(moving)


@pytest.mark.slow
def test_bfloat16_products_hardly_change_the_step():
    """One θ step of SGD with rate 1 is the hypergradient itself."""
    model = models.create("cnn", (8, 8, 1), 4)
    config = ibau.Config(
        schedule="release",
        rounds=1,
        batch_size=24,
        outer_steps=1,
        outer_optimizer="sgd",
        outer_lr=1.0,
        solver_step=50.0,
    )
    config = dataclasses.replace(config, solver="one_step")
    start = model.init(jax.random.key(0))["params"]

    def step(**changes):
        after = purify(dataclasses.replace(config, **changes), model=model)[2]["params"]
        return np.concatenate([np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (after, start)), strict=True)])

    exact, rounded, direct = step(), step(products="bfloat16"), step(solver="none")
    assert 0 < np.linalg.norm(rounded - exact) < 0.15 * np.linalg.norm(direct - exact)  # of the indirect term


def test_short_rounds_continue_where_the_previous_one_ended():
    """δ of the first round depends on the first batch alone, that of the second round on the second."""

    def perturbation(rounds, changed):
        victim, view = problem(24)
        images = view.images.copy()
        images[changed] = 255 - images[changed]
        still = ibau.Config(schedule="fast", rounds=rounds, batch_size=8, inner_steps=1, outer_steps=1, outer_lr=1e-30)
        ibau.purify(still, victim, dataclasses.replace(view, images=images), jax.random.key(7))
        return np.asarray(view.callback.perturbation)

    first, second, third = slice(0, 8), slice(8, 16), slice(16, 24)
    for rounds, used in ((1, first), (2, second), (3, third), (4, first)):
        untouched = perturbation(rounds, slice(0))
        for part in (first, second, third):
            assert (perturbation(rounds, part) == untouched).all() == (part != used)


def test_schedules_fill_in_only_fields_left_at_none():
    release, paper = ibau.Config(schedule="release"), ibau.Config(schedule="paper", outer_lr=0.5)
    assert (release.rounds, release.inner_lr, release.patched_fraction, release.penalty) == (5, 10.0, 0.01, 0.001)
    assert (paper.patched_fraction, paper.penalty, paper.inner_labels, paper.outer_lr) == (1.0, 0.0, "true", 0.5)
    fast = ibau.Config(schedule="fast", rounds=3)
    assert (fast.rounds, fast.batch_size, fast.inner_steps, fast.outer_steps) == (3, 64, 10, 10)
    assert (fast.inner_lr, fast.patched_fraction, fast.outer_lr) == (10.0, 0.01, 1e-3)


def test_patched_images_are_exactly_counted_and_never_padding():
    weight = jnp.array([[0.25] * 4 + [0.0] * 2, [0.5] * 2 + [0.0] * 4])
    for seed in range(5):
        patched = _batch.draw_patched(weight, 5, 3, jax.random.key(seed))
        np.testing.assert_array_equal(patched.sum(1), [3, 2])
        assert not bool((patched & (weight == 0)).any())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", 0),
        ("batch_size", -1),
        ("inner_lr", 0.0),
        ("patched_fraction", 1.5),
        ("solver", "cgg"),
        ("ridge", -1.0),
    ],
)
def test_a_bad_field_is_named_with_its_value(field, value):
    with pytest.raises(InputError, match=f"defense.{field}.*{value}"):
        ibau.Config(schedule="release", **{field: value})


def test_a_diverging_run_stops_with_the_step_and_the_rate():
    with pytest.raises(InputError, match="unlearning loss became .* at step .* 1e\\+30.*defense.outer_lr"):
        purify(ibau.Config(schedule="release", batch_size=8, outer_optimizer="sgd", outer_lr=1e30))
