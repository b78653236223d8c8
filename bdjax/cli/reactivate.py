"""`bdjax reactivate`: try to reactivate the backdoor of a purified model."""

import json
from dataclasses import dataclass
from pathlib import Path

from bdjax import registry
from bdjax.cli._devices import run_context
from bdjax.cli._methods import leading_methods
from bdjax.cli._options import DeviceFlags
from bdjax.cli._output import say
from bdjax.cli._parsing import first_argument, parse_flags
from bdjax.cli._paths import remove_run

ORDER = 45
USAGE = "PURIFIED_DIR ATTACK [--clean-model DIR] [--attack.FIELD ..] [--retuning.FIELD ..] [--seed S] [--out DIR]"
SUMMARY = "try to reactivate the backdoor of a purified model (retuning, query_reactivation): R-ASR, Q-ASR"


@dataclass
class Flags(DeviceFlags):
    """Flags of `bdjax reactivate`."""

    clean_model: Path | None = None
    """Directory of the same model trained without poison (`bdjax train clean`), which is attacked for comparison;
    default: one that is found in, or trained into, ROOT/victims."""
    seed: int = 0
    """Seed of the attack."""
    dataset: str | None = None
    """Data set of the model, if it has moved: digits, npz:PATH, folder:PATH or tfds:NAME."""
    root: Path = Path("runs")
    """Directory of victims: clean models are kept in ROOT/victims."""
    out: Path | None = None
    """Directory of the result and the reactivated model; default: PURIFIED_DIR-ATTACK."""
    force: bool = False
    """Replace an earlier result."""


def _needs(attack: str) -> dict[str, type]:
    """Config classes, by name, of the reactivation attacks that run before `attack`."""
    from bdjax.config import config_of

    return {name: config_of("attacks", name) for name in registry.load("attacks", attack).needs}


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    directory = Path(first_argument("reactivate", argv))
    (attack,), rest = leading_methods(argv[1:], "reactivate", ("attacks",))
    needs = _needs(attack)
    options = parse_flags("reactivate", (str(directory), attack), rest, Flags, **needs, attack=attack)
    from bdjax.pipelines.reactivation import ReactivationRequest, reactivate

    request = ReactivationRequest(
        directory, attack, options.attack, options.seed, {name: getattr(options, name) for name in needs},
        options.clean_model, dataset=options.dataset,
    )  # fmt: skip
    out = options.out or directory.with_name(f"{directory.name}-{attack}")
    with run_context(options) as context:
        context.store = options.root / "victims"
        if options.force:
            remove_run(out)
        result = reactivate(request, out, context)
    say(f"{attack} of {directory}: n = {result['n_test']} (ACC), {result['n_asr']} (ASR); seed {options.seed}")
    say(f"{'':16s}{'ACC':>8s}{'ASR':>8s}{'ACC after':>11s}{result['metric']:>11s}")
    for label, before, after in (
        ("purified", result["before"], result["after"]),
        ("clean model", result["clean_before"], result["clean_after"]),
    ):
        assert before is not None and after is not None  # the request attacks the clean model, too
        rates = (before["acc"], before["asr"], after["acc"], after["asr"])
        cells = ["-" if rate is None else f"{100 * rate:.2f}" for rate in rates]
        say(f"{label:16s}{cells[0]:>8s}{cells[1]:>8s}{cells[2]:>11s}{cells[3]:>11s}")
    say(f"result:  {out / 'result.json'}")
    if options.json:
        say(json.dumps(result))
