"""`bdjax list`: the methods of each kind; imports none of them."""

from bdjax import registry
from bdjax.cli._common import say, usage
from bdjax.errors import InputError

ORDER = 100
USAGE = "[attacks|defenses|models|datasets]"
SUMMARY = "what there is"


def main(argv: list[str]) -> None:
    """Carry out the command; `argv` is what follows its name."""
    if argv[:1] in (["-h"], ["--help"]):
        usage("list", argv)
    if argv and argv[0] not in registry.KINDS:
        raise InputError(f"nothing is listed under {argv[0]!r}. Choose from {', '.join(registry.KINDS)}.")
    for kind in argv[:1] or registry.KINDS:
        if not argv:
            say(f"{kind}:")
        for name in registry.names(kind):
            say(f"  {name:18s} {registry.summary(kind, name)}")
