"""What is said of data and models before the numbers: order and names of classes, empty ones, impossible accuracies."""

import json

import numpy as np
import pytest

from bdjax.config import Experiment
from bdjax.datasets import _checks
from bdjax.errors import InputError
from bdjax.models import Input
from bdjax.pipelines import plausibility
from bdjax.pipelines.evaluation import Evaluation


def data(names, labels=None, channels=3):
    labels = np.arange(len(names)).repeat(2) if labels is None else np.array(labels)
    images = np.full((len(labels), 4, 5, channels), 90, np.uint8)
    images[:, 0, 0, 0] = 100 + labels
    return _checks.check_data("mine", images, labels, images, labels, names)


def manifest(names, **more):
    return {"kind": "imported", "classes": list(names), "shape": [4, 5, 3], "source": {}, **more}


@pytest.mark.parametrize(
    ("own", "given"),
    [
        (["dog", "cat", "eel"], ["cat", "dog", "eel"]),
        (["Dog", "house cat", "EEL"], ["house_cat", "dog", "eel"]),
        (["0", "10", "2"], ["0", "2", "10"]),
    ],
)
def test_labels_come_into_the_order_of_the_models_outputs(own, given):
    there = data(given)
    found = plausibility.aligned(manifest(own), "m", there)
    assert found.classes == tuple(own) and "permuted into the order" in found.notes[-1]
    for before, after, image in zip(there.y_train, found.y_train, found.x_train, strict=True):
        assert own[after].lower().replace(" ", "_") == given[before] and image[0, 0, 0] == 100 + before
    assert plausibility.aligned(manifest(own), "m", found) is found


@pytest.mark.parametrize(
    ("own", "given"),
    [
        (["a", "b", "c"], ["a", "b", "c"]),
        (["0", "1", "2"], ["a", "b", "c"]),
        (["a", "b", "c"], ["0", "1", "2"]),
        (["0", "1", "2"], ["1", "2", "3"]),
        (["a", "b"], ["a", "b", "c"]),
    ],
)
def test_classes_without_names_on_one_side_stay_as_they_are(own, given):
    there = data(given)
    assert plausibility.aligned(manifest(own), "m", there) is there


@pytest.mark.parametrize("given", [["x", "y", "z"], ["a", "b", "z"]])
def test_data_of_other_classes_is_refused(given):
    with pytest.raises(InputError, match=f"m holds a model of the classes a, b, c; mine has {', '.join(given)}"):
        plausibility.aligned(manifest("abc"), "m", data(given))


def test_classes_are_called_by_the_models_names():
    assert plausibility.class_names(manifest("abc"), data(["0", "1", "2"])) == ("a", "b", "c")
    assert plausibility.class_names(manifest("012"), data(["x", "y", "z"])) == ("x", "y", "z")


def test_empty_classes_and_targets_without_images_warn():
    gap = data("abcd", [0, 0, 2, 2])
    said = plausibility.of_data(gap, [1])
    assert said[0].startswith("no training image of class b, d") and said[1].startswith("no test image of class b, d")
    assert "the attack's target, class b (1), has no training and no test image" in said[2]
    assert plausibility.of_data(data("abc"), [1]) == [] and len(plausibility.of_data(gap, [0])) == 2


def test_a_data_set_is_described():
    said = " ".join(plausibility.described(data("ab", [0, 0, 0, 1])))
    assert "mine: 2 classes, images 4x5x3." in said and "4 training images, 1 to 3 a class: a 3, b 1." in said


LABELS = np.arange(10).repeat(20)


@pytest.mark.parametrize(
    ("right", "recorded", "words"),
    [
        (200, None, None),
        (120, None, None),
        (120, 0.65, None),
        (120, 0.94, "far below the recorded 0.9400"),
        (60, None, "hardly above chance (0.10)"),
        (20, 0.95, "far below the recorded"),
        (200, 0.95, None),
    ],
)
def test_an_accuracy_that_cannot_be_warns(right, recorded, words):
    rng = np.random.default_rng(0)
    guesses = np.where(rng.permutation(200) < right, LABELS, (LABELS + rng.integers(1, 10, 200)) % 10)
    found = plausibility.of_accuracy(guesses, LABELS, "abcdefghij", recorded)
    assert bool(found) == (words is not None)
    if words:
        assert (
            words in found[0]
            and "(n = 200)" in found[0]
            and "--input-mean" in found[0]
            and "another order" not in found[0]
        )


def test_an_exchange_of_classes_is_named():
    guesses = (LABELS + 3) % 10
    assert (
        "With the classes in another order it would be 1.00"
        in plausibility.of_accuracy(guesses, LABELS, "abcdefghij")[0]
    )


def test_one_class_alone_is_not_near_chance():
    assert plausibility.of_accuracy(np.zeros(20, int), np.zeros(20, int), "ab") == []


def test_the_recorded_accuracy(tmp_path):
    assert plausibility.recorded_accuracy(manifest("ab", source={"accuracy": 0.9}), tmp_path) == 0.9
    assert plausibility.recorded_accuracy(manifest("ab"), tmp_path) is None
    (tmp_path / "result.json").write_text(json.dumps({"after": {"acc": 0.8}}))
    assert plausibility.recorded_accuracy({"kind": "purified"}, tmp_path / "purified") == 0.8
    (tmp_path / "result.json").write_text("[]")
    assert plausibility.recorded_accuracy({"kind": "purified"}, tmp_path / "purified") is None


@pytest.mark.parametrize(
    ("shape", "channels", "kind", "words"),
    [
        ([4, 5, 3], 1, "imported", ["numpy.repeat(x, 3, axis=-1)"]),
        ([4, 5, 1], 3, "imported", ["RGB to grey"]),
        ([8, 8, 3], 3, "imported", ["--size 4,5", "--resize 8", "mogrify -resize '8x8!'"]),
        ([8, 9, 3], 3, "victim", ["mogrify -resize '9x8!'"]),
    ],
)
def test_data_of_another_shape_gets_its_remedy(shape, channels, kind, words):
    said = plausibility.remedy(manifest("abc", shape=shape, kind=kind), data("abc", channels=channels))
    assert all(word in said for word in words) and ("--size" in said) == (shape == [8, 8, 3])


def test_without_a_trigger_nothing_is_an_attack_success_rate(blobs, blobs_npz):
    from conftest import perceptron

    from bdjax import datasets
    from bdjax.reports import table

    found = Evaluation(perceptron(), datasets.load(blobs_npz), Experiment("clean", dataset=blobs_npz), {})
    rates = found.rates(found.labels, found.labels)
    assert rates == {"acc": 1.0, "asr": None, "asr_with_target": None, "ctca": None}
    assert not found.eligible.any() and found.targets == [] and len(found.pictures()["clean"]) == 6
    assert table._asr_line(None, None, 0).endswith("not measured: no trigger given") and "0.00" not in table._asr_line(
        None, None, 0
    )
    planted = Evaluation(perceptron(), datasets.load(blobs_npz), Experiment("badnets", dataset=blobs_npz), {})
    assert planted.rates(planted.labels, planted.goals)["asr"] == 1.0 and len(planted.targets) == 1


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7), "--input-mean 0.491373,0.482353,0.446667 --input-std 0.247059"),
        ((123.68, 116.78, 103.94), (), "--input-std 0.00392157,0.00392157,0.00392157"),
        ((0.5,), (63.0,), "--input-std 0.247059"),
    ],
)
def test_a_normalisation_for_bytes_is_refused_with_the_flags_to_give(mean, std, words):
    with pytest.raises(InputError, match="is not for images in .0, 1.") as caught:
        Input(mean, std).check(3)
    assert words in str(caught.value)
    Input((0.5, 1.0, 0), (1 / 255, 2.0, 1)).check(3)  # a network that was given 0 to 255
