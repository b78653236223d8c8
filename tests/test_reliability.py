"""A little of what benchmarks/reliability.py does: kills, two at once, a full disk, flipped bits."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from bdjax import registry
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines import sweep
from bdjax.pipelines.context import Context
from bdjax.pipelines.defend import DefenseRequest, defend

bench = registry.load_file(Path(__file__).parent.parent / "benchmarks" / "reliability.py")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(file of a grid of one cell, what an undisturbed sweep leaves)."""
    folder = tmp_path_factory.mktemp("grid")
    file = bench.write_grid(folder, 1, 6)
    (folder / "cells").mkdir()
    sweep.run_cell(file, 0, 0, folder / "cells", 1)
    return file, bench.contents(folder / "cells")


def finished(file, out):
    bench.finish(bench.start_sweep(file, out))
    found = bench.contents(out)
    return {name: value for name, value in found.items() if name != "cells.json"}


@pytest.mark.slow
def test_a_killed_sweep_loses_nothing_and_ends_with_the_same_bits(undisturbed, tmp_path):
    file, expected = undisturbed
    assert len(expected) > 20
    process = bench.start_sweep(file, tmp_path / "out")
    while not (kept := list((tmp_path / "out").glob("victims/.*/*/epoch-*"))) and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert kept
    assert bench.differences(expected, finished(file, tmp_path / "out")) == []
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.name != ".lock"]


def test_a_training_that_goes_on_has_its_whole_curve(tmp_path):
    from conftest import perceptron

    from bdjax.engine import FitConfig, fit
    from bdjax.engine.callbacks import Recorder

    class Killed(Recorder):
        def on_round_end(self, step, variables, **arrays):
            super().on_round_end(step, variables, **arrays)
            if step == 3:
                raise KeyboardInterrupt

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8), rng.integers(0, 4, 40).astype(np.int32)

    def train(callback, folder):
        saver = checkpoint.EpochSaver(folder)
        fit(
            perceptron(),
            images,
            labels,
            FitConfig(epochs=5, batch_size=20),
            jax.random.key(0),
            callback=callback,
            saver=saver,
        )
        return callback.rows

    expected = train(Recorder(lambda *_: None), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(Killed(lambda *_: None), tmp_path / "half")
    assert [row["step"] for row in expected] == [1, 2, 3, 4, 5] and len({row["train_loss"] for row in expected}) == 5
    assert train(Recorder(lambda *_: None), tmp_path / "half") == expected


def test_what_is_compared_can_differ(undisturbed):
    _, expected = undisturbed
    name = next(name for name in expected if "kernel" in name)
    changed = {**expected, name: expected[name][:-1] + b"\0"}
    assert bench.differences(expected, changed) == [name]
    assert bench.differences(expected, {k: v for k, v in expected.items() if k != name}) == [name]


@pytest.mark.slow
def test_two_processes_that_make_the_same_run_leave_one(undisturbed, tmp_path):
    file, expected = undisturbed
    argv = [sys.executable, "-m", "bdjax", "_cell", str(file), "0", "0", str(tmp_path / "out"), "1"]
    both = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = f"bdjax: {file} is code of your own and is executed.\n"
    assert [(process.communicate()[1], process.returncode) for process in both] == [(told, 0)] * 2
    assert bench.differences(expected, bench.contents(tmp_path / "out")) == []


def test_a_run_that_another_process_makes_is_waited_for(finished_run, monkeypatch):

    directory, result = finished_run
    told = []

    class Waiting(Context):
        def waiting(self):
            told.append("waiting")
            held.__exit__(None, None, None)

    (directory / "result.json").rename(directory / "aside.json")
    held = checkpoint.locked(directory)
    held.__enter__()
    config = registry.load("defenses", "ibau").Config(schedule="release", rounds=2, batch_size=10)
    again = defend(DefenseRequest(directory / "victim", "ibau", config), directory, Waiting(1))
    assert told == ["waiting"] and again["after"] == result["after"]


@pytest.fixture
def finished_run(request, tmp_path):
    source, result = request.getfixturevalue("finished")
    return Path(shutil.copytree(source, tmp_path / "run")), result


def test_a_full_disk_leaves_what_was_there(tmp_path):
    found = bench.damage.full_disk(tmp_path, 2, random.Random(0), mount=False)
    assert found["disk"] == "RLIMIT_FSIZE" and found["bad"] == []
    assert found["refused"] == {"epoch: File too large": 2, "model: File too large": 2, "arrays: File too large": 2}


def test_a_command_says_that_the_disk_is_full(undisturbed, tmp_path, capsys, monkeypatch):
    from commands import refused

    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']")

    monkeypatch.setattr("bdjax.io._orbax.ocp.save", full)
    data = f"npz:{undisturbed[0].parent / 'b.npz'}"
    argv = ["train", "clean", "--dataset", data, "--fit.epochs", "1", "--devices", "1", "--out", tmp_path / "v"]
    said = refused(capsys, *argv)
    assert "No space left on device" in said and "--out" in said and not (tmp_path / "v").exists()


def test_a_flipped_bit_in_any_file_is_found_and_the_file_is_named(finished_run, tmp_path):
    directory, _ = finished_run
    saver = checkpoint.EpochSaver(tmp_path / "epochs")
    state = {"w": np.arange(100, dtype=np.float32)}
    saver.save(1, state)
    for place, read in (
        (directory / "victim", lambda: checkpoint.read_manifest(directory / "victim")),
        (tmp_path / "epochs" / "epoch-000001", lambda: saver.restore(state)),
    ):
        found = bench.damage.flipped(place, read, 8, random.Random())
        assert found["files"] > 8 and found["flips"] == 8 * found["files"]
        assert found["missed"] == [] and all("format" in line for line in found["unclear"])


def test_every_bit_of_a_manifest_counts(finished_run):
    directory, _ = finished_run
    path = directory / "victim" / "manifest.json"
    whole = path.read_bytes()
    for at in (whole.index(b'"seed"') + 8, whole.index(b'"seal"') + 12, whole.index(b'"hash"') + 12):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"manifest\.json is damaged"):
            checkpoint.read_manifest(directory / "victim")


def test_a_directory_from_before_the_seal_is_read(finished_run):
    import json

    directory, _ = finished_run
    path = directory / "victim" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**{k: v for k, v in manifest.items() if k != "seal"}, "format": 1}))
    assert checkpoint.read_manifest(directory / "victim")["hash"] == manifest["hash"]
