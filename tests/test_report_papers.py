"""The papers' numbers beside ours: which row of experiments/papers a cell picks, and what is said if none."""

import csv
import io

import pytest
from synthetic_results import BADNETS, PAPERS, cell, parsed, plan, write

from bdjax.errors import InputError
from bdjax.reports import table


@pytest.mark.parametrize("papers", [PAPERS, None])
def test_the_papers_numbers_stand_beside_ours(tmp_path, papers):
    plan(tmp_path, cell(0, "BadNets", paper=BADNETS), cell(1, "own"))
    write(tmp_path / "x", cell=cell(0, "BadNets", paper=BADNETS))
    row, own = parsed(tmp_path, papers)
    printed = [row[f"paper_{name}"] for name in ("acc_before", "asr_before", "acc_after", "asr_after")]
    assert printed == ["84.94", "98.28", "83.35", "12.30"]
    assert own["paper_acc_before"] == ""
    markdown = table.report(tmp_path, "markdown", papers)
    assert "| H200 x 1 | 84.94 | 98.28 | 83.35 | 12.30 |" in markdown
    lines = table.report(tmp_path, "text", papers).splitlines()
    ours = next(line for line in lines if line.startswith("BadNets"))
    paper = lines[lines.index(ours) + 1]
    assert ours.index("90.00") == paper.index("84.94")
    assert ours.index("10.00") == paper.index("12.30")


def test_a_filter_may_come_with_the_result_alone(tmp_path):
    write(tmp_path / "x", cell=cell(paper=BADNETS))
    assert parsed(tmp_path)[0]["paper_asr_after"] == "12.30"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        # AGE prints a deviation
        (
            {"paper": "age", "table": "1", "dataset": "CIFAR-10", "defense_setting": "BDK; 512 samples; base"},
            {"asr_before": "94.53", "asr_before_std": "", "asr_after": "0.0", "asr_after_std": "0.0"},
        ),
        # Table 5 repeats the undefended model for every defense_setting
        (
            {"paper": "ibau", "table": "5", "defense": "I-BAU", "defense_setting": "100 clean samples"},
            {"acc_before": "84.92", "asr_before": "99.96", "acc_after": "76.9", "asr_after": "4.00"},
        ),
        # Table 3 has an ASR per trigger, but one ACC for all of them
        (
            {"paper": "ibau", "table": "3", "dataset": "CIFAR-10", "attack": "BadNets", "defense": "NAD"},
            {"acc_before": "", "acc_after": ""},
        ),
        # the text alone tells of this network without a name; 20 and 90 rounds
        (
            {"table": "text A.5.4", "defense": "I-BAU", "defense_setting": "90 rounds"},
            {"acc_before": "73.41", "asr_before": "89.00", "acc_after": "84.06", "asr_after": "0.23"},
        ),
    ],
    ids=["std", "repeated", "no-acc", "text"],
)  # fmt: skip
def test_other_papers(tmp_path, query, expected):
    write(tmp_path / "x", cell=cell(paper=query))
    (row,) = parsed(tmp_path, PAPERS)
    assert {name: row[f"paper_{name}"] for name in expected} == expected
    assert row["paper_asr_after"]


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"attack": "NoSuch"}, ["'attack': 'NoSuch'", "finds no ACC or ASR"]),
        ({"colour": "red"}, ["names no column: colour"]),
        ({"attack": None}, ["finds 8 ACC values", "attack: 'All-to-all' | 'BadNets' |", "attack_setting: "]),
        ({"defense": None}, ["finds 8 ACC values", "defense: 'DI' | 'DP' |", "defense_setting: '' | "]),
    ],
    ids=["none", "column", "attacks", "defenses"],
)
def test_a_filter_that_finds_none_or_several_says_so(tmp_path, change, messages):
    query = {name: value for name, value in {**BADNETS, **change}.items() if value is not None}
    write(tmp_path / "x", cell=cell(paper=query))
    with pytest.raises(InputError) as error:
        table.report(tmp_path, "text", PAPERS)
    for message in messages:
        assert message in str(error.value)
    assert "model: " not in str(error.value)  # the same in all matches: it distinguishes nothing


def test_the_papers_rows_are_told_apart_by_their_columns():
    rows = [row for path in PAPERS.glob("*.csv") for row in csv.DictReader(io.StringIO(path.read_text("utf-8")))]
    keys = {tuple(row.values())[:9] for row in rows}
    assert (len(rows), len(keys)) == (3288, 3288)
    assert all(float(row["value"]) >= 0 for row in rows)


def test_a_wrong_folder_of_papers(tmp_path):
    write(tmp_path / "runs/x", cell=cell(paper=BADNETS))
    with pytest.raises(InputError, match="no CSV tables.*nowhere.*--papers"):
        table.report(tmp_path / "runs", "text", tmp_path / "nowhere")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"other\.csv lacks the columns attack"):
        table.report(tmp_path / "runs", "text", tmp_path)
