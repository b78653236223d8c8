"""`bdjax reactivate`: attack a purified model again."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from bdjax import registry
from bdjax.cli._common import first, methods, parse, ready, remove_run, say
from bdjax.cli._options import Device

ORDER = 45
USAGE = "PURIFIED_DIR ATTACK [--clean DIR] [--attack.FIELD ..] [--retuning.FIELD ..] [--seed S] [--out DIR]"
SUMMARY = "attack a purified model again (retuning, query_reactivation): R-ASR, Q-ASR"


@dataclass
class Flags(Device):
    """Flags of `bdjax reactivate`."""

    clean: Path | None = None
    """Directory of a clean model trained alike (`bdjax train clean`), the line to compare with; default one that is
    found in, or trained into, --root."""
    seed: int = 0
    """Of the attack."""
    dataset: str | None = None
    """Where the model's data set lies now, if it has moved."""
    root: Path = Path("runs")
    """Where clean models are kept: ROOT/victims."""
    out: Path | None = None
    """Directory for the result and the re-activated model; default PURIFIED_DIR-ATTACK beside it."""
    force: bool = False
    """Replace an earlier result that stands there."""


def _needs(attack: str) -> dict[str, type]:
    """The Configs of the re-activations that `attack` begins with."""
    from bdjax.config import config_of

    return {name: config_of("attacks", name) for name in getattr(registry.load("attacks", attack), "NEEDS", ())}


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    directory = Path(first("reactivate", argv))
    (attack,), rest = methods(argv[1:], "reactivate", ("attacks",))
    needs = _needs(attack)
    fields = [(name, kind, dataclasses.field(default_factory=kind)) for name, kind in needs.items()]
    flags = dataclasses.make_dataclass("Flags", fields, bases=(Flags,))
    options = parse("reactivate", (str(directory), attack), rest, flags, attack=attack)
    from bdjax.pipelines import reactivation

    out = options.out or directory.with_name(f"{directory.name}-{attack}")
    with ready(options) as context:
        context.store = options.root / "victims"
        if options.force:
            remove_run(out)
        result = reactivation.reactivate(
            directory, attack, options.attack, out,
            earlier={name: getattr(options, name) for name in needs}, seed=options.seed, clean=options.clean,
            dataset=options.dataset, context=context,
        )  # fmt: skip
    say(f"{attack} of {directory}: n = {result['n_test']} (ACC), {result['n_asr']} (ASR); seed {options.seed}")
    say(f"{'':16s}{'ACC':>8s}{'ASR':>8s}{'ACC after':>11s}{result['metric']:>11s}")
    for label, before, after in (
        ("purified", result["before"], result["after"]),
        ("clean model", result["clean_before"], result["clean_after"]),
    ):
        rates = (before["acc"], before["asr"], after["acc"], after["asr"])
        cells = ["-" if rate is None else f"{100 * rate:.2f}" for rate in rates]
        say(f"{label:16s}{cells[0]:>8s}{cells[1]:>8s}{cells[2]:>11s}{cells[3]:>11s}")
    say(f"result:  {out / 'result.json'}")
    if options.json:
        say(json.dumps(result))
