"""The command line. Each command is a module of this folder; help and lists import no jax, a command does when it runs.

A command's module defines ORDER (its position in the help), USAGE (what follows its name), SUMMARY (one line),
`main(argv)` and the dataclass of its flags, unless `bdjax.cli._options` defines it. A command whose name is a Python
keyword has a module with `_` appended. A command whose name begins with `_` is left out of the help; the modules in
HELPERS are not commands.

Method names come first (`bdjax run ATTACK DEFENSE`), because they decide which flags exist: the fields of the methods'
Config classes, as `--attack.FIELD` and `--defense.FIELD`.
"""

import errno
import os
import pkgutil
import sys
from collections.abc import Sequence

from bdjax import __version__
from bdjax.cli._devices import device_error
from bdjax.cli._output import fail, log_to_stderr, say
from bdjax.cli._parsing import load_command
from bdjax.errors import InputError
from bdjax.text import visible

HELPERS = {
    "_clip_flags", "_devices", "_import_options", "_large_pages", "_methods", "_options", "_output", "_parsing",
    "_paths",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Exits with 2 and a message for errors of the user, with 1 for failed cells of a sweep."""
    argv = [*(sys.argv[1:] if argv is None else argv)]
    if not argv or argv[0] in ("-h", "--help"):
        say(_help())
        return
    if argv[0] == "--version":
        say(f"bdjax {__version__}")
        return
    try:
        if argv[0] not in _command_names():
            known = ", ".join(sorted(_command_names(), key=_sort_key))
            raise InputError(f"unknown command {argv[0]!r}. Known: {known}; see bdjax --help.")
        _check_text(argv)
        log_to_stderr()
        load_command(argv[0]).main(argv[1:])
    except InputError as error:
        fail(str(error))
    except RuntimeError as error:
        if "Unable to initialize backend" not in str(error):
            raise
        fail(device_error(error))
    except ValueError as error:  # of an environment variable that jax reads when it is imported
        if not (any(name.startswith("JAX_") and name in str(error) for name in os.environ) and "env" in str(error)):
            raise
        fail(f"jax rejects one of its environment variables: {error}. Correct or unset it.")
    except BrokenPipeError:  # `bdjax ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        fail(f"{error.strerror}: {error.filename or 'the output'}. Choose another directory with --out.")
    except KeyboardInterrupt:
        sys.exit(130)


def _check_text(argv: Sequence[str]) -> None:
    """Raise InputError for an argument that no record or report could contain, before any computing."""
    for argument in argv:
        surrogates = not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument)
        if "\0" in argument or surrogates:
            escaped = visible(argument.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))
            raise InputError(
                f"the argument {escaped} is not UTF-8, or contains a null byte. Rename the file or folder."
            )


def _command_names() -> set[str]:
    """Names of all commands, including those that the help leaves out."""
    return {module.name.removesuffix("_") for module in pkgutil.iter_modules(__path__)} - HELPERS


def _sort_key(name: str) -> tuple[bool, int, str]:
    """Sort key of a command in the help."""
    return name.startswith("_"), load_command(name).ORDER, name


def _help() -> str:
    """Text of `bdjax --help`: a summary and a usage line for each command."""
    names = [name for name in sorted(_command_names(), key=_sort_key) if not name.startswith("_")]
    lines = ["usage: bdjax COMMAND ...", "", "Plant backdoors in neural networks, remove them, and measure both.", ""]
    lines += [f"  {name:10s} {load_command(name).SUMMARY}" for name in names]
    lines += ["", *(f"bdjax {name} {load_command(name).USAGE}" for name in names)]
    lines += ["", "All flags of a command: bdjax COMMAND --help; of a method: bdjax run ATTACK DEFENSE --help"]
    return "\n".join(lines)
