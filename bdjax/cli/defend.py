"""`bdjax defend`: remove the backdoor from the model in a directory."""

from dataclasses import dataclass
from pathlib import Path

from bdjax import registry
from bdjax.cli._devices import run_context
from bdjax.cli._methods import leading_methods, pop_method
from bdjax.cli._options import OutputFlags
from bdjax.cli._output import print_run, say
from bdjax.cli._parsing import first_argument, parse_flags
from bdjax.cli._paths import remove_run

ORDER = 40
USAGE = "VICTIM_DIR DEFENSE [--defense.FIELD ..] [--split.FIELD ..] [--clean-model DIR] [--seed S] [--out DIR]"
SUMMARY = "remove the backdoor from the model in VICTIM_DIR, measure before and after"


@dataclass
class Flags(OutputFlags):
    """Flags of `bdjax defend`."""

    dataset: str | None = None
    """Data set of the victim, if it has moved: digits, npz:PATH, folder:PATH or tfds:NAME. Required for an imported
    model, whose attack success rate is measured with the trigger of --attack ATTACK --attack.FIELD .."""
    seed: int | None = None
    """Seed of the defense; default: the victim's."""
    clean_model: Path | None = None
    """Directory of the same model trained without poison (`bdjax train clean` with the victim's flags), for AGE's
    score; default: the one beside the victim, if any."""
    estimate: bool = True
    """Also estimate the attack success rate without the trigger: by triggers recovered from the model before and after
    the defense, on images that the defense did not learn from."""


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    victim = Path(first_argument("defend", argv, f"defenses: {', '.join(registry.names('defenses'))}"))
    (defense,), rest = leading_methods(argv[1:], "defend", ("defenses",))
    attack, rest = pop_method("attack", rest)
    parts = {"attack": attack} if attack else {}
    options = parse_flags("defend", (str(victim), defense), rest, Flags, defense=defense, split=True, **parts)
    from bdjax.pipelines.defend import DefenseRequest, defend_resolved, resolve_defense
    from bdjax.pipelines.opening import EvaluationSource

    source = EvaluationSource(options.dataset, attack=attack, attack_config=getattr(options, "attack", None))
    request = DefenseRequest(victim, defense, options.defense, options.split, options.seed, source, options.clean_model)
    with run_context(options) as context:
        resolved = resolve_defense(request)
        directory = options.out or resolved.directory_in(options.root)
        if options.force:
            remove_run(directory)
        result = defend_resolved(resolved, directory, context)
    if result["attack"] == "clean":
        say("No trigger is put on images, so the attack success rate is not measured. Name the trigger with --attack.")
    print_run(result, directory, options.json)
