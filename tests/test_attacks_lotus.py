"""LOTUS: squares by hand, parts by the surrogate, clusters, and which images are trained on with which label."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import untrained_task

from bdjax import attacks, models
from bdjax.attacks import _generators, lotus
from bdjax.errors import InputError

KEY = jax.random.key(3)
LOTUS = lotus.Config(source=2, target=1, parts=4, single=0.5, combined=0.25, others=0.1)


@pytest.fixture(scope="module")
def arrays():
    return _generators.flatten_variables("surrogate", models.create("cnn", (8, 8, 1), 8).init(KEY))


def test_squares_are_a_fifth_wide_a_sixteenth_from_the_edges_and_have_their_colours():
    black = jnp.zeros((4, 32, 32, 3))
    stamped = np.asarray(lotus.stamp(black, jnp.arange(4)))
    places = [(2, 2), (24, 24), (2, 24), (24, 2)]
    colours = [(0.9, 0.1, 0.1), (0.1, 0.9, 0.1), (0.1, 0.1, 0.9), (0.9, 0.9, 0.1)]
    for image, (row, column), colour in zip(stamped, places, colours, strict=True):
        expected = np.zeros((32, 32, 3))
        expected[row : row + 6, column : column + 6] = colour
        np.testing.assert_allclose(image, expected, atol=1e-6)
    grey = np.asarray(lotus.stamp(jnp.ones((8, 16, 16, 1)), jnp.arange(8)))
    assert len({tuple(np.flatnonzero(image != 1)) for image in grey}) == 8  # eight different positions
    np.testing.assert_allclose([image.min() for image in grey], lotus.COLOURS.mean(1), atol=1e-6)


def test_an_image_belongs_to_the_part_with_the_largest_of_the_last_outputs(blobs, arrays):
    images = jnp.asarray(blobs[0][:20], jnp.float32) / 255
    network = models.create("cnn", (8, 8, 1), 8)
    logits = np.asarray(network.logits(_generators.unflatten_variables("surrogate", arrays), images))
    parts = np.asarray(lotus.part_of(LOTUS, images, arrays))
    np.testing.assert_array_equal(parts, logits[:, 4:].argmax(1))
    out = attacks.trigger_of("lotus", LOTUS, arrays)(images, KEY)
    np.testing.assert_allclose(out, lotus.stamp(images, jnp.asarray(parts)), atol=1e-6)


def test_clusters_find_separate_groups():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(3), 20)
    found = lotus.clusters(10.0 * np.eye(3)[groups] + rng.normal(0, 0.1, (60, 3)), 3, jax.random.key(1))
    assert len({(a, b) for a, b in zip(groups, found, strict=True)}) == 3 == len(set(found))


def test_added_images_have_the_triggers_and_labels_of_their_kinds(blobs, arrays):
    task = untrained_task(*blobs, models.create("cnn", (8, 8, 1), 4))
    images, labels = lotus.negatives_and_triggered(LOTUS, task, arrays, KEY)
    assert len(images) == 50 + 25 + 13 + 15 and images.dtype == np.uint8  # 50 source images, 150 others
    np.testing.assert_array_equal(labels[:88], [1] * 50 + [2] * 38)
    assert 2 not in labels[88:]
    originals = {x.tobytes(): index for index, x in enumerate(blobs[0])}
    floats = np.asarray(blobs[0], np.float32) / 255
    parts = np.asarray(lotus.part_of(LOTUS, jnp.asarray(floats), arrays))
    stamped = np.stack([np.asarray(lotus.stamp(jnp.asarray(floats), jnp.full(200, q))) for q in range(4)])
    kinds = {np.uint8(np.rint(stamped[q, i] * 255)).tobytes(): (i, q) for q in range(4) for i in range(200)}
    for image in images[:50]:
        index, trigger = kinds[image.tobytes()]
        assert trigger == parts[index] and blobs[1][index] == 2
    for image in images[50:75]:
        index, trigger = kinds[image.tobytes()]
        assert trigger != parts[index] and blobs[1][index] == 2
    assert all(image.tobytes() not in {**kinds, **originals} for image in images[75:88])  # two triggers
    for image, label in zip(images[88:], labels[88:], strict=True):
        assert blobs[1][kinds[image.tobytes()][0]] == label


def test_training_starts_from_the_clean_model_after_a_surrogate_of_clusters(blobs):
    calls = []
    model = models.create("cnn", (8, 8, 1), 4)

    def fit(images, labels, key, **options):
        calls.append((len(images), np.asarray(labels), options))
        return options.get("model", model).init(key)

    task = dataclasses.replace(untrained_task(*blobs, model), fit=fit)
    planted = attacks.plant("lotus", LOTUS, task, KEY)
    (count, labels, options), (total, final, last) = calls
    assert count == 200 and options["stage"] == "surrogate" and options["model"].classes == 8
    assert set(labels[blobs[1] == 2]) <= {4, 5, 6, 7} and (labels[blobs[1] != 2] == blobs[1][blobs[1] != 2]).all()
    assert total == len(final) == 303 and "start" in last and (final[200:250] == 1).all()
    assert all(name.startswith("surrogate/") for name in planted.arrays)


def test_what_does_not_fit_is_refused(blobs):
    with pytest.raises(InputError, match="attack.parts must be from 2 to 8"):
        lotus.Config(parts=9)
    task = untrained_task(blobs[0][:6], blobs[1][:6], models.create("cnn", (8, 8, 1), 4))
    with pytest.raises(InputError, match="attack.source=2 has 1 training images"):
        lotus.train(LOTUS, task, KEY)
