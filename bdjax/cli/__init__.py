"""The command line: a command is a module of this folder. Help and lists import no jax; a command does when it runs.

A module holds ORDER (its place in the help), USAGE (what follows its name), SUMMARY (one line), `main(argv)`, and
the dataclass of its flags unless `bdjax.cli._options` has it. Modules in HELPERS are no commands; another name that
begins with `_` is a command that the help leaves out. A command that is a word of Python's has a `_` behind its
module's name.

Method names come first (`bdjax run ATTACK DEFENSE`), because they decide which flags there are: the fields
of the methods' own Config classes, as `--attack.FIELD` and `--defense.FIELD`.
"""

import errno
import os
import pkgutil
import sys
from collections.abc import Sequence

from bdjax import __version__
from bdjax.cli._common import command, fail, no_device, say, tell
from bdjax.errors import InputError
from bdjax.text import visible

HELPERS = {"_common", "_large_pages", "_options"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exits with 2 and a message for what the user can mend, 1 for failed cells of a sweep."""
    argv = [*(sys.argv[1:] if argv is None else argv)]
    if not argv or argv[0] in ("-h", "--help"):
        say(_help())
        return
    if argv[0] == "--version":
        say(f"bdjax {__version__}")
        return
    try:
        if argv[0] not in _names():
            known = ", ".join(sorted(_names(), key=_place))
            raise InputError(f"unknown command {argv[0]!r}. Known: {known}; see bdjax --help.")
        _check_text(argv)
        tell()
        command(argv[0]).main(argv[1:])
    except InputError as error:
        fail(str(error))
    except RuntimeError as error:
        if "Unable to initialize backend" not in str(error):
            raise
        fail(no_device(error))
    except ValueError as error:  # of a variable that jax reads when it is imported
        if not (any(name.startswith("JAX_") and name in str(error) for name in os.environ) and "env" in str(error)):
            raise
        fail(f"jax refuses one of its environment variables: {error}. Correct or unset it.")
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
    """Raise InputError for an argument that no record or report could hold, before any work is done."""
    for one in argv:
        if "\0" in one or not one.isascii() and any("\ud800" <= character <= "\udfff" for character in one):
            shown = visible(one.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))
            raise InputError(f"the argument {shown} is not UTF-8, or holds a zero byte. Rename the file or folder.")


def _names() -> set[str]:
    return {module.name.removesuffix("_") for module in pkgutil.iter_modules(__path__)} - HELPERS


def _place(name: str) -> tuple[bool, int, str]:
    return name.startswith("_"), command(name).ORDER, name


def _help() -> str:
    shown = {name: command(name) for name in sorted(_names(), key=_place) if not name.startswith("_")}
    lines = ["usage: bdjax COMMAND ...", "", "Plant backdoors in neural networks, remove them, and measure both.", ""]
    lines += [f"  {name:10s} {module.SUMMARY}" for name, module in shown.items()]
    lines += ["", *(f"bdjax {name} {module.USAGE}" for name, module in shown.items())]
    lines += ["", "All flags of a method: bdjax run ATTACK DEFENSE --help"]
    return "\n".join(lines)
