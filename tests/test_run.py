"""The main job from end to end on a small problem: phases, directories, refusals, grids. Mostly through the CLI."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from bdjax import checkpoint, cli, datasets, run, victim
from bdjax.engine.clock import compiled_programs
from bdjax.evaluation import Evaluation
from bdjax.experiment import Experiment, SplitConfig, to_json
from bdjax.report import table

FAST = ["--fit.epochs", "2", "--fit.batch-size", "40", "--devices", "1"]
PLANT = ["--attack.target", "1", "--attack.ratio", "0.2", *FAST]
DEFEND = ["--defense.rounds", "2", "--defense.batch-size", "10", "--devices", "1"]
KEYS = {
    "attack", "defense", "dataset", "model", "seed", "n_test", "before", "after", "seconds", "peak_memory_bytes",
    "config_hash", "env",
}  # fmt: skip


def bdjax(capsys, *argv):
    """The command's stdout; fails the test when it exits with an error."""
    try:
        cli.main([str(a) for a in argv])
    except SystemExit as stop:
        assert stop.code in (0, None), capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *argv):
    """The message of a command that must exit with 2 and no traceback."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    assert stop.value.code == 2
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return out.err + out.out


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(blobs_npz, root):
    """One run by the CLI, kept for the module: (its directory, its result)."""
    out = root / "one"
    cli.main(["run", "badnets", "ibau", "--dataset", blobs_npz, *PLANT, *DEFEND[:-2], "--out", str(out)])
    return out, json.loads((out / "result.json").read_text())


def test_run_writes_everything_and_rates_are_fractions(finished):
    out, result = finished
    assert set(result) >= KEYS
    assert set(result["seconds"]) == {"attack", "defense", "compile"}
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
    other = json.loads(bdjax(capsys, "evaluate", out / "victim", "--data", blobs_npz, "--json").splitlines()[-1])
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
    experiment = victim.experiment_of(manifest, None, None, split, None)
    model, _ = victim.load_model(manifest, out / "victim", data)
    return model, data, experiment, checkpoint.read_arrays(out / "victim", "trigger")


def test_clean_images_from_the_training_split_leave_the_test_split_whole(finished, blobs_npz):
    evaluation = Evaluation(*_evaluation_arguments(finished[0], blobs_npz, SplitConfig("train", 16)))
    assert len(evaluation.images) == 40 and len(evaluation.clean_images) == 16
    train = datasets.load(blobs_npz).x_train
    np.testing.assert_array_equal(evaluation.clean_images, train[evaluation.clean_indices])


def test_other_values_compile_nothing_new(blobs_npz, tmp_path):
    def once(name, seed, **changes):
        experiment = Experiment("badnets", "ibau", blobs_npz, seed=seed)
        fit = {"epochs": 1, "batch_size": 40, "learning_rate": changes.pop("learning_rate", 1e-3)}
        defense = {"rounds": 1, "batch_size": 10, **changes}
        experiment = Experiment(
            "badnets", "ibau", blobs_npz, "cnn", seed, type(experiment.attack_config)(target=1),
            type(experiment.defense_config)(**defense), type(experiment.fit)(**fit),
        )  # fmt: skip
        run.run(experiment, tmp_path, tmp_path / name, victim.Context(1))

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


def test_killed_training_resumes_to_the_same_bits(blobs_npz, tmp_path):
    argv = ["train", "badnets", "--dataset", blobs_npz, *PLANT[:4], "--fit.epochs", "40", "--fit.batch-size", "40"]
    command = [sys.executable, "-m", "bdjax", *argv, "--devices", "1"]
    env = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run([*command, "--out", "whole"], cwd=tmp_path, env=env, check=True, capture_output=True)
    child = subprocess.Popen([*command, "--out", "cut"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".cut.training-*/epoch-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "cut").exists() and list(tmp_path.glob(".cut.training-*/epoch-*"))
    subprocess.run([*command, "--out", "cut"], cwd=tmp_path, env=env, check=True, capture_output=True)
    like = jax.eval_shape(victim.models.create("cnn", (8, 8, 1), 4).init, jax.random.key(0))
    one, two = (checkpoint.read_variables(tmp_path / name, like) for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not list(tmp_path.glob(".cut.training-*")) and not list(tmp_path.glob("*partial*"))


class TestRefusals:
    """What a user gets wrong: exit code 2, the name, the value and the remedy."""

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["run", "badnet", "ibau"], ["'badnet'", "Did you mean 'badnets'?", "image_trigger"]),
            (["run", "badnets", "ibua"], ["'ibua'", "Did you mean 'ibau'?"]),
            (["run", "badnets", "ibau", "--model", "resnet"], ["'resnet'", "resnet18"]),
            (["run", "badnets", "ibau", "--dataset", "digit"], ["'digit'", "digits"]),
            (["run", "badnets", "ibau", "--dataset", "npz:nowhere.npz"], ["nowhere.npz"]),
            (["run", "badnets"], ["DEFENSE", "ibau"]),
            (["run", "badnets", "ibau", "--attack.target", "10"], ["attack.target=10", "0 to 9"]),
            (["run", "badnets", "ibau", "--attack.ratio", "1.5"], ["attack.ratio", "(0, 1]", "1.5"]),
            (
                ["run", "badnets", "ibau", "--attack.labels", "clean", "--attack.ratio", "0.3"],
                ["0.3", "class 8", "largest"],
            ),
            (["run", "badnets", "ibau", "--attack.size", "40"], ["attack.size=40", "32x32"]),
            (["run", "badnets", "ibau", "--fit.batch-size", "5000"], ["5000", "1000 training images"]),
            (
                ["run", "badnets", "ibau", "--fit.batch-size", "50", "--devices", "4"],
                ["50", "4 devices", "multiple of 4"],
            ),
            (["run", "badnets", "ibau", "--devices", "9"], ["devices=9"]),
            (["run", "badnets", "ibau", "--split.size", "797"], ["split.size=797", "797"]),
            (["run", "image_trigger", "ibau", "--attack.pattern", "no.png"], ["no.png"]),
            (["run", "badnets", "ibau", "--defense.solver", "magic"], ["magic", "fixed_point"]),
            (["run", "badnets", "ibau", "--defense.rounds", "many"], ["many"]),
            (["run", "badnets", "ibau", "--attack.sise", "3"], ["attack.sise", "attack.size"]),
            (["frobnicate"], ["frobnicate", "run"]),
            (["list", "attack"], ["'attack'", "attacks"]),
            (["defend", "nowhere", "ibau"], ["nowhere"]),
            (["evaluate", "nowhere"], ["nowhere"]),
            (["report", "nowhere"], ["nowhere"]),
            (["sweep", "nowhere.py"], ["nowhere.py"]),
        ],
        ids=lambda v: " ".join(v)[:60],
    )
    def test_message_names_it(self, argv, words, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        message = " ".join(refused(capsys, *argv).split())
        for word in words:
            assert word in message
        assert not list(tmp_path.glob("runs/*.json")) and not list(tmp_path.glob("runs/victims/[!.]*"))

    def test_out_of_another_configuration_or_of_something_else(self, finished, blobs_npz, capsys, tmp_path):
        out, _ = finished
        argv = ["run", "badnets", "ibau", "--dataset", blobs_npz, *PLANT, *DEFEND[:-2], "--seed", "9", "--out"]
        assert "another configuration" in refused(capsys, *argv, out)
        (tmp_path / "letters.txt").write_text("dear")
        assert "not empty" in refused(capsys, *argv, tmp_path)
        assert "left alone" in refused(capsys, *argv, tmp_path, "--force")
        assert (tmp_path / "letters.txt").read_text() == "dear"

    def test_damaged_victim_names_the_file(self, finished, capsys, tmp_path):
        shutil.copytree(finished[0] / "victim", tmp_path / "v")
        with open(tmp_path / "v" / "trigger.npz", "r+b") as file:
            file.seek(40)
            file.write(b"\xff")
        assert "trigger.npz is damaged" in refused(capsys, "defend", tmp_path / "v", "ibau", "--out", tmp_path / "d")

    def test_data_of_another_content_is_not_taken_for_the_victims(self, finished, blobs, capsys, tmp_path):
        images, labels = blobs
        np.savez(tmp_path / "o.npz", x_train=images[:99], y_train=labels[:99], x_test=images[160:], y_test=labels[160:])
        argv = ["defend", finished[0] / "victim", "ibau", "--dataset", f"npz:{tmp_path}/o.npz", "--out", tmp_path / "d"]
        assert "fingerprint" in refused(capsys, *argv)

    def test_full_disk(self, blobs_npz, capsys, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        argv = ["train", "badnets", "--dataset", blobs_npz, *PLANT, "--out", tmp_path / "v"]
        assert "no space" in refused(capsys, *argv)
        assert not (tmp_path / "v").exists()


def test_image_trigger_from_files(blobs_npz, capsys, tmp_path):
    """The file's content is stored with the victim and decides its hash; the file may go."""
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[6:, 6:] = (255, 255, 255, 255)
    Image.fromarray(picture).save(tmp_path / "patch.png")
    argv = ["train", "image_trigger", "--dataset", blobs_npz, "--attack.mode", "replace", *FAST]
    bdjax(capsys, *argv, "--attack.pattern", tmp_path / "patch.png", "--out", tmp_path / "v")
    Image.fromarray(picture[::-1]).save(tmp_path / "patch.png")
    assert "another configuration" in refused(
        capsys, *argv, "--attack.pattern", tmp_path / "patch.png", "--out", tmp_path / "v"
    )
    (tmp_path / "patch.png").unlink()
    arrays = checkpoint.read_arrays(tmp_path / "v", "trigger")
    np.testing.assert_array_equal(arrays["on_black"][..., 0], picture[..., 3])
    assert json.loads(bdjax(capsys, "evaluate", tmp_path / "v", "--json").splitlines()[-1])["n_asr"] == 30


GRID = """
from bdjax.engine import FitConfig
from bdjax.experiment import Experiment
from bdjax.sweep import Cell
from bdjax.attacks import badnets
from bdjax.defenses import ibau

TITLE, SEEDS = "a grid", (0,)

def cell(label, defense, dataset={data!r}):
    return Cell(label, Experiment("badnets", "ibau", dataset, attack_config=badnets.Config(target=1),
                                  defense_config=defense, fit=FitConfig(epochs=2, batch_size=40)), scale="toy")

CELLS = (cell("good", ibau.Config(rounds=1, batch_size=10)), cell("other", ibau.Config(rounds=2, batch_size=10)),
         cell("bad", ibau.Config(), "npz:nowhere.npz"))
"""


def test_sweep_shares_victims_lists_failures_and_does_nothing_twice(blobs_npz, capsys, tmp_path):
    (tmp_path / "grid.py").write_text(GRID.format(data=blobs_npz))
    argv = ["sweep", tmp_path / "grid.py", "--out", tmp_path / "out", "--devices", "1"]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    first = capsys.readouterr().out
    assert stop.value.code == 1
    assert "1 of 3 cells failed" in first and "bad, seed 0" in first and "nowhere.npz" in first
    assert len(list((tmp_path / "out" / "victims").glob("[!.]*"))) == 1
    results = list((tmp_path / "out").glob("*/result.json"))
    assert len(results) == 2 and {json.loads(p.read_text())["cell"]["label"] for p in results} == {"good", "other"}
    with pytest.raises(SystemExit):
        cli.main([str(a) for a in argv])
    assert "2 finished before, 0 to do" in capsys.readouterr().out
    markdown = bdjax(capsys, "report", tmp_path / "out", "--markdown")
    assert "missing" in markdown and "toy" in markdown and "good" in markdown


def test_sweep_starts_a_killed_worker_again(blobs_npz, tmp_path, monkeypatch):
    from bdjax import sweep

    (tmp_path / "grid.py").write_text(GRID.format(data=blobs_npz).replace('cell("bad"', 'cell("third"').replace(
        ', "npz:nowhere.npz"', ""))  # fmt: skip
    real, started, said = sweep._start, [], []

    def start(*arguments):
        process = real(*arguments)
        if not started:
            process.kill()
        started.append(process)
        return process

    monkeypatch.setattr(sweep, "_start", start)
    failed = sweep.sweep(tmp_path / "grid.py", tmp_path / "out", devices=1, workers=2, say=said.append)
    assert not failed and len(started) == 4
    assert any("was killed (signal 9); starting it again" in line for line in said)


def test_shards_part_the_grid_by_victims():
    from bdjax import sweep

    cells = [sweep.Cell(f"d{d}", Experiment("badnets", "ibau")) for d in range(3)]
    jobs = [sweep._Job(i, seed, cell) for seed in range(4) for i, cell in enumerate(cells)]
    parts = [sweep._shard(jobs, f"{i}/3") for i in range(3)]
    assert sorted((j.index, j.seed) for part in parts for j in part) == sorted((j.index, j.seed) for j in jobs)
    assert not {j.seed for j in parts[0]} & {j.seed for j in parts[1]}


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
    from bdjax.defenses import ibau
    from bdjax.experiment import from_json

    config = ibau.Config(norm_bound=float("inf"), rounds=3)
    assert from_json(ibau.Config, json.loads(json.dumps(to_json(config), allow_nan=False))) == config


def test_own_attack_in_a_file_outside_the_package(blobs_npz, capsys, tmp_path):
    """The README's example of an attack, word for word."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    source = readme.split("<!-- example: attack -->")[1].split("```python\n")[1].split("```")[0]
    assert len(source.splitlines()) <= 40
    (tmp_path / "stripes.py").write_text(source)
    out = tmp_path / "v"
    bdjax(capsys, "train", tmp_path / "stripes.py", "--dataset", blobs_npz, "--attack.width", "2", *FAST, "--out", out)
    assert checkpoint.read_manifest(out)["attack"]["config"]["width"] == 2
    again = bdjax(capsys, "evaluate", out, "--json").splitlines()[-1]
    assert json.loads(again)["n_test"] == 40


def test_own_defense_in_a_file_outside_the_package(finished, capsys, tmp_path):
    """The README's example of a defense, word for word."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    source = readme.split("<!-- example: defense -->")[1].split("```python\n")[1].split("```")[0]
    assert len(source.splitlines()) <= 40
    (tmp_path / "shrink.py").write_text(source)
    argv = [
        "defend",
        finished[0] / "victim",
        tmp_path / "shrink.py",
        "--defense.factor",
        "0.5",
        "--out",
        tmp_path / "d",
    ]
    result = json.loads(bdjax(capsys, *argv, "--json").splitlines()[-1])
    assert result["defense_config"] == {"factor": 0.5}
