"""`bdjax train`: phase one, in a process of its own."""

import json

from bdjax.cli._common import methods, parse, ready, remove_run, say
from bdjax.cli._options import Plant

ORDER = 30
USAGE = "ATTACK [--dataset D] [--model M] [--seed S] [--attack.FIELD ..] [--fit.FIELD ..] [--out DIR]"
SUMMARY = "plant ATTACK and write a victim directory"


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    (attack,), rest = methods(argv, "train", ("attacks",))
    options = parse("train", (attack,), rest, Plant, attack=attack, fit=True)
    from bdjax.config import Experiment
    from bdjax.io import checkpoint
    from bdjax.pipelines import run, victim

    experiment = Experiment(attack, None, options.dataset, options.model, options.seed, options.attack, fit=options.fit)
    with ready(options) as context:
        directory = options.out or run.victim_directory_of(experiment, options.root)
        if options.force:
            remove_run(directory)
        context.store = None if options.out else directory.parent
        victim.train(experiment, directory, context)
    if not checkpoint.is_main_process():
        return
    manifest = checkpoint.read_record(directory)
    summary = {"directory": str(directory), **{k: manifest[k] for k in ("hash", "model", "seed", "seconds", "attack")}}
    say(f"victim: {directory}\nnext:   bdjax evaluate {directory}\n        bdjax defend {directory} ibau")
    if options.json:
        say(json.dumps(summary))
