"""Triggers, attacks and defenses in files of the user's own."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import FAST, bdjax, refused
from PIL import Image

from bdjax import registry
from bdjax.errors import InputError
from bdjax.io import checkpoint


def test_image_trigger_from_files(blobs_npz, capsys, tmp_path):
    """The file's content is stored with the victim and decides its hash; the file may go."""
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[6:, 6:] = (255, 255, 255, 255)
    Image.fromarray(picture).save(tmp_path / "patch.png")
    argv = ["train", "image_trigger", "--dataset", blobs_npz, "--attack.mode", "replace", *FAST]
    bdjax(capsys, *argv, "--attack.trigger", tmp_path / "patch.png", "--out", tmp_path / "v")
    Image.fromarray(picture[::-1]).save(tmp_path / "patch.png")
    assert "another configuration" in refused(
        capsys, *argv, "--attack.trigger", tmp_path / "patch.png", "--out", tmp_path / "v"
    )
    (tmp_path / "patch.png").unlink()
    arrays = checkpoint.read_arrays(tmp_path / "v", "trigger")
    np.testing.assert_array_equal(arrays["on_black"][..., 0], picture[..., 3])
    assert json.loads(bdjax(capsys, "evaluate", tmp_path / "v", "--json").splitlines()[-1])["n_asr"] == 30


def test_own_attack_in_a_file_outside_the_package(blobs_npz, capsys, tmp_path):
    """The guide's example of an attack, word for word."""
    guide = (Path(__file__).parent.parent / "docs" / "add-a-method.md").read_text()
    source = guide.split("<!-- example: attack -->")[1].split("```python\n")[1].split("```")[0]
    assert len(source.splitlines()) <= 40
    (tmp_path / "stripes.py").write_text(source)
    out = tmp_path / "v"
    bdjax(capsys, "train", tmp_path / "stripes.py", "--dataset", blobs_npz, "--attack.width", "2", *FAST, "--out", out)
    assert checkpoint.read_manifest(out)["attack"]["config"]["width"] == 2
    again = bdjax(capsys, "evaluate", out, "--code", tmp_path / "stripes.py", "--json").splitlines()[-1]
    assert json.loads(again)["n_test"] == 40


@pytest.mark.parametrize("trigger", ["trigger", "training_trigger"])
def test_a_trigger_without_its_fourth_argument_is_named(tmp_path, trigger):
    file = tmp_path / f"{trigger}_of_three.py"
    file.write_text(
        f"from bdjax.attacks.badnets import Config, trigger\ndef {trigger}(config, images, key):\n    return images\n"
    )
    with pytest.raises(InputError, match=rf"`{trigger}` must take four arguments.*arrays, holds .* add it"):
        registry.load("attacks", str(file))


def test_own_defense_in_a_file_outside_the_package(finished, capsys, tmp_path):
    """The guide's example of a defense, word for word."""
    guide = (Path(__file__).parent.parent / "docs" / "add-a-method.md").read_text()
    source = guide.split("<!-- example: defense -->")[1].split("```python\n")[1].split("```")[0]
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
