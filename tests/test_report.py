"""The table of a directory of runs: synthetic results with numbers worked out by hand."""

import json

import pytest
from synthetic_results import BADNETS, cell, parsed, plan, write

from bdjax.errors import InputError
from bdjax.reports import table


def test_mean_and_sample_std_over_seeds(tmp_path):
    for seed, acc, asr in ((0, 0.80, 0.10), (1, 0.82, 0.20), (2, 0.87, 0.60)):
        write(tmp_path / f"runs/{seed}", seed, acc, asr, n_asr=4500 + seed)
    (row,) = parsed(tmp_path)
    # ACC 80 82 87: mean 83, squares 9 + 1 + 16 = 26 = 2 * 13; ASR 10 20 60: mean 30, 400 + 100 + 900 = 1400 = 2 * 700
    assert float(row["acc_after_mean"]) == pytest.approx(83)
    assert float(row["acc_after_std"]) == pytest.approx(13**0.5)
    assert float(row["asr_after_mean"]) == pytest.approx(30)
    assert float(row["asr_after_std"]) == pytest.approx(700**0.5)
    assert float(row["asr_after_incl_target_mean"]) == pytest.approx(35)
    assert (float(row["acc_before_mean"]), float(row["acc_before_std"])) == pytest.approx((90, 0))
    assert float(row["seconds_mean"]) == pytest.approx(11)
    assert float(row["peak_memory_mib"]) == 102
    assert (row["runs"], row["planned"], row["n_test"], row["hardware"]) == ("3", "", "5000", "H200 x 1")
    assert (row["n_asr_min"], row["n_asr_max"], row["peak_memory_of"], row["scale"]) == ("4500", "4502", "device", "")
    text = table.report(tmp_path, "text", None)
    for shown in (
        "badnets -> ibau",
        "90.00 ± 0.00",
        "83.00 ± 3.61",
        "30.00 ± 26.46",
        "4500-4502",
        "11.0",
        "n test = 5000",
    ):
        assert shown in text


def test_one_run_has_no_deviation(tmp_path):
    write(tmp_path / "a", acc=0.8125)
    (row,) = parsed(tmp_path)
    assert (row["acc_after_mean"], row["acc_after_std"]) == ("81.25", "")
    shown = table.report(tmp_path, "markdown", None).splitlines()[2]
    assert "| 81.25 |" in shown
    assert "±" not in shown


def test_configurations_are_kept_apart_and_named_by_what_differs(tmp_path):
    for seed in (0, 1):
        write(tmp_path / f"a{seed}", seed)
        write(tmp_path / f"b{seed}", seed, defense_config={"rounds": 100, "solver": "cg"})
    write(tmp_path / "c", attack="blended", attack_config={"alpha": 0.2})
    assert {row["label"]: row["runs"] for row in parsed(tmp_path)} == {
        "badnets -> ibau (defense.solver=fixed_point)": "2",
        "badnets -> ibau (defense.solver=cg)": "2",
        "blended -> ibau": "1",
    }


def test_a_copied_result_counts_once(tmp_path):
    write(tmp_path / "a", 0)
    write(tmp_path / "copy", 0)
    write(tmp_path / "b", 1)
    assert parsed(tmp_path)[0]["runs"] == "2"
    assert "Not counted: 1 result.json" in table.report(tmp_path, "text", None)


def test_planned_cells_without_a_result_are_missing(tmp_path):
    plan(tmp_path, cell(0, "first"), cell(1, "second"))
    write(tmp_path / "x", 0, cell=cell(0, "first"))
    write(tmp_path / "y", 2, cell=cell(0, "first"))
    first, second = parsed(tmp_path)
    assert (first["label"], first["runs"], first["planned"]) == ("first", "2", "3")
    assert (second["label"], second["runs"], second["planned"], second["dataset"]) == ("second", "0", "3", "cifar10")
    measured = [name for name in second if name.endswith(("_mean", "_std", "_mib")) or name in ("n_test", "hardware")]
    assert len(measured) > 12
    assert {second[name] for name in measured} == {""}
    *_, one, two = (line for line in table.report(tmp_path, "markdown", None).splitlines() if line.startswith("|"))
    assert "| 2/3 |" in one
    assert two == f"| second | cifar10 | small_vgg | 0/3 |{' missing |' * 10}"
    assert "bdjax sweep experiments/ibau/table1.py --seeds 0,1,2" in table.report(tmp_path, "text", None)


def test_only_a_plan_is_a_table_too(tmp_path):
    plan(tmp_path, cell())
    assert table.report(tmp_path, "text", None).count("missing") > 9


def test_a_smaller_scale_is_marked(tmp_path):
    small = cell(0, "BadNets", scale="5 of 100 rounds")
    plan(tmp_path, small, cell(1, "Blended"))
    write(tmp_path / "x", cell=small)
    write(tmp_path / "y", cell=cell(1, "Blended"))
    text, markdown = (table.report(tmp_path, form, None).splitlines() for form in ("text", "markdown"))
    assert "* BadNets: 5 of 100 rounds" in text
    assert any(line.startswith("BadNets *  ") for line in text)
    assert not any("Blended *" in line for line in text)
    assert r"- \* BadNets: 5 of 100 rounds" in markdown
    assert any(line.startswith(r"| BadNets \* |") for line in markdown)
    assert [row["scale"] for row in parsed(tmp_path)] == ["5 of 100 rounds", ""]


def test_results_of_another_scale_are_not_pooled(tmp_path):
    plan(tmp_path, cell(0, "BadNets"))
    write(tmp_path / "full", 0, acc=0.9, cell=cell(0, "BadNets"))
    write(tmp_path / "small", 1, acc=0.1, cell=cell(0, "BadNets", scale="tiny"))
    now, before = parsed(tmp_path)
    assert (now["label"], now["runs"], float(now["acc_after_mean"])) == ("BadNets", "1", pytest.approx(90))
    assert (before["label"], before["scale"]) == ("BadNets (not in cells.json)", "tiny")


def test_results_follow_their_cell_when_the_plan_is_reordered(tmp_path):
    plan(tmp_path, cell(0, "new"), cell(1, "old"), seeds=[0])
    write(tmp_path / "x", cell=cell(0, "old"))
    assert [(row["label"], row["runs"]) for row in parsed(tmp_path)] == [("new", "0"), ("old", "1")]


def test_a_cell_of_two_configurations_is_refused(tmp_path):
    write(tmp_path / "a", 0, cell=cell())
    write(tmp_path / "b", 1, cell=cell(), defense_config={"rounds": 5, "solver": "fixed_point"})
    with pytest.raises(InputError, match=r"a.result\.json and .*b.result\.json.*defense\.rounds"):
        table.report(tmp_path, "text", None)


def test_sweeps_in_subfolders_do_not_mix(tmp_path):
    for name, acc in (("one", 0.5), ("two", 0.7)):
        plan(tmp_path / name, cell(0, name), seeds=[0])
        write(tmp_path / name / "x", acc=acc, cell=cell(0, name))
    rows = parsed(tmp_path)
    assert [(row["label"], row["runs"], float(row["acc_after_mean"])) for row in rows] == [
        ("one", "1", pytest.approx(50)),
        ("two", "1", pytest.approx(70)),
    ]


def test_markdown_is_a_table_whatever_the_label(tmp_path):
    plan(tmp_path, cell(0, "a | b"), cell(1, "c"))
    write(tmp_path / "x", cell=cell(0, "a | b"))
    lines = table.report(tmp_path, "markdown", None).splitlines()
    rows = [line.replace(r"\|", "") for line in lines if line.startswith("|")]
    assert len(rows) == 4
    assert len({row.count("|") for row in rows}) == 1
    assert set(rows[1]) <= set("|:- ")
    assert lines[0] == "**I-BAU, Table 1**"
    assert lines[lines.index("") + 1].startswith("|")
    notes = [line for line in lines if line.startswith("- ")]
    assert any("± sample standard deviation" in note for note in notes)
    assert any("n test = 5000" in note for note in notes)
    assert lines[-len(notes) - 1] == ""


def test_text_fits_a_wide_terminal(tmp_path):
    label = "Trojan watermark, one trigger and one target, 20 % of the training images, I-BAU with conjugate gradients"
    plan(tmp_path, cell(0, label, "a tenth of the epochs " * 10, BADNETS), cell(1, "short"))
    for seed in range(3):
        wide = {"device": "NVIDIA H200 141GB HBM3e", "devices": 8}
        asr = (0.0, 1.0, 1.0)[seed]
        write(tmp_path / str(seed), seed, asr, asr, cell(0, label, "a tenth of the epochs " * 10, BADNETS), env=wide)
    lines = table.report(tmp_path, "text", None).splitlines()
    assert max(map(len, lines)) <= 160
    start = next(i for i, line in enumerate(lines) if line.startswith("Trojan"))
    width = lines[2].index("runs")
    shown = " ".join(" ".join(line[:width].split()) for line in lines[start : lines.index("", start)])
    assert shown == f"{label} * cifar10, small_vgg"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"attack": "badnets"}', "\udcff"])
def test_a_damaged_result_is_named(tmp_path, content):
    write(tmp_path / "good")
    write(tmp_path / "bad", 1).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"bad.result\.json is damaged.*Remove it"):
        table.report(tmp_path, "text", None)


@pytest.mark.parametrize(
    "change", [{"before": None}, {"n_test": "many"}, {"cell": {"label": "x"}}, {"env": {}}, {"cell": 3}, {"fit": 1}]
)
def test_a_result_of_the_wrong_form_is_named(tmp_path, change):
    write(tmp_path / "bad", **change)
    with pytest.raises(InputError, match=r"bad.result\.json is damaged"):
        table.report(tmp_path, "text", None)


def test_a_damaged_plan_is_named(tmp_path):
    (tmp_path / "cells.json").write_text('{"cells": [{}]}')
    with pytest.raises(InputError, match=r"cells\.json is damaged"):
        table.report(tmp_path, "text", None)


def test_nothing_to_report(tmp_path):
    with pytest.raises(InputError, match="holds no result.json and no cells.json. Run"):
        table.report(tmp_path, "text", None)
    with pytest.raises(InputError, match="no such directory: .*gone. Give"):
        table.report(tmp_path / "gone", "text", None)


def test_one_run_for_a_terminal(tmp_path):
    text = table.one(json.loads(write(tmp_path / "x").read_text()))
    assert "badnets -> ibau on cifar10, small_vgg, seed 0" in text
    assert "clean accuracy, %             90.00    80.00   n = 5000" in text
