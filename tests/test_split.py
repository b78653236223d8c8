"""The defender's images drawn by class, and from both splits."""

import numpy as np
import pytest

from bdjax.config import SplitConfig
from bdjax.pipelines.evaluation import _quotas, clean_indices, pool
from bdjax.types import Data


def data(*counts, train=0):
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2)
    return Data(
        "d", images[:train], labels[:train], images[train:], labels[train:], tuple(map(str, range(len(counts))))
    )


@pytest.mark.parametrize(
    ("counts", "size", "expected"),
    [
        ([10, 10], 10, [5, 5]),
        ([90, 10], 50, [45, 5]),
        ([97, 2, 1], 50, [48, 1, 1]),  # one of two is kept from the defense, one alone is not
        ([50, 30, 20], 10, [5, 3, 2]),
        ([98, 1, 1], 3, [1, 1, 1]),
        ([5, 5, 5], 2, [1, 1, 0]),  # fewer than classes
        ([1, 1, 1, 1], 2, [1, 1, 0, 0]),
        ([0, 6, 4], 5, [0, 3, 2]),
        ([7, 7, 7], 10, [4, 3, 3]),
    ],
)
def test_classes_give_in_proportion_and_are_on_both_sides(counts, size, expected):
    found = _quotas(np.array(counts), size)
    assert found.tolist() == expected and found.sum() == size


def test_any_size_is_met_and_within_the_counts():
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts = rng.integers(0, 12, rng.integers(2, 8))
        for size in range(counts.sum() + 1):
            found = _quotas(counts, size) if counts.sum() else counts
            assert found.sum() == size and (found >= 0).all() and (found <= counts).all()
            if np.minimum(counts, 1).sum() <= size <= np.maximum(counts - 1, np.minimum(counts, 1)).sum():
                assert (found[counts > 0] >= 1).all() and (counts - found)[counts > 1].min(initial=1) >= 1


def test_images_are_drawn_by_class_and_seed():
    given, split = data(60, 20, 20), SplitConfig("test", 50, "stratified")
    one, two = (clean_indices(split, given, seed) for seed in (0, 1))
    for found in (one, two):
        assert np.bincount(given.y_test[found]).tolist() == [30, 10, 10] and len(set(found.tolist())) == 50
    assert one.tolist() != two.tolist() and (one == clean_indices(split, given, 0)).all() and one.dtype == np.int32


def test_all_is_both_splits_and_what_is_not_drawn_is_evaluated_on():
    from conftest import perceptron

    from bdjax.config import Experiment
    from bdjax.pipelines.evaluation import Evaluation

    given = data(30, 30, train=40)
    images, labels = pool("all", given)
    assert len(images) == 60 and labels.tolist() == [0] * 30 + [1] * 30
    experiment = Experiment("clean", split=SplitConfig("all", None, "stratified"))
    found = Evaluation(perceptron((2, 2, 1), 2), given, experiment, {})
    assert len(found.clean_images) == 30 and np.bincount(found.clean_labels).tolist() == [15, 15]
    seen = sorted([*found.clean_images[:, 0, 0, 0].tolist(), *found.images[:, 0, 0, 0].tolist()])
    assert seen == list(range(60))
