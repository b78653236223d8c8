"""`bdjax poisoned`: what the file holds, that it is a data set, and refusals."""

import json
import shutil

import numpy as np
import pytest
from commands import bdjax, refused
from numpy.testing import assert_array_equal

from bdjax import datasets
from bdjax.attacks import badnets, clean
from bdjax.config import Experiment, FitConfig
from bdjax.io import checkpoint
from bdjax.pipelines import training
from bdjax.pipelines.poisoned_set import poisoned_set


def planted(directory, dataset, attack, config):
    fit = FitConfig(epochs=1, batch_size=40)
    return training.train(Experiment(attack, None, dataset, attack_config=config, fit=fit), directory)


@pytest.fixture(scope="module")
def square(blobs_npz, tmp_path_factory):
    """A victim of BadNets, 40 of 160 images poisoned."""
    config = badnets.Config(target=1, ratio=0.25)
    return planted(tmp_path_factory.mktemp("victims") / "square", blobs_npz, "badnets", config)


def test_the_file_holds_what_the_victim_learnt_from(square, blobs, tmp_path, capsys):
    lines = bdjax(capsys, "poisoned", square, "--out", tmp_path / "set.npz", "--json").splitlines()
    with np.load(tmp_path / "set.npz", allow_pickle=False) as file:
        found = dict(file)
    data, images, labels, positions = poisoned_set(square)
    expected = {"x_train": images, "y_train": labels, "x_test": data.x_test, "y_test": data.y_test}
    expected |= {"classes": np.array(["0", "1", "2", "3"]), "poisoned": positions}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert found["poisoned"].dtype == np.int32 and len(positions) == 40
    changed = (found["x_train"] != blobs[0][:160]).any((1, 2, 3)) | (found["y_train"] != blobs[1][:160])
    assert_array_equal(np.flatnonzero(changed), positions)

    sha256 = checkpoint.read_manifest(square)["poison"]["sha256"]
    assert lines[0] == "poisoned: 40 of 160 training images" and sha256 in lines[1]
    assert json.loads(lines[-1]) == {
        "file": str(tmp_path / "set.npz"), "victim": str(square), "attack": "badnets", "poisoned": 40, "images": 160,
        "sha256": sha256,
    }  # fmt: skip


def test_the_file_is_a_data_set(square, blobs, tmp_path, capsys):
    spec = bdjax(capsys, "poisoned", square, "--out", tmp_path / "set.npz").splitlines()[-1].split()[-1]
    data = datasets.load(spec)
    _, images, labels, _ = poisoned_set(square)
    assert spec == f"npz:{tmp_path / 'set.npz'}" and data.classes == ("0", "1", "2", "3")
    assert_array_equal(data.x_train, images)
    assert_array_equal(data.y_train, labels)
    assert_array_equal(data.x_test, blobs[0][160:])
    assert f"{'n_test':16s} 40" in bdjax(capsys, "evaluate", square, "--dataset", spec)


def test_a_data_set_that_has_moved(square, blobs_npz, tmp_path, capsys):
    shutil.copytree(square, tmp_path / "victim")
    manifest = json.loads((tmp_path / "victim" / "manifest.json").read_text())
    manifest["dataset"]["spec"] = "npz:gone.npz"
    (tmp_path / "victim" / "manifest.json").write_text(checkpoint.manifest_text(manifest))
    argv = ("poisoned", tmp_path / "victim", "--out", tmp_path / "set.npz")
    assert "gone.npz" in refused(capsys, *argv)
    assert "fingerprint" in refused(capsys, *argv, "--dataset", "digits")
    assert not (tmp_path / "set.npz").exists()
    assert "40 of 160" in bdjax(capsys, *argv, "--dataset", blobs_npz)


def test_a_file_is_replaced_only_by_force(square, tmp_path, capsys):
    argv = ("poisoned", square, "--out", tmp_path / "set.npz")
    (tmp_path / "set.npz").write_text("mine")
    assert "--force" in refused(capsys, *argv) and (tmp_path / "set.npz").read_text() == "mine"
    bdjax(capsys, *argv, "--force")
    first = (tmp_path / "set.npz").read_bytes()
    bdjax(capsys, *argv, "--force")
    assert (tmp_path / "set.npz").read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["set.npz"]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("set.png", ["set.png does not end in .npz", "--out"]),
        ("folder.npz", ["folder.npz is a directory"]),
        ("gone/set.npz", ["there is no directory gone"]),
    ],
)
def test_an_out_that_cannot_be(out, words, square, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npz").mkdir()
    message = refused(capsys, "poisoned", square, "--out", out)
    assert all(word in message for word in words)


def test_an_out_that_may_not_be_written_or_has_no_room(square, tmp_path, capsys, monkeypatch):
    argv = ("poisoned", square, "--out", tmp_path / "set.npz")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert "no space" in refused(capsys, *argv)
    monkeypatch.setattr("os.access", lambda *_: False)  # a superuser may write anywhere
    assert "permission denied" in refused(capsys, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_directories_without_a_poisoned_set(blobs_npz, square, tmp_path, capsys):
    out = tmp_path / "set.npz"
    assert "nowhere is not a directory" in refused(capsys, "poisoned", "nowhere", "--out", out)
    assert "not a bdjax model directory" in refused(capsys, "poisoned", tmp_path, "--out", out)
    assert "VICTIM_DIR" in refused(capsys, "poisoned")
    assert "--out" in refused(capsys, "poisoned", square)
    innocent = planted(tmp_path / "clean", blobs_npz, "clean", clean.Config())
    assert "has no poisoned training set: clean" in refused(capsys, "poisoned", innocent, "--out", out)
    floats = planted(tmp_path / "floats", blobs_npz, "badnets", badnets.Config(target=1, ratio=0.25, quantise=False))
    message = refused(capsys, "poisoned", floats, "--out", out)
    assert "float32" in message and "--attack.no-quantise" in message
    assert not out.exists()
