"""`bdjax evaluate`: measure a model directory again."""

import json
from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._common import chosen, first, parse, ready, remarks, say
from bdjax.cli._options import Common
from bdjax.text import UNMEASURED

ORDER = 50
USAGE = "DIR [--data D] [--attack ATTACK --attack.FIELD ..]"
SUMMARY = "accuracy and attack success rate of a model directory"


@dataclass
class Flags(Common):
    """Flags of `bdjax evaluate`."""

    data: str | None = None
    """Another data set of the model's shape: digits, npz:PATH, folder:PATH or tfds:NAME. An imported model needs one,
    and `--attack ATTACK --attack.FIELD ..` says which trigger it is tried with; without, its accuracy is measured."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    directory = Path(first("evaluate", argv))
    attack, rest = chosen("attack", argv[1:])
    options = parse("evaluate", (argv[0],), rest, Flags, **({"attack": attack} if attack else {}))
    from bdjax.pipelines import run

    with ready(options):
        found = run.evaluate(directory, options.data, attack, getattr(options, "attack", None))
    by_trigger = {f"asr {label}": value for label, value in found.get("asr_by_trigger", {}).items()}
    apart = ("asr_by_trigger", "data", "warnings")
    for name, value in ({k: v for k, v in found.items() if k not in apart} | by_trigger).items():
        if value is None:
            value = UNMEASURED if name == "asr" else "-"
        say(f"{name:16s} {value:.4f}" if isinstance(value, float) else f"{name:16s} {value}")
    remarks(found)
    if options.json:
        say(json.dumps(found))
