"""Contrastive training: a batch computed by hand, four devices equal one, AdamW, the schedule, zero-shot ranks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_clip_models import RESNET, VIT, ready

from bdjax.engine import embed, parallel
from bdjax.engine.contrastive import (
    PairFitConfig,
    PairSamples,
    clip_loss,
    fit_pairs,
    info_nce,
    pair_step,
    warmup_cosine,
)
from bdjax.errors import InputError


def batch_of(config, count=8, seed=3):
    rng = np.random.default_rng(seed)
    tokens = np.zeros((count, config.context), np.int32)
    tokens[:, 0], tokens[:, 1:3], tokens[:, 3] = 18, rng.integers(1, 17, (count, 2)), 19
    return rng.integers(0, 256, (count, *config.shape)).astype(np.uint8), tokens


def test_the_loss_of_two_pairs_by_hand():
    images = jnp.asarray([[2.0, 0.0], [0.0, 5.0]])
    texts = jnp.asarray([[3.0, 4.0], [0.0, 1.0]])  # cosines: 0.6 and 0 for the first image, 0.8 and 1 for the second
    scale = 2.0
    rows = -(math.log(math.exp(1.2) / (math.exp(1.2) + 1)) + math.log(math.exp(2) / (math.exp(1.6) + math.exp(2)))) / 2
    columns = (
        -(math.log(math.exp(1.2) / (math.exp(1.2) + math.exp(1.6))) + math.log(math.exp(2) / (1 + math.exp(2)))) / 2
    )
    assert float(info_nce(images, texts, jnp.float32(math.log(scale)))) == pytest.approx((rows + columns) / 2, rel=1e-6)


def on_devices(config, devices, form, gradients):
    """(loss, gradient or batch statistics) of one batch by a mapped step."""
    encoder, variables = ready(config)
    images, tokens = batch_of(config)

    def step(state, batch, per_step, constants, axis):
        samples = PairSamples(batch["images"], batch["tokens"], batch["keys"], None, axis)

        def loss(params):
            return clip_loss(encoder, params, state["batch_stats"], samples)

        if gradients:
            (value, _), other = jax.value_and_grad(loss, has_aux=True)(state["params"])
        else:
            value, (_, other) = loss(state["params"])
        return state, parallel.average((value, other), axis)

    batch = {"images": images / np.float32(255), "tokens": tokens, "keys": jax.random.split(jax.random.key(0), 8)}
    with parallel.using(devices, form):
        return jax.device_get(parallel.compiled(step)(jax.tree.map(jnp.array, variables), batch, {}, {})[1])


def largest_difference(one, other):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max() / max(1, np.abs(a).max()), one, other)))


@pytest.mark.parametrize("form", ["pmap", "jit"])
def test_four_devices_compute_the_loss_and_the_gradient_of_one(form):
    one, four = on_devices(VIT, 1, form, True), on_devices(VIT, 4, form, True)
    assert largest_difference(one, four) < 1e-5
    assert np.abs(one[1]["logit_scale"]) > 1e-3 and np.abs(one[1]["visual"]["proj"]).max() > 1e-2


def test_four_devices_compute_the_batch_statistics_of_one():
    one, four = on_devices(RESNET, 1, "pmap", False), on_devices(RESNET, 4, "pmap", False)
    assert largest_difference(one, four) < 1e-5


def test_four_devices_train_the_model_of_one():
    images, tokens = batch_of(VIT, 16)
    encoder, trained = ready(VIT)[0], []
    for devices in (1, 4):
        with parallel.using(devices):
            trained.append(fit_pairs(encoder, images, tokens, PairFitConfig(2, 8, 1e-3, 1), jax.random.key(0)))
    # weights without influence, such as the bias of an attention's keys, differ: Adam amplifies their rounding errors
    for embed_all, rows in ((embed.embed_images, images), (embed.embed_texts, tokens)):
        one, four = (embed_all(encoder, jax.device_get(variables), rows) for variables in trained)
        assert np.abs(one - four).max() < 1e-4


def test_a_step_is_optax_adamw_with_decay_of_matrices_alone():
    encoder, variables = ready(VIT)
    images, tokens = batch_of(VIT)
    step = pair_step(encoder, clip_loss)
    state = {**variables, "opt": optax.scale_by_adam().init(variables["params"])}
    batch = {"index": jnp.arange(8), "augment": jax.random.split(jax.random.key(0), 8)}
    batch["dropout"] = batch["augment"]
    constants = {"images": images, "tokens": tokens, "extra": None, "weight_decay": jnp.float32(0.1),
                 "largest_scale": jnp.float32(9)}  # fmt: skip
    after, _ = jax.jit(step, static_argnames="axis")(state, batch, {"rate": jnp.float32(1e-2)}, constants, axis=None)
    samples = PairSamples(images / np.float32(255), tokens, batch["augment"], None, None)
    gradient = jax.grad(lambda p: clip_loss(encoder, p, {}, samples)[0])(variables["params"])
    adamw = optax.adamw(1e-2, weight_decay=0.1, mask=jax.tree.map(lambda p: p.ndim > 1, variables["params"]))
    with jax.numpy_dtype_promotion("standard"):
        update, _ = adamw.update(gradient, adamw.init(variables["params"]), variables["params"])
    expected = optax.apply_updates(variables["params"], update)
    # Adam's first step is the sign of the gradient: where it is small, rounding decides
    sure = jax.tree.map(lambda g: np.abs(np.asarray(g)) > 1e-4, gradient)

    def agree(one, other, where):
        return np.allclose(np.asarray(one)[where], np.asarray(other)[where], atol=1e-5)

    assert jax.tree.all(jax.tree.map(agree, after["params"], expected, sure))


def test_the_text_encoder_and_the_scale_stay_when_the_image_encoder_alone_is_trained():
    encoder, variables = ready(VIT)
    images, tokens = batch_of(VIT)
    config = PairFitConfig(1, 8, 1e-2)
    after = fit_pairs(encoder, images, tokens, config, jax.random.key(0), start=variables, part="visual")
    same = {
        part: jax.tree.all(jax.tree.map(np.array_equal, after["params"][part], variables["params"][part]))
        for part in ("visual", "text", "logit_scale")
    }
    assert same == {"visual": False, "text": True, "logit_scale": True}


def test_logit_scale_is_clipped():
    encoder, variables = ready(VIT)
    images, tokens = batch_of(VIT)
    config = PairFitConfig(1, 8, 1e-3, largest_scale=1.5)
    after = fit_pairs(encoder, images, tokens, config, jax.random.key(0), start=variables)
    assert float(after["params"]["logit_scale"]) == 1.5


def test_the_schedule_rises_linearly_and_falls_to_zero():
    rates = warmup_cosine(2.0, 4, 12)
    assert rates[:5].tolist() == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0) and rates[11] == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    assert warmup_cosine(1.0, 50, 4)[1] == 1.0  # at most half of the steps


def test_a_batch_that_is_too_large_is_refused():
    encoder, _ = ready(VIT)
    with pytest.raises(InputError, match="fit.batch_size=9 is larger than the 8 pairs"):
        fit_pairs(encoder, *batch_of(VIT), PairFitConfig(1, 9), jax.random.key(0))


def test_training_separates_the_pairs():
    encoder, _ = ready(VIT)
    images, tokens = batch_of(VIT)
    variables = fit_pairs(encoder, images, tokens, PairFitConfig(60, 8, 3e-3, 5), jax.random.key(0))
    u, v = embed.embed_images(encoder, variables, images, 3), embed.embed_texts(encoder, variables, tokens, 5)
    assert (embed.rank_classes(u, v, 1)[:, 0] == np.arange(8)).mean() >= 0.75
    assert np.allclose((u**2).sum(1), 1, atol=1e-5) and u.shape == (8, 6)


def test_a_class_is_the_normalised_mean_of_its_captions():
    encoder, variables = ready(VIT)
    _, tokens = batch_of(VIT)
    classes = embed.class_embeddings(encoder, variables, tokens.reshape(4, 2, -1))
    mean = embed.embed_texts(encoder, variables, tokens[2:4]).mean(0)
    assert np.allclose(classes[1], mean / np.linalg.norm(mean), atol=1e-5)
    assert embed.rank_classes(np.asarray([[0.0, 1.0]]), np.asarray([[1.0, 0], [0, 1.0], [0, -1]])).tolist() == [
        [1, 0, 2]
    ]
