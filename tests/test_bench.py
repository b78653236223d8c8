"""`bdjax bench`: what is counted, against hand-computed values; that every name is a workload; the command."""

import json
import re
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import bdjax, refused
from conftest import perceptron

from bdjax import bench
from bdjax.bench import _measure, workloads
from bdjax.engine import FitConfig, fit
from bdjax.reports import bench as report

SMALL = workloads.SMALL


def prepared(monkeypatch, job):
    monkeypatch.setattr(_measure, "prepared", lambda name, sizes: job)


def test_every_name_has_a_kind():
    known = set(workloads._KINDS)
    assert {name.partition("/")[0] for name in bench.NAMES} == known | {bench.STARTUP}


def test_operations_and_bytes_of_a_product(monkeypatch):
    """[30, 50] @ [50, 70], four times a run: 2 m k n operations; both factors and the product pass once."""
    a, b = jnp.ones((30, 50)), jnp.ones((50, 70))
    multiply = jax.jit(lambda a, b: a @ b)
    prepared(monkeypatch, workloads.Job(lambda: multiply(a, b), 8, extra=((4, lambda a, b: a @ b, (a, b)),)))
    row = _measure.measure("product", repeats=3, small=True)
    assert row["flops"] == 4 * 2 * 30 * 50 * 70
    assert row["bytes"] == 4 * 4 * (30 * 50 + 50 * 70 + 30 * 70)
    assert row["peak_memory_bytes"] == 4 * (30 * 50 + 50 * 70 + 30 * 70) and "analysis" in row["peak_memory_of"]
    assert row["n"] == len(row["seconds"]) == 3 and row["rate"] == 8 / row["median"]
    assert report.share(row, "flops") == pytest.approx(row["flops"] / row["median"] / row["peak_flops"])
    assert row["peak_flops"] > 0 and row["peak_flops_of"] == "256x256 product in float32"


def test_the_steps_of_training_are_counted_by_the_engine(monkeypatch, blobs):
    """Five steps of 40 images of the perceptron 64-8-4: a pass forward, one to each kernel, one to the hidden layer."""
    model = perceptron()
    run = lambda: fit(model, *blobs, FitConfig(1, 40, "sgd"), jax.random.key(0))  # noqa: E731
    prepared(monkeypatch, workloads.Job(run, 200))
    jax.clear_caches()  # another test of this process may have compiled the same step
    row, job, steps = _measure.first_call("fit", "cpu", False)
    assert row["compile"] > 0 and [entry[0] for entry in steps.values()] == [5]
    products = 5 * 2 * 40 * (2 * 64 * 8 + 3 * 8 * 4)
    assert products < _measure._costs(job, steps)[0] < 1.6 * products


RUNS = [
    ("train/resnet18/wanet/float32", 32), ("evaluate/resnet18", 20), ("ibau/release", 1), ("bibau", 16), ("age", 16),
    ("inversion", 160), ("many/vmap", 64), ("trigger/sig", 40), ("trigger/blended", 40),
]  # fmt: skip


@pytest.mark.parametrize(("name", "units"), RUNS)
def test_a_workload_gives_finite_arrays_twice(name, units, monkeypatch):
    """With a model that compiles at once in the place of its own; the second run must not meet donated arrays."""
    monkeypatch.setattr(workloads, "_model", lambda name, sizes, dtype="float32": perceptron(sizes.shape, 10))
    monkeypatch.setattr(workloads.bibau, "Config", partial(workloads.bibau.Config, steps=1))
    job = workloads.job(name, SMALL)
    assert job.units == units
    for _ in range(2):
        leaves = jax.tree.leaves(job.run())
        assert leaves and all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in leaves)


def test_all_sizes_make_a_model():
    for sizes in (SMALL, *workloads.SUITES.values()):
        model = workloads._model("small_vgg", sizes, "bfloat16")
        assert model.shape == sizes.shape and dict(model.options)["width"] == sizes.width


def test_names_and_patterns():
    assert bench.chosen("age, many/*") == ["age", "many/loop", "many/vmap", "many/devices"]
    assert bench.chosen("") == list(bench.NAMES)


@pytest.mark.slow
def test_the_command_measures_cold_cached_and_after(capsys, tmp_path):
    argv = ["bench", "--small", "--repeats", "2", "--only", "trigger/badnets", "--json", "--out", tmp_path / "b.json"]
    out = bdjax(capsys, *argv).splitlines()
    result = json.loads(out[-1])
    (row,) = result["rows"]
    assert row["name"] == "trigger/badnets" and row["n"] == 2 and 0 < row["compile_cached"] < 3 * row["compile"]
    assert json.loads((tmp_path / "b.json").read_text()) == result and result["env"]["platform"] == "cpu"
    assert re.match(r"trigger/badnets +[\d.e-]+ \([\d.e-]+ to [\d.e-]+\)", out[1]) and "mean nothing" in "\n".join(out)


@pytest.mark.slow
def test_a_start_is_timed_from_outside(monkeypatch):
    """The one that fills the cache is told apart; the child says when its first step is over."""
    monkeypatch.setattr(bench, "_run_worker", lambda *_: time.sleep(next(pauses)))
    pauses = iter((0.2, 0.01, 0.02))
    found = bench._startup(2, {}, 100)
    assert found["n"] == 2 and found["cold"] >= 0.2 > found["median"] >= 0.015
    said = []
    _measure.first_step(said.append)
    assert said == ["first step"]


@pytest.mark.slow
def test_what_fails_or_takes_too_long_is_a_row(monkeypatch):
    monkeypatch.setattr(
        bench, "_row", lambda *_: bench._run_worker(["measure", "ibau/none", "cpu", "1", "nothing"], {}, 60)
    )
    (row,) = bench.bench(only="age")["rows"]
    assert "schedules" in row["failed"] or "none" in row["failed"], row
    assert report.line(row).startswith("age ")
    monkeypatch.setattr(bench, "_row", lambda *_: bench._run_worker(["first-step"], {}, 0.01))
    assert bench.bench(only="age", limit=0.01)["rows"][0]["failed"] == "longer than 0.01 s"


def test_where_minutes_count_a_workload_is_started_once_with_the_cache_that_there_is(monkeypatch):
    asked = []
    answer = lambda arguments, given, limit: asked.append((arguments[0], given)) or '{"name": "age", "compile": 1}'  # noqa: E731
    monkeypatch.setattr(bench, "_run_worker", answer)
    (row,) = bench.bench(only="age", cold=False)["rows"]
    assert asked == [("measure", {})] and "compile_cached" not in row
    (row,) = bench.bench(only="age")["rows"]
    assert len(asked) == 3 and "JAX_COMPILATION_CACHE_DIR" in asked[-1][1] and row["compile_cached"] == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--only", "nothing"], "--only nothing matches no workload. Known: train/small_vgg"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--suite", "tpu"], "tpu"),
        (["--out", "b.txt"], "does not end in .json"),
    ],
)
def test_a_wrong_argument(argv, words, capsys):
    assert words in refused(capsys, "bench", *argv)
