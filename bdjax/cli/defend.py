"""`bdjax defend`: phase two, on a victim directory."""

from dataclasses import dataclass
from pathlib import Path

from bdjax import registry
from bdjax.cli._common import chosen, finish, first, methods, parse, ready, remove_run, say
from bdjax.cli._options import OutputFlags

ORDER = 40
USAGE = "VICTIM_DIR DEFENSE [--defense.FIELD ..] [--split.FIELD ..] [--clean DIR] [--seed S] [--out DIR]"
SUMMARY = "clean the model in VICTIM_DIR, measure before and after"


@dataclass
class Flags(OutputFlags):
    """Flags of `bdjax defend`."""

    dataset: str | None = None
    """Where the victim's data set lies now, if it has moved. An imported model needs one; `--attack ATTACK
    --attack.FIELD ..` says which trigger it is measured with."""
    seed: int | None = None
    """Of the defense; default the victim's."""
    clean: Path | None = None
    """A model of `bdjax train clean` with the victim's flags, for the score; default the one beside the victim."""
    estimate: bool = True
    """Estimate the attack success rate without the trigger, too: by triggers recovered from the model before and after,
    on images that the defense did not learn from."""


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    victim = Path(first("defend", argv, f"defenses: {', '.join(registry.names('defenses'))}"))
    (defense,), rest = methods(argv[1:], "defend", ("defenses",))
    attack, rest = chosen("attack", rest)
    parts = {"attack": attack} if attack else {}
    options = parse("defend", (str(victim), defense), rest, Flags, defense=defense, split=True, **parts)
    from bdjax.pipelines import run

    own = {"dataset": options.dataset, "attack": attack, "attack_config": getattr(options, "attack", None)}
    with ready(options) as context:
        directory = options.out or run.defense_directory_of(
            victim, defense, options.defense, options.split, options.seed, options.root, **own
        )
        if options.force:
            remove_run(directory)
        result = run.defend(
            victim, defense, options.defense, directory,
            split=options.split, seed=options.seed, clean=options.clean, context=context, **own,
        )  # fmt: skip
    if result["attack"] == "clean":
        say("No trigger is put on images, so no attack success rate is measured; give one by --attack.")
    finish(result, directory, options.json)
