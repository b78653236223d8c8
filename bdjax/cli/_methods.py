"""Method names on the command line. They are read before the flags, because a method's Config decides which exist."""

from bdjax import registry
from bdjax.cli._parsing import stop_with_usage
from bdjax.errors import InputError


def pop_method(part: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """Read the method that `--PART NAME` names.

    Args:
      part: "attack" or "defense".
      argv: arguments of the command.

    Returns:
      (name of the method or None, arguments without the flag and its value).

    Raises:
      InputError: when the name is missing or unknown.
    """
    flag, kind = f"--{part}", f"{part}s"
    if flag not in argv:
        return None, argv
    index = argv.index(flag)
    if index + 1 == len(argv):
        article = "an" if part[0] in "aeiou" else "a"
        raise InputError(f"{flag} needs the name of {article} {part}. Choose from {', '.join(registry.names(kind))}.")
    registry.check(kind, argv[index + 1])
    return argv[index + 1], [*argv[:index], *argv[index + 2 :]]


def leading_methods(argv: list[str], name: str, kinds: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Read the method names at the beginning of a command's arguments.

    Args:
      argv: arguments behind the command's name.
      name: of the command, for its usage.
      kinds: kind of each method, such as ("attacks", "defenses").

    Returns:
      (names of the methods, remaining arguments).

    Raises:
      InputError: when a name is missing or unknown.
    """
    names = argv[: len(kinds)]
    if len(names) < len(kinds) or any(method.startswith("-") for method in names):
        stop_with_usage(name, argv, "\n".join(f"{kind}: {', '.join(registry.names(kind))}" for kind in kinds))
    for kind, method in zip(kinds, names, strict=True):
        registry.check(kind, method)
    return names, argv[len(kinds) :]
