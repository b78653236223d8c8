"""What a kill, a second process, a full disk and a flipped bit do to runs and checkpoints.

    python benchmarks/reliability.py [grid] [together] [disk] [flips] [--out DIR] [--kills 50] [--cells 4] [--pairs 10]
        [--fills 40] [--offsets 200] [--seed 0]

About 20 minutes on 2 CPU cores that do nothing else; grids of tiny networks on 8x8 images. `grid` kills sweeps by
SIGKILL at random moments until they are finished and compares what they leave with an undisturbed one; `together`
starts the same run twice at once; `disk` writes checkpoints to a disk that is filled meanwhile (a tmpfs where it may be
mounted, else a limit on the size of files); `flips` turns one bit in every file of checkpoints (the last two are in
damage.py). tests/test_reliability.py does a little of each. Results go to OUT/NAME.json.
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
from bdjax.pipelines import victim
from bdjax.pipelines.environment import environment

damage = registry.load_file(Path(__file__).with_name("damage.py"))

GRID = """
from bdjax.attacks import badnets, blended
from bdjax.defenses import finetune, ibau
from bdjax.engine import FitConfig
from bdjax.config import Experiment
from bdjax.pipelines.sweep import Cell

TITLE, SEEDS = "reliability", (0,)
CELLS = tuple(
    Cell(f"{{attack}} {{defense}}", Experiment(
        attack, defense, {data!r}, attack_config=config, defense_config=own,
        fit=FitConfig(epochs={epochs}, batch_size=40)))
    for attack, config in (("badnets", badnets.Config(target=1)), ("blended", blended.Config(target=1)))
    for defense, own in (("ibau", ibau.Config("release", 2, batch_size=10)), ("finetune", finetune.Config(epochs=2)))
)[:{cells}]
"""
TIMES = {"seconds", "compile", "peak_memory_bytes", "peak_memory_of", "env", "files", "seal"}
"""Entries of results and manifests that are not the same from one time to the next."""


def main() -> None:
    """Run what is asked for, and write it down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", help="grid, together, disk, flips; default all")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/reliability"))
    for name, value in (("kills", 50), ("cells", 4), ("pairs", 10), ("fills", 40), ("offsets", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    dice = random.Random(given.seed)
    parts = {
        "grid": lambda folder: killed_grids(folder, given.kills, dice, given.cells),
        "together": lambda folder: together(folder, given.pairs),
        "disk": lambda folder: damage.full_disk(folder, given.fills, dice),
        "flips": lambda folder: flipped_bits(folder, given.offsets, dice),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.parts or parts:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            found = {**parts[name](Path(folder)), "seed": given.seed}
        found |= {"minutes": round((time.monotonic() - began) / 60, 1), "env": environment(1)}
        (given.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        sys.stdout.write(json.dumps({k: v for k, v in found.items() if k != "env"}) + "\n")


# --- kills


def killed_grids(folder: Path, kills: int, dice: random.Random, cells: int = 4, epochs: int = 30) -> dict[str, Any]:
    """Grids killed until so many kills have hit, each finished afterwards and compared with an undisturbed one."""
    file = write_grid(folder, cells, epochs)
    began = time.monotonic()
    finish(sweeping(file, folder / "undisturbed"))
    horizon = (time.monotonic() - began) / cells
    expected = contents(folder / "undisturbed")
    whom, when = Counter[str](), Counter[str]()
    grids, different = 0, []
    while whom.total() < kills:
        out, grids = folder / f"grid-{grids}", grids + 1
        while hit := kill(sweeping(file, out), out, dice, horizon):
            whom[hit] += 1
            when[moment(out)] += 1
            if whom.total() == kills:
                break
        finish(sweeping(file, out))
        different += [f"grid {grids - 1}: {name}" for name in differing(expected, contents(out))]
        shutil.rmtree(out)
    return {"kind": "killed grids", "kills": whom.total(), "killed": dict(whom), "moments": dict(when), "grids": grids,
            "cells": cells * grids, "epochs": epochs, "compared": len(expected), "different": different}  # fmt: skip


def moment(out: Path) -> str:
    """What a kill has interrupted, by what it left."""
    names = listed(out)
    if any(".training-" in name for name in names):
        return "training, with an epoch kept"
    runs = [Path(name) for name in names if name.endswith("config.json")]
    if any(not run.with_name("result.json").exists() for run in runs):
        return "defense or measuring"
    return "starting, loading, training before its first epoch, or between cells"


def kill(process: "subprocess.Popen[bytes]", out: Path, dice: random.Random, horizon: float) -> str | None:
    """Kill a sweep and its worker, the worker alone, or the sweep alone; what was hit, or None where it was too late.

    Half of the moments are spread over the time that a cell takes, half begin when the next file appears.
    """
    if dice.random() < 0.5:
        time.sleep(dice.uniform(0, horizon))
    else:
        before, deadline = listed(out), time.monotonic() + 3 * horizon
        while process.poll() is None and listed(out) == before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, horizon / 3))
    whom = dice.choice(("everything", "the worker", "the sweep"))
    workers = children(process.pid)
    if process.poll() is not None or (whom == "the worker" and not workers):
        process.communicate()
        return None
    if whom == "the worker":
        with contextlib.suppress(ProcessLookupError):
            os.kill(workers[0], signal.SIGKILL)
    elif whom == "the sweep":  # the worker goes on, and meets the next sweep's
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return whom


def sweeping(file: Path, out: Path) -> "subprocess.Popen[bytes]":
    """A sweep in a process group of its own."""
    return started("sweep", str(file), "--out", str(out), "--devices", "1")


def started(*argv: str) -> "subprocess.Popen[bytes]":
    """A command of bdjax."""
    command = [sys.executable, "-m", "bdjax", *argv]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, env={**os.environ}
    )


def finish(process: "subprocess.Popen[bytes]") -> None:
    """Wait; a failure here is a mistake of this file, or of bdjax without any disturbance."""
    _, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"an undisturbed command failed ({process.returncode}):\n{err.decode()[-2000:]}")


def children(pid: int) -> list[int]:
    """Processes that a process started (Linux)."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def listed(folder: Path) -> set[str]:
    """Every path below a folder that is there now."""
    return {at + name for at, _, names in os.walk(folder) for name in names}


def write_grid(folder: Path, cells: int, epochs: int) -> Path:
    """A file of experiments and its data: 8x8 images whose bright quarter tells the class."""
    rng, labels = np.random.default_rng(0), np.tile(np.arange(4, dtype=np.int32), 50)
    images = rng.integers(0, 80, (200, 8, 8, 1)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 150
    np.savez(folder / "b.npz", x_train=images[:160], y_train=labels[:160], x_test=images[160:], y_test=labels[160:])
    (folder / "grid.py").write_text(GRID.format(data=f"npz:{folder / 'b.npz'}", cells=cells, epochs=epochs))
    return folder / "grid.py"


def contents(out: Path) -> dict[str, Any]:
    """Everything below a folder that must be the same each time: results without times, arrays and weights as bytes."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.name in ("result.json", "manifest.json", "config.json"):
            found[name] = timeless(json.loads(path.read_text()))
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                found |= {f"{name}/{key}": (arrays[key].shape, arrays[key].tobytes()) for key in arrays.files}
        if path.name == "manifest.json":
            manifest = checkpoint.read_manifest(path.parent)  # every file against its hash
            data = datasets.load(manifest["dataset"]["spec"])
            leaves = jax.tree_util.tree_leaves_with_path(victim.load_model(manifest, path.parent, data)[1])
            found |= {f"{name}{jax.tree_util.keystr(at)}": np.asarray(leaf).tobytes() for at, leaf in leaves}
    return found


def timeless(value: Any) -> Any:
    """JSON without what differs from one time to the next."""
    if isinstance(value, dict):
        return {key: timeless(held) for key, held in value.items() if key not in TIMES}
    return [timeless(held) for held in value] if isinstance(value, list) else value


def differing(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names that are missing, new, or not the same."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


# --- two at once


def together(folder: Path, pairs: int, epochs: int = 10) -> dict[str, Any]:
    """The same run twice at once, in pairs; in every other pair one of the two is killed while both are at it."""
    file = write_grid(folder, 1, epochs)
    argv = ["run", "badnets", "ibau", "--dataset", f"npz:{folder / 'b.npz'}", "--attack.target", "1", "--fit.epochs",
            str(epochs), "--fit.batch-size", "40", "--defense.rounds", "2", "--defense.batch-size", "10",
            "--devices", "1", "--out"]  # fmt: skip
    finish(started(*argv, str(folder / "alone")))
    expected, bad, killed = contents(folder / "alone"), [], 0
    for pair in range(pairs):
        out = folder / f"pair-{pair}"
        one, other = started(*argv, str(out)), started(*argv, str(out))
        if pair % 2:
            while not out.exists() and one.poll() is None:
                time.sleep(0.01)
            time.sleep(0.3)
            killed += one.poll() is None
            one.kill()
        said = [process.communicate()[1].decode() for process in (one, other)]
        if other.returncode or (one.returncode and not pair % 2):
            bad.append(f"pair {pair}: exit codes {one.returncode}, {other.returncode}: {''.join(said)[-500:]}")
        bad += [f"pair {pair}: {name}" for name in differing(expected, contents(out))]
        shutil.rmtree(out)
    return {"kind": "two at once", "pairs": pairs, "one_killed": killed, "compared": len(expected), "different": bad,
            "grid": file.name}  # fmt: skip


# --- a flipped bit


def flipped_bits(folder: Path, offsets: int, dice: random.Random, epochs: int = 3) -> dict[str, Any]:
    """One bit turned in every file of a victim, of a purified model and of an unfinished epoch, at so many places."""
    write_grid(folder, 1, epochs)
    argv = ["run", "badnets", "ibau", "--dataset", f"npz:{folder / 'b.npz'}", "--attack.target", "1", "--fit.epochs",
            str(epochs), "--defense.rounds", "1", "--devices", "1", "--out", str(folder / "run")]  # fmt: skip
    finish(started(*argv))
    state = {"params": {"w": np.arange(1000, dtype=np.float32)}, "opt": {"count": np.int32(3)}}
    saver = checkpoint.EpochSaver(folder / "epochs")
    saver.save(3, state)
    reads = {
        folder / "run" / "victim": lambda: checkpoint.read_manifest(folder / "run" / "victim"),
        folder / "run" / "purified": lambda: checkpoint.read_manifest(folder / "run" / "purified"),
        folder / "epochs" / "epoch-000003": lambda: saver.restore(state),
    }
    found = {directory.name: damage.flipped(directory, read, offsets, dice) for directory, read in reads.items()}
    return {"kind": "flipped bits", "flips": sum(one["flips"] for one in found.values()), **found}


if __name__ == "__main__":
    main()
