"""Where the cells of a grid are carried out: Slurm by a stub of its commands, Ray by a cluster on this machine."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import slurm_stub
from commands import refused

from bdjax import cli
from bdjax.errors import InputError
from bdjax.pipelines import backends, sweep
from bdjax.pipelines.backends import CellTask, Ended, Plan, Resources, local, slurm, startable

_FAKE = """
import pathlib, sys, time
file, index, seed, out, devices, *options = sys.argv[1:]
pathlib.Path(out, f"victim-{seed}").mkdir(exist_ok=True)
pathlib.Path(out, "order").open("a").write(f"{index}{seed} ")
print("some words", flush=True)
if index == "3":
    sys.exit("it is broken")
"""

TWELVE = """
from bdjax.attacks import badnets
from bdjax.config import Experiment, FitConfig, SplitConfig
from bdjax.defenses import clp
from bdjax.pipelines.experiment_options import Cell

TITLE, SEEDS = "twelve cells", (0, 1)
CELLS = tuple(
    Cell(f"u = {u}", Experiment("badnets", "clp", "digits", "cnn", attack_config=badnets.Config(target=1),
         defense_config=clp.Config(u=u), fit=FitConfig(epochs=1, batch_size=64), split=SplitConfig("test", 100)))
    for u in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
)
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Cells 0 to 3 with two seeds, whose program is a fake that fails for cell 3; those of a seed share a victim."""
    (tmp_path / "fake.py").write_text(_FAKE)
    program = [sys.executable, str(tmp_path / "fake.py"), "grid.py"]
    monkeypatch.setattr(Plan, "program", lambda self, flags=(): program)
    out = tmp_path / "o u t"
    (out / "logs").mkdir(parents=True)
    tasks = tuple(CellTask(i, s, f'cell "{i}"', out / f"victim-{s}") for s in (0, 1) for i in range(4))
    return Plan(Path("grid.py"), out, tasks, {"names": ["a b", "c"]})


def run(backend, plan, **resources):
    """(errors by name, lines that were said)."""
    said: list[str] = []
    ended = list(backend.run(plan, Resources(**resources), said.append))
    assert all(isinstance(one, Ended) for one in ended) and len({one.task for one in ended}) == len(plan.tasks)
    return {one.task.name: one.error for one in ended if one.error}, said


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """The state of stub commands of Slurm, asked often."""
    monkeypatch.setattr(slurm, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(slurm, "_GRACE_SECONDS", 0.2)
    return slurm_stub.install(tmp_path, monkeypatch)


def test_one_cell_of_each_missing_victim_starts_first(tmp_path):
    (tmp_path / "there").mkdir()
    there, missing, none = (CellTask(i, 0, "", v) for i, v in enumerate((tmp_path / "there", tmp_path / "gone", None)))
    tasks = [there, missing, none, CellTask(3, 0, "", tmp_path / "there"), CellTask(4, 0, "", tmp_path / "gone")]
    assert [task.index for task in startable(tasks, ())] == [0, 1, 2, 3]
    assert [task.index for task in startable(tasks, {tmp_path / "gone"})] == [0, 2, 3]


def test_local_processes_run_all_cells_and_report_the_last_line_of_a_failed_one(plan):
    errors, _ = run(local, plan, workers=4)
    assert set(errors) == {'cell "3", seed 0', 'cell "3", seed 1'}
    assert errors['cell "3", seed 1'] == f"it is broken (log: {plan.out / 'logs' / 'cell-3-seed-1.log'})"
    assert len((plan.out / "order").read_text().split()) == 8


def test_slurm_runs_the_cells_that_train_first_and_the_others_after_them(plan, queue):
    errors, _ = run(slurm, plan)
    assert (
        set(errors) == {'cell "3", seed 0', 'cell "3", seed 1'} and "it is broken (log: " in errors['cell "3", seed 0']
    )
    order = (plan.out / "order").read_text().split()
    assert order[:2] == ["00", "01"] and sorted(order) == sorted(f"{i}{s}" for i in range(4) for s in range(2))
    first, others = ((queue / f"{number}.job").read_text() for number in (100, 101))
    assert first.endswith("first-0-try-1.sh after ") and others.endswith("others-0-try-1.sh after 100")
    (plan.out / "order").unlink()
    run(slurm, plan)  # the victims are there: one array
    assert (queue / "102.job").read_text().endswith("first-0-try-1.sh after ") and not (queue / "103.job").exists()


def test_a_cell_that_slurm_lost_is_submitted_again(plan, queue):
    (queue / "lose-one").touch()
    errors, said = run(slurm, plan)
    assert len(errors) == 2 and "1 cells were killed or lost; submitting them again" in said
    assert sorted((plan.out / "order").read_text().split()) == sorted(f"{i}{s}" for i in range(4) for s in range(2))


def test_a_cell_that_is_killed_twice_is_a_failure(plan, queue, tmp_path):
    (tmp_path / "fake.py").write_text(_FAKE + "import os; os.kill(os.getpid(), 9)")
    errors, _ = run(slurm, plan)
    assert len(errors) == 8 and "some words (log: " in errors['cell "0", seed 0']
    assert len((plan.out / "order").read_text().split()) == 8 + 6  # cells 3 exit by themselves


def test_slurm_refuses_what_it_cannot_do(plan, queue, tmp_path, monkeypatch):
    (plan.out / "slurm").mkdir()
    (plan.out / "slurm" / "submitted").write_text("100 101\n")
    (queue / "100.job").touch()
    with pytest.raises(InputError, match=r"still in the queue: 100 101\. .*`scancel 100 101`"):
        run(slurm, plan)
    (queue / "100.done").touch()
    (queue / "refuse").touch()
    with pytest.raises(InputError, match=r"sbatch refused .*first-0-try-1\.sh: .*invalid partition"):
        run(slurm, plan)
    (plan.out / "slurm" / "submitted").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no sbatch on the PATH"):
        run(slurm, plan)


def test_a_script_says_what_each_cell_is_given(plan):
    resources = Resources(workers=5, gpus=2, cpus=3, sbatch="--partition=gpu --time=4:00:00")
    text = slurm.describe(plan, resources)
    for line in ("--array=0-1%5", "--array=0-5%5", "--gres=gpu:2", "--cpus-per-task=3", "--partition=gpu"):
        assert f"#SBATCH {line}" in text
    assert '  "0 1"  # cell "0", seed 1' in text and "afterany" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_large_grids_are_several_arrays():
    tasks = tuple(CellTask(i, 0, str(i)) for i in range(2500))
    assert [len(array.tasks) for array in slurm._arrays(tasks, 1)] == [1000, 1000, 500]


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"gpus": -1.0}, {"cpus": 0}])
def test_resources_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match="per-cell|workers"):
        Resources(**wrong)


def test_every_backend_has_the_functions_of_the_protocol():
    for name in ("local", "slurm", "ray"):
        backend = backends.load(name)
        assert callable(backend.run) and callable(backend.describe)


def test_ray_that_is_not_installed_is_named(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'bdjax\[ray\]'"):
        run(backends.load("ray"), plan)


def test_a_cell_ends_with_the_process_that_started_it(tmp_path):
    """`_cell --attached` ends when its stdin is closed, also while it is busy."""
    (tmp_path / "busy.py").write_text("import time\ntime.sleep(600)\n")
    words = [sys.executable, "-m", "bdjax", "_cell", "--attached", str(tmp_path / "busy.py"), "0", "0", "out", "1"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 1


def test_print_shows_the_commands_and_runs_nothing(tmp_path, capsys):
    (tmp_path / "grid.py").write_text(TWELVE)
    argv = ["sweep", str(tmp_path / "grid.py"), "--out", str(tmp_path / "out"), "--print"]
    cli.main(argv)
    shown = capsys.readouterr().out
    assert shown.count("_cell") == 12 and not (tmp_path / "out").exists()
    cli.main([*argv, "--backend", "slurm", "--slurm-options=--time=1:00:00"])
    shown = capsys.readouterr().out
    assert "#SBATCH --time=1:00:00" in shown and "#SBATCH --array=0-9" in shown and '"5 1"  # u = 3.0, seed 1' in shown
    cli.main([*argv, "--backend", "ray", "--gpus-per-cell", "0.25"])
    assert "each with 1 CPU cores and 0.25 GPUs" in capsys.readouterr().out
    assert "--workers must be at least 0" in refused(capsys, *argv, "--workers", "-1")


def numbers(out):
    """What was measured, by the hash of the run."""
    results = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/result.json")}
    for result in results.values():
        for row in result["rounds"]:
            del row["seconds"]
    return {name: (result["before"], result["after"], result["rounds"]) for name, result in results.items()}


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """(the file of twelve cells, their numbers in this process)."""
    folder = tmp_path_factory.mktemp("twelve")
    (file := folder / "grid.py").write_text(TWELVE)
    for seed in (0, 1):
        for index in range(6):
            sweep.run_cell(file, index, seed, folder / "out", 1)
    return file, numbers(folder / "out")


@pytest.mark.slow
def test_slurm_gives_the_numbers_of_this_process(twelve, queue, tmp_path, capsys):
    file, expected = twelve
    argv = ["sweep", file, "--out", tmp_path / "out", "--backend", "slurm", "--devices", "1", "--seeds", "1"]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    assert stop.value.code == 0 and "[6/6]" in capsys.readouterr().out
    measured = numbers(tmp_path / "out")
    assert len(measured) == 6 and measured.items() <= expected.items()


@pytest.fixture
def cluster():
    """Address of a Ray cluster of two workers on this machine."""
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", "0"]
        words += ["--num-cpus", "2", "--num-gpus", "0", "--object-store-memory", "100000000", "--temp-dir", folder]
        words += ["--include-dashboard", "false", "--disable-usage-stats"]
        environ = {**os.environ, "RAY_worker_niceness": "0"}
        with open(Path(folder, "start.log"), "wb") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, env=environ, start_new_session=True)
        address = Path(folder, "ray_current_cluster")
        began = time.monotonic()
        while not address.exists():
            assert process.poll() is None and time.monotonic() - began < 120, Path(folder, "start.log").read_text()
            time.sleep(0.2)
        yield address.read_text().strip()
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_ray_gives_the_same_numbers_although_a_worker_is_killed(twelve, cluster, tmp_path):
    file, expected = twelve
    words = [sys.executable, "-m", "bdjax", "sweep", str(file), "--out", str(tmp_path / "out"), "--devices", "1"]
    process = subprocess.Popen(
        [*words, "--backend", "ray", "--ray-address", cluster],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("[4/12]"):
            _kill_a_worker(tmp_path)
    _, errors = process.communicate()
    text = "".join(lines)
    assert process.returncode == 0, text + errors
    assert "the worker was lost" in text and "starting it again" in text and "[12/12]" in text
    assert numbers(tmp_path / "out") == expected
    assert len([path for path in (tmp_path / "out" / "victims").iterdir() if path.name[0] != "."]) == 2
    again = subprocess.run(words, capture_output=True, text=True, check=True)  # from any machine, with any backend
    assert "12 finished before, 0 to do" in again.stdout


def _kill_a_worker(folder):
    """Kill the worker of Ray that carries out a cell of this grid, and wait until the cell has ended, too."""
    cells = []
    while not cells:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
                if b"--attached" in words and str(folder / "out").encode() in words:
                    cells.append(path.parent)
            except OSError:  # it ended meanwhile
                continue
    parent = next(line for line in (cells[0] / "status").read_text().splitlines() if line.startswith("PPid:"))
    os.kill(int(parent.split()[1]), signal.SIGKILL)
    began = time.monotonic()
    while (cells[0] / "cmdline").exists() and b"--attached" in (cells[0] / "cmdline").read_bytes():
        assert time.monotonic() - began < 30
        time.sleep(0.1)
