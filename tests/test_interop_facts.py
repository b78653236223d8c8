"""What is used of that which stands beside weights: normalisation layers, prune masks, class names, an accuracy."""

import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.interop import _metadata
from bdjax.interop._tensors import Tensor
from bdjax.models import Input
from bdjax.reports.imported import notes


def held(array):
    array = np.asarray(array)
    return Tensor(array.dtype.name, array.shape, lambda: array)


def test_a_normalisation_layer_is_the_inputs():
    mean, std = np.float32([0.4914, 0.5, 0.4]), np.float32([0.25, 0.2, 0.3])
    for pair in (("mean", "std"), ("0.mean", "0.std"), ("module.norm.mu", "module.norm.sigma")):
        shaped = {pair[0]: held(mean.reshape(1, 3, 1, 1)), pair[1]: held(std.reshape(3, 1, 1)), "w": held(mean)}
        inputs, names = _metadata.normalisation("f", {"k": shaped}, None)
        assert names == {"k": frozenset(pair)}
        assert inputs["k"] == Input((0.4914, 0.5, 0.4), (0.25, 0.2, 0.3))
    bytes_ = {"n.mean": held(mean * 255), "n.std": held(std * 255)}
    found = _metadata.normalisation("f", {"": bytes_}, Input(channels="bgr"))[0][""]
    np.testing.assert_allclose(found.mean + found.std, [*mean, *std], rtol=1e-6)
    assert found.channels == "bgr"
    assert _metadata.normalisation("f", {"": bytes_}, Input((0.4914, 0.5, 0.4), (0.25, 0.2, 0.3)))[0]
    with pytest.raises(InputError, match="normalisation layer .'n.mean'.*Omit both"):
        _metadata.normalisation("f", {"": bytes_}, Input((0.5,), (0.5,)))
    for odd in ({"n.mean": held(mean)}, {"n.mean": held(mean), "n.std": held(-std)},
                {"n.mean": held(mean), "n.std": held(std), "m.mean": held(std), "m.std": held(std)}):  # fmt: skip
        assert _metadata.normalisation("f", {"": odd}, None) == ({}, {})


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (1e-30,)), ((0.5,), (9e-6,)), ((0.5,), (0.0,)), ((0.5,), (-0.2,)), ((-1e30,), (0.2,)), ((3.0,), (0.5,)),
     ((0.5,), (11.0,)), ((0.5, 0.5, 0.5), (0.2, 1e-9, 0.2)), ((1e30,), (1e30,))],
)  # fmt: skip
def test_a_normalisation_that_is_for_no_images_is_refused(mean, std):
    layer = {"norm.mean": held(np.float32(mean)), "norm.std": held(np.float32(std))}
    whole = {**layer, "conv.weight": held(np.zeros((2, 2), np.float32))}
    with pytest.raises(InputError, match="'norm.mean'.*from -10 to 1.*from 1e-05 to less than 10.*--ignore norm.mean"):
        _metadata.normalisation("f", {"": whole}, None)
    assert _metadata.normalisation("f", {"": whole}, None, {"": frozenset(["norm.std"])}) == ({}, {})
    assert _metadata.normalisation("f", {"": layer}, None) == ({}, {}), "numbers of something else, beside the weights"


def test_a_normalisation_that_is_ignored_is_not_done():
    layer = {"norm.mean": held(np.float32([0.5])), "norm.std": held(np.float32([0.25]))}
    assert _metadata.normalisation("f", {"": layer}, None)[0][""] == Input((0.5,), (0.25,))
    for name in layer:
        assert _metadata.normalisation("f", {"": layer}, None, {"": frozenset([name])}) == ({}, {})


def test_what_is_ignored_is_named_in_any_usual_way():
    tensors = dict.fromkeys(["a.bn1.neuron_mask", "a.bn2.neuron_mask", "b.neuron_mask.x", "aux.fc.weight", "c.weight"])
    for wanted, count in (("neuron_mask", 3), ("aux", 1), ("aux.fc.weight", 1), ("a.bn?.*", 2), ("*mask*", 3)):
        assert len(_metadata.ignored_tensors("f", {"": tensors}, [wanted])[""]) == count
    with pytest.raises(InputError, match="--ignore 'mask' names; there are some such as 'a.bn1.neuron_mask'"):
        _metadata.ignored_tensors("f", {"": tensors}, ["mask"])


def test_pruned_weights_are_multiplied_by_their_masks():
    tensors = {
        "c.weight_orig": held(np.float32([1, 2])),
        "c.weight_mask": held(np.float32([0, 1])),
        "c.bias": held([1.0]),
    }
    found = _metadata.apply_masks(tensors, frozenset(["c.weight_mask"]))
    assert list(found) == ["c.weight", "c.bias"]
    np.testing.assert_array_equal(found["c.weight"].read(), np.float32([0, 2]))
    assert list(_metadata.apply_masks(tensors, frozenset())) == list(tensors)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"classes": ["cat", "dog", "eel"]}, ("cat", "dog", "eel")),
        ({"class_to_idx": {"eel": 2, "cat": 0, "dog": 1}}, ("cat", "dog", "eel")),
        ({"idx_to_class": {2: "eel", 0: "cat", 1: "dog"}}, ("cat", "dog", "eel")),
        ({"hparams": {"class_names": ("cat", "dog", "eel")}}, ("cat", "dog", "eel")),
        ({"class_to_idx": {"0": 0, "10": 1, "2": 2}}, ("0", "10", "2")),
        ({"classes": ["cat", "dog"]}, None),
        ({"classes": 3}, None),
        ({"classes": ["cat", "cat", "dog"]}, None),
        ({"class_to_idx": {"eel": 3, "cat": 0, "dog": 1}}, None),
        ({"classes": ["cat", ["dog"], "eel"]}, None),
        (["cat"], None),
    ],
)
def test_class_names_of_a_file(value, names):
    found = _metadata.class_names(value, 3)
    assert (found and found[0]) == names


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"classes": ["cat", "cat", "dog"]}, "'classes': 'cat' occurs more than once"),
        ({"hparams": {"names": ["a", 1, "1"]}}, "'hparams.names': '1' occurs more than once"),
        ({"classes": ["cat", "dog"]}, "'classes': 2 names for 3 outputs"),
        ({"class_to_idx": {"eel": 3, "cat": 0, "dog": 1}}, "'class_to_idx': its numbers are not 0 to 2, each once"),
        ({"class_to_idx": {"eel": 2, "cat": 0, "dog": 1, "cow": 1}}, "its numbers are not 0 to 3, each once"),
        ({"idx_to_class": {0: "cat", "1": "dog", 2: "eel"}}, "its numbers are not 0 to 2, each once"),
        ({"classes": ["cat", ["dog"], "eel"]}, "'classes': not all of them are text or whole numbers"),
        ({"classes": ["cat", "d" * 201, "eel"]}, "'classes': one has more than 200 characters"),
        ({"classes": [1, 2, 10**5000]}, "'classes': one has more than 200 characters"),
        ({"classes": 3}, None),
        ({"classes": []}, None),
        ({}, None),
    ],
)
def test_class_names_that_cannot_be_used_are_not_dropped_without_a_word(value, why):
    assert _metadata.class_names(value, 3) is None
    said = _metadata.class_names_problem(value, 3)
    assert said == why or why in said
    lines = notes({"classes": ["0", "1", "2"], "source": {"classes": None, "unnamed": said}})
    assert lines == ([f"classes: numbered; the names in the file are not used, {said}"] if said else [])


@pytest.mark.parametrize(
    ("value", "rate"), [({"acc": 94.5}, 0.945), ({"best": {"best_acc": 0.5}}, 0.5), ({"acc": "94"}, None), ({}, None)]
)
def test_the_accuracy_that_a_file_tells(value, rate):
    assert _metadata.accuracy(value) == rate
