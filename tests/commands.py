"""The command line as tests call it, with flags that make a run small."""

import pytest

from bdjax import cli

FAST = ["--fit.epochs", "2", "--fit.batch-size", "40", "--devices", "1"]
PLANT = ["--attack.target", "1", "--attack.ratio", "0.2", *FAST]
DEFEND = [
    "--defense.schedule", "release", "--defense.rounds", "2", "--defense.batch-size", "10", "--devices", "1"
]  # fmt: skip


def bdjax(capsys, *argv):
    """The command's stdout; fails the test when it exits with an error."""
    try:
        cli.main([str(a) for a in argv])
    except SystemExit as stop:
        assert stop.code in (0, None), capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *argv):
    """The message of a command that must exit with 2 and no traceback."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    assert stop.value.code == 2
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return out.err + out.out
