"""Cells of a grid beyond attack and defense: stored victims, weight files, stages, and flags of lists."""

from dataclasses import dataclass, replace

import pytest

from bdjax import interop
from bdjax.attacks import badnets
from bdjax.cli import sweep as command
from bdjax.config import Experiment, SplitConfig
from bdjax.errors import InputError
from bdjax.pipelines import cells
from bdjax.pipelines.context import Context
from bdjax.pipelines.experiment_options import Cell, ExperimentOptions, Grid

EXTRA = {"cell": {"index": 0, "label": "one", "scale": "", "paper": None}}


@dataclass(frozen=True)
class Count:
    """A stage that counts its runs."""

    limit: int

    @property
    def name(self):
        return "count"

    def run(self, model, seed, context):
        RUNS.append((model, seed))
        return {"limit": self.limit, "purified": (model / "purified").is_dir()}


RUNS: list = []


@pytest.mark.slow
def test_a_stored_victim_is_defended_and_its_stages_follow_once(finished, blobs_npz, tmp_path):
    experiment = Experiment("badnets", "finetune", blobs_npz, "cnn", split=SplitConfig("test", 20, "stratified"))
    cell = Cell("one", experiment, stored=finished[0] / "victim", measured=8, stages=(Count(3),))
    assert cells.read(cell, 5, tmp_path) is None
    for _ in range(2):
        cells.carry_out(cell, 5, tmp_path, Context(1), EXTRA)
    done = cells.read(cell, 5, tmp_path)
    assert done.result["n_test"] == 8 and done.result["seed"] == 5 and done.result["cell"] == EXTRA["cell"]
    assert done.stages == {"count": {"limit": 3, "purified": True}}
    assert len(RUNS) == 1 and RUNS[0] == (done.directory, 5)
    assert cells.read(replace(cell, stages=(Count(4),)), 5, tmp_path) is None  # other settings, another record
    assert cells.victim_hash(cell, 0) == cells.victim_hash(cell, 1)
    with pytest.raises(InputError, match="stored victim .* needs a defense"):
        cells.carry_out(replace(cell, experiment=replace(experiment, defense=None)), 5, tmp_path, Context(1), EXTRA)


@pytest.mark.slow
def test_a_weight_file_is_imported_and_measured_with_the_attack(finished, blobs_npz, tmp_path):
    file = tmp_path / "weights.safetensors"
    interop.export_model(finished[0] / "victim", "safetensors", file)
    split, target = SplitConfig("test", 20, "stratified"), badnets.Config(target=1)
    experiment = Experiment("badnets", "finetune", blobs_npz, "cnn", attack_config=target, split=split)
    cell = Cell("one", experiment, stored=file)
    assert cells.read(cell, 0, tmp_path / "out") is None
    cells.carry_out(cell, 0, tmp_path / "out", Context(1), EXTRA)
    result = cells.read(cell, 0, tmp_path / "out").result
    assert result["attack"] == "badnets" and result["n_asr"] > 0 and result["before"]["asr"] is not None


@dataclass(frozen=True)
class Options(ExperimentOptions):
    """Options of a file."""

    names: tuple[str, ...] = ("a", "b")
    """Names."""
    ratios: tuple[float, ...] = ()
    """Ratios."""


def test_lists_are_flags_with_commas():
    import dataclasses

    import tyro

    flags = dataclasses.make_dataclass("Flags", command._fields_of(Options))
    given = tyro.cli(flags, args=["--names", "BI-BAU (U),none", "--ratios", "0.1,2"])
    assert (given.names, given.ratios) == (("BI-BAU (U)", "none"), (0.1, 2.0))
    assert tyro.cli(flags, args=[]).names == ("a", "b")


def test_the_command_of_a_grid_has_the_options_that_differ_from_the_scales(tmp_path):
    file = tmp_path / "experiments" / "paper" / "table.py"
    grid = Grid(file, "a table", (0,), (), Options(epochs=2, names=("x y", "z")))
    assert grid.command((3, 4)) == 'bdjax sweep experiments/paper/table.py --epochs 2 --names "x y,z" --seeds 3,4'
    assert str(grid.out) == "runs/paper/table"
    with pytest.raises(InputError, match="there is no scale 'huge' here. Choose from paper, cpu, smoke"):
        Options(scale="huge")
