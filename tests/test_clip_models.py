"""The dual encoders: shapes, the causal mask, the end of the text, batch statistics and one image at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import models
from bdjax.errors import InputError
from bdjax.models import ClipConfig
from bdjax.pair_types import DualEncoder

VIT = ClipConfig((8, 8, 3), "vit", 16, (2,), 2, 4, 12, 1, 3, 7, 20, 6)
RESNET = dataclasses.replace(VIT, shape=(32, 32, 3), vision="resnet", vision_width=4, vision_depths=(1, 1, 1, 1))
TOKENS = jnp.asarray([[18, 3, 4, 19, 0, 0, 0], [18, 5, 19, 0, 0, 0, 0], [18, 3, 4, 5, 6, 7, 19]], jnp.int32)


def ready(config) -> tuple[DualEncoder, dict]:
    encoder = models.dual_encoder(config)
    return encoder, jax.jit(encoder.init)(jax.random.key(0))


def pictures(config, count=3):
    return jnp.asarray(np.random.default_rng(0).random((count, *config.shape)), jnp.float32)


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_embeddings_have_the_dimension_and_do_not_depend_on_the_rest_of_the_batch(config):
    encoder, variables = ready(config)
    images = pictures(config)
    together = encoder.encode_image(variables, images)
    assert together.shape == (3, 6) and together.dtype == jnp.float32
    assert np.allclose(together[1:2], encoder.encode_image(variables, images[1:2]), atol=1e-5)
    assert encoder.visual(variables, images)[1].shape == (3, config.vision_features)
    assert variables["params"]["logit_scale"] == pytest.approx(np.log(1 / 0.07))


def test_text_is_causal_and_ends_at_its_end_token():
    encoder, variables = ready(VIT)
    embeddings = encoder.encode_text(variables, TOKENS)
    assert embeddings.shape == (3, 6)
    padded = TOKENS.at[0, 4:].set(jnp.asarray([9, 10, 11]))  # whatever follows the end token is not seen
    assert np.allclose(embeddings[0], encoder.encode_text(variables, padded)[0], atol=1e-6)
    changed = TOKENS.at[0, 2].set(5)
    assert not np.allclose(embeddings[0], encoder.encode_text(variables, changed)[0], atol=1e-4)


def test_the_resnet_updates_its_statistics_in_training_alone():
    encoder, variables = ready(RESNET)
    images = pictures(RESNET)
    same = encoder.visual(variables, images)[2]
    new = encoder.visual(variables, images, True)[2]
    moved = jax.tree.map(lambda a, b: not np.allclose(a, b), variables["batch_stats"], new)
    assert same is variables["batch_stats"] and any(jax.tree.leaves(moved))


def test_bfloat16_activations_give_float32_embeddings_close_to_those_of_float32():
    encoder, variables = ready(VIT)
    half = models.dual_encoder(VIT, jnp.bfloat16)
    for one, other in ((encoder.encode_image(variables, pictures(VIT)), half.encode_image(variables, pictures(VIT))),
                       (encoder.encode_text(variables, TOKENS), half.encode_text(variables, TOKENS))):  # fmt: skip
        assert other.dtype == jnp.float32
        assert np.allclose(one, other, atol=0.05 * float(jnp.abs(one).max()))


def test_the_presets_have_openais_numbers_of_parameters():
    for name, published in (("vit_b_32", 151_277_313), ("rn50", 102_007_137)):
        encoder = models.dual_encoder(models.PRESETS[name])
        shapes = jax.eval_shape(encoder.init, jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == published


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_heads": 3}, "model.vision_width must be a multiple of vision_heads=3, got 16"),
        ({"text_heads": 5}, "model.text_width must be a multiple of text_heads=5, got 12"),
        ({"vision_depths": (1, 2)}, "must have 1 numbers for vit"),
        ({"patch": 16}, "at least 16x16 pixels"),
        ({"context": 2}, "model.context must be at least 3"),
    ],
)
def test_impossible_sizes_are_refused(change, words):
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        dataclasses.replace(VIT, **change)


def test_captions_of_another_length_are_refused():
    encoder, variables = ready(VIT)
    with pytest.raises(InputError, match="captions have 5 tokens; the text encoder takes 7"):
        encoder.encode_text(variables, TOKENS[:, :5])
