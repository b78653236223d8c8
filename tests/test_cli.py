"""The list of commands is the folder."""

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
    known = refused(capsys, "_common").split("Known: ")[1]
    assert known.startswith("demo, run, train, defend, ") and "_common" not in known
    assert "_cell" in known and "_cell" not in bdjax(capsys, "--help")
