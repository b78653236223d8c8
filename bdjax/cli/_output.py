"""What commands print: lines on stdout, log messages and errors on stderr, the table of a finished run."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from bdjax.text import visible


def say(text: str) -> None:
    """Print text on stdout and flush; control and formatting characters other than newline and tab are escaped."""
    sys.stdout.write(visible(text, lines=True) + "\n")
    sys.stdout.flush()


def fail(message: str) -> NoReturn:
    """Print an error on stderr and exit with code 2."""
    sys.stderr.write(f"bdjax: {visible(message, lines=True)}\n")
    sys.exit(2)


class _StderrHandler(logging.Handler):
    """Print log messages of the library on stderr, escaped."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        sys.stderr.write(f"bdjax: {visible(record.getMessage())}\n")


def log_to_stderr() -> None:
    """Print the library's log messages on stderr, for example which code file is executed."""
    log = logging.getLogger("bdjax")
    if not any(isinstance(handler, _StderrHandler) for handler in log.handlers):
        log.addHandler(_StderrHandler())
        log.setLevel(logging.INFO)
        log.propagate = False


def print_remarks(result: Mapping[str, Any]) -> None:
    """Print a result's notes on its data and its warnings, one per line."""
    for line in result.get("data") or ():
        say(f"data:    {line}")
    for warning in result.get("warnings") or ():
        say(f"warning: {warning}")


def print_run(result: Any, directory: Path, as_json: bool) -> None:
    """Print the table and the files of a finished run, and draw its figure if there is none yet.

    Args:
      result: record of the run (result.json).
      directory: of the run.
      as_json: whether to print the record as the last line.
    """
    from bdjax.io import checkpoint, records
    from bdjax.reports import figure, table

    if not checkpoint.is_main_process():
        return
    with records.reading_record(directory / "result.json"):
        say(table.one(result))
        print_remarks(result)
    picture = directory / "figure.png"
    if not picture.exists():
        arrays = checkpoint.read_arrays(directory, "arrays")
        with records.reading_record(directory / "arrays.npz"):
            figure.draw(result, arrays, picture)
    say(f"picture: {picture}\nresult:  {directory / 'result.json'}\nmodel:   {directory / 'purified'}")
    if as_json:
        say(json.dumps(result))
