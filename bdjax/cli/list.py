"""`bdjax list`: list the methods of each kind without importing them."""

from bdjax import registry
from bdjax.cli._output import say
from bdjax.cli._parsing import stop_with_usage
from bdjax.errors import InputError

ORDER = 100
USAGE = "[attacks|defenses|detectors|models|datasets]"
SUMMARY = "list attacks, defenses, detectors, models and data sets"


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    if argv[:1] in (["-h"], ["--help"]):
        stop_with_usage("list", argv)
    if len(argv) > 1:
        raise InputError(f"list takes one kind, got {' '.join(argv)}. Choose from {', '.join(registry.KINDS)}.")
    if argv and argv[0] not in registry.KINDS:
        raise InputError(f"unknown kind {argv[0]!r}. Choose from {', '.join(registry.KINDS)}.")
    for kind in argv[:1] or registry.KINDS:
        if not argv:
            say(f"{kind}:")
        for name in registry.names(kind):
            say(f"  {name:18s} {registry.summary(kind, name)}")
