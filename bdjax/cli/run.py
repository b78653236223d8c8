"""`bdjax run`: train a victim of an attack and apply a defense to it."""

from dataclasses import dataclass

from bdjax.cli._devices import run_context
from bdjax.cli._methods import leading_methods
from bdjax.cli._options import TrainingFlags
from bdjax.cli._output import print_run
from bdjax.cli._parsing import parse_flags
from bdjax.cli._paths import remove_run

ORDER = 20
USAGE = (
    "ATTACK DEFENSE [--dataset D] [--model M] [--seed S] [--attack.FIELD ..] [--defense.FIELD ..] [--fit.FIELD ..]"
    " [--split.FIELD ..] [--with-clean-model] [--out DIR]"
)
SUMMARY = "train a model with the backdoor of ATTACK, purify it with DEFENSE, measure before and after"


@dataclass
class Flags(TrainingFlags):
    """Flags of `bdjax run`."""

    with_clean_model: bool = False
    """Also train the same model without poison, and print AGE's score, which compares the purified model with it."""
    estimate: bool = True
    """Also estimate the attack success rate without the trigger: by triggers recovered from the model before and after
    the defense, on images that the defense did not learn from."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    (attack, defense), rest = leading_methods(argv, "run", ("attacks", "defenses"))
    options = parse_flags("run", (attack, defense), rest, Flags, attack=attack, defense=defense, fit=True, split=True)
    from bdjax.config import Experiment
    from bdjax.pipelines.run import RunRequest, directory_of, run

    experiment = Experiment(
        attack, defense, options.dataset, options.model, options.seed, options.attack, options.defense,
        options.fit, options.split,
    )  # fmt: skip
    with run_context(options) as context:
        if options.force:
            remove_run(options.out or directory_of(experiment, options.root))
        request = RunRequest(experiment, options.root, options.out, options.with_clean_model)
        result, directory = run(request, context)
    print_run(result, directory, options.json)
