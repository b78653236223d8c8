"""`bdjax train`: train a model with a backdoor."""

import json

from bdjax.cli._devices import run_context
from bdjax.cli._methods import leading_methods
from bdjax.cli._options import TrainingFlags
from bdjax.cli._output import say
from bdjax.cli._parsing import parse_flags
from bdjax.cli._paths import remove_run

ORDER = 30
USAGE = "ATTACK [--dataset D] [--model M] [--seed S] [--attack.FIELD ..] [--fit.FIELD ..] [--out DIR]"
SUMMARY = "train a model with the backdoor of ATTACK and write it to a victim directory"


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    (attack,), rest = leading_methods(argv, "train", ("attacks",))
    options = parse_flags("train", (attack,), rest, TrainingFlags, attack=attack, fit=True)
    from bdjax import datasets
    from bdjax.config import Experiment
    from bdjax.io import checkpoint
    from bdjax.pipelines.training import resolve_training, train_resolved

    experiment = Experiment(attack, None, options.dataset, options.model, options.seed, options.attack, fit=options.fit)
    with run_context(options) as context:
        data = datasets.load(experiment.dataset)
        training = resolve_training(experiment, data, options.out, options.root / "victims")
        directory = training.directory
        if options.force:
            remove_run(directory)
        context.store = None if options.out else directory.parent
        train_resolved(training, context)
    if not checkpoint.is_main_process():
        return
    manifest = checkpoint.read_record(directory)
    summary = {"directory": str(directory), **{k: manifest[k] for k in ("hash", "model", "seed", "seconds", "attack")}}
    say(f"victim: {directory}\nnext:   bdjax evaluate {directory}\n        bdjax defend {directory} ibau")
    if options.json:
        say(json.dumps(summary))
