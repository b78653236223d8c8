"""Every file of experiments loads at every scale, runs at the smallest, and each of its cells picks a published row."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from synthetic_results import PAPERS

from bdjax.config import to_json
from bdjax.errors import InputError
from bdjax.pipelines import cells, summary, sweep
from bdjax.pipelines.experiment_options import load_grid
from bdjax.reports import papers

EXPERIMENTS = PAPERS.parent
ELSEWHERE = {"accelerator", "audit"}
"""Folders with other forms of files: a measurement of one machine, and audits."""
FILES = sorted(
    path for path in EXPERIMENTS.glob("*/*.py") if not path.name.startswith("_") and path.parent.name not in ELSEWHERE
)
GRIDS = [path for path in FILES if path.name not in ("validation.py", "clip_figure3.py")]
"""All but a file that writes a data set, and one about dual encoders, which are no cells of a grid."""


@pytest.fixture(scope="module")
def tables():
    return papers.read_tables(PAPERS)


def named(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", GRIDS, ids=named)
@pytest.mark.parametrize("scale", ["paper", "cpu", "smoke"])
def test_a_file_of_experiments_loads_and_its_filters_find_the_papers_numbers(path, scale, tables):
    grid = load_grid(path, {"scale": scale})
    assert grid.title and grid.seeds and grid.cells
    for cell in grid.cells:
        if cell.paper:
            found = papers.published_values(cell.paper, tables)
            assert any(found[name][0] for name in ("acc_after", "asr_after", "score")), cell.label
    if scale == "smoke":
        assert len(grid.seeds) == 1 and all(cell.scale for cell in grid.cells)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_the_head_of_a_file_says_its_command_what_it_measures_and_its_time(path):
    head = ast.get_docstring(ast.parse(path.read_text()))
    command = "bdjax sweep" if path in GRIDS else "python"
    assert f"{command} experiments/{named(path)}.py" in head
    if path in GRIDS:
        assert "Time" in head and "To expect" in head


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*/*.py")), ids=named)
def test_experiments_have_options_in_place_of_environment_variables_and_main_loops(path):
    text = path.read_text()
    names = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    if named(path) != "accelerator/environment":  # which hands it on to child processes
        assert not {"environ", "environb", "getenv"} & names
    assert "load_file" not in text and "sys.path" not in text
    assert "__main__" not in text or path not in GRIDS


@pytest.fixture(scope="module")
def trained(finished):
    """Directory of the victim that the session's run trained."""
    return next(path for path in finished[0].parent.rglob("manifest.json") if '"victim"' in path.read_text()).parent


def test_a_victim_directory_says_its_attack_and_a_weight_file_needs_the_attack_in_the_list(trained, tmp_path):
    victims = tmp_path / "victims.json"

    def read(**fields):
        victims.write_text(json.dumps([{"name": "one", "set": "dev", **fields}]))
        return load_grid(EXPERIMENTS / "foreign/bench.py", {"victims": str(victims), "defenses": ("clp",)}).cells

    (cell,) = read(path=str(trained), dataset="digits")
    recorded = json.loads((trained / "manifest.json").read_text())
    assert cell.experiment.attack == "badnets" and cell.experiment.model == recorded["model"]
    assert to_json(cell.experiment.attack_config) == recorded["attack"]["config"]
    with pytest.raises(InputError, match="victim one lacks model, attack, attack_config"):
        read(path="net.pth", dataset="digits")


def test_the_leaderboard_lists_defenses_that_see_clean_images_alone(trained):
    options = {"scale": "cpu", "victims": (str(trained),)}
    names = {cell.experiment.defense for cell in load_grid(EXPERIMENTS / "leaderboard/table.py", options).cells}
    assert {"ibau", "bibau", "auto", "clp"} <= names
    assert not {"dp_sgd", "ep", "ibu"} & names  # given the poisoned training set, or the trigger


@pytest.fixture(scope="module")
def small_digits(tmp_path_factory):
    """The digits as they are, 8x8, of which 400 are to train on and 200 to test on."""
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    scans, labels = load_digits(return_X_y=True)
    images = np.round(scans[:600].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels[:600].astype(np.int32)
    np.savez(path, x_train=images[:400], y_train=labels[:400], x_test=images[400:], y_test=labels[400:])
    return path


@pytest.mark.slow
@pytest.mark.parametrize("path", GRIDS, ids=named)
def test_every_file_runs_at_the_scale_smoke(path, small_digits, tmp_path):
    grid = load_grid(path, {"scale": "smoke", "dataset": f"npz:{small_digits}"})
    for index in range(len(grid.cells)):
        sweep.run_cell(path, index, grid.seeds[0], tmp_path, 1, grid.options_record)
    summary.write_summary(grid, tmp_path, grid.seeds)
    finished = [cells.read(cell, grid.seeds[0], tmp_path) for cell in grid.cells]
    assert all(finished)
    if grid.summarise is not None:
        text = (tmp_path / "summary.md").read_text()
        assert "Scale: " in text and "Hardware: cpu x 1" in text and f"{len(grid.cells)} finished cells" in text
        assert f"Made by: `bdjax sweep experiments/{named(path)}.py --scale smoke" in text
    if grid.draw is not None:
        assert list(tmp_path.rglob("*.png"))


def test_smaller_runs_are_marked_as_such():
    options = {"epochs": 3, "model": "small_vgg", "datasets": ["mnist=npz:m.npz", "tiny"]}
    chosen = load_grid(EXPERIMENTS / "age/table1.py", options).cells
    assert len(chosen) == 8
    first, last = chosen[0], chosen[-1]
    assert first.scale == "small_vgg for ResNet-18; victim trained 3 epochs" and "top-5" in last.scale
    experiment = first.experiment
    assert (experiment.dataset, experiment.model, experiment.fit.epochs) == ("npz:m.npz", "small_vgg", 3)
    assert first.clean and experiment.defense_config.backdoor_knowledge and last.experiment.defense_config.repair


def test_sizes_leave_rows_out():
    chosen = load_grid(EXPERIMENTS / "age/table5_6.py", {"sizes": [5, 512]}).cells
    assert [cell.experiment.split.size for cell in chosen] == [512, 512, 5, 5, 5]
    assert {cell.experiment.defense for cell in chosen} == {"age", "finetune"}


def test_triggers_leave_rows_out():
    chosen = load_grid(EXPERIMENTS / "age/table3_4.py", {"triggers": ["g", "h"], "epochs": 2}).cells
    assert [cell.experiment.attack for cell in chosen] == ["lsb"] * 4 + ["narcissus"] * 4
    assert chosen[-1].experiment.attack_config.surrogate_epochs == 2 and "Narcissus" in chosen[-1].scale


def test_without_options_nothing_is_marked():
    chosen = load_grid(EXPERIMENTS / "age/table3_4.py").cells
    assert {cell.scale for cell in chosen} == {""} and len(chosen) == 32


def test_the_scale_cpu_is_one_flag():
    grid = load_grid(EXPERIMENTS / "age/table1.py", {"scale": "cpu", "dataset": "npz:c.npz"})
    assert {cell.experiment.dataset for cell in grid.cells} == {"npz:c.npz"} and len(grid.cells) == 4
    assert grid.options_record["epochs"] == 5 and grid.out == Path("runs/age/table1")
    assert grid.command((0, 1)) == "bdjax sweep experiments/age/table1.py --scale cpu --dataset npz:c.npz --seeds 0,1"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in EXPERIMENTS.glob("results/*/cells.json")))
def test_the_commands_of_committed_results_give_their_cells(name):
    plan = json.loads((EXPERIMENTS / "results" / name / "cells.json").read_text())
    grid = load_grid(EXPERIMENTS.parent / plan["file"], plan["options"])
    seeds = plan["cells"][0]["seeds"]
    assert plan["command"] == grid.command(seeds) and plan["options"] == grid.options_record
    assert [cell["label"] for cell in plan["cells"]] == [cell.label for cell in grid.cells]
    for path in (EXPERIMENTS / "results" / name).glob("*/result.json"):
        recorded = json.loads(path.read_text())
        cell = next(cell for cell in grid.cells if cell.label == recorded["cell"]["label"])
        experiment = cell.experiment
        assert recorded["model"] == experiment.model and recorded["cell"]["scale"] == cell.scale
        for key, config in (
            ("attack_config", experiment.attack_config),
            ("defense_config", experiment.defense_config),
            ("fit", experiment.fit),
            ("split", experiment.split),
        ):
            values = to_json(config)
            assert {k: v for k, v in recorded[key].items() if k in values and values[k] != v} == {}, (key, path)


def test_several_data_sets_are_named():
    path = EXPERIMENTS / "age/table1.py"
    with pytest.raises(InputError, match="does not say which of mnist, cifar10.* Use --datasets mnist=npz:c.npz"):
        load_grid(path, {"dataset": "npz:c.npz"})
    with pytest.raises(InputError, match="no data set svhn here. Choose from mnist"):
        load_grid(path, {"datasets": ["svhn"]})
    with pytest.raises(InputError, match="there are no rows X. Choose from none"):
        load_grid(EXPERIMENTS / "bibau/table2.py", {"rows": ["X"]})


GRID = """
from dataclasses import dataclass
from bdjax.config import Experiment, FitConfig
from bdjax.pipelines.experiment_options import Cell, ExperimentOptions

TITLE, SEEDS = "a grid", (3,)


@dataclass(frozen=True)
class Options(ExperimentOptions):
    names: tuple[str, ...] = ("a", "b")


def cells(options):
    fit = FitConfig(epochs=options.epochs or 2)
    return [Cell(name, Experiment("badnets", "ibau", fit=fit)) for name in options.names]
"""


def test_a_file_gives_cells_for_its_options(tmp_path):
    file = tmp_path / "grid.py"
    file.write_text(GRID)
    assert [cell.label for cell in load_grid(file).cells] == ["a", "b"]
    grid = load_grid(file, {"names": ["c"], "epochs": 5})
    assert [(cell.label, cell.experiment.fit.epochs) for cell in grid.cells] == [("c", 5)]
    assert load_grid(file, grid.options).options_record == grid.options_record
    with pytest.raises(InputError, match="has no field colour"):
        load_grid(file, {"colour": "red"})
    with pytest.raises(InputError, match="several cells are called a"):
        load_grid(file, {"names": ["a", "a"]})


def test_options_change_the_cells_of_a_table():
    path = EXPERIMENTS / "ibau/table1.py"
    full, short, smoke = (
        load_grid(path, options).cells[0] for options in ({}, {"epochs": 6, "dataset": "npz:c.npz"}, {"scale": "smoke"})
    )
    assert (full.scale, full.experiment.fit.epochs, full.experiment.dataset) == ("", 50, "tfds:cifar10")
    assert (short.scale, short.experiment.dataset) == ("victim trained 6 of 50 epochs", "npz:c.npz")
    assert (smoke.experiment.dataset, smoke.experiment.model, smoke.experiment.fit.epochs) == ("digits", "cnn", 1)
