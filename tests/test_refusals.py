"""What a user gets wrong: exit code 2, the name, the value and the remedy."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import DEFEND, PLANT, refused

from bdjax.io import checkpoint


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "badnet", "ibau"], ["'badnet'", "Did you mean 'badnets'?", "image_trigger"]),
        (["run", "badnets", "ibay"], ["'ibay'", "Did you mean 'ibau'?"]),
        (["run", "badnets", "ibau", "--model", "resnet19"], ["'resnet19'", "resnet18"]),
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
        (["run", "image_trigger", "ibau", "--attack.trigger", "no.png"], ["no.png"]),
        (["run", "badnets", "ibau", "--defense.solver", "magic"], ["magic", "fixed_point"]),
        (["run", "badnets", "ibau", "--defense.rounds", "many"], ["many"]),
        (["run", "badnets", "universal"], ["universal", "removes none", "bdjax audit"]),
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
def test_message_names_it(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = " ".join(refused(capsys, *argv).split())
    for word in words:
        assert word in message
    assert not list(tmp_path.glob("runs/*.json")) and not list(tmp_path.glob("runs/victims/[!.]*"))


def test_out_of_another_configuration_or_of_something_else(finished, blobs_npz, capsys, tmp_path):
    out, _ = finished
    argv = ["run", "badnets", "ibau", "--dataset", blobs_npz, *PLANT, *DEFEND[:-2], "--seed", "9", "--out"]
    assert "another configuration" in refused(capsys, *argv, out)
    (tmp_path / "letters.txt").write_text("dear")
    assert "not empty" in refused(capsys, *argv, tmp_path)
    assert "was not deleted" in refused(capsys, *argv, tmp_path, "--force")
    assert (tmp_path / "letters.txt").read_text() == "dear"


def test_damaged_victim_names_the_file(finished, capsys, tmp_path):
    shutil.copytree(finished[0] / "victim", tmp_path / "v")
    with open(tmp_path / "v" / "trigger.npz", "r+b") as file:
        file.seek(40)
        file.write(b"\xff")
    assert "trigger.npz is damaged" in refused(capsys, "defend", tmp_path / "v", "ibau", "--out", tmp_path / "d")


def test_data_of_another_content_is_not_taken_for_the_victims(finished, blobs, capsys, tmp_path):
    images, labels = blobs
    np.savez(tmp_path / "o.npz", x_train=images[:99], y_train=labels[:99], x_test=images[160:], y_test=labels[160:])
    argv = ["defend", finished[0] / "victim", "ibau", "--dataset", f"npz:{tmp_path}/o.npz", "--out", tmp_path / "d"]
    assert "fingerprint" in refused(capsys, *argv)


def test_full_disk(blobs_npz, capsys, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    argv = ["train", "badnets", "--dataset", blobs_npz, *PLANT, "--out", tmp_path / "v"]
    assert "no space" in refused(capsys, *argv)
    assert not (tmp_path / "v").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run badnets ibau", "train badnets", "evaluate m", "audit m", "demo"])
@pytest.mark.parametrize("asked", ["gpu9", "cuda"])
def test_a_device_that_is_not_there_is_named_in_one_line(command, asked, tmp_path):
    """In a process of its own: jax looks for devices once."""
    if asked == "cuda" and any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("there is a GPU")
    (tmp_path / "m").mkdir()
    env = {**os.environ, "JAX_PLATFORMS": asked, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-m", "bdjax", *command.split()]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"bdjax: JAX_PLATFORMS={asked} names a device")
    assert "Set JAX_PLATFORMS=cpu" in done.stderr and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["m"]
