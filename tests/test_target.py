"""What a user sees beside ACC and ASR: CTCA, the score against a clean model, and a defense's verdict."""

import json

import pytest
from commands import FAST, bdjax, refused
from synthetic_results import cell, parsed, plan, write

from bdjax.defenses import neural_cleanse
from bdjax.io import checkpoint
from bdjax.pipelines.opening import open_recorded
from bdjax.reports import table

FLAGS = ["--attack.target", "1", "--attack.ratio", "0.2", *FAST]


@pytest.fixture(scope="module")
def seen(blobs_npz, tmp_path_factory):
    """`bdjax run badnets age --with-clean-model`: (the directory of results, the run's own, its result)."""
    from bdjax import cli

    root = tmp_path_factory.mktemp("target")
    argv = ["run", "badnets", "age", "--dataset", blobs_npz, *FLAGS, "--root", str(root), "--defense.repair"]
    cli.main([*argv, "--with-clean-model"])
    (path,) = root.glob("*/result.json")
    return root, path.parent, json.loads(path.read_text())


def guesses(directory, blobs_npz):
    """Predictions of the clean held-out images and their labels, the long way."""

    artifact = open_recorded(directory)
    evaluation = artifact.evaluation
    return evaluation.predictions(artifact.victim.variables)[0], evaluation.labels


def test_ctca_is_the_accuracy_on_clean_images_of_the_target(seen, blobs_npz):
    _, directory, result = seen
    found, labels = guesses(directory / "purified", blobs_npz)
    assert result["after"]["ctca"] == pytest.approx((found[labels == 1] == 1).mean(), abs=1e-6)
    assert 0 <= result["before"]["ctca"] <= 1
    assert all("ctca" in row for row in result["rounds"]) and len(result["rounds"]) == 2


def test_the_score_is_that_of_a_clean_model_on_the_same_images(seen):
    root, _, result = seen
    names = sorted(
        checkpoint.read_manifest(path.parent)["attack"]["name"] for path in root.glob("victims/*/manifest.json")
    )
    assert names == ["badnets", "clean"]
    before, after, clean = result["before"], result["after"], result["clean"]
    assert clean["acc"] > 0 and before["asr"] > 0
    expected = (1 - after["asr"] / before["asr"]) * after["acc"] / clean["acc"]
    assert result["score"] == pytest.approx(expected, abs=1e-5)


def test_a_verdict_stands_beside_the_truth(seen):
    found = seen[2]["detection"]
    assert found["truth"] == {"poisoned": True, "targets": [1]} and found["seconds"] >= 0
    assert found["score"] == found["classes"][found["target"]] == max(found["classes"]) and len(found["classes"]) == 4


def test_the_terminal_tells_all_three(seen):
    text = table.one(seen[2])
    rate = 100 * seen[2]["clean"]["acc"]
    for words in ("accuracy of the target, %", "SCORE, %", f"without poison: ACC {rate:.2f}", "verdict: ", "target 1"):
        assert words in text


def test_a_defense_that_judged_on_its_way_is_not_asked_again(blobs_npz, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(neural_cleanse, "detect", lambda *_: pytest.fail("asked again"), raising=False)
    argv = ["run", "badnets", "neural_cleanse", "--dataset", blobs_npz, *FLAGS, "--out", tmp_path / "d", "--json"]
    short = ["--defense.epochs", "1", "--defense.unlearning-epochs", "1"]
    found = json.loads(bdjax(capsys, *argv, *short).splitlines()[-1])["detection"]
    assert len(found["classes"]) == 4 and found["truth"]["poisoned"]


def test_a_clean_model_beside_the_victim_is_found_and_completes_a_finished_result(blobs_npz, capsys, tmp_path):
    argv = ["run", "badnets", "age", "--dataset", blobs_npz, *FLAGS, "--root", tmp_path]
    first = json.loads(bdjax(capsys, *argv, "--json").splitlines()[-1])
    assert first["score"] is None and first["clean"] is None and "SCORE" not in table.one(first)
    bdjax(capsys, "train", "clean", "--dataset", blobs_npz, *FAST, "--root", tmp_path)
    assert json.loads(bdjax(capsys, *argv, "--json").splitlines()[-1]) == first  # as it was
    completed = json.loads(bdjax(capsys, *argv, "--with-clean-model", "--json").splitlines()[-1])
    assert completed["clean"] is not None and {k: completed[k] for k in first if k not in ("clean", "score")} == {
        k: first[k] for k in first if k not in ("clean", "score")
    }
    (victim,) = [p.parent for p in tmp_path.glob("victims/*/poison.npz")]
    other = bdjax(capsys, "defend", victim, "age", "--defense.scale", "0.4", "--root", tmp_path, "--json")
    assert json.loads(other.splitlines()[-1])["clean"] == completed["clean"]


def test_a_poisoned_model_is_no_clean_one(seen, capsys, tmp_path):
    (victim,) = [p.parent for p in seen[0].glob("victims/*/poison.npz")]
    message = refused(capsys, "defend", victim, "age", "--clean-model", victim, "--out", tmp_path / "d")
    assert "holds no clean model" in message and not (tmp_path / "d").exists()


def test_all_to_all_has_no_ctca_and_no_single_target(blobs_npz, capsys, tmp_path):
    argv = ["run", "badnets", "age", "--dataset", blobs_npz, *FLAGS, "--attack.labels", "all_to_all"]
    out = tmp_path / "d"
    result = json.loads(bdjax(capsys, *argv, "--out", out, "--json").splitlines()[-1])
    assert result["after"]["ctca"] is None and result["detection"]["truth"]["targets"] == []
    text = table.one(result)
    assert "accuracy of the target" not in text and "without a single target" in text
    assert "ctca             -" in bdjax(capsys, "evaluate", out)


def test_a_clean_suspect_is_truly_clean(blobs_npz, capsys, tmp_path):
    argv = ["run", "clean", "age", "--dataset", blobs_npz, *FAST, "--out", tmp_path / "d", "--json"]
    result = json.loads(bdjax(capsys, *argv).splitlines()[-1])
    assert result["detection"]["truth"] == {"poisoned": False, "targets": []}
    assert "the model is clean" in table.one(result)


def test_a_cell_may_ask_for_the_clean_model(blobs_npz, tmp_path):
    from bdjax.pipelines import sweep

    (tmp_path / "grid.py").write_text(f"""
from bdjax.engine import FitConfig
from bdjax.config import Experiment
from bdjax.pipelines.experiment_options import Cell

TITLE, SEEDS, FIT = "a grid", (0,), FitConfig(epochs=1, batch_size=40)
CELLS = (Cell("one", Experiment("blended", "age", {blobs_npz!r}, fit=FIT), clean=True),)
""")
    assert sweep.run_cell(tmp_path / "grid.py", 0, 0, tmp_path / "out", 1)["clean"]["acc"] > 0
    assert len(list(tmp_path.glob("out/victims/*/manifest.json"))) == 2


# --- the table of many


def rates(acc, asr, ctca):
    return {"acc": acc, "asr": asr, "asr_with_target": asr, "ctca": ctca}


def verdict(named, called, targets, poisoned=True):
    return {"target": named, "poisoned": called, "score": 4.0, "truth": {"poisoned": poisoned, "targets": targets}}


AGE = {
    "paper": "age", "table": "6", "dataset": "CIFAR-10", "defense": "AGE", "defense_setting": "BDK; 5 samples; base",
}  # fmt: skip


def fill(directory):
    """Three runs of one cell: CTCA .1 .2 .6, scores .9 .7 and none, two verdicts; a clean model called poisoned."""
    plan(directory, cell(0, "AGE", paper=AGE), cell(1, "clean"))
    for seed, ctca, score, found in (
        (0, 0.1, 0.9, verdict(8, True, [8])),
        (1, 0.2, 0.7, verdict(3, False, [8])),
        (2, 0.6, None, None),
    ):
        write(
            directory / f"a{seed}", seed, cell=cell(0, "AGE", paper=AGE), before=rates(0.9, 1.0, 0.8),
            after=rates(0.8, 0.1, ctca), score=score, detection=found,
        )  # fmt: skip
    write(directory / "b", 0, cell=cell(1, "clean"), detection=verdict(0, True, [], False))


def test_means_over_what_there_is(tmp_path):
    fill(tmp_path)
    row, clean = parsed(tmp_path)
    assert float(row["ctca_before_mean"]) == pytest.approx(80) and float(row["ctca_before_std"]) == pytest.approx(0)
    assert float(row["ctca_after_mean"]) == pytest.approx(30)
    assert float(row["ctca_after_std"]) == pytest.approx(700**0.5)
    assert float(row["score_mean"]) == pytest.approx(80) and float(row["score_std"]) == pytest.approx(200**0.5)
    assert (row["target_named"], row["called_poisoned"]) == ("0.5", "0.5")
    assert [clean[name] for name in ("ctca_after_mean", "score_mean", "target_named")] == ["", "", ""]
    assert clean["called_poisoned"] == "1.0"
    assert [row[f"paper_{name}"] for name in ("asr_after", "ctca_after", "score", "seconds")] == [
        "0.0",
        "0.0",
        "92.51",
        "0.38",
    ]
    assert [row[f"paper_{name}_std"] for name in ("ctca_after", "score")] == ["0.0", "1.34"]


def test_both_tables_show_them_and_say_what_they_are(tmp_path):
    fill(tmp_path)
    text, markdown = (table.report(tmp_path, form, None) for form in ("text", "markdown"))
    for shown in (text, markdown):
        for words in (
            "30.00 ± 26.46",
            "80.00 ± 14.14",
            "SCORE",
            "paper's SCORE",
            "92.51 ± 1.34",
            "CTCA: accuracy on clean",
        ):
            assert words in shown
        assert "the target is named in 50.0 % of 2, poisoned models are called poisoned in 50.0 % of 2" in " ".join(
            shown.split()
        )
        assert "clean models are called clean in 0.0 % of 1" in " ".join(shown.split())
    assert max(map(len, text.splitlines())) <= 160
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert "| paper's s |" in rows[0]


def test_results_without_them_look_as_before(tmp_path):
    write(tmp_path / "a")
    for form in ("text", "markdown"):
        shown = table.report(tmp_path, form, None)
        assert "CTCA" not in shown and "SCORE" not in shown and "Verdicts" not in shown
    (row,) = parsed(tmp_path)
    assert {row[name] for name in ("ctca_after_mean", "score_mean", "called_poisoned", "paper_score")} == {""}


def test_a_planned_cell_is_missing_in_the_second_table_too(tmp_path):
    fill(tmp_path)
    plan(tmp_path, cell(0, "AGE", paper=AGE), cell(1, "clean"), cell(2, "later"))
    lines = table.report(tmp_path, "text", None).splitlines()
    assert [line.count("missing") > 3 for line in lines if line.startswith("later")] == [True, True]
