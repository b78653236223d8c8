"""Two processes on one machine train one model, and end where one process does; Orbax saves and restores in between."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import bdjax, refused
from conftest import perceptron

from bdjax import datasets
from bdjax.engine import FitConfig, fit
from bdjax.io import checkpoint

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
RECIPE = {"epochs": 2, "batch_size": 64, "optimizer": "sgd", "learning_rate": 0.1}
TRAIN = ["train", "badnets", "--model", "cnn", "--attack.target", "1", "--fit.epochs", "2", "--fit.batch-size", "40"]
TRAIN += ["--fit.optimizer", "sgd"]
CHILD = """
import json, sys
from pathlib import Path

from bdjax import cli

given = json.loads(sys.argv[1])
cli.main([*given["train"], *given["join"]])

import jax
from conftest import perceptron
from bdjax import datasets
from bdjax.io import checkpoint
from bdjax.engine import FitConfig, fit, parallel

assert jax.process_count() == 2 and parallel.count() == 4, (jax.process_count(), parallel.count())
data, out = datasets.load("digits"), Path(given["out"])


class Dying(checkpoint.EpochSaver):
    def save(self, epoch, state):
        super().save(epoch, state)
        raise KeyboardInterrupt


def training(saver):
    model = perceptron(data.shape, 10)
    return fit(model, data.x_train, data.y_train, FitConfig(**given["recipe"]), jax.random.key(0), saver=saver)


try:
    training(Dying(out / "epochs"))
except KeyboardInterrupt:
    pass
begun = checkpoint.EpochSaver(out / "epochs").restore
saver = checkpoint.EpochSaver(out / "epochs")
saver.restore = lambda like: (lambda found: (print("restored", found[0], flush=True), found)[1])(begun(like))
checkpoint.write_model(out / "model", {"kind": "test"}, training(saver), {"own": {"x": jax.numpy.arange(3)}})
"""


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def together(blobs_npz, tmp_path_factory):
    """What two processes of two devices each wrote: (directory, the output of each)."""
    out, port = tmp_path_factory.mktemp("together"), free_port()
    train = [*TRAIN, "--dataset", blobs_npz, "--out", str(out / "victim")]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), env.get("PYTHONPATH", "")])
    children = []
    for process in range(2):
        join = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(process)]
        given = json.dumps({"train": train, "join": join, "out": str(out), "recipe": RECIPE})
        command = [sys.executable, "-c", CHILD, given]
        children.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        said = [child.communicate(timeout=600) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(err[-2000:] for _, err in said)
    return out, [output for output, _ in said]


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_they_end_where_one_process_does_across_a_restore(together):
    out, said = together
    assert all("restored 1" in output for output in said)
    data, model = datasets.load("digits"), perceptron((32, 32, 1), 10)
    alone = fit(model, data.x_train, data.y_train, FitConfig(**RECIPE), jax.random.key(0))
    checkpoint.read_manifest(out / "model")  # every file has its hash
    assert_close(checkpoint.read_variables(out / "model", jax.eval_shape(model.init, jax.random.key(0))), alone)
    assert [p.name for p in (out / "epochs").iterdir()] == ["epoch-000002"]


def test_the_command_trains_one_victim_and_the_first_process_alone_speaks(together, blobs_npz, capsys, tmp_path):
    out, said = together
    assert "victim: " in said[0] and "victim: " not in said[1]
    bdjax(capsys, *TRAIN, "--dataset", blobs_npz, "--devices", "1", "--out", tmp_path / "one")
    mine, theirs = (checkpoint.read_manifest(place) for place in (tmp_path / "one", out / "victim"))
    assert (mine["hash"], mine["poison"]) == (theirs["hash"], theirs["poison"])
    for a, b in zip(mine["curve"], theirs["curve"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--processes", "2"], "need --coordinator HOST:PORT"),
        (["--coordinator", "here", "--processes", "2", "--process", "0"], "needs the form HOST:PORT"),
        (["--coordinator", "here:1", "--processes", "2", "--process", "2"], "got --processes 2 --process 2"),
        (["--coordinator", "here:1", "--slurm"], "--slurm and --coordinator exclude each other"),
    ],
)
def test_flags_that_do_not_fit_together(flags, words, capsys, tmp_path):
    assert words in refused(capsys, "train", "clean", "--out", tmp_path / "v", *flags)


def test_slurm_says_who_is_who(monkeypatch):
    """The variables of a task of `srun` are what jax reads; nothing is connected here."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: asked.append(given))
    from bdjax.cli._devices import join_cluster
    from bdjax.cli._options import ClusterFlags

    monkeypatch.setattr(jax.config, "update", lambda *given: asked.append(given))
    join_cluster(ClusterFlags(slurm=True))
    join_cluster(ClusterFlags(coordinator="a:1", processes=2, process=1))
    gloo = ("jax_cpu_collectives_implementation", "gloo")
    assert asked == [gloo, (), gloo, ("a:1", 2, 1)]
