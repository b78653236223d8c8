"""The main job from end to end on a small problem: phases, directories, what is written. Mostly through the CLI."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from commands import DEFEND, PLANT, bdjax
from PIL import Image

from bdjax import datasets, models, registry
from bdjax.config import Experiment, SplitConfig, demo, to_json
from bdjax.engine.callbacks import Recorder
from bdjax.engine.clock import compiled_programs
from bdjax.io import checkpoint
from bdjax.pipelines.artifact import experiment_of, load_model
from bdjax.pipelines.context import Context
from bdjax.pipelines.defend import DefenseRequest, defend
from bdjax.pipelines.evaluation import Evaluation
from bdjax.pipelines.run import RunRequest, run
from bdjax.pipelines.training import train
from bdjax.reports import table

KEYS = {
    "attack", "defense", "dataset", "model", "seed", "n_test", "before", "after", "seconds", "peak_memory_bytes",
    "config_hash", "env",
}  # fmt: skip


def test_run_writes_everything_and_rates_are_fractions(finished):
    out, result = finished
    assert set(result) >= KEYS
    assert set(result["seconds"]) == {"attack", "defense", "compile", "estimate"}
    for rates in (result["before"], result["after"]):
        assert all(0 <= rates[name] <= 1 for name in ("acc", "asr", "asr_with_target"))
    names = {
        "config.json",
        "env.json",
        "metrics.jsonl",
        "result.json",
        "arrays.npz",
        "figure.png",
        "victim",
        "purified",
    }
    assert {p.name for p in out.iterdir() if not p.name.startswith(".")} == names
    with Image.open(out / "figure.png") as picture:
        assert picture.size[0] > 800
    assert len(result["rounds"]) == 2 == len((out / "metrics.jsonl").read_text().splitlines())
    assert result["env"]["devices"] == 1 and result["env"]["platform"] == "cpu"
    assert result["n_test"] == 20 and result["n_defender"] == 20 and result["n_asr"] == 16


def test_json_is_the_last_line_and_a_finished_run_is_not_repeated(finished, blobs_npz, capsys):
    out, result = finished
    argv = ["run", "badnets", "ibau", "--dataset", blobs_npz, *PLANT, *DEFEND[:-2], "--out", out, "--json"]
    before = (out / "result.json").stat().st_mtime_ns
    assert json.loads(bdjax(capsys, *argv).splitlines()[-1]) == result
    assert (out / "result.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_defense_is_judged_by_images_kept_apart_and_its_success_is_estimated(tmp_path):
    """Digits: 100 images, 20 of them kept apart, and an estimate of what is left of the attack."""
    train(demo(), tmp_path / "victim")
    config, context = registry.load("defenses", "ibau").Config(rounds=1), Context(estimate=True)
    split = SplitConfig(size=100, order="stratified")
    result = defend(DefenseRequest(tmp_path / "victim", "ibau", config, split), tmp_path / "run", context)
    assert (result["n_defender"], result["n_validation"]) == (100, 20)
    assert all(0 <= row["validation_accuracy"] <= 1 for row in result["rounds"])
    flips = result["estimate"]["flips"]
    assert {row["form"] for row in flips} == {"additive", "patch"} and flips[0]["label"] == 8
    assert result["estimate"]["rate"] == max(max(row["after"], row["anew"]) for row in flips)
    assert flips[0]["before"] > 0.5 > flips[0]["after"] and result["seconds"]["estimate"] > 0
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


def test_a_curve_of_many_rounds_is_thinned():
    measured = []
    callback = Recorder(lambda *_: None, measure=lambda variables: measured.append(variables) or {"acc": 1.0})
    for step in range(1, 101):
        callback.on_round_end(step, step)
    assert measured == [1, 2, 3, 4, 5, 10, 20, 40, 80] and len(callback.rows) == 100
    assert [row["step"] for row in callback.rows if "acc" in row] == measured


@pytest.mark.slow
def test_train_then_defend_in_other_processes_equals_run(finished, blobs_npz, tmp_path):
    _, result = finished
    env = {**os.environ, "XLA_FLAGS": ""}
    for argv in (
        ["train", "badnets", "--dataset", blobs_npz, *PLANT, "--out", "v"],
        ["defend", "v", "ibau", *DEFEND, "--out", "d", "--json"],
    ):
        command = [sys.executable, "-W", "error::DeprecationWarning:bdjax", "-m", "bdjax", *argv]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no bar and no noise when stderr is not a terminal
    apart = json.loads(done.stdout.splitlines()[-1])
    for name in ("before", "after", "config_hash", "victim_hash"):
        assert apart[name] == result[name]


def test_evaluate_gives_the_numbers_of_the_run(finished, blobs_npz, capsys):
    out, result = finished
    clean = json.loads(bdjax(capsys, "evaluate", out, "--json").splitlines()[-1])
    assert {k: clean[k] for k in ("acc", "asr")} == {k: result["after"][k] for k in ("acc", "asr")}
    whole = json.loads(bdjax(capsys, "evaluate", out / "victim", "--json").splitlines()[-1])
    assert whole["n_test"] == 40  # a victim has no defender yet: the whole test set counts
    other = json.loads(bdjax(capsys, "evaluate", out / "victim", "--dataset", blobs_npz, "--json").splitlines()[-1])
    assert other["acc"] == whole["acc"]


def test_manifest_tells_everything_and_reproduces_the_poison(finished, blobs_npz):
    out, _ = finished
    manifest = checkpoint.read_manifest(out / "victim")
    data = datasets.load(blobs_npz)
    assert manifest["dataset"]["fingerprint"] == data.fingerprint
    assert manifest["attack"]["config"]["target"] == 1
    assert set(manifest["env"]) >= {"jax", "flax", "commit", "device"}
    poison = checkpoint.read_arrays(out / "victim", "poison")
    assert len(poison["indices"]) == 32 and (poison["labels_after"] == 1).all()
    np.testing.assert_array_equal(poison["labels_before"], data.y_train[poison["indices"]])
    portrait = checkpoint.read_arrays(out / "victim", "trigger")
    assert (portrait["on_black"] == 255).sum() == 1 and (portrait["on_white"] == 255).all()


def test_defenders_images_are_recorded_and_never_evaluated(finished, blobs_npz):
    out, _ = finished
    indices = checkpoint.read_arrays(out, "arrays")["clean_indices"]
    assert len(set(indices)) == 20
    evaluation = Evaluation(*_evaluation_arguments(out, blobs_npz))
    held = datasets.load(blobs_npz).x_test[np.setdiff1d(np.arange(40), indices)]
    np.testing.assert_array_equal(evaluation.images, held)


def _evaluation_arguments(out, blobs_npz, split=None):
    manifest, data = checkpoint.read_manifest(out / "victim"), datasets.load(blobs_npz)
    experiment = experiment_of(manifest, split=split)
    model, _ = load_model(manifest, out / "victim", data)
    return model, data, experiment, checkpoint.read_arrays(out / "victim", "trigger")


def test_clean_images_from_the_training_split_leave_the_test_split_whole(finished, blobs_npz):
    evaluation = Evaluation(*_evaluation_arguments(finished[0], blobs_npz, SplitConfig("train", 16)))
    assert len(evaluation.images) == 40 and len(evaluation.clean_images) == 16
    train = datasets.load(blobs_npz).x_train
    np.testing.assert_array_equal(evaluation.clean_images, train[evaluation.clean_indices])


@pytest.mark.slow
def test_other_values_compile_nothing_new(blobs_npz, tmp_path):
    def once(name, seed, **changes):
        experiment = Experiment("badnets", "ibau", blobs_npz, seed=seed)
        fit = {"epochs": 1, "batch_size": 40, "learning_rate": changes.pop("learning_rate", 1e-3)}
        defense = {"rounds": 1, "batch_size": 10, **changes}
        experiment = Experiment(
            "badnets", "ibau", blobs_npz, "cnn", seed, type(experiment.attack_config)(target=1),
            type(experiment.defense_config)(**defense), type(experiment.fit)(**fit),
        )  # fmt: skip
        run(RunRequest(experiment, tmp_path, tmp_path / name), Context(1))

    once("a", 0)
    before = compiled_programs()
    once(
        "b",
        1,
        learning_rate=2e-3,
        inner_lr=5.0,
        outer_lr=2e-3,
        penalty=0.01,
        norm_bound=3.0,
        solver_step=0.2,
        ridge=0.1,
    )
    assert compiled_programs() == before


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_bits(blobs_npz, tmp_path):
    argv = ["train", "badnets", "--dataset", blobs_npz, *PLANT[:4], "--fit.epochs", "40", "--fit.batch-size", "40"]
    command = [sys.executable, "-m", "bdjax", *argv, "--devices", "1"]
    env = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run([*command, "--out", "whole"], cwd=tmp_path, env=env, check=True, capture_output=True)
    child = subprocess.Popen([*command, "--out", "cut"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".cut.training-*/*/epoch-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "cut").exists() and list(tmp_path.glob(".cut.training-*/*/epoch-*"))
    subprocess.run([*command, "--out", "cut"], cwd=tmp_path, env=env, check=True, capture_output=True)
    like = jax.eval_shape(models.create("cnn", (8, 8, 1), 4).init, jax.random.key(0))
    one, two = (checkpoint.read_variables(tmp_path / name, like) for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not list(tmp_path.glob(".cut.training-*")) and not list(tmp_path.glob("*partial*"))


def test_help_is_fast_and_imports_no_jax():
    code = "import sys; from bdjax import cli; cli.main(['--help']); cli.main(['list']); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage: bdjax" in done.stdout and "ibau" in done.stdout
    best = min(_seconds([sys.executable, "-m", "bdjax", "--help"]) for _ in range(3))
    assert best < 0.5


def _seconds(command):
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - began


def test_table_of_one_run_shows_what_matters(finished):
    text = table.one(finished[1])
    for words in ("n = 20", "n = 16", "seconds: attack", "peak memory", "clean accuracy"):
        assert words in text


def test_config_survives_json():
    from bdjax.config import from_json
    from bdjax.defenses import ibau

    config = ibau.Config(norm_bound=float("inf"), rounds=3)
    assert from_json(ibau.Config, json.loads(json.dumps(to_json(config), allow_nan=False))) == config
