"""Parsing of command lines: a command's usage, its first argument, and its flags by tyro."""

import dataclasses
import importlib
import keyword
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import tyro

from bdjax import registry
from bdjax.cli._output import say
from bdjax.errors import InputError
from bdjax.text import parse_names

_RENAMED = {
    ("audit", "--clean"): "--clean-data",
    ("defend", "--clean"): "--clean-model",
    ("evaluate", "--data"): "--dataset",
    ("purify", "--clean"): "--clean-data",
    ("reactivate", "--clean"): "--clean-model",
    ("run", "--clean"): "--with-clean-model",
}
"""(command, earlier name of a flag) -> its name now."""


def load_command(name: str) -> ModuleType:
    """Import the module of a command."""
    return importlib.import_module(f"bdjax.cli.{name}{'_' if keyword.iskeyword(name) else ''}")


def stop_with_usage(name: str, argv: list[str], details: str = "") -> NoReturn:
    """Print the usage of a command and exit with 0 where help is requested; otherwise report missing arguments.

    Args:
      name: of the command.
      argv: arguments behind the command's name.
      details: lines below the usage, such as the known methods.

    Raises:
      InputError: when `argv` does not begin with -h or --help.
    """
    usage = load_command(name).USAGE
    text = f"usage: bdjax {name} {usage}" + (f"\n{details}" if details else "")
    if argv and argv[0] in ("-h", "--help"):
        arguments = usage.partition("[")[0]
        more = f"\n\nAll flags: bdjax {name} {arguments}--help" if arguments else ""
        say(f"{text}\n\n{load_command(name).SUMMARY}{more}")
        sys.exit(0)
    raise InputError(f"{name} needs more arguments.\n{text}")


def first_argument(name: str, argv: list[str], details: str = "") -> str:
    """Return the first argument of a command, or stop with its usage when there is none.

    For --help without arguments, the argument's placeholder is inserted into `argv`, so that `parse_flags` then lists
    all flags.

    Args:
      name: of the command.
      argv: arguments behind the command's name.
      details: lines below the usage, such as the known methods.

    Returns:
      The argument.

    Raises:
      InputError: when there is no argument before the first flag.
    """
    words = load_command(name).USAGE.split()
    if {"-h", "--help"} & set(argv) and argv[0].startswith("-") and words[1][0] in "[-":
        say(f"usage: bdjax {name} {load_command(name).USAGE}\n")
        argv.insert(0, words[0])
    if not argv or argv[0].startswith("-"):
        stop_with_usage(name, argv, details)
    return argv[0]


def parse_flags(name: str, arguments: tuple[str, ...], argv: list[str], flags: type, **parts: Any) -> Any:
    """Parse the flags of a command, together with the Config fields of its methods, and load the files of --code.

    Args:
      name: of the command.
      arguments: positional arguments that were read before, for the usage line.
      argv: the remaining arguments.
      flags: dataclass of the command's flags.
      **parts: what adds the flags --PART.FIELD: the name of the method for "attack" and "defense", True for "fit" and
        "split", and a Config class for any other part.

    Returns:
      An instance of a subclass of `flags`, with one more field for each part.

    Raises:
      InputError: when a flag was renamed, or a file of --code cannot be loaded.
      SystemExit: with 2, after a message, when the flags cannot be parsed; with 0 after help.
    """
    _check_renamed(name, argv)
    fields: list[tuple[str, type, Any]] = []
    if parts:
        from bdjax.config import FitConfig, SplitConfig, config_of

        kinds = {"attack": "attacks", "defense": "defenses"}
        for part, value in parts.items():
            if isinstance(value, type):
                config = value
            elif part in kinds:
                config = config_of(kinds[part], value)
            else:
                config = {"fit": FitConfig, "split": SplitConfig}[part]
            fields.append((part, config, dataclasses.field(default_factory=config)))
    options_class = dataclasses.make_dataclass(flags.__name__, fields, bases=(flags,))
    options_class.__doc__ = load_command(name).SUMMARY
    if {"-h", "--help"} & set(argv):
        _unwrap_help(options_class)
    options: Any = tyro.cli(options_class, prog=" ".join(("bdjax", name, *arguments)), args=argv)
    for file in parse_names(getattr(options, "code", "")):
        registry.load_file(Path(file))
    return options


def _check_renamed(name: str, argv: list[str]) -> None:
    """Raise InputError for a flag that has another name now."""
    for argument in argv:
        flag = argument.partition("=")[0]
        if (name, flag) in _RENAMED:
            raise InputError(f"{flag} was renamed: use {_RENAMED[name, flag]}.")


def _unwrap_help(flags: type) -> None:
    """Join the lines of each field's docstring, whose line breaks tyro would keep, and give them to tyro as help."""
    import docstring_parser

    docs: dict[str, str] = {}
    for base in reversed(flags.__mro__[:-1]):
        params = docstring_parser.parse_from_object(base).params
        docs |= {param.arg_name: param.description for param in params if param.description}
    for field in dataclasses.fields(flags):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            _unwrap_help(field.type)
        elif doc := docs.get(field.name):
            paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", doc)]
            field.metadata = {**field.metadata, "help": "\n\n".join(paragraphs)}  # type: ignore[assignment]
