"""`bdjax inspect`: look inside a victim and what a defense made of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bdjax.cli._common import chosen, parse, ready, say
from bdjax.cli._options import Common

ORDER = 47
USAGE = "VICTIM_DIR PURIFIED_DIR [CLEAN_DIR] [--dataset D] [--attack ATTACK --attack.FIELD ..] [--out DIR]"
SUMMARY = "what a defense did inside a victim"


@dataclass(kw_only=True)
class Flags(Common):
    """Flags of `bdjax inspect`."""

    victim: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VICTIM_DIR")]
    """The model with the backdoor."""
    purified: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PURIFIED_DIR")]
    """What a defense made of it."""
    clean: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[CLEAN_DIR]")] = None
    """From `bdjax train clean` with the victim's flags and another seed; without it there is no BEC."""
    out: Path | None = None
    """Directory of inspection.json and inspection.png; those that stand there are replaced. Default:
    PURIFIED_DIR-inspection."""
    dataset: str | None = None
    """Where the victim's data set lies now, if it has moved. An imported model needs one, and `--attack ATTACK
    --attack.FIELD ..` for the trigger to look for."""
    count: int | None = None
    """Held-out images to look inside the models with; default 500, or all if there are fewer."""
    seed: int = 0
    """Decides which these are, and the t-SNE."""
    share: float = 1.0
    """Of the layers, counted from the last, that the means are over, in (0, 1]; BI-BAU takes 0.5."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    attack, rest = chosen("attack", argv)
    options = parse("inspect", (), rest, Flags, **({"attack": attack} if attack else {}))
    from bdjax.pipelines import inspection
    from bdjax.reports import inspection as report

    out = options.out or options.purified.with_name(f"{options.purified.name}-inspection")
    report.check_directory(out)
    with ready(options) as context:
        models = options.victim, options.purified, options.clean
        drawn = {"count": options.count, "seed": options.seed, "share": options.share}
        result = inspection.inspect(
            *models, options.dataset, **drawn, attack=attack, attack_config=getattr(options, "attack", None),
            tick=context.tick,
        )  # fmt: skip
    say(report.write(result, out))
    if options.json:
        say(json.dumps(result))
