"""Grids of experiments: what is shared, what is done again, what fails."""

import json

import pytest
from commands import bdjax

from bdjax import cli
from bdjax.config import Experiment
from bdjax.errors import InputError

pytestmark = pytest.mark.slow

GRID = """
from bdjax.engine import FitConfig
from bdjax.config import Experiment
from bdjax.pipelines.experiment_options import Cell
from bdjax.attacks import badnets
from bdjax.defenses import ibau

TITLE, SEEDS = "a grid", (0,)

def cell(label, defense, dataset={data!r}):
    return Cell(label, Experiment("badnets", "ibau", dataset, attack_config=badnets.Config(target=1),
                                  defense_config=defense, fit=FitConfig(epochs=2, batch_size=40)), scale="toy")

CELLS = (cell("good", ibau.Config("release", 1, 10)), cell("other", ibau.Config("release", 2, 10)),
         cell("bad", ibau.Config(), "npz:nowhere.npz"))
"""


def test_sweep_shares_victims_lists_failures_and_does_nothing_twice(blobs_npz, capsys, tmp_path):
    (tmp_path / "grid.py").write_text(GRID.format(data=blobs_npz))
    argv = ["sweep", tmp_path / "grid.py", "--out", tmp_path / "out", "--devices", "1"]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    first = capsys.readouterr().out
    assert stop.value.code == 1
    assert "1 of 3 cells failed" in first and "bad, seed 0" in first and "nowhere.npz" in first
    assert len(list((tmp_path / "out" / "victims").glob("[!.]*"))) == 1
    results = list((tmp_path / "out").glob("*/result.json"))
    assert len(results) == 2 and {json.loads(p.read_text())["cell"]["label"] for p in results} == {"good", "other"}
    with pytest.raises(SystemExit):
        cli.main([str(a) for a in argv])
    assert "2 finished before, 0 to do" in capsys.readouterr().out
    markdown = bdjax(capsys, "report", tmp_path / "out", "--markdown")
    assert "missing" in markdown and "toy" in markdown and "good" in markdown


def test_sweep_starts_a_killed_worker_again(blobs_npz, tmp_path, monkeypatch):
    from bdjax.pipelines import sweep
    from bdjax.pipelines.backends import Resources, local

    (tmp_path / "grid.py").write_text(GRID.format(data=blobs_npz).replace('cell("bad"', 'cell("third"').replace(
        ', "npz:nowhere.npz"', ""))  # fmt: skip
    real, started, said = local._start, [], []

    def start(*arguments):
        process = real(*arguments)
        if not started:
            process.kill()
        started.append(process)
        return process

    monkeypatch.setattr(local, "_start", start)
    request = sweep.SweepRequest(tmp_path / "grid.py", tmp_path / "out", devices=1, resources=Resources(workers=2))
    failed = sweep.sweep(request, say=said.append)
    assert not failed and len(started) == 4
    assert any("was killed (signal 9); starting it again" in line for line in said)


def test_shards_part_the_grid_by_victims():
    from bdjax.pipelines import sweep

    cells = [sweep.Cell(f"d{d}", Experiment("badnets", "ibau")) for d in range(3)]
    jobs = [sweep._Job(i, seed, cell) for seed in range(4) for i, cell in enumerate(cells)]
    parts = [sweep._shard(jobs, f"{i}/3") for i in range(3)]
    assert sorted((j.index, j.seed) for part in parts for j in part) == sorted((j.index, j.seed) for j in jobs)
    assert not {j.seed for j in parts[0]} & {j.seed for j in parts[1]}


def test_seeds_that_are_no_numbers_are_named(tmp_path):
    from bdjax.pipelines import sweep

    (tmp_path / "grid.py").write_text('TITLE, SEEDS, CELLS = "nothing", (0,), ()\n')
    with pytest.raises(InputError, match="--seeds must be whole numbers.*such as 0,1,2; got '0;1'"):
        sweep.sweep(sweep.SweepRequest(tmp_path / "grid.py", tmp_path / "out", seeds="0;1"))
