"""Defenses that tune the victim on clean images by steps of their own: NAD, FT-SAM, SAU; and what they share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import perceptron
from numpy.testing import assert_allclose

from bdjax import models, registry
from bdjax.defenses import _tuning, ft_sam, nad, sau
from bdjax.engine import parallel
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError
from bdjax.types import DefenderView, Model, Victim, Watch

KEY, MODEL = jax.random.key(0), perceptron()
VICTIM = Victim(MODEL, MODEL.init(jax.random.key(3)))


def view_of(blobs, count=40, watch=None):
    return DefenderView(blobs[0][:count], blobs[1][:count], watch or Watch())


def cross_entropy(logits, labels):
    return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()


class Seen(Watch):
    def __init__(self):
        self.rows = []

    def observe(self, step, variables, **arrays):
        self.rows.append({name: float(value) for name, value in arrays.items() if np.ndim(value) == 0})


# What they share.


@pytest.mark.parametrize(
    ("wanted", "total", "devices", "expected"),
    [(256, 500, 1, (2, 250)), (64, 500, 1, (8, 62)), (256, 20, 1, (1, 20)), (256, 5, 4, (1, 4)), (8, 7, 2, (1, 6))],
)
def test_a_pass_is_cut_into_equal_batches(wanted, total, devices, expected):
    with parallel.using(devices):
        number, size = _tuning.equal_batches(wanted, total)
    assert (number, size) == expected
    assert size % devices == 0 and number * size <= total and size <= max(wanted, devices)


def test_fewer_images_than_devices_are_refused():
    with parallel.using(4), pytest.raises(InputError, match="3 images cannot be split over 4 devices"):
        _tuning.equal_batches(64, 3)


GRADIENTS = ([1.0, 0.5], [0.1, -3.0], [-0.2, 0.1])


@pytest.mark.parametrize(
    ("name", "expected"),  # of PyTorch 2.13: Adam(amsgrad=True), SGD(momentum=0.9, nesterov=True)
    [
        ("amsgrad", [[0.9, -2.1], [0.825919, -2.0376081], [0.7822379, -1.9915055]]),
        ("nesterov", [[0.81, -2.095], [0.71, -1.5655], [0.667, -1.37795]]),
    ],
)
def test_directions_are_those_of_pytorch(name, expected):
    params = jnp.array([1.0, -2.0])
    rule = direction(name, 0.9)
    state = rule.init(params)
    for gradient, after in zip(GRADIENTS, expected, strict=True):
        update, state = rule.update(jnp.array(gradient), state)
        params = params - 0.1 * update
        assert_allclose(params, after, rtol=1e-5)


# NAD.


def test_attention_of_a_small_map():
    places = jnp.array([[[[1.0, 0.0], [0.0, -2.0]], [[2.0, 1.0], [0.0, 0.0]]]])  # [1, 2, 2, 2]: masses 1, 4, 5, 0
    assert_allclose(nad.attention(places), [np.array([1, 4, 5, 0]) / (42**0.5 + 1e-6)], rtol=1e-6)
    assert_allclose(nad.attention(places.reshape(1, 4, 2)), nad.attention(places))  # tokens
    assert_allclose(nad.attention(jnp.array([[3.0, 0.0, -4.0]])), [np.array([9, 0, 16]) / 337**0.5], rtol=1e-5)
    empty = jax.grad(lambda f: nad.attention(f).sum())(jnp.zeros((1, 2, 2, 3)))
    assert bool((empty == 0).all())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cnn", ("block1", "block2", "block3")),
        ("small_vgg", ("conv4", "conv6", "block3")),
        ("mnist_cnn", ("conv1", "conv2")),
        ("preact_resnet18", ("stage2", "stage3", "stage4")),
        pytest.param("wide_resnet", ("stage1", "stage2", "stage3"), marks=pytest.mark.slow),
        pytest.param("vit_b_16", ("block3", "block8", "block12"), marks=pytest.mark.slow),
        pytest.param("vgg16", ("block2", "block3", "block4"), marks=pytest.mark.slow),  # its block5 is one place
    ],
)
def test_maps_are_the_last_of_each_resolution(name, expected):
    model = models.create(name, (32, 32, 3), 10)
    variables = jax.eval_shape(model.init, KEY)
    assert nad.stages(model, variables, 3) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.names("models"))
def test_every_model_has_maps_to_match(name):
    model = models.create(name, (64, 64, 3), 10)
    variables = jax.eval_shape(model.init, KEY)
    names = nad.stages(model, variables, 3)
    assert 1 <= len(names) <= 3
    nad._check_layers(names, model, variables)


@pytest.mark.slow
def test_one_step_of_nad_equals_a_plain_computation(blobs):
    config = nad.Config(
        teacher_epochs=1, epochs=1, batch_size=40, betas=(300.0,), rates=(0.05,), begins=(0,), augment="none",
        weight_decay=0.01,
    )  # fmt: skip
    seen = Seen()
    out = nad.purify(config, VICTIM, view_of(blobs, watch=seen), KEY)["params"]
    images, labels = jnp.asarray(blobs[0][:40], jnp.float32) / 255, blobs[1][:40]

    def run(params):
        logits, features, _ = MODEL.apply({"params": params, "batch_stats": {}}, images)
        return logits, features["flat"]

    def look(features):
        mass = features**2
        return mass / (jnp.linalg.norm(mass, axis=1, keepdims=True) + 1e-6)

    def step(loss):
        start = VICTIM.variables["params"]
        gradient = jax.tree.map(lambda g, p: g + 0.01 * p, jax.grad(loss)(start), start)
        return jax.tree.map(lambda p, g: p - 0.05 * 1.9 * g, start, gradient)  # Nesterov's first step

    teacher = step(lambda params: cross_entropy(run(params)[0], labels))
    wanted = look(run(teacher)[1])

    def loss(params):
        logits, features = run(params)
        return cross_entropy(logits, labels) + 300 * ((look(features) - wanted) ** 2).mean()

    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), out, step(loss))
    assert seen.rows[0]["loss"] == pytest.approx(float(loss(VICTIM.variables["params"])), rel=1e-4)
    assert seen.rows[0]["attention_loss"] > 1e-4  # the term was there


def test_nad_names_what_the_model_lacks(blobs):
    with pytest.raises(InputError, match="'block9', but the features of model 'perceptron' are flat"):
        nad.purify(nad.Config(layers=("block9",), betas=(1.0,)), VICTIM, view_of(blobs), KEY)
    mute = dataclasses.replace(MODEL, apply=lambda *args: (MODEL.apply(*args)[0], {}, {}))
    with pytest.raises(InputError, match="'perceptron' shows no features, which NAD compares"):
        nad.purify(nad.Config(), Victim(mute, VICTIM.variables), view_of(blobs), KEY)


def test_rates_of_nad_change_at_their_epochs():
    rates = nad._rates(nad.Config(), 22, 3)
    assert rates.shape == (22, 3)
    assert_allclose(rates[[0, 1, 2, 19, 20, 21], 0], [0.1, 0.1, 0.01, 0.01, 1e-4, 1e-4])


# FT-SAM.


def test_ascent_is_in_proportion_to_the_weights():
    params = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([0.5])}
    gradient = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([-2.0])}
    found = ft_sam.ascent(params, gradient, 2.0, True)  # |w| g is 3, 8, -1
    assert_allclose(found["a"], 2 * np.array([9, 32]) / 74**0.5, rtol=1e-6)
    assert_allclose(found["b"], 2 * np.array([-0.5]) / 74**0.5, rtol=1e-6)
    plain = ft_sam.ascent(params, gradient, 2.0, False)
    assert_allclose(plain["a"], 2 * np.array([1, 2]) / 3, rtol=1e-6)
    assert_allclose(plain["b"], 2 * np.array([-2]) / 3, rtol=1e-6)


def test_smoothed_labels_leave_an_equal_part_to_the_other_classes():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]))
    by_hand = [-(0.9 * np.log(0.7) + 0.05 * np.log(0.2) + 0.05 * np.log(0.1)),
               -(0.05 * np.log(0.25) + 0.05 * np.log(0.25) + 0.9 * np.log(0.5))]  # fmt: skip
    assert_allclose(ft_sam.smoothed(logits, jnp.array([0, 2]), 0.1), np.mean(by_hand), rtol=1e-6)


def test_both_readings_of_the_cosine():
    batches = ft_sam.rates(ft_sam.Config(epochs=30), 10)
    assert batches.shape == (30, 10)
    assert_allclose(batches.reshape(-1)[[0, 50, 100, 150, 200, 299]][:5], [0.01, 0.005, 0, 0.005, 0.01], atol=1e-9)
    epochs = ft_sam.rates(ft_sam.Config(epochs=4, cosine="epochs"), 3)
    assert_allclose(epochs[:, 0], 0.005 * (1 + np.cos(np.pi * np.arange(4) / 4)), rtol=1e-6)
    assert (epochs == epochs[:, :1]).all()
    assert (ft_sam.rates(ft_sam.Config(epochs=2, cosine="off"), 3) == np.float32(0.01)).all()


def _tagged_apply(variables, images, train=False, keys=None, axis_name=None):
    logits, features, _ = MODEL.apply(variables, images)
    return logits, features, {"seen": variables["params"]["body"].sum()} if train else variables["batch_stats"]


TAGGED = Model("tagged", MODEL.shape, 4, MODEL.init, _tagged_apply)
"""The perceptron with a statistic that tells which parameters a forward pass in training mode was made with."""


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [True, False])
def test_two_steps_of_ft_sam_equal_a_plain_computation(blobs, adaptive):
    config = ft_sam.Config(
        epochs=2, batch_size=40, rho=0.3, adaptive=adaptive, augment="none", weight_decay=0.01, half_period=3,
        learning_rate=0.1, smoothing=0.2,
    )  # fmt: skip
    start = VICTIM.variables["params"]
    victim = Victim(TAGGED, {"params": start, "batch_stats": {"seen": jnp.float32(0)}})
    out = ft_sam.purify(config, victim, view_of(blobs), KEY)
    images, labels = jnp.asarray(blobs[0][:40], jnp.float32) / 255, blobs[1][:40]
    wanted = np.full((40, 4), 0.2 / 3, np.float32)
    wanted[np.arange(40), labels] = 0.8

    def loss(params):
        logits = MODEL.logits({"params": params, "batch_stats": {}}, images)
        return -(wanted * jax.nn.log_softmax(logits)).sum(1).mean()

    params, momentum = start, jax.tree.map(jnp.zeros_like, start)
    for rate in (0.1, 0.1 * (1 + np.cos(np.pi / 3)) / 2):
        first, before = jax.grad(loss)(params), params
        size = jax.tree.map(jnp.abs, params) if adaptive else jax.tree.map(jnp.ones_like, params)
        length = sum(float(((s * g) ** 2).sum()) for s, g in zip(*map(jax.tree.leaves, (size, first)), strict=True))
        there = jax.tree.map(lambda p, s, g, n=length**0.5: p + 0.3 * s**2 * g / n, params, size, first)
        second = jax.tree.map(lambda g, p: g + 0.01 * p, jax.grad(loss)(there), params)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, second)
        params = jax.tree.map(lambda p, m, r=rate: p - r * m, params, momentum)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), out["params"], params)
    # statistics are those of the first pass
    assert float(out["batch_stats"]["seen"]) == pytest.approx(float(before["body"].sum()), abs=1e-4)


# SAU.


def test_losses_count_what_is_not_reached_yet():
    """Image 0 fools neither network, 1 fools both but apart, 2 is shared, 3 fools the victim alone."""
    share = np.array([[[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8], [0.8, 0.1, 0.1]],
                      [[0.5, 0.4, 0.1], [0.2, 0.1, 0.7], [0.3, 0.3, 0.4], [0.1, 0.8, 0.1]]], np.float32)  # fmt: skip
    labels, clean = jnp.zeros(4, jnp.int32), [jnp.zeros(4, jnp.int32)] * 2
    adversarial, alike = sau.losses([jnp.log(p) for p in share], clean, labels)
    assert_allclose(adversarial, [(np.log(0.6) + np.log(0.5)) / 2, 0, 0, np.log(0.8) / 2], rtol=1e-5, atol=1e-7)

    def divergence(p, q):
        middle = (p + q) / 2
        return 0.5 * (p * np.log(p / middle)).sum() + 0.5 * (q * np.log(q / middle)).sum()

    by_hand = [divergence(*share[:, image]) if image != 2 else 0 for image in range(4)]
    assert_allclose(alike, by_hand, rtol=1e-5, atol=1e-7)


def test_unlearning_loss_is_the_mean_of_its_two_forms():
    share = np.array([[0.2, 0.5, 0.3], [0.9995, 0.0003, 0.0002], [0.1, 0.1, 0.8]], np.float32)
    predicted, counted = jnp.array([1, 1, 2]), jnp.array([True, True, False])
    found = sau.unlearning(jnp.log(share), predicted, counted)
    first = -np.log(0.5 + 1e-6)
    second = -(np.log(0.999 + 1e-6) + np.log(1 + 1e-6 - 0.001)) / 2  # both limits hold
    assert_allclose(found, [first, second, 0], rtol=1e-4)


HYPER = {"step": 0.2, "bound": 0.2, "beta_adversarial": 0.01, "beta_shared": 1.0}


def slow_shared_examples(now, original, images, labels, steps):
    """The same for one image at a time, with ifs."""
    found = []
    for image, label in zip(images, labels, strict=True):
        nets = [lambda x, v=v: MODEL.logits(v, x[None])[0] for v in (now, original)]
        was = [int(net(image).argmax()) for net in nets]
        delta = jnp.full(image.shape, 0.2)
        for _ in range(steps):
            is_ = [int(net(image + delta).argmax()) for net in nets]
            fooled = [a != b for a, b in zip(is_, was, strict=True)]

            def loss(delta, image=image, label=label, nets=nets, fooled=fooled, is_=is_):
                shares = [jax.nn.softmax(net(image + delta)) for net in nets]
                value = sum(0.01 * 0.5 * jnp.log(p[label]) for p, done in zip(shares, fooled, strict=True) if not done)
                if not (all(fooled) and is_[0] == is_[1]):
                    middle = sum(shares) / 2
                    value += sum(0.5 * (p * jnp.log(p / middle)).sum() for p in shares)
                return jnp.asarray(value, jnp.float32)

            delta = jnp.clip(delta - 0.2 * jnp.sign(jax.grad(loss)(delta)), -0.2, 0.2)
        found.append(image + delta)
    return jnp.stack(found)


@pytest.mark.slow
def test_shared_examples_equal_those_of_one_image_at_a_time(blobs):
    now, original = MODEL.init(jax.random.key(1)), MODEL.init(jax.random.key(2))
    images, labels = jnp.asarray(blobs[0][:4], jnp.float32) / 255, jnp.asarray(blobs[1][:4])
    found = sau.shared_examples(MODEL, now, original, images, labels, 2, HYPER)
    assert_allclose(found, slow_shared_examples(now, original, images, labels, 2), atol=1e-6)
    assert float(abs(found - images).max()) == pytest.approx(0.2) and float((found - images).min()) < -0.1


@pytest.mark.slow
def test_one_step_of_sau_equals_a_plain_computation(blobs):
    config = sau.Config(epochs=1, batch_size=12, steps=1, learning_rate=1e-2, lambda_adversarial=0.3)
    seen = Seen()
    out = sau.purify(config, VICTIM, view_of(blobs, 12, seen), KEY)["params"]
    images, labels, start = jnp.asarray(blobs[0][:12], jnp.float32) / 255, blobs[1][:12], VICTIM.variables
    moved = slow_shared_examples(start, start, images, labels, 1)
    called = MODEL.logits(start, moved).argmax(1)
    counted = (called != labels) & (called != MODEL.logits(start, images).argmax(1))
    assert 0 < int(counted.sum()) < 12  # both kinds are there

    def loss(params):
        clean, logits = (MODEL.logits({"params": params, "batch_stats": {}}, x) for x in (images, moved))
        left = 1 - jax.nn.softmax(logits)[jnp.arange(len(labels)), called]
        shared = -jnp.where(counted, jnp.log(left), 0).sum() / len(labels)
        return cross_entropy(clean, labels) + 0.3 * cross_entropy(logits, labels) + shared

    gradient = jax.grad(loss)(start["params"])
    expected = jax.tree.map(lambda p, g: p - 1e-2 * g / (jnp.abs(g) + 1e-8), start["params"], gradient)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-4), out, expected)
    assert seen.rows[0]["fooled"] == pytest.approx(float(counted.mean()))


QUICK = {
    nad: {"teacher_epochs": 1, "epochs": 1, "batch_size": 20},
    ft_sam: {"epochs": 2, "batch_size": 20},
    sau: {"epochs": 1, "batch_size": 20, "steps": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("module", QUICK, ids=lambda m: m.__name__.rpartition(".")[2])
def test_four_devices_agree_with_one(blobs, module):
    def run(devices):
        with parallel.using(devices):
            return module.purify(module.Config(**QUICK[module]), VICTIM, view_of(blobs), KEY)

    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-4), run(1), run(4))


@pytest.mark.slow
@pytest.mark.parametrize("module", QUICK, ids=lambda m: m.__name__.rpartition(".")[2])
def test_real_networks_are_tuned_and_their_statistics_follow(blobs, module):
    model = models.create("small_vgg", (8, 8, 1), 4)
    victim = Victim(model, model.init(KEY))
    out = module.purify(module.Config(**QUICK[module]), victim, view_of(blobs), KEY)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(out))
    moved = [
        bool((a != b).any())
        for a, b in zip(*(jax.tree.leaves(v["batch_stats"]) for v in (out, victim.variables)), strict=True)
    ]
    assert all(moved) if module is not sau else not any(moved)


@pytest.mark.parametrize(
    ("module", "changes", "said"),
    [
        (nad, {"epochs": 0}, "defense.epochs must be at least 1, got 0"),
        (nad, {"betas": ()}, r"defense.betas must be one or more numbers from zero on, got \(\)"),
        (nad, {"rates": (0.1, 0.0, 1.0)}, "defense.rates must be one or more positive numbers"),
        (nad, {"begins": (1, 2, 3)}, "defense.begins must be epochs that ascend from 0"),
        (nad, {"begins": (0, 5)}, "defense.begins has 2 entries and defense.rates 3"),
        (nad, {"layers": ("block1",)}, "defense.layers has 1 entries and defense.betas 3"),
        (nad, {"momentum": 1.0}, r"defense.momentum must be in \[0, 1\), got 1.0"),
        (ft_sam, {"half_period": 0}, "defense.half_period must be at least 1, got 0"),
        (ft_sam, {"rho": -1.0}, "defense.rho must be zero or more, got -1.0"),
        (ft_sam, {"smoothing": 1.0}, r"defense.smoothing must be in \[0, 1\), got 1.0"),
        (sau, {"bound": 0.0}, "defense.bound must be positive, got 0.0"),
        (sau, {"beta_shared": -1.0}, "defense.beta_shared must be zero or more, got -1.0"),
        (sau, {"steps": 0}, "defense.steps must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(module, changes, said):
    with pytest.raises(InputError, match=said):
        module.Config(**changes)
