"""BAN fine-tuning: one step against a plain computation, the schedule, and what needs batch normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from pruned import KEY, MODEL, Seen, victim_of
from tuned import VICTIM, cross_entropy

from bdjax.defenses import _masks, ban_finetune
from bdjax.errors import InputError
from bdjax.types import DefenderView


def test_one_step_is_a_step_on_the_loss_with_and_without_adversarial_noise(blobs):
    config = ban_finetune.Config(epochs=1, batch_size=12, augment="none", weight_decay=0.1, noise_weight=0.5)
    subject, seen = victim_of(blobs), Seen()
    out = ban_finetune.purify(config, subject, DefenderView(blobs[0][:12], blobs[1][:12], seen), KEY)
    start, images, labels = subject.variables, jnp.asarray(blobs[0][:12], jnp.float32) / 255, blobs[1][:12]
    _, noise_key = jax.random.split(jax.random.fold_in(KEY, 1))
    drawn = _masks.draw_noise(noise_key, {"norm": jnp.ones(6)}, jnp.float32(0.3))

    def loss(params, scale, bias):
        norm = {"scale": (1 + scale) * params["norm"]["scale"], "bias": (1 + bias) * params["norm"]["bias"]}
        logits, _, stats = MODEL.apply({**start, "params": {**params, "norm": norm}}, images, True)
        return cross_entropy(logits, labels), stats

    xi, delta = drawn["scale"]["norm"], drawn["bias"]["norm"]
    (uphill_xi, uphill_delta), _ = jax.grad(loss, (1, 2), has_aux=True)(start["params"], xi, delta)
    xi, delta = xi + 0.3 * jnp.sign(uphill_xi), delta + 0.3 * jnp.sign(uphill_delta)
    assert float(abs(xi).max()) > 0.3  # not projected
    zero = jnp.zeros(6)

    def both(params):
        return loss(params, zero, zero)[0] + 0.5 * loss(params, xi, delta)[0]

    gradient = jax.grad(both)(start["params"])
    expected = jax.tree.map(lambda p, g: p - 0.01 * (g + 0.1 * p), start["params"], gradient)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), out["params"], expected)
    stats = loss(start["params"], zero, zero)[1]
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), out["batch_stats"], stats)  # those without noise
    arrays = seen.rounds[0][2]
    assert arrays["noisy_loss"] > arrays["clean_loss"]
    assert_allclose(arrays["clean_loss"], loss(start["params"], zero, zero)[0], rtol=1e-4)


def test_learning_rate_falls_by_ten_at_the_milestones(blobs, monkeypatch):
    tables = []

    def run_epochs(step, state, constants, rates, *_, **__):
        tables.append(rates)
        return state

    monkeypatch.setattr(ban_finetune, "run_epochs", run_epochs)
    config = ban_finetune.Config(epochs=4, milestones=(1, 3), batch_size=20)
    ban_finetune.purify(config, victim_of(blobs), DefenderView(blobs[0][:40], blobs[1][:40]), KEY)
    assert_allclose(tables[0], np.array([[0.01] * 2, [0.001] * 2, [0.001] * 2, [0.0001] * 2]), rtol=1e-6)


def test_a_model_without_batch_normalisation_is_refused(blobs):
    with pytest.raises(InputError, match="ban_finetune"):
        ban_finetune.purify(ban_finetune.Config(), VICTIM, DefenderView(blobs[0][:40], blobs[1][:40]), KEY)
    with pytest.raises(InputError, match="milestones"):
        ban_finetune.Config(milestones=(3, 2))
