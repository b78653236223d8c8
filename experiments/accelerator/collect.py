"""What a run gave, as it is committed: results.jsonl, a table, and the archives' files without weights.

    PYTHONPATH=experiments python -m accelerator.collect OUT [experiments/results/accelerator]

The folder is named after the device that the run found.
"""

import re
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerator import records

RESULTS = Path(__file__).parents[1] / "results" / "accelerator"


def collect(out: Path, root: Path = RESULTS) -> Path:
    """Copy what is worth keeping from OUT into a folder of `root`, and return it. Raises SystemExit without a card."""
    found = records.read(out / "results.jsonl")
    machine = next((record for record in found if record.get("what") == "environment"), None)
    if machine is None:
        raise SystemExit(f"{out / 'results.jsonl'} does not say what the machine was: its first step did not end.")
    folder = root / re.sub(r"[^a-z0-9]+", "-", str(machine["device"]).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(out / "results.jsonl", folder)
    for archive in sorted(out.glob("files-*.zip")):
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder, [name for name in opened.namelist() if not name.startswith("weights/")])
    (folder / "table.md").write_text(table(found))
    return folder


def table(found: Sequence[dict[str, Any]]) -> str:
    """How the steps ended, and every measurement in a line, as Markdown."""
    machine: dict[str, Any] = next((record for record in found if record.get("what") == "environment"), {})
    begin: dict[str, Any] = next((record for record in found if record["kind"] == "begin"), {})
    facts = ", ".join(
        f"{name} {machine[name]}" for name in ("device", "jax", "flax", "python", "date") if name in machine
    )
    lines = [f"`{begin.get('command', '')}`", "", f"{facts}; commit {begin.get('commit_prepared')}.", ""]
    if machine.get("smoke"):
        lines += ["**Tiny sizes: these numbers mean nothing.**", ""]
    lines += ["| step | ended | seconds | reason |", "|---|---|--:|---|"]
    for record in found:
        if record["kind"] == "step":
            lines.append(f"| {record['step']} | {record['status']} | {record['seconds']:.0f} | {record['reason']} |")
    lines += ["", "| step | what | measured |", "|---|---|---|"]
    for record in found:
        if record["kind"] == "result" and record["what"] != "environment":
            cells = [f"{name} {_text(value)}" for name, value in record.items() if name not in _HIDDEN]
            lines.append(f"| {record['step']} | {record['what']} | {'; '.join(cells)} |")
    return "\n".join(lines) + "\n"


_HIDDEN = ("kind", "step", "what", "smoke", "env")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value).replace("|", "/")


if __name__ == "__main__":
    sys.stdout.write(f"{collect(Path(sys.argv[1]), *map(Path, sys.argv[2:]))}\n")
