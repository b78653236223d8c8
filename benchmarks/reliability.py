"""Test runs and checkpoints against kills, concurrent processes, full disks and flipped bits.

    python benchmarks/reliability.py [grid] [together] [disk] [flips] [--out DIR] [--kills 50] [--cells 4] [--pairs 10]
        [--fills 40] [--offsets 200] [--seed 0]

Takes about 20 minutes on 2 idle CPU cores; tiny networks on 8x8 images. `grid` kills sweeps by SIGKILL at random
moments until they are finished and compares their results with those of an undisturbed sweep; `together` starts the
same run twice at the same time; `disk` writes checkpoints to a disk that becomes full (a tmpfs where mounting is
permitted, else a limit on file sizes); `flips` flips single bits in every file of checkpoints (the last two are in
damage.py). tests/test_reliability.py runs a small part of each. Results are written to OUT/NAME.json.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bdjax import datasets, registry
from bdjax.io import checkpoint
from bdjax.pipelines.artifact import load_model
from bdjax.pipelines.environment import environment

damage = registry.load_file(Path(__file__).with_name("damage.py"))

GRID = """
from bdjax.attacks import badnets, blended
from bdjax.defenses import finetune, ibau
from bdjax.engine import FitConfig
from bdjax.config import Experiment
from bdjax.pipelines.experiment_options import Cell

TITLE, SEEDS = "reliability", (0,)
CELLS = tuple(
    Cell(f"{{attack}} {{defense}}", Experiment(
        attack, defense, {data!r}, attack_config=config, defense_config=defense_config,
        fit=FitConfig(epochs={epochs}, batch_size=40)))
    for attack, config in (("badnets", badnets.Config(target=1)), ("blended", blended.Config(target=1)))
    for defense, defense_config in (
        ("ibau", ibau.Config("release", 2, batch_size=10)), ("finetune", finetune.Config(epochs=2)))
)[:{cells}]
"""
TIMES = {"seconds", "compile", "peak_memory_bytes", "peak_memory_of", "env", "files", "seal"}
"""Entries of results and manifests that differ between identical runs."""


def main() -> None:
    """Run the selected parts and write their results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", help="grid, together, disk, flips; default all")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/reliability"))
    for name, value in (("kills", 50), ("cells", 4), ("pairs", 10), ("fills", 40), ("offsets", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    parts = {
        "grid": lambda folder: killed_grids(folder, options.kills, dice, options.cells),
        "together": lambda folder: together(folder, options.pairs),
        "disk": lambda folder: damage.full_disk(folder, options.fills, dice),
        "flips": lambda folder: flipped_bits(folder, options.offsets, dice),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.parts or parts:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            result = {**parts[name](Path(folder)), "seed": options.seed}
        result |= {"minutes": round((time.monotonic() - began) / 60, 1), "env": environment(1)}
        (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        sys.stdout.write(json.dumps({k: v for k, v in result.items() if k != "env"}) + "\n")


# --- kills


def killed_grids(folder: Path, kills: int, dice: random.Random, cells: int = 4, epochs: int = 30) -> dict[str, Any]:
    """Kill grids `kills` times in total, finish each, and compare the results with those of an undisturbed grid."""
    file = write_grid(folder, cells, epochs)
    began = time.monotonic()
    finish(start_sweep(file, folder / "undisturbed"))
    horizon = (time.monotonic() - began) / cells
    expected = contents(folder / "undisturbed")
    targets, moments = Counter[str](), Counter[str]()
    grids, different = 0, []
    while targets.total() < kills:
        out, grids = folder / f"grid-{grids}", grids + 1
        while target := kill(start_sweep(file, out), out, dice, horizon):
            targets[target] += 1
            moments[moment(out)] += 1
            if targets.total() == kills:
                break
        finish(start_sweep(file, out))
        different += [f"grid {grids - 1}: {name}" for name in differences(expected, contents(out))]
        shutil.rmtree(out)
    counts = {"kills": targets.total(), "killed": dict(targets), "moments": dict(moments), "grids": grids}
    counts |= {"cells": cells * grids, "epochs": epochs, "compared": len(expected)}
    return {"kind": "killed grids", **counts, "different": different}


def moment(out: Path) -> str:
    """Return the stage that a kill interrupted, from the files that exist."""
    names = files_below(out)
    if any(".training-" in name for name in names):
        return "training, with an epoch kept"
    runs = [Path(name) for name in names if name.endswith("config.json")]
    if any(not run.with_name("result.json").exists() for run in runs):
        return "defense or measuring"
    return "starting, loading, training before its first epoch, or between cells"


def kill(process: "subprocess.Popen[bytes]", out: Path, dice: random.Random, horizon: float) -> str | None:
    """Kill a sweep and its worker, only the worker, or only the sweep.

    Half of the moments are uniform over the duration of a cell, half follow the creation of the next file. Returns what
    was killed, or None when the sweep had already ended.
    """
    if dice.random() < 0.5:
        time.sleep(dice.uniform(0, horizon))
    else:
        before, deadline = files_below(out), time.monotonic() + 3 * horizon
        while process.poll() is None and files_below(out) == before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, horizon / 3))
    target = dice.choice(("everything", "the worker", "the sweep"))
    workers = children(process.pid)
    if process.poll() is not None or (target == "the worker" and not workers):
        process.communicate()
        return None
    if target == "the worker":
        with contextlib.suppress(ProcessLookupError):
            os.kill(workers[0], signal.SIGKILL)
    elif target == "the sweep":  # the worker continues beside the worker of the next sweep
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return target


def start_sweep(file: Path, out: Path) -> "subprocess.Popen[bytes]":
    """Start a sweep in a new process group."""
    return start("sweep", str(file), "--out", str(out), "--devices", "1")


def start(*argv: str) -> "subprocess.Popen[bytes]":
    """Start a command of bdjax."""
    command = [sys.executable, "-m", "bdjax", *argv]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, env={**os.environ}
    )


def finish(process: "subprocess.Popen[bytes]") -> None:
    """Wait for an undisturbed command; exit when it fails."""
    _, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"an undisturbed command failed ({process.returncode}):\n{err.decode()[-2000:]}")


def children(pid: int) -> list[int]:
    """Return the child processes of a process (Linux)."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def files_below(folder: Path) -> set[str]:
    """Return the paths of all files below a folder."""
    return {parent + name for parent, _, names in os.walk(folder) for name in names}


def write_grid(folder: Path, cells: int, epochs: int) -> Path:
    """Write a file of experiments and its data: 8x8 images whose bright quarter determines the class."""
    rng, labels = np.random.default_rng(0), np.tile(np.arange(4, dtype=np.int32), 50)
    images = rng.integers(0, 80, (200, 8, 8, 1)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 150
    np.savez(folder / "b.npz", x_train=images[:160], y_train=labels[:160], x_test=images[160:], y_test=labels[160:])
    (folder / "grid.py").write_text(GRID.format(data=f"npz:{folder / 'b.npz'}", cells=cells, epochs=epochs))
    return folder / "grid.py"


def contents(out: Path) -> dict[str, Any]:
    """Return everything below a folder that must be reproducible: results without times, arrays and weights."""
    content: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.name in ("result.json", "manifest.json", "config.json"):
            content[name] = without_times(json.loads(path.read_text()))
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                content |= {f"{name}/{key}": (arrays[key].shape, arrays[key].tobytes()) for key in arrays.files}
        if path.name == "manifest.json":
            manifest = checkpoint.read_manifest(path.parent)  # verifies the hash of every file
            data = datasets.load(manifest["dataset"]["spec"])
            leaves = jax.tree_util.tree_leaves_with_path(load_model(manifest, path.parent, data)[1])
            content |= {f"{name}{jax.tree_util.keystr(path)}": np.asarray(leaf).tobytes() for path, leaf in leaves}
    return content


def without_times(value: Any) -> Any:
    """Remove the entries in TIMES from a JSON value."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def differences(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """Return the names that are missing, new, or different."""
    return sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))


# --- two runs at once


def together(folder: Path, pairs: int, epochs: int = 10) -> dict[str, Any]:
    """Start the same run twice at the same time; in every other pair, kill one of the two."""
    file = write_grid(folder, 1, epochs)
    argv = ["run", "badnets", "ibau", "--dataset", f"npz:{folder / 'b.npz'}", "--attack.target", "1", "--fit.epochs",
            str(epochs), "--fit.batch-size", "40", "--defense.rounds", "2", "--defense.batch-size", "10",
            "--devices", "1", "--out"]  # fmt: skip
    finish(start(*argv, str(folder / "alone")))
    expected, bad, killed = contents(folder / "alone"), [], 0
    for pair in range(pairs):
        out = folder / f"pair-{pair}"
        first, second = start(*argv, str(out)), start(*argv, str(out))
        if pair % 2:
            while not out.exists() and first.poll() is None:
                time.sleep(0.01)
            time.sleep(0.3)
            killed += first.poll() is None
            first.kill()
        errors = [process.communicate()[1].decode() for process in (first, second)]
        if second.returncode or (first.returncode and not pair % 2):
            bad.append(f"pair {pair}: exit codes {first.returncode}, {second.returncode}: {''.join(errors)[-500:]}")
        bad += [f"pair {pair}: {name}" for name in differences(expected, contents(out))]
        shutil.rmtree(out)
    return {"kind": "two at once", "pairs": pairs, "one_killed": killed, "compared": len(expected), "different": bad,
            "grid": file.name}  # fmt: skip


# --- flipped bits


def flipped_bits(folder: Path, offsets: int, dice: random.Random, epochs: int = 3) -> dict[str, Any]:
    """Flip `offsets` single bits in every file of a victim, a purified model and a saved epoch."""
    write_grid(folder, 1, epochs)
    argv = ["run", "badnets", "ibau", "--dataset", f"npz:{folder / 'b.npz'}", "--attack.target", "1", "--fit.epochs",
            str(epochs), "--defense.rounds", "1", "--devices", "1", "--out", str(folder / "run")]  # fmt: skip
    finish(start(*argv))
    state = {"params": {"w": np.arange(1000, dtype=np.float32)}, "opt": {"count": np.int32(3)}}
    saver = checkpoint.EpochSaver(folder / "epochs")
    saver.save(3, state)
    reads = {
        folder / "run" / "victim": lambda: checkpoint.read_manifest(folder / "run" / "victim"),
        folder / "run" / "purified": lambda: checkpoint.read_manifest(folder / "run" / "purified"),
        folder / "epochs" / "epoch-000003": lambda: saver.restore(state),
    }
    results = {directory.name: damage.flipped(directory, read, offsets, dice) for directory, read in reads.items()}
    return {"kind": "flipped bits", "flips": sum(result["flips"] for result in results.values()), **results}


if __name__ == "__main__":
    main()
