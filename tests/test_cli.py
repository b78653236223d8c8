"""The list of commands is the folder."""

import pytest
from commands import bdjax, refused

from bdjax import cli


def test_a_file_in_the_folder_is_a_command(tmp_path, capsys, monkeypatch):
    source = "ORDER, USAGE, SUMMARY = 25, '[WHO]', 'say hello'\ndef main(argv): print('hello', *argv)\n"
    (tmp_path / "greet.py").write_text(source)
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    assert bdjax(capsys, "greet", "you") == "hello you\n"
    lines = bdjax(capsys, "--help").splitlines()
    place = lines.index("  greet      say hello")
    assert lines[place - 1].startswith("  run ") and lines[place + 1].startswith("  train ")
    assert "bdjax greet [WHO]" in lines
    assert "run, greet, train" in refused(capsys, "greeet")


def test_helpers_are_no_command(capsys):
    known = refused(capsys, "_parsing").split("Known: ")[1]
    assert known.startswith("demo, run, train, defend, ") and "_parsing" not in known
    assert "_cell" in known and "_cell" not in bdjax(capsys, "--help")


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["run", "badnets", "ibau", "--clean"], "--with-clean-model"),
        (["defend", "v", "ibau", "--clean", "c"], "--clean-model"),
        (["reactivate", "v", "retuning", "--clean=c"], "--clean-model"),
        (["inspect", "v", "p", "c"], "--clean-model"),
        (["purify", "f.pt", "--clean", "digits", "--out", "o"], "--clean-data"),
        (["audit", "d", "--clean", "digits"], "--clean-data"),
        (["evaluate", "d", "--data=digits"], "--dataset"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_renamed_flag_is_refused_with_its_new_name(argv, flag, capsys):
    message = refused(capsys, *argv)
    assert "renamed" in message and f"use {flag}" in message
    assert flag in bdjax(capsys, argv[0], *argv[1:3] if argv[0] == "run" else (), "--help")


def test_the_lines_of_a_flags_description_are_joined(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert "are executed. Without this flag, no code" in bdjax(capsys, "audit", "--help")
