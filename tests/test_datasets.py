"""Specifications, the digits, arrays and .npz files: the loaded data, and the errors for invalid ones."""

from pathlib import Path

import numpy as np
import pytest
from dataset_checks import SCANS, TARGETS, assert_stored, says
from PIL import Image

from bdjax import registry
from bdjax.datasets import _checks, load
from bdjax.datasets._stratify import spread

# --- the specification


def test_sources_are_the_modules():
    assert registry.names("datasets") == ["digits", "folder", "npz", "tfds"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("npz", "`npz:PATH`"),
        ("npz:", "`npz:PATH`"),
        ("folder", "`folder:PATH`"),
        ("tfds", "`tfds:NAME`"),
        ("tfds:@here", "`tfds:NAME`"),
        ("digits:5", "got '5'"),
        ("digit", "Did you mean 'digits'?"),
        ("npz:/no/such.npz", "/no/such.npz does not exist"),
        ("folder:/no/such", "/no/such does not exist"),
    ],
)
def test_the_error_for_a_wrong_specification_states_the_right_form(spec, words):
    assert words in says(spec)


def test_a_user_defined_module(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from bdjax.datasets import _checks\nimport numpy as np\n"
        "def load(rest):\n"
        "    x = np.full((2, 4, 4), int(rest), np.uint8)\n"
        "    return _checks.check_data('mine', x, [0, 1], x, [1, 0])\n"
    )
    data = load(f"{tmp_path}/mine.py:7")
    assert data.shape == (4, 4, 1) and data.x_train.max() == 7
    (tmp_path / "empty.py").write_text("")
    assert "empty.py has no function `load" in says(f"{tmp_path}/empty.py:7")


# --- digits


def test_digits_split_is_stratified_and_fixed():
    data = load("digits")
    assert_stored(data)
    assert (data.name, data.shape, data.classes) == ("digits", (32, 32, 1), tuple("0123456789"))
    assert (len(data.x_train), len(data.x_test)) == (1000, 797)
    of_class = np.bincount(TARGETS)
    test = np.bincount(data.y_test)
    assert np.abs(test - of_class * 797 / 1797).max() < 1
    np.testing.assert_array_equal(np.bincount(data.y_train) + test, of_class)
    np.testing.assert_array_equal(np.bincount(data.y_train), [99, 101, 98, 102, 101, 101, 101, 100, 97, 100])
    again = load("digits")
    assert again.fingerprint == data.fingerprint


def test_digits_are_the_scans_enlarged():
    data = load("digits")
    x = np.concatenate([data.x_train, data.x_test])
    scans = SCANS * 255 / 16
    assert x.max() == 255 and x.min() == 0
    # the mean of every 4x4 block is near its pixel, and no scan is missing or duplicated
    assert abs(x.mean() - scans.mean()) < 1
    assert len(np.unique(x.reshape(len(x), -1), axis=0)) == len(np.unique(scans.reshape(len(scans), -1), axis=0))
    # the fourth scan, a 3, is where its label is
    scan = Image.fromarray(np.round(scans[3]).astype(np.uint8)).resize((32, 32), Image.Resampling.BILINEAR)
    at = (x[..., 0] == np.asarray(scan)).all((1, 2))
    assert np.concatenate([data.y_train, data.y_test])[at].tolist() == [3]


@pytest.mark.parametrize(("count", "chosen"), [(5, 1), (10, 2), (7, 7), (4, 0), (178, 79), (2, 1)])
def test_spread_is_exact_and_even(count, chosen):
    mask = spread(count, chosen)
    assert mask.shape == (count,) and mask.sum() == chosen
    gaps = np.diff(np.flatnonzero(mask))
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


# --- arrays, as every source passes them to the checks


def arrays(**changes):
    x, y = np.arange(6 * 4 * 5 * 3, dtype=np.uint8).reshape(6, 4, 5, 3), np.array([0, 1, 2, 0, 1, 2])
    return {"x_train": x, "y_train": y, "x_test": x[:3], "y_test": y[:3]} | changes


def save(path, **parts) -> str:
    np.savez_compressed(path, **parts)
    return f"npz:{path}"


def test_npz_gives_the_arrays(tmp_path):
    parts = arrays()
    data = load(save(tmp_path / "small.npz", **parts))
    assert_stored(data)
    assert (data.name, data.shape, data.classes) == ("small", (4, 5, 3), ("0", "1", "2"))
    for key, array in parts.items():
        np.testing.assert_array_equal(getattr(data, key), array)


def test_npz_adds_a_channel_to_grayscale_and_names_the_classes(tmp_path):
    x = arrays()["x_train"][..., 0]
    names = np.array(["cat", "dog", "bird", "fish"])
    data = load(save(tmp_path / "g.npz", **arrays(x_train=x, x_test=x[:3, ..., None]), classes=names))
    assert data.shape == (4, 5, 1) and data.classes == ("cat", "dog", "bird", "fish")
    np.testing.assert_array_equal(data.x_train[..., 0], x)
    assert load(save(tmp_path / "b.npz", **arrays(), classes=names.astype("S"))).classes[3] == "fish"


def test_npz_the_highest_label_counts_in_either_split(tmp_path):
    assert load(save(tmp_path / "t.npz", **arrays(y_test=np.array([0, 4, 1], np.uint8)))).classes == tuple("01234")


X, Y = arrays()["x_train"], arrays()["y_train"]
BAD_ARRAYS = {
    "float in 0..1": ({"x_train": X / np.float32(255)}, ["x_train", "float32 from 0 to 1", "* 255"]),
    "float in 0..255": ({"x_test": X * 1.0}, ["x_test", "float64 from 0 to 255", "x.round().astype(numpy.uint8)"]),
    "normalised": ({"x_train": X / 255.0 - 0.5}, ["float64 from -0.5 to 0.5", "Scale the pixels to 0..255"]),
    "int64": ({"x_train": X.astype(np.int64)}, ["int64 from 0 to 255", "astype(numpy.uint8)"]),
    "text": ({"x_train": X.astype(str)}, ["x_train", "dtype <U3"]),
    "flat": ({"x_train": X.reshape(6, -1)}, ["x_train", "[6, 60]", "[N, H, W, C]"]),
    "channels first": ({"x_train": X.transpose(0, 3, 1, 2)}, ["[6, 3, 4, 5]", "x_train.transpose(0, 2, 3, 1)"]),
    "alpha": ({"x_train": np.zeros((6, 4, 5, 4), np.uint8)}, ["[6, 4, 5, 4]", "C = 4", "x[..., :3]"]),
    "no pixels": ({"x_train": X[:, :, :0]}, ["[6, 4, 0, 3]", "without pixels"]),
    "shapes differ": ({"x_test": X[:3, :3]}, ["x_train are 4x5x3", "x_test 3x5x3"]),
    "empty test": ({"x_test": X[:0], "y_test": Y[:0]}, ["x_test is empty", "[0, 4, 5, 3]"]),
    "empty train": ({"x_train": X[:0], "y_train": Y[:0]}, ["x_train is empty"]),
    "lengths": ({"y_train": Y[:5]}, ["y_train has 5 labels for 6 images"]),
    "float labels": ({"y_train": Y * 1.0}, ["y_train is of dtype float64", "astype(numpy.int32)"]),
    "bool labels": ({"y_test": Y[:3] == 1}, ["y_test is of dtype bool"]),
    "column": ({"y_train": Y[:, None]}, ["y_train has shape [6, 1]", "y_train.reshape(-1)"]),
    "one-hot": ({"y_train": np.eye(3, dtype=int)[Y]}, ["[6, 3]", "argmax(axis=1)"]),
    "negative": ({"y_train": np.array([0, 1, 2, -1, -1, 0])}, ["y_train[3] is -1", "0 to 2", "2 such"]),
    "too high": ({"y_test": [0, 1, 2], "classes": ["a", "b"]}, ["y_train[2] is 2", "2 classes", "0 to 1"]),
    "identifiers": ({"y_train": Y + 10**9}, ["highest label is 1000000002"]),
    "one class": ({"y_train": Y * 0, "y_test": Y[:3] * 0}, ["has 1 class (0)"]),
    "same name": ({"classes": ["a", "b", "a"]}, ["'a' occurs more than once"]),
    "classes no list": ({"classes": np.ones((2, 2))}, ["classes", "float64 of shape [2, 2]"]),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_named_with_their_value_and_remedy(tmp_path, case):
    changes, words = BAD_ARRAYS[case]
    message = says(save(tmp_path / "bad.npz", **arrays(**changes)))
    assert "bad" in message
    for word in words:
        assert word in message, message


def test_a_class_may_be_without_training_images():
    data = _checks.check_data("gap", X, np.where(Y == 1, 0, Y), X[:3], Y[:3])
    assert data.classes == ("0", "1", "2") and 1 not in data.y_train


# --- npz files


def test_npz_lists_missing_and_present_arrays(tmp_path):
    message = says(save(tmp_path / "part.npz", x_train=X, images=X, y_test=Y))
    assert "has no y_train, x_test" in message and "there are x_train, images, y_test" in message
    assert "part.npz" in message


def test_npz_never_unpickles(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    pickled = np.empty(6, object)
    pickled[:] = [Trap()] * 6
    for key in ("x_train", "y_test", "classes"):
        message = says(save(tmp_path / "p.npz", **arrays(**{key: pickled})))
        assert f"{key} of {tmp_path}/p.npz is an object array" in message and "never loaded" in message
    (tmp_path / "raw.npz").write_bytes(b"\x80\x04N.")
    assert "raw.npz is not a .npz file" in says(f"npz:{tmp_path}/raw.npz")
    assert not (tmp_path / "sprung").exists()


def test_npz_refuses_other_and_damaged_files(tmp_path):
    np.save(tmp_path / "one.npy", X)
    assert "one.npy is not a .npz file" in says(f"npz:{tmp_path}/one.npy")
    assert "is a folder; did you mean `folder:PATH`" in says(f"npz:{tmp_path}")
    np.savez(tmp_path / "whole.npz", **arrays())
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    assert "cut.npz is not a .npz file, or it is cut off" in says(f"npz:{tmp_path}/cut.npz")
    at = whole.index(X.tobytes()[:64])
    (tmp_path / "flip.npz").write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    message = says(f"npz:{tmp_path}/flip.npz")
    assert "x_train of" in message and "flip.npz is damaged" in message
