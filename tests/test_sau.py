"""SAU: its losses by hand, shared adversarial examples one image at a time, and a step against a direct computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from tuned import KEY, MODEL, VICTIM, Seen, cross_entropy, view_of

from bdjax.defenses import sau


def test_perturbation_losses_count_networks_that_are_not_fooled_yet():
    """Image 0 fools neither network, 1 fools both, to different classes, 2 is shared, 3 fools only the victim."""
    share = np.array([[[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8], [0.8, 0.1, 0.1]],
                      [[0.5, 0.4, 0.1], [0.2, 0.1, 0.7], [0.3, 0.3, 0.4], [0.1, 0.8, 0.1]]], np.float32)  # fmt: skip
    labels, clean = jnp.zeros(4, jnp.int32), [jnp.zeros(4, jnp.int32)] * 2
    adversarial, alike = sau.perturbation_losses([jnp.log(p) for p in share], clean, labels)
    assert_allclose(adversarial, [(np.log(0.6) + np.log(0.5)) / 2, 0, 0, np.log(0.8) / 2], rtol=1e-5, atol=1e-7)

    def divergence(p, q):
        middle = (p + q) / 2
        return 0.5 * (p * np.log(p / middle)).sum() + 0.5 * (q * np.log(q / middle)).sum()

    by_hand = [divergence(*share[:, image]) if image != 2 else 0 for image in range(4)]
    assert_allclose(alike, by_hand, rtol=1e-5, atol=1e-7)


def test_unlearning_loss_is_the_mean_of_its_two_forms():
    share = np.array([[0.2, 0.5, 0.3], [0.9995, 0.0003, 0.0002], [0.1, 0.1, 0.8]], np.float32)
    predicted, counted = jnp.array([1, 1, 2]), jnp.array([True, True, False])
    found = sau.unlearning_losses(jnp.log(share), predicted, counted)
    first = -np.log(0.5 + 1e-6)
    second = -(np.log(0.999 + 1e-6) + np.log(1 + 1e-6 - 0.001)) / 2  # both limits apply
    assert_allclose(found, [first, second, 0], rtol=1e-4)


HYPER = {"step": 0.2, "bound": 0.2, "beta_adversarial": 0.01, "beta_shared": 1.0}


def slow_shared_examples(now, original, images, labels, steps):
    """Shared adversarial examples one image at a time, with Python conditions."""
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
    assert 0 < int(counted.sum()) < 12  # some count, some do not

    def loss(params):
        clean, logits = (MODEL.logits({"params": params, "batch_stats": {}}, x) for x in (images, moved))
        left = 1 - jax.nn.softmax(logits)[jnp.arange(len(labels)), called]
        shared = -jnp.where(counted, jnp.log(left), 0).sum() / len(labels)
        return cross_entropy(clean, labels) + 0.3 * cross_entropy(logits, labels) + shared

    gradient = jax.grad(loss)(start["params"])
    expected = jax.tree.map(lambda p, g: p - 1e-2 * g / (jnp.abs(g) + 1e-8), start["params"], gradient)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-4), out, expected)
    assert seen.rows[0]["fooled"] == pytest.approx(float(counted.mean()))
