"""How fast the library is here: `bdjax bench`, and benchmarks/compare.py beside PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from accelerator.records import Run, SkipStep
from bdjax import bench as benchmarks

ROOT = Path(__file__).parents[2]
WORKLOADS = (
    "train/small_vgg/clean/float32",
    "train/resnet18/clean/bfloat16",
    "ibau/release",
    "bibau",
    "many/loop",
    "many/vmap",
    "inversion",
    "age",
    "train/small_vgg/clean/bfloat16",
)
"""Of `bdjax bench --suite gpu`, in order of worth."""
COMPARED = ("train/small_vgg/clean/bfloat16", "train/resnet18/clean/bfloat16", "ibau/release")
"""Of benchmarks/compare.py, where PyTorch compiles its networks for tens of seconds each."""

_LEAST = 15.0  # seconds in which a process starts, compiles and runs the smaller ones


def bench(run: Run) -> None:
    """Each workload in a process of its own, with the compilation cache of this run."""
    names, repeats = (("ibau/release",), 1) if run.smoke else (WORKLOADS, 5)
    rows: list[dict[str, Any]] = []
    for name in names:  # one call each: `bench` goes by its own order
        if rows and run.left() < _LEAST:
            run.record("left out", name=name, reason=f"{run.left():.0f} s are left")
            continue
        limit = max(1.0, min(60.0, run.left()))
        found = benchmarks.bench("gpu", name, repeats=repeats, small=run.smoke, limit=limit, cold=False)
        rows += found["rows"]
        run.record("bench", **found["rows"][0])
        result = {**found, "rows": rows}
        (run.keep / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    if all("failed" in row for row in rows):
        raise RuntimeError(f"no workload came to an end: {rows[0]['failed']}")


def compare(run: Run) -> None:
    """Both sides on this device, one after the other. Raises SkipStep without PyTorch."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    if subprocess.run([run.torch_python, "-c", look], check=False).returncode:
        raise SkipStep(f"PyTorch is not installed for {Path(run.torch_python).name}")
    names, repeats = (("ibau/release",), 1) if run.smoke else (COMPARED, 5)
    out = run.keep / "compare"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "compare.py"), "--suite", "gpu", "--only", ",".join(names),
        "--repeats", str(repeats), "--out", str(out), "--torch-python", run.torch_python,
        "--threads", str(max(1, min(8, os.cpu_count() or 1))), "--pages", "small",
        "--limit", "60", "--compile-limit", "45", "--cache", str(jax.config.jax_compilation_cache_dir),
        *(["--small"] if run.smoke else []),
    ]  # fmt: skip
    recorded = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:  # one for each workload, after compare.json holds it
            sys.stdout.write(line)
            rows = json.loads((out / "compare.json").read_text())["rows"]
            for row in rows[recorded:]:
                run.record("compare", **row)
            recorded = len(rows)
    if process.returncode:
        raise RuntimeError(f"compare.py ended with code {process.returncode}")
    if all("failed" in row for row in rows):
        raise RuntimeError(f"nothing was compared: {rows[0]['failed']}")
