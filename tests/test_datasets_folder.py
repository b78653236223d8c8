"""Folders of images as a data set: the split, colours, order, and the errors for invalid folders."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from dataset_checks import assert_stored, says
from PIL import Image

from bdjax.datasets import load


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


def test_folder_without_split_is_split_evenly_and_reproducibly(tmp_path):
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
    assert f"{root} has train/ with class folders, but no test/ with class folders" in says(f"folder:{root}")


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
