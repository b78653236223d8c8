"""`bdjax inspect` and `bdjax evaluate` of imported models and what a defense made of them, with a trigger given."""

import json
import shutil

import numpy as np
import pytest
from commands import bdjax, refused

from bdjax import cli
from bdjax.pipelines.opening import EvaluationSource, open_recorded

TRIGGER = ["--attack", "badnets", "--attack.target", "1"]


@pytest.fixture(scope="module")
def models(finished, blobs_npz, tmp_path_factory):
    """(imported, what naive_at made of it): the victim of the session's run as if it had come from elsewhere."""
    folder = tmp_path_factory.mktemp("imported")
    file = folder / "victim.pt"
    cli.main(["export", str(finished[0] / "victim"), "--format", "torch", "--out", str(file)])
    cli.main(["import", str(file), "--model", "cnn", "--size", "8", "--out", str(folder / "m")])
    argv = ["defend", str(folder / "m"), "naive_at", "--defense.rounds", "1", "--defense.batch-size", "10"]
    cli.main([*argv, "--dataset", blobs_npz, "--devices", "1", "--out", str(folder / "d")])
    return folder / "m", folder / "d"


@pytest.mark.slow
def test_an_imported_model_is_looked_into_with_the_trigger_that_is_given(models, finished, blobs_npz, capsys, tmp_path):
    argv = ["inspect", *models, "--dataset", blobs_npz, *TRIGGER, "--count", 20, "--out", tmp_path / "in", "--json"]
    found = json.loads(bdjax(capsys, *argv).splitlines()[-1])
    assert found["attack"] == "badnets" and found["target"] == 1 and found["n_test"] == 20
    again = bdjax(capsys, "evaluate", models[1], *TRIGGER, "--json")
    tried = json.loads(again.splitlines()[-1])
    assert {k: tried[k] for k in ("acc", "asr")} == {k: found["rates"]["purified"][k] for k in ("acc", "asr")}
    own = json.loads(bdjax(capsys, "inspect", finished[0] / "victim", finished[0], "--json", "--count", 20)
                     .splitlines()[-1])  # fmt: skip
    beside = finished[0].with_name(f"{finished[0].name}-inspection")
    assert json.loads((beside / "inspection.json").read_text()) == own and (beside / "inspection.png").is_file()
    theirs = found["layers"][0]["tac"]["top"]["victim"]
    np.testing.assert_allclose(theirs, own["layers"][0]["tac"]["top"]["victim"], rtol=0.5)
    assert [row["name"] for row in found["layers"]] == [row["name"] for row in own["layers"]]


def test_what_does_not_belong_together_is_refused(models, finished, blobs_npz, capsys, tmp_path):
    imported, purified = models
    out = ["--out", tmp_path / "in"]
    assert "Say by --attack which trigger" in refused(capsys, "inspect", *models, "--dataset", blobs_npz, *out)
    assert "--dataset" in refused(capsys, "inspect", *models, *TRIGGER, *out)
    asked = ["--dataset", blobs_npz, *TRIGGER, *out]
    assert "records its own attack" in refused(capsys, "inspect", imported, finished[0], *asked)
    assert "records its own attack" in refused(capsys, "inspect", finished[0], purified, *asked)
    with np.load(blobs_npz.removeprefix("npz:")) as arrays:
        np.savez(tmp_path / "turned.npz", **{name: arrays[name][::-1] for name in arrays.files})
    asked[1] = f"npz:{tmp_path / 'turned.npz'}"
    assert "differ in their data set" in refused(capsys, "inspect", *models, *asked)


def test_another_models_purified_one_is_refused(models, blobs_npz, capsys, tmp_path):
    from bdjax.io import checkpoint

    other = shutil.copytree(models[0], tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["source"]["sha256"] = "0" * 63 + "1"
    (other / "manifest.json").write_text(checkpoint.manifest_text(manifest))
    said = refused(capsys, "inspect", other, models[1], "--dataset", blobs_npz, *TRIGGER, "--out", tmp_path / "in")
    assert "was made of another victim" in said


def test_the_images_that_the_defense_saw_are_left_out_with_a_trigger_too(models, blobs_npz):

    from bdjax.registry import load

    config = load("attacks", "badnets").Config(target=1)
    tried = open_recorded(models[1] / "purified", EvaluationSource(attack="badnets", attack_config=config))
    plain = open_recorded(models[1] / "purified")
    assert tried.held_out and plain.manifest["hash"] == tried.manifest["hash"]
    np.testing.assert_array_equal(tried.evaluation.clean_indices, plain.evaluation.clean_indices)
    assert (tried.evaluation.triggered != tried.evaluation.images).any()
    assert (plain.evaluation.triggered == plain.evaluation.images).all()
