"""`bdjax purify`: from a weight file, or a directory, to a cleaned weight file and a report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import bdjax, refused

from bdjax import cli, datasets, registry
from bdjax.interop import reader
from bdjax.io import checkpoint

FIXTURES = Path(__file__).parent / "fixtures" / "torch"
CNN = ["--model", "cnn", "--size", "8"]
QUICK = [
    "--defense", "naive_at", "--defense.rounds", "1", "--defense.batch-size", "10", "--devices", "1",
    "--defense.learning-rate", "1e-4",  # a larger one ruins this small model, and the guard takes it back
    "--methods", "age,additive,universal",
]  # fmt: skip


@pytest.fixture(scope="module")
def file(finished, tmp_path_factory):
    """The victim of the session's run as a file of PyTorch's, its name a trap for HTML."""
    out = tmp_path_factory.mktemp("net") / "<script>alert(1)<_script>.pth"
    cli.main(["export", str(finished[0] / "victim"), "--format", "torch", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def clean(blobs, tmp_path_factory):
    """100 clean images, class names that are traps for HTML."""
    images, labels = blobs
    path = tmp_path_factory.mktemp("clean") / "mine.npz"
    names = np.array(["<script>alert(2)</script>", 'a"b', "c & d", "e"])
    np.savez(path, x_train=images[:60], y_train=labels[:60], x_test=images[160:], y_test=labels[160:], classes=names)
    return f"npz:{path}"


@pytest.fixture(scope="module")
def cleaned(file, clean, tmp_path_factory):
    """(what the command said, OUT, its result)."""
    out = tmp_path_factory.mktemp("purify") / "out"
    cli.main(["purify", str(file), *CNN, "--clean-data", clean, *QUICK, "--out", str(out)])
    return out, json.loads((out / "result.json").read_text())


def test_everything_is_there_and_readable(cleaned, file, clean, capsys):
    out, result = cleaned
    names = {"model", "purified", "purified.pth", "audit.json", "audit.png", "audit-after.json", "audit-after.png",
             "pictures", "report.html", "config.json", "result.json"}  # fmt: skip
    assert {path.name for path in out.iterdir()} == names and not list(out.parent.glob(".*"))
    assert result["input"]["sha256"] == checkpoint.sha256(file) and result["input"]["path"] == str(file)
    again = json.loads(bdjax(capsys, "evaluate", out / "purified", "--json").splitlines()[-1])
    assert again["n_test"] == 50 and again["acc"] == pytest.approx(result["accuracy"]["after"]["rate"])
    ran = json.loads((out / "purified" / "result.json").read_text())
    assert ran["before"]["acc"] == pytest.approx(result["accuracy"]["before"]["rate"])
    bdjax(capsys, "export", out / "purified", "--format", "torch", "--out", out.parent / "again.pt")
    assert (out.parent / "again.pt").read_bytes() == (out / "purified.pth").read_bytes()


def test_recovered_triggers_are_tried_on_both_models(cleaned):
    _, result = cleaned
    rows = result["estimate"]["flips"]
    assert rows and all(0 <= row[phase] <= 1 for row in rows for phase in ("before", "after", "anew"))
    assert all(row["size"] > 0 and 0 < row["n"] < result["n_defender"] for row in rows)
    assert result["estimate"]["rate"] == max(max(row["after"], row["anew"]) for row in rows)
    assert f"of {rows[0]['n']} clean images before" in result["notes"][0]


def test_the_weights_have_the_names_and_types_that_came_in_and_the_original_is_kept_bit_for_bit(cleaned, file, capsys):
    out, _ = cleaned
    before, after = (reader.state_dicts(reader.read(path)[1])[""] for path in (file, out / "purified.pth"))
    assert [(k, v.dtype, v.shape) for k, v in before.items()] == [(k, v.dtype, v.shape) for k, v in after.items()]
    assert any(not np.array_equal(before[name].read(), after[name].read()) for name in before)
    bdjax(capsys, "export", out / "model", "--format", "torch", "--out", out.parent / "undone.pth")
    assert (out.parent / "undone.pth").read_bytes() == file.read_bytes()


def test_what_is_measured_was_held_out_of_every_class(cleaned, clean):
    out, result = cleaned
    assert (result["n_defender"], result["n_held_out"]) == (50, 50)
    assert result["split"] == {
        "source": "all", "size": 50, "order": "stratified", "validation": 0.2, "largest_drop": 0.1
    }  # fmt: skip
    data = datasets.load(clean)
    labels = np.concatenate([data.y_train, data.y_test])
    used = checkpoint.read_arrays(out / "purified" / "purified", "split")["indices"]
    np.testing.assert_array_equal(np.bincount(labels[used]), [13, 13, 12, 12])
    assert result["by_class"] == [[13, 12], [13, 12], [12, 13], [12, 13]]


def test_accuracies_have_wilsons_interval_and_predictions_add_up(cleaned):
    result = cleaned[1]
    z = 1.959963984540054
    for own in result["accuracy"].values():
        p, n = own["right"] / own["n"], own["n"]
        middle, wide = (p + z**2 / (2 * n)) / (1 + z**2 / n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
        np.testing.assert_allclose(
            [own["low"], own["high"]], [middle - wide / (1 + z**2 / n), middle + wide / (1 + z**2 / n)]
        )
    changed, accuracy = result["changed"], result["accuracy"]
    assert changed["all"] == changed["broken"] + changed["mended"] + changed["other"]
    assert accuracy["after"]["right"] - accuracy["before"]["right"] == changed["mended"] - changed["broken"]


def test_the_audit_is_that_of_the_audit_command_on_the_held_out_images(cleaned):
    out, result = cleaned
    for name, phase in (("audit", "before"), ("audit-after", "after")):
        found = json.loads((out / f"{name}.json").read_text())
        assert list(found["methods"]) == ["age", "additive", "universal"] and found["n"] == 50
        assert result["audit"][phase]["methods"] == found["methods"]
    before, after = (result["audit"][phase]["methods"] for phase in ("before", "after"))
    assert any(before[name]["classes"] != after[name]["classes"] for name in before)
    shown = result["audit"]["before"]["pictures"]
    assert {one["method"] for one in shown} == {"additive", "universal"} and all(
        (out / one["file"]).is_file() for one in shown
    )


def test_the_table_of_a_directory_has_its_run(cleaned, capsys):
    said = bdjax(capsys, "report", cleaned[0])
    assert "naive_at" in said and "1 " in said


def test_the_same_call_again_finds_it_and_another_one_is_refused(cleaned, file, clean, capsys, monkeypatch):
    out, result = cleaned
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    argv = ["purify", file, *CNN, "--clean-data", clean, *QUICK, "--out", out]
    said = bdjax(capsys, *argv, "--json")
    assert "finished before" in said and json.loads(said.splitlines()[-1]) == result
    assert "another input or other settings" in refused(capsys, *argv, "--seed", "1")
    assert "another input or other settings" in refused(capsys, *argv, "--held-out", "20")
    with (file.parent / "other.pth").open("wb") as other:
        other.write((FIXTURES / "small_vgg.pth").read_bytes())
    assert "another input or other settings" in refused(capsys, argv[0], file.parent / "other.pth", *argv[2:])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_report_that_was_left_away_is_made_by_a_second_call(cleaned, file, clean, capsys):
    out, _ = cleaned
    report = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    argv = ["purify", file, *CNN, "--clean-data", clean, *QUICK, "--out", out]
    bdjax(capsys, *argv, "--no-report")
    assert not (out / "report.html").exists()
    bdjax(capsys, *argv)
    assert (out / "report.html").read_bytes() == report


@pytest.mark.slow
def test_an_interrupted_one_goes_on(cleaned, file, clean, capsys, tmp_path):
    out, result = cleaned
    half = shutil.copytree(out, tmp_path / "half")
    for name in ("result.json", "report.html", "audit.json", "purified.pth"):
        (half / name).unlink()
    shutil.rmtree(half / "purified")
    bdjax(capsys, "purify", file, *CNN, "--clean-data", clean, *QUICK, "--out", half)
    again = json.loads((half / "result.json").read_text())
    for name in ("accuracy", "changed", "config_hash", "by_class", "split"):
        assert again[name] == result[name]
    assert (half / "purified.pth").read_bytes() == (out / "purified.pth").read_bytes()


@pytest.mark.slow
def test_a_run_directory_brings_its_own_data_and_its_trigger_is_measured(finished, capsys, tmp_path):
    victim = finished[0] / "victim"
    said = bdjax(capsys, "purify", victim, "--model", "cnn", *QUICK, "--out", tmp_path / "o", "--json")
    result = json.loads(said.splitlines()[-1])
    assert result["split"]["source"] == "test" and result["asr"]["attack"] == "badnets" and result["asr"]["n"] > 0
    assert result["weights"]["file"] == "purified.pt" and not (tmp_path / "o" / "model").exists()
    assert result["audit"]["before"]["truth"] == {"poisoned": True, "attack": "badnets"}
    assert "badnets" in (tmp_path / "o" / "report.html").read_text()


@pytest.mark.slow
def test_an_imported_directory_keeps_its_format(finished, blobs_npz, capsys, tmp_path):
    weights = tmp_path / "v.safetensors"
    bdjax(capsys, "export", finished[0] / "victim", "--format", "safetensors", "--out", weights)
    bdjax(capsys, "import", weights, *CNN, "--out", tmp_path / "m")
    bdjax(capsys, "purify", tmp_path / "m", "--clean-data", blobs_npz, *QUICK, "--images", "test", "--held-out", "12",
          "--out", tmp_path / "o", "--no-report")  # fmt: skip
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert (result["n_defender"], result["n_held_out"]) == (28, 12) and not (tmp_path / "o" / "report.html").exists()
    assert (tmp_path / "o" / "purified.safetensors").is_file() and result["asr"] is None


@pytest.mark.slow
def test_a_backdoorbench_result_says_its_model_itself(capsys, tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(20, dtype=np.int32) % 5
    images = rng.integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    np.savez(tmp_path / "d.npz", x_train=images[:10], y_train=labels[:10], x_test=images[10:], y_test=labels[10:])
    argv = ["purify", FIXTURES / "attack_result.pt", "--clean-data", f"npz:{tmp_path / 'd.npz'}", *QUICK]
    argv[argv.index("age,additive,universal")] = "age"
    bdjax(capsys, *argv, "--out", tmp_path / "o")
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert result["model"]["model"] == "preact_resnet18" and result["weights"]["file"] == "purified.pt"
    assert result["model"]["input"]["mean"] == [0.4914, 0.4822, 0.4465] and result["n_held_out"] == 10


def test_defenses_that_need_no_trigger_are_named():
    from bdjax.defenses import without_trigger

    able = set(without_trigger())
    assert {"ibau", "bibau", "age", "finetune"} <= able and not {"ibu", "actft", "universal"} & able
    assert registry.load("defenses", "ibu").trigger_needed
