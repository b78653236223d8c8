"""Layouts of folders and arrays in practice: names of splits, formats, links, rotated images, notes and errors."""

import os
import pickle

import numpy as np
import pytest
from dataset_checks import assert_stored, says
from PIL import Image
from test_datasets import arrays, save
from test_datasets_folder import paint

from bdjax.datasets import load
from bdjax.errors import InputError


def classes(root, *names, count=2, ending="png", start=0):
    for place, name in enumerate(names):
        for number in range(count):
            paint(root / name / f"{number}.{ending}", (start + 10 * place + 100, number, 50))
    return root


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["0", "1", "10", "11", "2"], ("0", "1", "2", "10", "11")),
        (["00010", "00002", "00001"], ("00001", "00002", "00010")),
        (["3", "1", "b"], ("1", "3", "b")),
        (["10", "9", "1a"], ("10", "1a", "9")),
    ],
)
def test_numeric_folder_names_are_sorted_by_number(names, wanted, tmp_path):
    data = load(f"folder:{classes(tmp_path, *names)}")
    assert data.classes == wanted
    for label, name in enumerate(wanted):
        assert data.x_train[data.y_train == label][0, 0, 0, 0] == 100 + 10 * names.index(name)


def test_a_broken_link_is_named(tmp_path):
    classes(tmp_path, "a", "b")
    (tmp_path / "b" / "2.png").symlink_to(tmp_path / "gone.png")
    assert "2.png" in says(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("train", "test", "beside"),
    [
        ("training", "testing", []),
        ("Train", "Test", ["Meta"]),
        ("TRAIN", "VAL", []),
        ("train", "valid", []),
        ("train", "test", ["val", "meta"]),
        ("train", "validation", ["Annotations"]),
    ],
)
def test_splits_under_other_names(train, test, beside, tmp_path):
    classes(tmp_path / train, "a", "b", count=3)
    classes(tmp_path / test, "a", "b", count=1)
    for name in beside:
        paint(tmp_path / name / "0.png", (1, 1, 1))
    data = load(f"folder:{tmp_path}")
    assert_stored(data)
    assert data.classes == ("a", "b") and len(data.y_train) == 6 and len(data.y_test) == 2
    said = " ".join(data.notes)
    assert (f"{test}/ as the test split" in said) == ((train, test) != ("train", "test"))
    assert all(f"{name}/" in said for name in beside)


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["val/a", "val/b"], "has val/ with class folders, but no train/ with class folders. Give"),
        (["test/a", "val/b"], "has test/ with class folders"),
        (["train", "test"], "has train/, test/, named like a split"),
        (["cat", "dog", "val"], "has val/, named like a split"),
        (["train/a", "Train/a"], "has Train/ and train/, which look like the same split"),
        (["Train/0", "Train/1", "Test", "Meta"], "Test/ has no class folders in it"),
    ],
)
def test_folders_named_like_splits_are_not_classes(folders, words, tmp_path):
    classes(tmp_path, *folders)
    assert words in says(f"folder:{tmp_path}")


def test_a_class_may_be_called_train(tmp_path):
    assert load(f"folder:{classes(tmp_path, 'car', 'plane', 'train')}").classes == ("car", "plane", "train")


@pytest.mark.parametrize("ending", ["bmp", "webp", "tiff", "tif", "ppm", "gif", "jfif", "BMP", "Tiff"])
def test_other_formats_are_read_among_pngs(ending, tmp_path):
    classes(tmp_path, "a", "b")
    for name in "ab":
        paint(tmp_path / name / f"9.{ending}", (200, 100, 50))
    data = load(f"folder:{tmp_path}")
    assert len(data.y_train) + len(data.y_test) == 6 and not data.notes
    seen = np.concatenate([data.x_train, data.x_test])[:, 0, 0].astype(int)
    assert (abs(seen - [200, 100, 50]).max(-1) < 12).sum() == 2


def test_skipped_files_are_counted(tmp_path):
    classes(tmp_path, "a", "b")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "b" / "raw.npy").write_text("x")
    (tmp_path / "b" / ".hidden.png").write_text("x")
    (tmp_path / "labels.csv").write_text("x")
    said = " ".join(load(f"folder:{tmp_path}").notes)
    assert f"Left out in {tmp_path}: labels.csv." in said
    assert "3 files that are not images" in said and "1 .txt" in said and "1 .npy" in said and "1 hidden" in said


def test_linked_folders_are_followed_once(tmp_path):
    elsewhere = classes(tmp_path / "elsewhere", "a", count=4)
    root = classes(tmp_path / "root", "b")
    os.symlink(elsewhere / "a", root / "a")
    (root / "b" / "more").symlink_to(elsewhere / "a")
    (root / "b" / "round").symlink_to(root / "b")
    data = load(f"folder:{root}")
    assert data.classes == ("a", "b")
    assert [int((np.concatenate([data.y_train, data.y_test]) == label).sum()) for label in (0, 1)] == [4, 6]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_images_are_rotated_by_their_exif_orientation(orientation, ending, tmp_path):
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4, :4], upright[:4, 4:], upright[4:, :4] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = Image.fromarray(upright)
    stored = stored if back is None else stored.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[274] = orientation
    for name in "ab":
        for number in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            stored.save(tmp_path / name / f"{number}.{ending}", exif=exif, quality=100)
    data = load(f"folder:{tmp_path}")
    corners = data.x_train[0][[1, 1, 6, 6], [1, 6, 1, 6]].astype(int)
    assert abs(corners - [[250, 0, 0], [0, 250, 0], [0, 0, 250], [0, 0, 0]]).max() < 60
    assert ("4 images were rotated or flipped" in " ".join(data.notes)) == (orientation > 1)


def test_a_file_of_several_frames_is_refused(tmp_path):
    classes(tmp_path, "a", "b")
    frames = [Image.new("RGB", (6, 5), (value, 0, 0)) for value in (10, 200)]
    frames[0].save(tmp_path / "a" / "0.tiff", save_all=True, append_images=frames[1:])
    assert "0.tiff contains 2 frames" in says(f"folder:{tmp_path}")


def test_a_name_that_is_not_utf8_is_refused_when_it_is_read(tmp_path):
    classes(tmp_path, "a", "b", os.fsdecode(b"\xff\xfe"))
    assert "is called \\udcff\\udcfe, which is not UTF-8" in says(f"folder:{tmp_path}")
    root = tmp_path / os.fsdecode(b"set\xff")
    assert "not UTF-8" in says(f"folder:{classes(root, 'a', 'b')}")
    assert "not UTF-8" in says(f"npz:{root}/x.npz")


@pytest.mark.parametrize("top", [1, 2, 16, 31, 32, 255])
def test_the_range_of_pixels(top, tmp_path):
    x = (arrays()["x_train"].astype(int) % (top + 1)).astype(np.uint8)
    spec = save(tmp_path / "dark.npz", **arrays(x_train=x, x_test=x[:3]))
    if top == 1:
        assert "uint8 from 0 to 1" in says(spec) and "(x * 255)" in says(spec)
    else:
        assert bool(load(spec).notes) == (top < 32)


def test_other_published_forms_are_refused_with_a_remedy(tmp_path):
    x = arrays()["x_train"]
    said = says(save(tmp_path / "s.npz", **arrays(x_train=x.transpose(1, 2, 3, 0))))
    assert "SVHN's [H, W, C, N]" in said and "x_train.transpose(3, 0, 1, 2)" in said
    (tmp_path / "train_32x32.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    assert "loadmat('train_32x32.mat')" in says(f"npz:{tmp_path}/train_32x32.mat")
    (tmp_path / "mats").mkdir()
    (tmp_path / "train_32x32.mat").rename(tmp_path / "mats" / "train_32x32.mat")
    assert "loadmat" in says(f"folder:{tmp_path}/mats")
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    (batches / "data_batch_1").write_bytes(pickle.dumps({b"data": 1}))
    assert "encoding='bytes'" in says(f"folder:{batches}") and "npz:cifar.npz" in says(f"npz:{batches}/data_batch_1")


def test_the_remedy_for_cifar_works(tmp_path, monkeypatch):
    from bdjax.datasets import _checks

    rng = np.random.default_rng(0)
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        batch = {b"data": rng.integers(0, 256, (10, 3072)).astype(np.uint8), b"labels": list(range(10))}
        (tmp_path / name).write_bytes(pickle.dumps(batch))
    monkeypatch.chdir(tmp_path)
    code = _checks.CIFAR.partition('python -c "')[2].partition('"')[0]
    exec(compile(code, "remedy", "exec"), {})
    data = load("npz:cifar.npz")
    assert data.shape == (32, 32, 3) and len(data.y_train) == 20 and len(data.y_test) == 10
    first = pickle.loads((tmp_path / "data_batch_1").read_bytes())[b"data"][0]
    np.testing.assert_array_equal(data.x_train[0, :, :, 1], first[1024:2048].reshape(32, 32))


def test_the_remedy_for_svhn_works(tmp_path, monkeypatch):
    from scipy.io import savemat

    from bdjax.datasets import _checks

    x = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10)).astype(np.uint8)
    for name in ("train", "test"):
        savemat(tmp_path / f"{name}_32x32.mat", {"X": x, "y": np.arange(1, 11)[:, None]})
    monkeypatch.chdir(tmp_path)
    exec(compile(_checks.SVHN.partition('python -c "')[2].partition('"')[0], "remedy", "exec"), {})
    data = load("npz:svhn.npz")
    np.testing.assert_array_equal(data.x_train[4], x[..., 4])
    assert data.y_train.tolist() == [*range(1, 10), 0]


def test_system_folders_are_not_classes(tmp_path):
    for label in ("a", "b", "__MACOSX", "@eaDir", "__pycache__"):
        for place in range(2 if label in "ab" else 1):
            (tmp_path / label).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / label / f"{place}.png")
    assert load(f"folder:{tmp_path}").classes == ("a", "b")


def test_class_names_that_are_not_text_are_refused(tmp_path):
    images, labels = np.zeros((2, 8, 8, 3), np.uint8), np.arange(2)
    for name in (b"\xff", b"a\xc3"):
        np.savez(tmp_path / "x.npz", x_train=images, y_train=labels, x_test=images, y_test=labels, classes=[b"a", name])
        with pytest.raises(InputError, match="classes of .*x.npz contains .*not UTF-8"):
            load(f"npz:{tmp_path}/x.npz")
