"""`bdjax run`: the main job, from an attack's name to the numbers after a defense."""

from dataclasses import dataclass

from bdjax.cli._common import finish, methods, parse, ready, remove_run
from bdjax.cli._options import Plant

ORDER = 20
USAGE = (
    "ATTACK DEFENSE [--dataset D] [--model M] [--seed S] [--attack.FIELD ..] [--defense.FIELD ..] [--fit.FIELD ..]"
    " [--split.FIELD ..] [--clean] [--out DIR]"
)
SUMMARY = "plant ATTACK, checkpoint the victim, clean it with DEFENSE, measure before and after"


@dataclass
class Flags(Plant):
    """Flags of `bdjax run`."""

    clean: bool = False
    """Train the same model without poison, too, and print AGE's score against it."""
    estimate: bool = True
    """Estimate the attack success rate without the trigger, too: by triggers recovered from the model before and after,
    on images that the defense did not learn from."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    (attack, defense), rest = methods(argv, "run", ("attacks", "defenses"))
    options = parse("run", (attack, defense), rest, Flags, attack=attack, defense=defense, fit=True, split=True)
    from bdjax.config import Experiment
    from bdjax.pipelines import run

    experiment = Experiment(
        attack, defense, options.dataset, options.model, options.seed, options.attack, options.defense,
        options.fit, options.split,
    )  # fmt: skip
    with ready(options) as context:
        if options.force:
            remove_run(options.out or run.directory_of(experiment, options.root))
        result, directory = run.run(experiment, options.root, options.out, context, clean=options.clean)
    finish(result, directory, options.json)
