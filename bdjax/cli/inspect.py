"""`bdjax inspect`: compare the activations of a victim and its purified model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bdjax.cli._devices import run_context
from bdjax.cli._methods import pop_method
from bdjax.cli._options import CommonFlags
from bdjax.cli._output import say
from bdjax.cli._parsing import parse_flags
from bdjax.errors import InputError

ORDER = 47
USAGE = "VICTIM_DIR PURIFIED_DIR [--clean-model DIR] [--dataset D] [--attack ATTACK --attack.FIELD ..] [--out DIR]"
SUMMARY = "compare the activations of a victim and its purified model: TAC, CKA, BEC, t-SNE"


@dataclass(kw_only=True)
class Flags(CommonFlags):
    """Flags of `bdjax inspect`."""

    victim: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VICTIM_DIR")]
    """Directory of the model with the backdoor."""
    purified: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PURIFIED_DIR")]
    """Directory of the victim after a defense."""
    clean_model: Path | None = None
    """Directory of a model trained without poison (`bdjax train clean` with the victim's flags and another seed), which
    BEC needs."""
    out: Path | None = None
    """Directory of inspection.json and inspection.png, where existing ones are replaced; default:
    PURIFIED_DIR-inspection."""
    dataset: str | None = None
    """Data set of the victim, if it has moved: digits, npz:PATH, folder:PATH or tfds:NAME. Required for an imported
    model, together with its trigger: --attack ATTACK --attack.FIELD .."""
    count: int | None = None
    """Number of held-out images to compare activations on; default: 500, or all if there are fewer."""
    seed: int = 0
    """Seed of the choice of images and of the t-SNE."""
    share: float = 1.0
    """Share of the layers, in (0, 1] and counted from the last, that the means are taken over; BI-BAU uses 0.5."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    if len(argv) > 2 and not any(argument.startswith("-") for argument in argv[:3]):
        raise InputError("the third argument of inspect was renamed: use --clean-model DIR.")
    attack, rest = pop_method("attack", argv)
    options = parse_flags("inspect", (), rest, Flags, **({"attack": attack} if attack else {}))
    from bdjax.pipelines.inspection import InspectionRequest, inspect
    from bdjax.pipelines.opening import EvaluationSource
    from bdjax.reports import inspection as report

    out = options.out or options.purified.with_name(f"{options.purified.name}-inspection")
    report.check_directory(out)
    source = EvaluationSource(options.dataset, attack=attack, attack_config=getattr(options, "attack", None))
    request = InspectionRequest(
        options.victim, options.purified, options.clean_model, source, options.count, options.seed, options.share
    )
    with run_context(options) as context:
        result = inspect(request, context.tick)
    say(report.write(result, out))
    if options.json:
        say(json.dumps(result))
