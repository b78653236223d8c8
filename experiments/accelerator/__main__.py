"""The whole run: packages, steps, archives. `run.sh` calls this; its options are explained in README.md.

It is no file of cells, because it measures a machine within a limit of time and must be of use when a step fails. Its
options are argparse's, because it begins before the carried wheels, tyro among them, are unpacked.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from accelerator import packing, records, schedule, wheels
from accelerator.environment import of_steps

CARRIED = Path(__file__).parent / "carry"


def main(argv: list[str]) -> int:
    """Carry out the schedule. Returns 1 when a step failed or ran out of its time, else 0."""
    options = _options(argv)
    out, began = options.out.absolute(), time.time()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise SystemExit(f"{out} is not empty. Give the name of a new directory.")
    work = options.work.absolute()
    keep, site, file = work / "keep", work / "site", out / "results.jsonl"
    for folder in (keep, site):
        folder.mkdir(parents=True, exist_ok=True)
    note = work / "out"
    note.write_text(str(out))  # for run.sh, should this process be killed before it has packed
    signal.signal(signal.SIGTERM, _stop)
    try:
        env = of_steps(work, site, options.smoke)
        commit = (CARRIED / "commit.txt").read_text().strip() if (CARRIED / "commit.txt").exists() else None
        records.append(file, {"kind": "begin", "command": _command(argv), "commit_prepared": commit})
        _install(site, file)
        names = [name for name in options.only.split(",") if name]
        steps = [step for step in schedule.STEPS if not names or step.name in names]
        given = ["--work", work, "--keep", keep, "--records", file, "--images", options.images]
        given += ["--torch-python", options.torch_python, *(["--smoke"] if options.smoke else [])]

        def command(step: schedule.Step, deadline: float) -> list[str]:
            return [sys.executable, "-m", "accelerator.steps", step.name, str(deadline), *map(str, given)]

        logs = keep / "logs"
        schedule.carry_out(steps, command, budget=options.budget, file=file, logs=logs, env=env, began=began)
    finally:
        left_out = packing.pack(out, keep)
        seconds = time.time() - began
        records.append(file, {"kind": "end", "seconds": seconds, "left_out": left_out})
        note.unlink()
        sys.stdout.write(f"{seconds:.0f} s; {out}: {', '.join(sorted(path.name for path in out.iterdir()))}\n")
        sys.stdout.flush()
    ended = [record["status"] for record in records.read(file) if record["kind"] == "step"]
    return int(any(status in ("failed", "timeout") for status in ended))


def _install(site: Path, file: Path) -> None:
    """Carried wheels of what is missing; the steps say what else they miss."""
    begin, found = time.time(), wheels.needed(CARRIED / "wheels")
    reason = ""
    try:
        wheels.install(found, site)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(error)
    names = [path.name for path in found]
    records.append(file, {"kind": "wheels", "installed": names, "seconds": time.time() - begin, "reason": reason})


def _command(argv: list[str]) -> str:
    """The command as it was given, without the paths of this machine."""
    words = [Path(word).name if os.path.isabs(word) else word for word in argv[2:]]  # without run.sh's own --work
    return " ".join(["experiments/accelerator/run.sh", *words])


def _stop(*_: object) -> None:
    raise SystemExit("stopped by SIGTERM")


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.sh", description=(__doc__ or "").partition("\n")[0])
    packed = CARRIED / "images.npz"
    parser.add_argument("--out", type=Path, required=True, help="new directory")
    parser.add_argument("--work", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--images", default=str(packed) if packed.exists() else "", help="images.npz, or npz:FILE")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--only", default="", help="names of steps with commas between; default all")
    parser.add_argument("--smoke", action="store_true", help="every step at tiny sizes on a CPU")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with PyTorch")
    options = parser.parse_args(argv)
    known = [step.name for step in schedule.STEPS]
    if wrong := [name for name in options.only.split(",") if name and name not in known]:
        parser.error(f"--only {','.join(wrong)}: there are {', '.join(known)}.")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
