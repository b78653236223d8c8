"""Every model is the pair of pure functions that `bdjax.types.Model` promises; and augmentation."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import large_are_slow

from bdjax import models, registry
from bdjax.engine import augment
from bdjax.errors import InputError
from bdjax.types import Model

NAMES = registry.names("models")
CASES = large_are_slow(NAMES)
SHAPE, CLASSES = (8, 8, 1), 4
NARROW = {
    "clip_vit_b_32": 12, "densenet121": 4, "efficientnet_v2_s": 4, "googlenet": 8, "mobilenet_v3_small": 4,
    "preact_resnet18": 4, "resnet18": 4, "resnet18_imagenet": 4, "vgg16": 1, "vgg16_bn": 1, "vgg19": 1, "vgg19_bn": 1,
    "vit_b_16": 12, "vit_b_32": 12, "mobilenet_v2": 4, "mobilenet_v3_large": 4, "resnet": 4, "resnet_cifar": 4,
    "senet18": 4, "vgg_cifar": 1, "wide_resnet": 4, "convnext_tiny": 4, "efficientnet_b3": 4,
}  # fmt: skip
"""Channels that compile and compute in no time; the rest are small anyway."""


def large_enough(name, shape=SHAPE):
    least = registry.load("models", name).smallest
    return (max(shape[0], least), max(shape[1], least), shape[2])


def shapes_of(name, shape=None, classes=CLASSES, dtype=jnp.float32, narrow=True):
    model = models.create(name, shape or large_enough(name), classes, dtype, NARROW.get(name) if narrow else None)
    with jax.numpy_dtype_promotion("standard"):  # flax's BatchNorm needs it for bfloat16
        return model, jax.eval_shape(model.init, jax.random.key(0))


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


SMALL = [name for name in NAMES if name not in NARROW]


@lru_cache
def ready(name) -> tuple[Model, dict]:
    """The model and variables drawn by NumPy: compiling the initialiser of a ResNet takes 15 seconds on a CPU."""
    model, like = shapes_of(name)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            fan_in = leaf.size // leaf.shape[-1]
            return jnp.asarray(rng.normal(0, (2 / fan_in) ** 0.5, leaf.shape), jnp.float32)
        return jnp.full(leaf.shape, {"scale": 1, "var": 1}.get(kind, 0), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, like)


def pictures(count=3, shape=SHAPE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((count, *shape)), jnp.float32)


def finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- every model


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_finite_deterministic_and_one_image_at_a_time(name):
    model, variables = ready(name)
    apply = jax.jit(model.apply)
    images = pictures(3, model.shape)
    logits, features, stats = apply(variables, images)
    assert logits.shape == (3, CLASSES) and logits.dtype == jnp.float32
    assert "flat" in features and all(len(feature) == 3 for feature in features.values())
    assert finite((logits, features)) and same(stats, variables["batch_stats"])
    assert same((logits, features), apply(variables, images)[:2])
    others = images.at[1:].set(1 - images[1:])
    np.testing.assert_allclose(apply(variables, others)[0][0], logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_training_moves_the_running_statistics_a_tenth_of_the_way(name):
    model, variables = ready(name)
    start, images = jax.tree.map(np.array, variables), pictures(4, model.shape)
    update = jax.jit(lambda stats: model.apply({**variables, "batch_stats": stats}, images, True)[2])
    once = update(variables["batch_stats"])
    assert jax.tree.structure(once) == jax.tree.structure(start["batch_stats"]) and finite(once)
    first = jax.tree.map(jnp.subtract, once, start["batch_stats"])
    second = jax.tree.map(jnp.subtract, update(once), once)  # towards the same statistics of the batch
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.any()
        np.testing.assert_allclose(b, 0.9 * a, rtol=1e-3, atol=1e-6)
    assert same(variables, start)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("shape", "classes"), [((9, 13, 3), 2), ((32, 32, 3), 43), ((28, 28, 1), 10)])
def test_any_height_width_channels_and_classes(name, shape, classes):
    shape = large_enough(name, shape)
    model, variables = shapes_of(name, shape, classes)
    logits, features, _ = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((5, *shape), jnp.float32))
    assert logits.shape == (5, classes) and logits.dtype == jnp.float32
    assert features["flat"].ndim == 2 and model.shape == shape and model.classes == classes


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_for_activations_only(name):
    model, variables = shapes_of(name, dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, *model.shape), jnp.float32)
    for train in (False, True):
        with jax.numpy_dtype_promotion("standard"):  # flax's BatchNorm needs it for bfloat16
            logits, features, stats = jax.eval_shape(partial(model.apply, train=train), variables, images)
        assert {leaf.dtype for leaf in jax.tree.leaves((variables, stats, logits))} == {jnp.dtype("float32")}
        assert {leaf.dtype for leaf in jax.tree.leaves(features)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name", CASES)
def test_the_smallest_side_works_and_the_error_names_it(name):
    least = registry.load("models", name).smallest
    model, variables = shapes_of(name, (least, least, 1))
    assert jax.eval_shape(model.logits, variables, jnp.zeros((1, least, least, 1))).shape == (1, CLASSES)
    for shape in ((least - 1, least, 1), (least, least - 1, 3)):
        with pytest.raises(InputError, match=f"at least {least}x{least} pixels, got {shape[0]}x{shape[1]}"):
            models.create(name, shape, CLASSES)


@pytest.mark.parametrize("name", CASES)
def test_the_same_arguments_give_the_same_object(name):
    assert models.create(name, (32, 32, 3), 7) is models.create(name, (32, 32, 3), 7)
    assert models.create(name, (32, 32, 3), 7) is not models.create(name, (32, 32, 3), 8)


def test_initialisation_follows_the_key_and_is_finite():
    model, like = shapes_of("cnn")
    init = jax.jit(model.init)
    one, again, other = (init(jax.random.key(seed)) for seed in (1, 1, 2))
    assert jax.tree.structure(one) == jax.tree.structure(like) and finite(one)
    assert same(one, again) and not same(one, other)


@pytest.mark.parametrize("name", SMALL)
def test_gradient_and_its_directional_derivative_by_the_images_are_finite(name):
    model, variables = ready(name)
    flat = jnp.zeros((2, *model.shape)).at[:, :4].set(1)  # constant patches: every pooling window is a tie

    @jax.jit
    def twice(images, direction):
        return jax.jvp(
            jax.grad(lambda x: jax.nn.log_softmax(model.logits(variables, x))[:, 0].sum()), (images,), (direction,)
        )

    gradient, curvature = twice(flat, pictures(2, model.shape))
    assert finite((gradient, curvature)) and jnp.abs(gradient).max() > 0 and jnp.abs(curvature).max() > 0


@pytest.mark.parametrize(("name", "near"), [("resnet_18", "resnet18"), ("smallvgg", "small_vgg"), ("CNN", "cnn")])
def test_an_unknown_model_is_answered_with_the_nearest_or_the_list(name, near):
    with pytest.raises(InputError, match=f"unknown model {name!r}.*{near}"):
        models.create(name, SHAPE, CLASSES)


def test_one_class_is_no_classifier():
    with pytest.raises(InputError, match="at least 2 classes, got 1"):
        models.create("cnn", SHAPE, 1)


def test_small_vgg_is_that_of_table_9():
    model, variables = shapes_of("small_vgg", (32, 32, 3), 10)
    assert count(variables) == 308_394
    _, features, _ = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    assert [features[f"conv{layer}"].shape[1:] for layer in range(1, 7)] == [
        (32, 32, 32),
        (32, 32, 32),
        (16, 16, 64),
        (16, 16, 64),
        (8, 8, 128),
        (8, 8, 128),
    ]
    assert [features[f"block{block}"].shape[1:] for block in (1, 2, 3)] == [(16, 16, 32), (8, 8, 64), (4, 4, 128)]
    assert features["flat"].shape == (1, 2048)


# --- augmentation


@pytest.mark.parametrize("name", augment.POLICIES)
def test_a_policy_treats_a_batch_as_its_images_one_at_a_time(name):
    distort = jax.jit(augment.policy(name))
    images, keys = pictures(6, (8, 8, 3)), jax.random.split(jax.random.key(0), 6)
    batch = distort(images, keys)
    assert batch.shape == images.shape and batch.dtype == jnp.float32 and batch.min() >= 0 and batch.max() <= 1
    assert same(batch, distort(images, keys))
    for i in range(6):
        alone = distort(jnp.broadcast_to(images[i], images.shape), jnp.broadcast_to(keys[i], keys.shape))
        assert same(alone, jnp.broadcast_to(batch[i], images.shape))
    assert same(batch, images) == (name == "none")


def test_crop_is_a_window_of_the_padded_image_and_every_offset_occurs():
    image = pictures(1)[0]
    padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)))
    windows = {padded[i : i + 8, j : j + 8].tobytes(): (i, j) for i in range(5) for j in range(5)}
    keys = jax.random.split(jax.random.key(0), 300)
    cropped = np.asarray(jax.vmap(lambda key: augment.crop(image, key, pad=2))(keys))
    assert {windows[one.tobytes()] for one in cropped} == set(windows.values())


def test_flip_mirrors_about_half_the_images_and_is_an_involution():
    image = pictures(1)[0]
    keys = jax.random.split(jax.random.key(0), 200)
    flipped = np.asarray(jax.vmap(augment.flip, (None, 0))(image, keys))
    mirrored = (flipped == np.asarray(image)[:, ::-1]).all((1, 2, 3))
    assert 60 < mirrored.sum() < 140 and (flipped[~mirrored] == np.asarray(image)).all()
    assert same(jax.vmap(augment.flip)(flipped, keys), jnp.broadcast_to(image, flipped.shape))


def test_cutout_zeroes_one_square_and_nothing_else():
    image = jnp.ones((8, 8, 2))
    keys = jax.random.split(jax.random.key(0), 50)
    for cut in np.asarray(jax.vmap(lambda key: augment.cutout(image, key, size=4))(keys)):
        gone = np.argwhere(cut.sum(-1) == 0)
        (top, left), (bottom, right) = gone.min(0), gone.max(0) + 1
        assert len(gone) == (bottom - top) * (right - left)
        assert all(2 <= side <= 4 for side in (bottom - top, right - left))
        assert bottom - top == 4 or top == 0 or bottom == 8
