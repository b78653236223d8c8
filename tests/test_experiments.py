"""Every file of experiments loads, and each of its cells picks a published row."""

from pathlib import Path

import pytest
from synthetic_results import PAPERS

from bdjax import registry
from bdjax.errors import InputError
from bdjax.pipelines.experiment_options import ExperimentOptions, load_grid
from bdjax.reports import papers

FILES = sorted(PAPERS.parent.glob("*.py"))


@pytest.fixture(scope="module")
def tables():
    return papers.read_tables(PAPERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_experiments_loads_and_its_filters_find_the_papers_numbers(path, tables):
    module = registry.load_file(path)
    if not hasattr(module, "CELLS") and not hasattr(module, "cells"):
        assert hasattr(module, "main") and f"python experiments/{path.name}" in module.__doc__
        return
    grid = load_grid(path)
    assert grid.title and grid.seeds and f"bdjax sweep experiments/{path.name}" in module.__doc__
    for cell in grid.cells:
        if cell.paper:
            found = papers.published_values(cell.paper, tables)
            assert any(found[name][0] for name in ("acc_after", "asr_after", "score")), cell.label


def fresh(name, tmp_path, monkeypatch, **environment):
    """An AGE file loaded anew (from a copy, for the same file gives the same module) with other variables."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    for file in FILES:
        if file.stem.startswith("age_"):
            (tmp_path / file.name).write_text(file.read_text())
    return registry.load_file(Path(tmp_path / name))


def test_smaller_runs_are_marked_as_such(tmp_path, monkeypatch):
    small = {"EPOCHS": "3", "MODEL": "small_vgg", "SEEDS": "4", "DATASETS": "mnist,tiny", "BDJAX_MNIST": "npz:m.npz"}
    module = fresh("age_table1.py", tmp_path, monkeypatch, **small)
    assert len(module.CELLS) == 8 and module.SEEDS == (4,)
    first, last = module.CELLS[0], module.CELLS[-1]
    assert first.scale == "small_vgg for ResNet-18; victim trained 3 epochs" and "top-5" in last.scale
    assert (first.experiment.dataset, first.experiment.model, first.experiment.fit.epochs) == (
        "npz:m.npz",
        "small_vgg",
        3,
    )
    assert first.clean and first.experiment.defense_config.backdoor_knowledge and last.experiment.defense_config.repair


def test_sizes_leave_rows_out(tmp_path, monkeypatch):
    module = fresh("age_table5_6.py", tmp_path, monkeypatch, SIZES="5,512")
    assert [cell.experiment.split.size for cell in module.CELLS] == [512, 512, 5, 5, 5]
    assert {cell.experiment.defense for cell in module.CELLS} == {"age", "finetune"}


def test_triggers_leave_rows_out(tmp_path, monkeypatch):
    module = fresh("age_table3_4.py", tmp_path, monkeypatch, TRIGGERS="g,h", EPOCHS="2")
    assert [cell.experiment.attack for cell in module.CELLS] == ["lsb"] * 4 + ["narcissus"] * 4
    assert module.CELLS[-1].experiment.attack_config.surrogate_epochs == 2 and "Narcissus" in module.CELLS[-1].scale


def test_without_variables_nothing_is_marked():
    module = registry.load_file(PAPERS.parent / "age_table3_4.py")
    assert {cell.scale for cell in module.CELLS} == {""} and len(module.CELLS) == 32


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
    path = PAPERS.parent / "ibau_table1.py"
    full, short, smoke = (
        load_grid(path, options).cells[0]
        for options in (None, ExperimentOptions(epochs=6, dataset="npz:c.npz"), ExperimentOptions(scale="smoke"))
    )
    assert (full.scale, full.experiment.fit.epochs, full.experiment.dataset) == ("", 50, "tfds:cifar10")
    assert (short.scale, short.experiment.dataset) == ("victim trained 6 of 50 epochs", "npz:c.npz")
    assert (smoke.experiment.dataset, smoke.experiment.model, smoke.experiment.fit.epochs) == ("digits", "cnn", 1)
