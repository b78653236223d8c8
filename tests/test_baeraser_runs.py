"""BAERASER from the command line: suspected labels, triggers in the figure; its experiments and the papers' rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import bdjax
from PIL import Image

from bdjax.config import config_of
from bdjax.io import checkpoint
from bdjax.pipelines.experiment_options import CellResult, load_grid
from bdjax.reports import figure, papers, table

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SMALL = [
    f"--defense.{flag}" for flag in (
        "hidden=8", "noise-size=8", "iterations=2", "samples=2", "batch-size=8", "epochs=2", "asr-threshold=0.0"
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def published():
    return papers.read_tables(EXPERIMENTS / "papers")


@pytest.mark.slow
def test_a_run_prints_its_suspected_labels_and_draws_its_triggers(finished, capsys, tmp_path):
    argv = ["defend", finished[0] / "victim", "baeraser", "--devices", "1", "--out", tmp_path / "d", *SMALL]
    out = bdjax(capsys, *argv, "--defense.largest-drop", "1", "--defense.size", "2")
    assert "suspected target labels: 0, 1, 2, 3\n" in out  # with τ = 0 all of them
    result = json.loads((tmp_path / "d/result.json").read_text())
    assert result["rounds"][-1]["suspected"] == [0, 1, 2, 3]
    assert result["defense_config"]["thresholds"] == [0.5, 0.8, 0.9]
    arrays = checkpoint.read_arrays(tmp_path / "d", "arrays")
    assert arrays["recovered"].shape == (24, 2, 2, 1) and arrays["label_asr"].shape == (4,)
    assert set(arrays["recovered_labels"][:4]) == {0, 1, 2, 3}
    plain = checkpoint.read_arrays(finished[0], "arrays")
    with_perturbation = {**arrays, **{k: v for k, v in plain.items() if k.startswith("perturbation")}}
    heights = []
    for some in ({k: v for k, v in arrays.items() if not k.startswith("recovered")}, arrays, with_perturbation):
        with Image.open(figure.draw(result, some, tmp_path / "f.png")) as picture:
            heights.append(picture.height)
    assert heights[0] < heights[1] < heights[2]  # one row per kind of array
    assert (tmp_path / "d/figure.png").exists()


def test_the_row_of_triggers_begins_with_the_true_one(tmp_path, monkeypatch):
    clean = np.zeros((2, 6, 6, 1), np.float32)
    triggered = clean.copy()
    triggered[:, 3:5, 1:4] = 0.5
    triggered[:, 3, 1] = 1.0
    shown = []
    monkeypatch.setattr(figure, "_show", lambda axis, image: shown.append(np.asarray(image)))
    result = {
        "before": {"acc": 1, "asr": 1}, "rounds": [], "attack": "a", "defense": "d", "dataset": "x", "model": "m",
        "n_test": 1, "seed": 0,
    }  # fmt: skip
    base = {"clean": clean, "triggered": triggered, "labels": np.zeros(2, int)}
    patches = np.full((3, 3, 3, 1), 0.25, np.float32)
    figure.draw(result, {**base, "recovered": patches, "recovered_labels": np.arange(3)}, tmp_path / "f.png")
    np.testing.assert_array_equal(shown[4][..., 0], [[1.0, 0.5, 0.5], [0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(shown[5], patches[0])
    assert len(shown) == 6  # as many as there are columns
    shown.clear()
    added = np.full((1, 6, 6, 1), -0.1, np.float32)
    figure.draw(result, {**base, "recovered": added}, tmp_path / "f.png")
    np.testing.assert_array_equal(shown[4], 0.5 + triggered[0] / 2)
    np.testing.assert_array_equal(shown[5], 0)


def test_the_table_of_one_run_lists_suspected_labels_only_when_the_defense_detects(finished):
    result = finished[1]
    assert "suspected" not in table.one(result)
    assert "suspected target labels: none" in table.one({**result, "rounds": [{"step": 1, "suspected": []}]})
    assert "suspected target labels: 4, 7" in table.one({**result, "rounds": [{"step": 1, "suspected": [4, 7]}]})


@pytest.mark.parametrize(
    ("name", "count", "without"),
    [("table1", 36, 0), ("table2", 36, 0), ("table3", 54, 0), ("figure_holding", 21, 21), ("figure_curve", 3, 3)],
)
def test_every_cell_is_of_its_defense_and_finds_its_published_row(name, count, without, published):
    grid = load_grid(EXPERIMENTS / f"baeraser/{name}.py")
    assert len(grid.cells) == count and sum(cell.paper is None for cell in grid.cells) == without
    for cell in grid.cells:
        experiment = cell.experiment
        assert isinstance(experiment.defense_config, config_of("defenses", experiment.defense))
        assert experiment.split.source == "test" and cell.scale == ""
        if cell.paper:
            printed = papers.published_values(cell.paper, published)
            assert printed["acc_after"][0] or printed["asr_after"][0]


def test_the_sweep_of_the_trade_off_keeps_the_ratio():
    for cell in load_grid(EXPERIMENTS / "baeraser/table3.py").cells:
        config = cell.experiment.defense_config
        ratio = float(cell.paper["defense_setting"].split(";")[0].removeprefix("beta/alpha="))
        assert config.beta / config.alpha == pytest.approx(ratio) and max(config.alpha, config.beta) == 1


def test_the_figure_of_clean_images_is_drawn_from_results(tmp_path):
    grid, results = load_grid(EXPERIMENTS / "baeraser/figure_holding.py"), []
    for attack, size in (("badnets", 500), ("badnets", 2500), ("imc", 500)):
        rates = {"before": {"acc": 0.6, "asr": 0.9}, "after": {"acc": 0.5, "asr": 0.1}}
        result = {"attack": attack, "n_defender": size, **rates}
        results.append(CellResult(grid.cells[0], 0, tmp_path, result, {}))
    grid.draw(results, tmp_path)
    with Image.open(tmp_path / "holding.png") as picture:
        assert picture.width > 1000
