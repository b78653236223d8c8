"""experiments/accelerator: the budget, steps that fail or take too long, what is packed, the images, and all of it."""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from bdjax import bench, models
from bdjax.pipelines.evaluation import clean_indices
from bdjax.types import Data

ROOT = Path(__file__).parents[1]
RUN = ROOT / "experiments" / "accelerator" / "run.sh"


@pytest.fixture
def module(monkeypatch):
    """A function that gives a module of the package."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return lambda name: importlib.import_module(f"accelerator.{name}")


def carried_out(module, tmp_path, programs, budget=60.0, began=None, limit=20.0):
    """Records of steps that are Python programs, by name, and the seconds that they took."""
    schedule, file = module("schedule"), tmp_path / "results.jsonl"
    steps = [schedule.Step(name, limit) for name in programs]
    command = lambda step, deadline: [sys.executable, "-c", programs[step.name]]  # noqa: E731
    begin = time.time()
    schedule.carry_out(steps, command, budget=budget, file=file, logs=tmp_path / "logs", began=began)
    return {record["step"]: record for record in module("records").read(file)}, time.time() - begin


def test_a_step_is_skipped_when_fewer_than_25_seconds_are_left(module, tmp_path):
    found, _ = carried_out(module, tmp_path, {"one": ""}, budget=100, began=time.time() - 70)
    assert found["one"]["status"] == "ok" and found["one"]["limit"] <= 100 - 70 - 5
    found, _ = carried_out(module, tmp_path, {"one": "", "two": ""}, budget=100, began=time.time() - 76)
    assert [found[name]["status"] for name in ("one", "two")] == ["skipped", "skipped"]
    assert "fewer than 25" in found["two"]["reason"]


def test_a_step_that_takes_too_long_is_stopped_with_its_children_and_the_next_one_runs(module, tmp_path):
    child = tmp_path / "child"
    endless = (
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "wait = 'import time; time.sleep(600)'\n"
        f"pathlib.Path({str(child)!r}).write_text(str(subprocess.Popen([sys.executable, '-c', wait]).pid))\n"
        "time.sleep(600)"
    )
    found, seconds = carried_out(module, tmp_path, {"endless": endless, "next": "print('here')"}, limit=3)
    assert found["endless"]["status"] == "timeout" and "longer than 3 s" in found["endless"]["reason"]
    assert found["next"]["status"] == "ok" and seconds < 20
    assert (tmp_path / "logs" / "next.log").read_text() == "here\n"
    state = subprocess.run(["ps", "-o", "stat=", "-p", child.read_text()], capture_output=True, text=True, check=False)
    assert state.stdout.strip()[:1] in ("", "Z")  # gone, or dead and not yet collected by its new parent


def test_how_a_step_ended_is_told_by_its_code_and_its_last_line(module, tmp_path):
    programs = {
        "crash": "raise MemoryError('no room')",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "skip": f"import sys; print('no such thing here'); sys.exit({module('records').SKIPPED})",
        "fine": "",
    }
    found, _ = carried_out(module, tmp_path, programs)
    assert {name: record["status"] for name, record in found.items()} == {
        "crash": "failed", "killed": "failed", "skip": "skipped", "fine": "ok",
    }  # fmt: skip
    assert found["crash"]["reason"] == "MemoryError: no room" and found["skip"]["reason"] == "no such thing here"


def test_what_comes_back_is_at_most_eight_files_of_limited_size(module, tmp_path):
    packing, rng = module("packing"), np.random.default_rng(0)
    out, keep = tmp_path / "out", tmp_path / "keep"
    (keep / "deep" / "er").mkdir(parents=True)
    out.mkdir()
    (out / "results.jsonl").write_text("{}\n")
    for i in range(20):
        (keep / "deep" / f"{i}.bin").write_bytes(rng.bytes(40_000 + i))
    (keep / "deep" / "er" / "huge.bin").write_bytes(rng.bytes(200_000))
    (keep / "small.json").write_text("{}")
    for _ in range(2):  # again: the archives are replaced
        left_out = packing.pack(out, keep, files=8, size=100_000)
        assert len(list(out.iterdir())) == 8 and all(path.stat().st_size <= 100_000 for path in out.iterdir())
        assert len(left_out) == 7 and "deep/er/huge.bin" in left_out
    names = [name for path in sorted(out.glob("*.zip")) for name in zipfile.ZipFile(path).namelist()]
    assert names[0] == "small.json" and len(names) == len(set(names)) == 15
    assert packing.pack(tmp_path / "out", tmp_path / "nothing") == []


@pytest.mark.parametrize("shape", [(950, 32, 32, 3), (20, 8, 8, 1)])
def test_images_come_back_nearly_as_they_were(module, tmp_path, shape):
    images, (number, height) = module("images"), shape[:2]
    ramp = np.linspace(0, 200, height)[None, :, None, None] + np.arange(number)[:, None, None, None] % 50
    x = np.broadcast_to(ramp, shape).astype(np.uint8)
    y, classes = np.arange(number) % 10, np.array([f"class {i}" for i in range(10)])
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:7], y_test=y[:7], classes=classes)
    assert images.pack(tmp_path / "a.npz", tmp_path / "b.npz") == (tmp_path / "b.npz").stat().st_size
    images.unpack(tmp_path / "b.npz", tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as found:
        assert found["x_train"].dtype == np.uint8 and found["x_train"].shape == shape
        assert np.abs(found["x_train"].astype(int) - x).max() <= 8
        np.testing.assert_array_equal(found["y_train"], y)
        assert len(found["x_test"]) == 7 and found["classes"].tolist() == classes.tolist()
    with pytest.raises(SystemExit, match="more than 1e-05"):
        images.main(["pack", str(tmp_path / "a.npz"), str(tmp_path / "d.npz"), "0.00001"])


def test_a_carried_wheel_is_used_only_where_it_is_needed(module, tmp_path):
    wheels = module("wheels")
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["numpy>=999", "pillow>=1"]\n')
    for name in ("numpy-999.0", "pillow-11.0", "no_such_package_here-1.0"):
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    found = [path.name.split("-")[0] for path in wheels.needed(tmp_path, tmp_path)]
    assert found == ["no_such_package_here", "numpy"]


def test_records_are_read_up_to_where_they_were_cut_off(module, tmp_path):
    records, file = module("records"), tmp_path / "r.jsonl"
    records.append(file, {"kind": "step", "value": np.float32(1.5)})
    file.write_text(file.read_text() + '{"kind": "st')
    assert records.read(file) == [{"kind": "step", "value": 1.5}] and records.read(tmp_path / "none") == []


@pytest.mark.slow
def test_a_run_that_is_stopped_packs_what_it_has(tmp_path):
    """SIGTERM to run.sh alone; then one to a run whose Python process is killed outright."""
    for number, victim in ((signal.SIGTERM, "run.sh"), (signal.SIGKILL, "python")):
        out = tmp_path / victim
        process = subprocess.Popen(
            [str(RUN), "--smoke", "--only", "machine,parity", "--out", str(out)], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "BDJAX_PYTHON": sys.executable},
        )  # fmt: skip
        file, end = out / "results.jsonl", time.time() + 60
        while time.time() < end and not (file.exists() and '"step", "step": "machine"' in file.read_text()):
            time.sleep(0.1)
        child = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        os.kill(process.pid if victim == "run.sh" else int(child.read_text().split()[0]), number)
        assert process.wait(30) != 0
        assert sorted(path.name for path in out.iterdir()) == ["files-0.zip", "results.jsonl"]
        assert "logs/machine.log" in zipfile.ZipFile(out / "files-0.zip").namelist()


def test_what_an_accelerator_is_given_can_be_carried_out(module, tmp_path, monkeypatch):
    """At full size, which is not run here: workloads that exist, models that fit, shares that the sets have."""
    papers, speed = module("papers"), module("speed")
    assert set(speed.COMPARED) < set(bench.NAMES) >= set(speed.WORKLOADS)
    images = np.zeros((50_000, 1, 1, 3), np.uint8), np.arange(50_000) % 10
    data = Data("cifar10", *images, *(part[:10_000] for part in images), tuple("abcdefghij"))
    begun = []
    run = module("records").Run("ibau", tmp_path / "r", tmp_path, tmp_path, "tfds:cifar10", time.time() + 1000)
    for name in ("_trained", "_export"):
        monkeypatch.setattr(papers, name, lambda *_: tmp_path)
    monkeypatch.setattr(papers, "_directory", lambda *_: tmp_path)
    monkeypatch.setattr(papers, "_defended", lambda run, victim, experiment: begun.append(experiment))
    rates = {"acc": 0.5, "asr": 0.5}
    found = {
        "before": rates,
        "after": rates,
        "n_test": 1,
        "n_asr": 1,
        "metric": "",
        "seconds": {"attack": 1, "compile": 1},
    }
    monkeypatch.setattr(papers, "reactivate", lambda *_, **__: found)
    (tmp_path / "manifest.json").touch()
    for step in (papers.ibau, papers.bibau, papers.age, papers.baeraser):
        step(run)
    models_ = [(experiment.model, experiment.fit.precision, experiment.seed) for experiment in begun]
    assert models_ == [
        *(("small_vgg", "float32", seed) for seed in (0, 1, 2)), ("resnet18", "bfloat16", 0),
        ("resnet18_imagenet", "float32", 0), ("small_vgg", "float32", 0),
    ]  # fmt: skip
    for experiment in begun:
        models.create(experiment.model, (32, 32, 3), 10, experiment.fit.dtype)
        assert len(clean_indices(experiment.split, data, experiment.seed)) == experiment.split.size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small_vgg", "resnet18"])
def test_parity_at_full_size_can_be_traced(module, name):
    parity = module("parity")
    model = models.create(name, parity.FULL.shape, parity.CLASSES)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    given = variables["params"], variables["batch_stats"], parity.inputs(parity.FULL)
    found = jax.eval_shape(functools.partial(parity.quantities, model, parity.FULL), *given)
    assert found["logits"].shape == (32, 10) and set(found) == set(parity.QUANTITIES)
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)  # noqa: E731
    assert shapes(found["hypergradient"]) == shapes(found["gradient"]) == shapes(variables["params"])


@pytest.mark.slow
def test_every_step_at_tiny_sizes(module, tmp_path):
    """As one would before the accelerator's time begins; PyTorch is not among the tests' packages."""
    out = tmp_path / "out"
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    command = [str(RUN), "--smoke", "--out", str(out)]
    done = subprocess.run(
        command, env={**env, "BDJAX_PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = module("records").read(out / "results.jsonl")
    ended = {record["step"]: record for record in found if record["kind"] == "step"}
    assert list(ended) == [step.name for step in module("schedule").STEPS]
    for name, record in ended.items():
        without_torch = name == "compare" and "PyTorch is not installed" in record["reason"]
        assert record["status"] == "ok" or (without_torch and record["status"] == "skipped"), record
    measured = {(record["step"], record["what"]) for record in found if record["kind"] == "result"}
    assert {
        ("machine", "environment"), ("machine", "product"), ("machine", "copy on the device"), ("parity", "parity"),
        ("bench", "bench"), ("ibau", "training"), ("ibau", "defense"), ("bibau", "defense"), ("bibau", "retuning"),
        ("age", "defense"), ("baeraser", "defense"),
    } <= measured  # fmt: skip
    rows = [record for record in found if record.get("what") == "parity"]
    assert [(row["dtype"], row["precision"]) for row in rows] == [
        ("float32", "default"), ("float32", "highest"), ("bfloat16", "default"),
    ]  # fmt: skip
    for row in rows[:2]:
        assert all(row[name]["relative_error"] < 1e-4 for name in ("logits", "gradient", "hypergradient"))
    assert found[-1]["kind"] == "end" and found[-1]["left_out"] == []
    folder = module("collect").collect(out, tmp_path / "results")
    assert folder.name == "cpu" and "| ibau | ok |" in (folder / "table.md").read_text()
    assert json.loads((folder / "bench.json").read_text())["rows"][0]["n"] == 1
    assert not (folder / "weights").exists() and list((folder / "runs").glob("*/result.json"))
