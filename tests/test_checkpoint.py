"""A checkpoint comes back bit for bit, or an InputError says which file is wrong; a kill leaves nothing by halves."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import models
from bdjax.engine import FitConfig, fit, parallel
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.io.checkpoint import EpochSaver, read_arrays, read_manifest, read_variables, write_model

ARRAYS = {"trigger": {"mask": np.eye(3, dtype=np.float32)}, "poison": {"indices": np.arange(5, dtype=np.int32)}}


def like(classes=4, name="cnn"):
    return jax.eval_shape(models.create(name, (8, 8, 1), classes).init, jax.random.key(0))


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(leaf.dtype)), shapes)


def assert_same(a, b):
    def check(x, y):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)

    jax.tree.map(check, a, b)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model directory that no test changes."""
    return write_model(tmp_path_factory.mktemp("models") / "one", {"model": "cnn"}, drawn(like()), ARRAYS)


@pytest.fixture
def copied(written, tmp_path):
    """A model directory to damage."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def refusal(directory):
    """What `read_manifest` says about a directory that is not whole."""
    with pytest.raises(InputError) as caught:
        read_manifest(directory)
    return str(caught.value)


# --- a model directory


def test_what_was_written_comes_back(written):
    manifest = read_manifest(written)
    assert manifest["model"] == "cnn" and manifest["format"] == checkpoint.FORMAT
    on_disk = {str(file.relative_to(written)) for file in written.rglob("*") if file.is_file()}
    assert on_disk == {*manifest["files"], "manifest.json"}
    assert_same(read_variables(written, like()), drawn(like()))
    for name, arrays in ARRAYS.items():
        assert_same(read_arrays(written, name), arrays)


def test_nothing_else_is_left_beside_it(written):
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_an_existing_directory_is_not_overwritten(written):
    with pytest.raises(InputError, match=f"{written} exists already"):
        write_model(written, {}, drawn(like(), 1), {})
    assert_same(read_variables(written, like()), drawn(like()))


def test_one_wrong_byte_in_any_file_is_found(copied):
    for name in read_manifest(copied)["files"]:
        whole = (copied / name).read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1} if whole else ():
            (copied / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert f"{copied / name} is damaged" in refusal(copied)
        (copied / name).write_bytes(whole + b"\0")
        assert f"{copied / name} is damaged" in refusal(copied)
        (copied / name).write_bytes(whole)
    read_manifest(copied)


def test_any_missing_file_is_found(copied):
    for name in read_manifest(copied)["files"]:
        (copied / name).rename(copied / "aside")
        assert f"{copied / name} is missing" in refusal(copied)
        (copied / "aside").rename(copied / name)


def test_a_foreign_directory_or_none_is_refused(tmp_path):
    assert f"{tmp_path / 'none'} is not a directory" in refusal(tmp_path / "none")
    (tmp_path / "weights.pt").write_bytes(b"x")
    assert f"{tmp_path / 'manifest.json'} is missing" in refusal(tmp_path)
    assert "is not a directory" in refusal(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"name": "of another tool"}', '{"format": 1, "files": []}', '{"files": {}}', "\udcff"]
)
def test_a_manifest_that_is_not_ours_is_refused(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    assert f"{tmp_path / 'manifest.json'} is damaged or not written by bdjax" in refusal(tmp_path)


def test_a_manifest_cut_anywhere_is_refused(copied):
    path = copied / "manifest.json"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 97):
        path.write_bytes(whole[:length])
        assert f"{path} is damaged" in refusal(copied)


def test_another_format_is_refused_with_both_numbers(copied):
    path = copied / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 7}))
    assert f"{path} has format 7; this version of bdjax reads format {checkpoint.FORMAT}" in refusal(copied)


@pytest.mark.parametrize("other", [{"name": "small_vgg"}, {"classes": 5}, {"classes": 3}], ids=str)
def test_variables_of_another_model_are_refused(other, written):
    with pytest.raises(InputError, match=f"{written / 'variables'} does not hold this model's arrays"):
        read_variables(written, like(**other))


def test_arrays_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "evil.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        read_arrays(tmp_path, "evil")


@pytest.mark.parametrize("culprit", ["numpy.savez", "bdjax.io._orbax.ocp.save", "bdjax.io.checkpoint.write_text"])
def test_a_write_that_fails_midway_leaves_nothing(culprit, tmp_path, monkeypatch):
    def fail(*_args, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(culprit, fail)
    with pytest.raises(OSError, match="No space left"):
        write_model(tmp_path / "models" / "one", {}, drawn(like()), ARRAYS)
    assert list((tmp_path / "models").iterdir()) == []
    monkeypatch.undo()
    assert read_manifest(write_model(tmp_path / "models" / "one", {}, drawn(like()), ARRAYS))


def test_a_full_disk_is_told_in_megabytes_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_300_000))
    variables = {"w": np.zeros(1_000_000, np.float32)}
    for write in (
        lambda: write_model(tmp_path / "one", {}, variables, {}),
        lambda: EpochSaver(tmp_path / "epochs").save(1, variables),
    ):
        with pytest.raises(InputError, match=f"4.0 MB are needed, 1.3 MB are free on {tmp_path}"):
            write()
    assert list(tmp_path.iterdir()) == []
    write_model(tmp_path / "small", {}, {"w": np.zeros(10, np.float32)}, {})


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    checkpoint.write_text(path, "old")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk")))
        checkpoint.write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    checkpoint.write_text(path, "new")
    assert path.read_text() == "new"


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    target, order = tmp_path / "deep" / "victim", []

    def other():
        with checkpoint.locked(target):
            order.append("other")

    thread = threading.Thread(target=other)
    with checkpoint.locked(target):
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]


# --- epochs


def state(seed):
    """A training state with Adam's counter and moments, drawn by seed."""
    weights = {"layer": {"w": np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32)}}
    moments = {"count": np.int32(seed), "mu": weights, "nu": jax.tree.map(np.square, weights)}
    return {"params": weights, "batch_stats": {}, "opt_state": moments}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_only_the_newest_epoch_is_kept_and_cleared(tmp_path):
    saver = EpochSaver(tmp_path / "epochs")
    assert saver.restore(state(0)) is None
    for epoch in (9, 10, 11):
        saver.save(epoch, state(epoch))
        assert names(saver.folder) == [f"epoch-{epoch:06d}"]
    epoch, restored = EpochSaver(saver.folder).restore(state(0))
    assert epoch == 11
    assert_same(restored, state(11))
    saver.clear()
    assert saver.restore(state(0)) is None and not saver.folder.exists()
    saver.clear()


def test_what_a_killed_writer_leaves_is_ignored_and_swept_up(tmp_path):
    saver = EpochSaver(tmp_path)
    saver.save(2, state(2))
    partial = tmp_path / ".epoch-000003.12345.partial"
    shutil.copytree(tmp_path / "epoch-000002", partial)
    (tmp_path / "epoch-000001").mkdir()  # of which half was removed when the kill came
    epoch, restored = saver.restore(state(0))
    assert epoch == 2
    assert_same(restored, state(2))
    saver.save(3, state(3))
    assert names(tmp_path) == ["epoch-000003"]


def test_a_failed_save_keeps_the_epoch_before(tmp_path, monkeypatch):
    saver = EpochSaver(tmp_path)
    saver.save(1, state(1))
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        saver.save(2, state(2))
    epoch, restored = saver.restore(state(0))
    assert epoch == 1
    assert_same(restored, state(1))


def test_an_epoch_of_another_model_is_refused(tmp_path):
    saver = EpochSaver(tmp_path)
    saver.save(1, state(1))
    with pytest.raises(InputError, match="epoch-000001 does not hold this model's arrays"):
        saver.restore({"params": {"other": np.zeros(3, np.float32)}})


def train(folder=None):
    """Twenty epochs of a cnn with Adam, kept in `folder` after each."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (64, 8, 8, 1)).astype(np.uint8), rng.integers(0, 4, 64).astype(np.int32)
    model, config = models.create("cnn", (8, 8, 1), 4), FitConfig(epochs=20, batch_size=32)
    with parallel.using(1):
        return fit(model, images, labels, config, jax.random.key(0), saver=folder and EpochSaver(folder))


@pytest.mark.slow
def test_a_training_killed_at_any_moment_goes_on_to_the_very_same_bits(tmp_path):
    folder, dice = tmp_path / "epochs", random.Random()
    tests, root = Path(__file__).parent, Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tests), str(root)]),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    code = f"import pathlib, test_checkpoint; test_checkpoint.train(pathlib.Path({str(folder)!r}))"
    expected = train()
    for _ in range(2):
        before = names(folder) if folder.exists() else []
        child = subprocess.Popen([sys.executable, "-c", code], env=environment)
        try:
            deadline = time.monotonic() + 120
            while child.poll() is None and time.monotonic() < deadline:
                if {path.name for path in folder.glob("epoch-*")}.difference(before):
                    break
                time.sleep(0.005)
            time.sleep(dice.uniform(0, 0.4))
        finally:
            child.kill()
        assert child.wait() in (-signal.SIGKILL, 0)
        assert set(names(folder)).difference(before)
    assert_same(train(folder), expected)
    assert names(folder) == ["epoch-000020"]
