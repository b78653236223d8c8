"""Every source of `bdjax.datasets`: what it gives, and what it says about a set that cannot work."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from bdjax import registry
from bdjax.datasets import _checks, load
from bdjax.datasets._spread import spread
from bdjax.errors import InputError

SCANS = np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8)
TARGETS = np.asarray(load_digits(return_X_y=True)[1]).astype(int)
PREPARED = Path(__file__).parent / "data" / "tfds"


def says(spec: str) -> str:
    """The message of the InputError that loading `spec` ends in."""
    with pytest.raises(InputError) as caught:
        load(spec)
    return str(caught.value)


def assert_stored(data):
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert x.dtype == np.uint8 and x.flags.c_contiguous and x.ndim == 4
        assert y.dtype == np.int32 and y.shape == (len(x),)


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
def test_a_wrong_spec_says_the_right_form(spec, words):
    assert words in says(spec)


def test_a_module_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from bdjax.datasets import _checks\nimport numpy as np\n"
        "def load(rest):\n"
        "    x = np.full((2, 4, 4), int(rest), np.uint8)\n"
        "    return _checks.make('mine', x, [0, 1], x, [1, 0])\n"
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
    # the mean of every 4x4 block is near its pixel, and no scan is lost or there twice
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


# --- arrays, as every source hands them over


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


def test_npz_grayscale_gets_a_channel_and_classes_their_names(tmp_path):
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
    data = _checks.make("gap", X, np.where(Y == 1, 0, Y), X[:3], Y[:3])
    assert data.classes == ("0", "1", "2") and 1 not in data.y_train


# --- npz files


def test_npz_missing_arrays_are_listed_with_those_that_are_there(tmp_path):
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


def test_npz_files_that_are_none_or_damaged(tmp_path):
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


# --- folders


def paint(path: Path, value, mode="RGB", size=(6, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    """A published split: two classes, 3 + 2 train and 1 + 1 test images, one colour each."""
    root = tmp_path / "birds"
    for i, at in enumerate(("train/owl/c.png", "train/owl/a.png", "train/owl/b.PNG", "test/owl/z.png")):
        paint(root / at, (10 * i, 0, 200))
    for i, at in enumerate(("train/jay/n/images/1.png", "train/jay/m/2.png", "test/jay/k/9.png")):
        paint(root / at, (0, 10 * i, 100))
    return root


def test_folder_published_split(root):
    (root / "train" / "owl" / "notes.txt").write_text("not an image")
    paint(root / "train" / "owl" / ".hidden.png", (1, 1, 1))
    paint(root / "train" / ".cache" / "x.png", (1, 1, 1))
    data = load(f"folder:{root}")
    assert_stored(data)
    assert (data.name, data.shape, data.classes) == ("birds", (5, 6, 3), ("jay", "owl"))
    np.testing.assert_array_equal(data.y_train, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(data.y_test, [0, 1])
    # jay: m/2 before n/images/1; owl: a, b, c
    colours = [[0, 10, 100], [0, 0, 100], [10, 0, 200], [20, 0, 200], [0, 0, 200]]
    np.testing.assert_array_equal(data.x_train, np.broadcast_to(np.array(colours)[:, None, None], (5, 5, 6, 3)))
    np.testing.assert_array_equal(data.x_test[:, 0, 0], [[0, 20, 100], [30, 0, 200]])


def test_folder_without_split_is_split_evenly_and_always_alike(tmp_path):
    for i in range(20):
        paint(tmp_path / "a" / f"{i:02}.png", i, "L")
    for i in range(7):
        paint(tmp_path / "b" / f"{i:02}.png", 100 + i, "L")
    paint(tmp_path / "c" / "0.png", 200, "L")
    paint(tmp_path / "c" / "1.png", 201, "L")
    data = load(f"folder:{tmp_path}")
    assert_stored(data)
    assert data.shape == (5, 6, 1)
    assert np.bincount(data.y_train).tolist() == [16, 6, 1] and np.bincount(data.y_test).tolist() == [4, 1, 1]
    assert data.x_test[:, 0, 0, 0].tolist() == [2, 7, 12, 17, 103, 201]
    seen = np.concatenate([data.x_train, data.x_test])[:, 0, 0, 0]
    assert sorted(seen.tolist()) == [*range(20), *range(100, 107), 200, 201]
    assert load(f"folder:{tmp_path}").fingerprint == data.fingerprint


def test_folder_is_rgb_as_soon_as_one_image_is(tmp_path):
    for name in "ab":
        for i in range(2):
            paint(tmp_path / name / f"{i}.png", 50 + i, "L")
    paint(tmp_path / "a" / "2.png", 1, "1")
    data = load(f"folder:{tmp_path}")
    assert data.shape == (5, 6, 1) and data.x_train.max() == 255  # a bilevel image counts as grayscale
    paint(tmp_path / "b" / "2.jpg", (200, 200, 200))
    data = load(f"folder:{tmp_path}")
    assert data.shape == (5, 6, 3)
    np.testing.assert_array_equal(data.x_train[0], np.full((5, 6, 3), 50))


def test_folder_modes_and_endings_become_rgb(tmp_path):
    red = (255, 0, 0)
    paint(tmp_path / "a" / "0.png", (*red, 9), "RGBA")
    paint(tmp_path / "a" / "1.JPEG", red)
    Image.new("RGB", (6, 5), red).convert("P").save(tmp_path / "a" / "2.png", transparency=bytes([100, 255]))
    paint(tmp_path / "b" / "0.jpg", (0, 255, 255, 0), "CMYK")
    paint(tmp_path / "b" / "1.png", (7, 99), "LA")
    data = load(f"folder:{tmp_path}")
    assert data.shape == (5, 6, 3)
    np.testing.assert_array_equal(data.x_train[:2], np.broadcast_to(red, (2, 5, 6, 3)))  # a/0, a/2
    np.testing.assert_allclose(data.x_test[0].astype(int), np.broadcast_to(red, (5, 6, 3)), atol=5)  # a/1, by JPEG
    np.testing.assert_allclose(data.x_train[2].astype(int), np.broadcast_to(red, (5, 6, 3)), atol=5)  # b/0
    np.testing.assert_array_equal(data.x_test[1], np.full((5, 6, 3), 7))  # b/1


def test_folder_many_images_keep_their_order(tmp_path):
    values = np.random.default_rng(0).permutation(300) % 256
    for i, value in enumerate(values):
        paint(tmp_path / "train" / "ab"[i % 2] / f"{i:03}.png", int(value), "L", (3, 3))
    for name in "ab":
        paint(tmp_path / "test" / name / "0.png", 0, "L", (3, 3))
    data = load(f"folder:{tmp_path}")
    np.testing.assert_array_equal(data.x_train[:, 0, 0, 0], np.concatenate([values[::2], values[1::2]]))


def test_folder_errors_name_the_folder(root):
    shutil.rmtree(root / "test" / "jay")
    message = says(f"folder:{root}")
    assert f"{root}/train has 1 class folder(s) that {root}/test lacks: jay" in message
    (root / "test" / "jay").mkdir()
    assert f"class folder {root}/test/jay has no image (.png, .jpg, .jpeg)" in says(f"folder:{root}")
    paint(root / "test" / "jay" / "0.png", (0, 0, 0))
    paint(root / "test" / "emu" / "0.png", (0, 0, 0))
    assert f"{root}/test has 1 class folder(s) that {root}/train lacks: emu" in says(f"folder:{root}")
    shutil.rmtree(root / "test")
    assert f"{root} has train/ with class folders, but no such test/" in says(f"folder:{root}")


def test_folder_without_classes_or_too_few(tmp_path):
    (tmp_path / "none").mkdir()
    message = says(f"folder:{tmp_path}/none")
    assert "none has no class folders" in message and "PATH/train/CLASS/*.png" in message
    paint(tmp_path / "few" / "a" / "0.png", 0, "L")
    assert f"class folder {tmp_path}/few/a has 1 image" in says(f"folder:{tmp_path}/few")
    assert "0.png is a file, not a folder" in says(f"folder:{tmp_path}/few/a/0.png")


def test_folder_sizes_differ(root):
    odd = paint(root / "train" / "owl" / "b.png", (0, 0, 0), size=(7, 5))
    paint(root / "train" / "owl" / "d.png", (0, 0, 0), size=(9, 9))
    message = says(f"folder:{root}")
    assert f"{root}/train/jay/m/2.png is 6x5, {odd} is 7x5" in message and "-resize" in message


@pytest.mark.parametrize("damage", ["text", "cut", "flip"])
def test_folder_corrupt_image(root, damage):
    bad = root / "train" / "owl" / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    Image.fromarray(noise).save(bad)
    whole = bad.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "text": b"<html>404</html>",
        "cut": whole[: len(whole) * 2 // 3],
        "flip": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
    }
    bad.write_bytes(damaged[damage])
    assert f"{bad} is not a readable PNG or JPEG image" in says(f"folder:{root}")


def test_folder_refuses_16_bit_grayscale(root):
    bad = root / "train" / "owl" / "a.png"
    Image.fromarray(np.full((5, 6), 40000, np.uint16)).save(bad)
    assert f"{bad} has 16 or more bits" in says(f"folder:{root}")


# --- TensorFlow Datasets: a truly prepared set (tests/data/make_tfds_fixture.py), read without TensorFlow


@pytest.fixture
def prepared(tmp_path):
    """A copy of the prepared set, and a function that edits one of its JSON files."""
    shutil.copytree(PREPARED, tmp_path, dirs_exist_ok=True)
    version = tmp_path / "tiny_digits" / "default" / "1.0.0"

    def edit(file, change):
        content = json.loads((version / file).read_text())
        change(content)
        (version / file).write_text(json.dumps(content))

    return version, edit


def tiny(folder) -> str:
    return f"tfds:tiny_digits@{folder}"


@pytest.mark.parametrize("name", ["tiny_digits", "tiny_digits/default:1.0.0"])
def test_tfds_reads_a_prepared_set_without_tensorflow(name):
    data = load(f"tfds:{name}@{PREPARED}")
    assert_stored(data)
    assert data.name == name and data.shape == (8, 8, 1)
    assert data.classes == tuple(f"digit {c}" for c in range(10))
    np.testing.assert_array_equal(data.x_train[..., 0], SCANS[:20] * 15)
    np.testing.assert_array_equal(data.x_test[..., 0], SCANS[20:30] * 15)
    np.testing.assert_array_equal(data.y_train, TARGETS[:20])
    np.testing.assert_array_equal(data.y_test, TARGETS[20:30])
    assert "tensorflow" not in sys.modules


def test_tfds_default_folder_is_the_environments(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(PREPARED))
    assert len(load("tfds:tiny_digits").x_train) == 20


def test_tfds_validation_stands_in_for_test(prepared, tmp_path):
    version, edit = prepared
    edit("dataset_info.json", lambda info: info["splits"][1].update(name="validation"))
    stem = "tiny_digits-{}.array_record-00000-of-00001"
    (version / stem.format("test")).rename(version / stem.format("validation"))
    assert len(load(tiny(tmp_path)).x_test) == 10
    edit("dataset_info.json", lambda info: info["splits"].pop())
    assert "tiny_digits has the splits train; `train` and test or validation are needed" in says(tiny(tmp_path))


def test_tfds_unprepared_says_the_commands(tmp_path):
    message = says(f"tfds:cifar10@{tmp_path}")
    assert f"tfds:cifar10 is not prepared in {tmp_path}" in message
    assert 'pip install "bdjax[tfds]"' in message
    command = f"tfds.builder('cifar10', data_dir='{tmp_path}', file_format='array_record').download_and_prepare()"
    assert f'python -c "import tensorflow_datasets as tfds; {command}"' in message


def test_tfds_unknown_name_suggests_the_nearest(tmp_path):
    message = says(f"tfds:mnst@{tmp_path}")
    assert "tfds:mnst" in message and "Did you mean 'mnist'?" in message
    message = says(f"tfds:tiny_digit@{PREPARED}")
    assert "Did you mean 'tiny_digits'?" in message and str(PREPARED) in message
    assert "tfds:not a name" in says(f"tfds:not a name@{tmp_path}")


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record.python.array_record_module"])
def test_tfds_missing_package(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = says(tiny(PREPARED))
    assert package in message and 'pip install "bdjax[tfds]"' in message


def test_tfds_that_failed_to_import_its_own_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", ModuleType("tensorflow_datasets"))
    message = says(tiny(PREPARED))
    assert "lacks a package" in message and 'pip install "bdjax[tfds]"' in message


def test_tfds_without_labels(prepared, tmp_path):
    def drop(features):
        del features["featuresDict"]["features"]["label"]

    prepared[1]("features.json", drop)
    assert "tiny_digits has no feature label; it has image" in says(tiny(tmp_path))


def test_tfds_other_file_format(prepared, tmp_path):
    prepared[1]("dataset_info.json", lambda info: info.update(fileFormat="tfrecord"))
    message = says(tiny(tmp_path))
    assert "as tfrecord" in message and "data_dir='FOLDER', file_format='array_record'" in message


@pytest.mark.parametrize("size", [None, 1000, 70000])
def test_tfds_damaged_file(prepared, tmp_path, size):
    file = prepared[0] / "tiny_digits-test.array_record-00000-of-00001"
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:size])
    message = says(tiny(tmp_path))
    assert "the split test in" in message and "is damaged" in message and str(tmp_path) in message
