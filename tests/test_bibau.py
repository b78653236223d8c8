"""BI-BAU: its parts against closed forms and plain loops, its switches, and invalid input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import perceptron
from numpy.testing import assert_allclose, assert_array_equal

from bdjax import models
from bdjax.defenses import _blind_inversion, bibau
from bdjax.defenses._adversarial import adversarial, project
from bdjax.defenses._cosine import cosine
from bdjax.defenses._fisher import ewc_penalty, fisher
from bdjax.engine import parallel
from bdjax.engine.clock import compiled_programs
from bdjax.errors import InputError
from bdjax.models import head, penultimate
from bdjax.types import Callback, DefenderView, Victim, to_float

KEY = jax.random.key(0)
MODEL = perceptron()
FAST = {"procedure": "paper", "epochs": 2, "batch_size": 20, "steps": 3}


@pytest.fixture
def view(blobs):
    return DefenderView(blobs[0][:40], blobs[1][:40])


@pytest.fixture
def victim():
    return Victim(MODEL, MODEL.init(KEY))


def entropy(variables, label):
    return lambda image: -jax.nn.log_softmax(MODEL.logits(variables, image[None])[0])[label]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_pgd_for_one_image_vmapped_is_the_batch_and_a_plain_loop(norm, victim):
    images, labels = jax.random.uniform(KEY, (6, 8, 8, 1)), jnp.arange(6) % 4
    starts = jax.vmap(lambda x, k: project(x + 0.01 * jax.random.normal(k, x.shape), x, 0.3, norm))(
        images, jax.random.split(KEY, 6)
    )
    vmapped = jax.vmap(
        lambda x, y, s: adversarial(entropy(victim.variables, y), x, s, 5, 0.1, 0.3, norm)
    )(images, labels, starts)  # fmt: skip

    def total(x):  # the whole batch at once: the images are independent
        logits = MODEL.logits(victim.variables, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    batch, plain = starts, np.array(starts)
    for _ in range(5):
        gradient = jax.grad(total)(batch)
        flat = jnp.linalg.norm(gradient.reshape(6, -1), axis=1)[:, None, None, None]
        change = batch + 0.1 * (gradient / flat if norm == "l2" else jnp.sign(gradient)) - images
        size = jnp.linalg.norm(change.reshape(6, -1), axis=1)[:, None, None, None]
        change = change * jnp.minimum(1, 0.3 / size) if norm == "l2" else jnp.clip(change, -0.3, 0.3)
        batch = jnp.clip(images + change, 0, 1)
        for i in range(6):
            g = np.array(jax.grad(entropy(victim.variables, labels[i]))(jnp.asarray(plain[i])))
            d = plain[i] + 0.1 * (g / np.linalg.norm(g) if norm == "l2" else np.sign(g)) - np.array(images[i])
            d = d * min(1, 0.3 / np.linalg.norm(d)) if norm == "l2" else np.clip(d, -0.3, 0.3)
            plain[i] = np.clip(np.array(images[i]) + d, 0, 1)
    assert_allclose(vmapped, batch, atol=1e-5)
    assert_allclose(vmapped, plain, atol=1e-5)
    assert (np.array(vmapped) != np.array(images)).any((1, 2, 3)).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("bound", [0.0, 0.01, 0.3, 10.0])
def test_the_projection_never_leaves_the_ball_or_the_range(norm, bound):
    keys = jax.random.split(KEY, 50)
    images = jax.random.uniform(keys[0], (50, 4, 4, 3)).at[:10].set(0.0).at[10:20].set(1.0)
    moved = images + jax.vmap(lambda k: 3 * jax.random.normal(k, (4, 4, 3)))(keys)
    out = jax.vmap(lambda m, x: project(m, x, bound, norm))(moved, images)
    assert float(out.min()) >= 0 and float(out.max()) <= 1
    change = np.array(out - images).reshape(50, -1)
    assert (np.linalg.norm(change, axis=1, ord=2 if norm == "l2" else np.inf) <= bound + 1e-6).all()
    inside = jax.vmap(lambda x: project(x, x, bound, norm))(images)
    assert_array_equal(inside, images)


def test_fisher_is_the_mean_of_squares_not_the_square_of_the_mean(victim, view):
    estimate = fisher(MODEL, victim.variables, view.images, view.labels, 16)
    images = jnp.asarray(view.images, jnp.float32) / 255
    gradients = [
        jax.grad(lambda p, i=i: -jax.nn.log_softmax(
            MODEL.logits({"params": p, "batch_stats": {}}, images[i : i + 1])[0])[view.labels[i]])(
                victim.variables["params"]) for i in range(40)
    ]  # fmt: skip
    flat = np.stack([np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for g in gradients])
    expected = (flat**2).mean(0) / (flat**2).mean()
    ours = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(estimate)])
    assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)
    assert_allclose(ours.mean(), 1, rtol=1e-5)
    batch = flat.mean(0) ** 2 / (flat.mean(0) ** 2).mean()
    assert np.linalg.norm(ours - batch) > 0.3 * np.linalg.norm(ours)


def test_a_capped_fisher_cuts_the_large_entries_and_leaves_the_others(victim, view):
    uncapped, capped = (fisher(MODEL, victim.variables, view.images, view.labels, 40, cap) for cap in (np.inf, 2.0))
    for one, other in zip(jax.tree.leaves(uncapped), jax.tree.leaves(capped), strict=True):
        assert_allclose(other, np.minimum(one, 2))
    assert max(float(leaf.max()) for leaf in jax.tree.leaves(uncapped)) > 2


def test_fisher_does_not_depend_on_the_size_of_its_batches(victim, view):
    one, other = (fisher(MODEL, victim.variables, view.images, view.labels, size) for size in (7, 40))
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)


def test_ewc_of_the_unchanged_model_is_zero_with_zero_gradient(victim, view):
    params = victim.variables["params"]
    weights = fisher(MODEL, victim.variables, view.images, view.labels, 40)
    value, gradient = jax.value_and_grad(ewc_penalty)(params, params, weights)
    assert value == 0 and all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    moved = jax.tree.map(lambda leaf: leaf + 0.1, params)
    assert_allclose(
        ewc_penalty(moved, params, weights), 0.01 * sum(leaf.sum() for leaf in jax.tree.leaves(weights)), rtol=1e-4
    )


def test_both_forms_of_the_inverse_ewc_fall_with_the_distance_until_clipped():
    def value_and_slope(distance, form):
        return jax.value_and_grad(lambda d: _blind_inversion.inverse_ewc(d, 1.0, form))(jnp.float32(distance))

    assert value_and_slope(0.25, "negated") == (-0.25, -1) and value_and_slope(3.0, "negated") == (-1, 0)
    assert_allclose(value_and_slope(4.0, "reciprocal"), (0.25, -1 / 16), rtol=1e-5)
    assert value_and_slope(0.5, "reciprocal") == (1, 0)


def test_the_cosine_is_defined_at_zero():
    value, gradient = jax.value_and_grad(cosine)(jnp.zeros(3), jnp.ones(3))
    assert value == 0 and bool(jnp.isfinite(gradient).all())
    assert_allclose(cosine(jnp.array([1.0, 0]), jnp.array([1.0, 1])), 0.5**0.5, rtol=1e-6)


@pytest.mark.parametrize(("angle", "degrees"), [(1.0, 90.0), (0.0, 45.0), (0.5, None)])
def test_the_priors_optimum_is_at_the_stated_angle(angle, degrees):
    """With Δw at 45 degrees to h: ξ = 0 aligns Δh with Δw, ξ = 1 puts it at 90 degrees to h, ξ = 0.5 in between."""
    h, w = jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]) / 2**0.5
    turns = jnp.linspace(0, 180, 18001)
    change = jnp.stack([jnp.cos(jnp.radians(turns)), jnp.sin(jnp.radians(turns))], 1)
    value = jax.vmap(lambda c: cosine(c, w) - angle * jnp.abs(cosine(c, h)))(change)
    best = float(turns[value.argmax()])
    if degrees is not None:
        assert abs(best - degrees) < 0.05
    else:
        assert 45 < best < 90


def objective_of(config, current, original, image, label):
    hyper = {name: jnp.float32(getattr(config, name)) for name in bibau._DYNAMIC}
    weights = [{"params": v["params"], "stats": v["batch_stats"]} for v in (current, original)]
    return _blind_inversion.adversarial_objective(MODEL, bibau._static(config), *weights, image, label, hyper)


@pytest.mark.parametrize("variant", ["untargeted", "targeted"])
@pytest.mark.parametrize(("a", "b"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_ascents_objective_equals_its_formula(variant, a, b, victim):
    config = bibau.Config(
        procedure="paper", variant=variant, target=2, constraints_a=a, constraints_b=b, temperature=3.0, mixing=0.3,
        likelihood=0.7, prior=1.3, angle=0.4,
    )  # fmt: skip
    original, current = victim.variables, MODEL.init(jax.random.key(1))
    image, moved = jax.random.uniform(KEY, (2, 8, 8, 1))
    value = objective_of(config, current, original, image, jnp.int32(1))(moved)

    def evaluate(v, x):
        logits, features, _ = MODEL.apply(v, x[None])
        return np.array(logits[0], float), np.array(features["flat"][0], float)

    def log_softmax(z):
        return z - np.log(np.exp(z).sum())

    original_logits, teacher = evaluate(original, moved)[0], evaluate(original, image)[0]
    (student, h_moved), (_, h) = evaluate(current, moved), evaluate(current, image)
    expected = log_softmax(original_logits)[2] if variant == "targeted" else -log_softmax(original_logits)[1]
    if a:
        p, log_q = np.exp(log_softmax(teacher / 3)), log_softmax(student / 3)
        kl = (p * (np.log(p) - log_q)).sum()
        expected -= 0.7 * (0.3 * 9 * kl + 0.7 * -log_softmax(student)[1])
    if b:
        row = 2 if variant == "targeted" else original_logits.argmax()
        change, w = h_moved - h, (head(original["params"]) - head(current["params"]))[:, row]
        cos = [np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in ((change, w), (change, h))]
        expected += 1.3 * (cos[0] - 0.4 * abs(cos[1]))
    assert_allclose(value, expected, rtol=1e-4)


def test_the_gradient_is_finite_at_the_first_step_where_the_weights_are_unchanged(victim):
    image = jax.random.uniform(KEY, (8, 8, 1))
    objective = objective_of(bibau.Config(procedure="paper"), victim.variables, victim.variables, image, jnp.int32(0))
    assert bool(jnp.isfinite(jax.grad(objective)(image)).all())


@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("linf", np.inf)])
def test_adversarial_images_stay_within_25_of_255(norm, order, victim, view):
    seen = {}

    class Look(Callback):
        def on_round_end(self, step, variables, **arrays):
            seen.update(arrays)

    config = bibau.Config(**FAST, norm=norm)
    bibau.purify(config, victim, dataclasses.replace(view, callback=Look()), KEY)
    sizes = 255 * np.linalg.norm(np.array(seen["perturbation"]).reshape(4, -1), order, axis=1)
    assert (sizes <= 25 + 1e-3).all() and (sizes > 3).all()
    assert {"loss", "clean_loss", "adversarial_loss", "ewc", "inverse_ewc"} <= set(seen)


@pytest.mark.parametrize(("a", "b"), [(False, False), (True, False), (False, True)])
def test_the_switches_are_the_rows_of_table_6(a, b, victim, view):
    """A weight has an effect only when its constraint set is on."""

    def run(**changes):
        config = bibau.Config(**FAST, constraints_a=a, constraints_b=b, learning_rate=0.1, **changes)
        return bibau.purify(config, victim, view, KEY)["params"]["body"]

    base = run()
    assert bool((run(ewc=5.0) != base).any()) == a and bool((run(likelihood=9.0) != base).any()) == a
    assert bool((run(inverse_ewc=5.0) != base).any()) == b and bool((run(prior=9.0) != base).any()) == b


@pytest.mark.slow
def test_separate_statistics_are_those_of_the_clean_images_alone(view):
    model = models.create("cnn", (8, 8, 1), 4)
    normed = Victim(model, model.init(KEY))

    def one_step(kind, **changes):
        """The variables after a single step on all 40 images."""
        config = bibau.Config(
            procedure="paper",
            epochs=1,
            batch_size=40,
            steps=1,
            constraints_a=False,
            constraints_b=False,
            batch_norm=kind,
            **changes,
        )
        return bibau.purify(config, normed, view, KEY)

    stats = {kind: one_step(kind)["batch_stats"] for kind in ("separate", "both", "batch", "frozen")}
    of_clean = model.apply(normed.variables, to_float(view.images), True)[2]
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), stats["separate"], of_clean)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), stats["both"], of_clean)
    jax.tree.map(assert_array_equal, stats["frozen"], normed.variables["batch_stats"])
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), stats["batch"], stats["separate"])
    assert max(jax.tree.leaves(gaps)) > 1e-4
    unmoved = [one_step(kind, noise=0.0, step_size=1e-9)["params"] for kind in ("separate", "batch")]
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), *unmoved)  # the two agree when no image is changed
    both = one_step("both", noise=0.0, step_size=1e-9)["params"]  # half of its loss has the running statistics
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), both, unmoved[0]))) > 1e-5


def test_a_cosine_begins_at_the_peak_and_falls(victim, view):
    def run(schedule, epochs):
        config = bibau.Config(
            procedure="paper", epochs=epochs, batch_size=40, steps=1, schedule=schedule, learning_rate=0.1
        )
        return bibau.purify(config, victim, view, KEY)["params"]["body"]

    assert_array_equal(run("cosine", 1), run("constant", 1))
    assert bool((run("cosine", 2) != run("constant", 2)).any())


def test_targeted_leaves_images_of_the_target_out(victim, view):
    """With every image of the target class, only the clean loss is left."""
    only = DefenderView(view.images, np.where(view.labels < 4, 2, 0).astype(np.int32))
    config = bibau.Config(variant="targeted", target=2, constraints_a=False, constraints_b=False, **FAST)
    with pytest.raises(InputError, match="no clean image of class 0, 1, 3"):
        bibau.purify(config, victim, only, KEY)
    seen = []

    class Look(Callback):
        def on_round_end(self, step, variables, **arrays):
            seen.append(arrays)

    labels = np.full(40, 2, np.int32)
    labels[:4] = np.arange(4)
    few = DefenderView(view.images, labels, Look())
    bibau.purify(dataclasses.replace(config, batch_size=40), victim, few, KEY)
    assert float(seen[0]["adversarial_loss"]) > 0


def test_four_devices_agree_with_one(victim, view):
    def run(devices):
        with parallel.using(devices):
            return bibau.purify(bibau.Config(**FAST), victim, view, KEY)

    jax.tree.map(lambda x, y: assert_allclose(x, y, atol=2e-4), run(1), run(4))


def test_other_values_compile_nothing(victim, view):
    bibau.purify(bibau.Config(**FAST), victim, view, KEY)
    before = compiled_programs()
    bibau.purify(bibau.Config(**FAST, angle=0.3, bound=9.0, ewc=3.0, learning_rate=1e-3), victim, view, KEY)
    assert compiled_programs() == before


def test_presets_fill_in_the_angle_unless_it_is_given():
    angles = [bibau.Config(preset=name).angle for name in ("general", "refool", "low_orthogonality")]
    assert angles == [0.9, 0.5, 0.1] and bibau.Config(preset="refool", angle=0.7).angle == 0.7


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"angle": 1.1}, r"angle must be in \[0, 1\], got 1.1"),
        ({"mixing": -0.1}, "mixing"),
        ({"bound": 0.0}, "bound must be positive, got 0.0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"ewc": -1.0}, "ewc must be zero or more, got -1.0"),
        ({"target": -1}, "target must be zero or more"),
    ],
)
def test_settings_out_of_range_are_refused(changes, match):
    with pytest.raises(InputError, match=match):
        bibau.Config(**changes)


def test_a_target_that_is_no_class_is_refused(victim, view):
    with pytest.raises(InputError, match="target=4, but the labels go from 0 to 3"):
        bibau.purify(bibau.Config(variant="targeted", target=4), victim, view, KEY)


@pytest.mark.slow
def test_every_models_penultimate_layer_feeds_its_head():
    """logits = penultimate @ head + bias: the convention that methods which read both depend on."""
    for name in ("cnn", "small_vgg"):
        model = models.create(name, (8, 8, 3), 4)
        variables = model.init(KEY)
        logits, features, _ = model.apply(variables, jax.random.uniform(KEY, (2, 8, 8, 3)))
        bias = variables["params"]["head"]["bias"]
        assert_allclose(penultimate(features) @ head(variables["params"]) + bias, logits, atol=1e-5)
    with pytest.raises(InputError, match="no dense layer named 'head'"):
        head({"body": 1})
