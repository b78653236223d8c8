"""`bdjax evaluate`: measure the model in a directory."""

import json
from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._devices import run_context
from bdjax.cli._methods import pop_method
from bdjax.cli._options import CommonFlags
from bdjax.cli._output import print_remarks, say
from bdjax.cli._parsing import first_argument, parse_flags
from bdjax.text import UNMEASURED

ORDER = 50
USAGE = "DIR [--dataset D] [--attack ATTACK --attack.FIELD ..]"
SUMMARY = "measure accuracy and attack success rate of the model in DIR"


@dataclass
class Flags(CommonFlags):
    """Flags of `bdjax evaluate`."""

    dataset: str | None = None
    """Another data set of the same image shape: digits, npz:PATH, folder:PATH or tfds:NAME. Required for an imported
    model, whose attack success rate is measured with the trigger of --attack ATTACK --attack.FIELD .., if given."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    directory = Path(first_argument("evaluate", argv))
    attack, rest = pop_method("attack", argv[1:])
    options = parse_flags("evaluate", (argv[0],), rest, Flags, **({"attack": attack} if attack else {}))
    from bdjax.pipelines.evaluate import evaluate
    from bdjax.pipelines.opening import EvaluationSource

    source = EvaluationSource(options.dataset, attack=attack, attack_config=getattr(options, "attack", None))
    with run_context(options):
        result = evaluate(directory, source)
    by_trigger = {f"asr {label}": value for label, value in result.get("asr_by_trigger", {}).items()}
    printed_below = ("asr_by_trigger", "data", "warnings")
    for name, value in ({k: v for k, v in result.items() if k not in printed_below} | by_trigger).items():
        if value is None:
            value = UNMEASURED if name == "asr" else "-"
        say(f"{name:16s} {value:.4f}" if isinstance(value, float) else f"{name:16s} {value}")
    print_remarks(result)
    if options.json:
        say(json.dumps(result))
