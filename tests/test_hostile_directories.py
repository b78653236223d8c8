"""Directories that attack their reader: no code of theirs runs, and each is answered in one line and exit code 2."""

import json
import os
import shutil

import hostile_directories as hostile
import numpy as np
import pytest
from commands import refused

from bdjax import datasets, registry
from bdjax.errors import InputError
from bdjax.io import checkpoint, records
from bdjax.io.files import MAX_TEXT
from bdjax.text import visible

NAMES = ("model", "attack.name", "defense.name", "reactivation.name", "dataset.spec")


@pytest.fixture(scope="module")
def fields(blobs_npz):
    """(kind, manifest, path of a field) of every field of every manifest."""
    found = hostile.manifests(datasets.load(blobs_npz), blobs_npz)
    return [(kind, one, place) for kind, one in found.items() for place in hostile.places(one)]


def answer(manifest, path):
    """None, or what the check of a manifest says: one line, short, without controls."""
    try:
        records.check_manifest(manifest, path)
    except InputError as error:
        said = str(error)
        assert said.startswith(str(path)) and said.isprintable() and len(said) < 600
        return said
    return None


def test_every_field_of_every_record_is_a_place_for_code_and_none_runs(fields, tmp_path):
    code, mark = hostile.code(tmp_path)
    assert len(fields) > 100
    for _, manifest, place in fields:
        for text in (str(code), f"{code}:0", f"badnets:{code}"):
            said = answer(hostile.changed(manifest, place, text), tmp_path / "manifest.json")
            if ".".join(map(str, place)) in NAMES and text == str(code):
                assert "code is never taken from a directory" in said and "--code" in said
    assert not mark.exists() and not any("bdjax_user_evil" in name for name in list(registry.sys.modules))


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])  # of every seventh, and of all
def test_every_field_with_every_wrong_value_is_taken_or_refused_in_one_line(step, fields, tmp_path):
    wrong = [(manifest, place, value) for _, manifest, place in fields for value in hostile.WRONG.values()]
    said = [answer(hostile.changed(*one), tmp_path / "manifest.json") for one in wrong[::step]]
    assert len(hostile.WRONG) % 7, "else the same values would be left out of every field"
    assert sum(line is not None for line in said) > 500 / step
    assert all(answer(hostile.without(manifest, place), tmp_path) is None or place for _, manifest, place in fields)


def test_a_solver_and_a_part_are_code_too(blobs_npz, tmp_path):
    code, mark = hostile.code(tmp_path)
    found = hostile.manifests(datasets.load(blobs_npz), blobs_npz)
    solver = hostile.changed(found["purified"], ("defense", "config", "solver"), str(code))
    part = {"name": "multi_target", "config": {"parts": [f"{code}:0", "badnets:1"]}}
    for manifest in (solver, {**found["victim"], "attack": part}):
        assert "code is never taken" in answer(manifest, tmp_path / "manifest.json")
    assert not mark.exists()


def test_a_file_that_the_user_has_named_is_found_again(blobs_npz, tmp_path):
    """Loaded by the command line or a Python caller: then a record may name it, though it has moved since."""
    code, mark = hostile.code(tmp_path)
    code = code.rename(tmp_path / "mine_alone.py")
    victim = hostile.manifests(datasets.load(blobs_npz), blobs_npz)["victim"]
    manifest = hostile.changed(victim, ("attack", "name"), "/elsewhere/mine_alone.py")
    assert answer(manifest, tmp_path / "manifest.json")
    registry.load_file(code)
    assert mark.exists()
    assert records.check_manifest(manifest, tmp_path / "manifest.json")["attack"]["name"] == str(code)


@pytest.fixture(scope="module")
def made(blobs_npz, tmp_path_factory):
    return hostile.make(tmp_path_factory.mktemp("directories"), blobs_npz)


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made["victim"], tmp_path / "m")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "export", "audit", "defend", "inspect", "gallery", "reactivate",
                                     "poisoned", "solvers", "purify"])  # fmt: skip
def test_no_command_runs_what_a_directory_names(command, made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, mark = hostile.code(tmp_path)
    argv = {
        "export": ["--format", "torch", "--out", "x.pt"], "defend": ["ibau"], "inspect": [made["purified"]],
        "gallery": ["--out", "x.png"], "reactivate": ["retuning"], "poisoned": ["--out", "x.npz"],
        "purify": ["--out", "p"],
    }  # fmt: skip
    for kind, place in (
        ("victim", "model"), ("victim", "attack.name"), ("victim", "dataset.spec"), ("purified", "defense.name"),
        ("purified", "defense.config.solver"), ("reactivated", "reactivation.name"), ("imported", "model"),
    ):  # fmt: skip
        directory = shutil.copytree(made[kind], tmp_path / f"{kind}-{place}", dirs_exist_ok=True)
        manifest = json.loads((directory / "manifest.json").read_text())
        hostile.rewrite(directory, hostile.changed(manifest, tuple(place.split(".")), str(code)))
        said = refused(capsys, command, directory, *argv.get(command, []))
        assert "code is never taken from a directory" in said and said.count("\n") == 1
    assert not mark.exists()


@pytest.mark.slow
def test_code_that_the_user_names_is_run_and_told(made, blobs_npz, tmp_path, capsys):
    from commands import bdjax

    from bdjax import cli

    (tmp_path / "own_attack.py").write_text("from bdjax.attacks.badnets import *\n")
    directory = shutil.copytree(made["victim"], tmp_path / "m")
    manifest = json.loads((directory / "manifest.json").read_text())
    hostile.rewrite(directory, hostile.changed(manifest, ("attack", "name"), str(tmp_path / "own_attack.py")))
    assert "--code" in refused(capsys, "evaluate", directory)
    cli.main(["evaluate", str(directory), "--code", str(tmp_path / "own_attack.py")])
    assert "own_attack.py is code of your own and is executed" in capsys.readouterr().err
    assert "asr" in bdjax(capsys, "evaluate", directory, "--attack", tmp_path / "own_attack.py")


# --- what lies in a directory


def refusal(directory):
    with pytest.raises(InputError) as caught:
        checkpoint.read_record(directory)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.slow
def test_format_1_skips_no_hash(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "format": 1, "classes": ["a", "b", "c", "d"]}))
    assert "is not its seal" in refusal(copied)  # what has a seal keeps it
    del manifest["seal"]
    (copied / "manifest.json").write_text(json.dumps({**manifest, "format": 1, "files": {}}))
    assert "is not listed in manifest.json" in refusal(copied)
    (copied / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    (copied / "trigger.npz").write_bytes(b"x")
    assert "trigger.npz is damaged" in refusal(copied)


@pytest.mark.slow
def test_what_a_manifest_lists_and_what_lies_there(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    for name in ("../m/trigger.npz", "/etc/passwd", "", ".", "variables/../trigger.npz", "a\nb"):
        hostile.rewrite(copied, {**manifest, "files": {**manifest["files"], name: "0" * 64}})
        assert refusal(copied)
    hostile.rewrite(copied, manifest)
    (copied / "variables" / "more").write_text("x")
    assert "more is not listed" in refusal(copied)
    (copied / "variables" / "more").unlink()
    (copied / "trigger.npz").unlink()
    os.mkfifo(copied / "trigger.npz")
    assert "a pipe, a device or a socket" in refusal(copied)
    (copied / "trigger.npz").unlink()
    (copied / "trigger.npz").symlink_to("/dev/zero")
    assert "a pipe, a device or a socket" in refusal(copied)
    (copied / "trigger.npz").unlink()
    with open(copied / "trigger.npz", "wb") as file:
        file.truncate(1 << 40)
    assert "1099511627776 bytes" in refusal(copied) and "at most" in refusal(copied)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a":' * 100_000, "damaged"), ("[" * 100_000, "damaged"), (" " * (MAX_TEXT + 1), "at most"),
        ('{"files": {}, "format": 2, "seal": ""}', "not its seal"),
        ('{"files": {}, "format": 2, "seal": "0"}', "not its seal"),
        ('{"files": {}, "format": 1e400}', "format"), ('{"files": {}, "format": true}', "format"),
        ('{"files": {}, "format": 1}', "kind is missing"), ('{"files": 7, "format": 1}', "damaged"),
        ('{"files": {}, "format": ' + "9" * 5000 + "}", "damaged"), ("\udcff", "damaged"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_a_manifest_that_is_none(text, words, tmp_path):
    (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    assert words in refusal(tmp_path)


@pytest.mark.slow
def test_damaged_variables_with_right_hashes_are_refused_in_one_line(made, tmp_path, capsys):
    """As an author would damage them: every file in turn empty, cut, of other bytes, of deep JSON, of another model."""
    names = json.loads((made["victim"] / "manifest.json").read_text())["files"]
    for place, name in enumerate(names):
        for number, body in enumerate((b"", b"{", b'{"a":' * 50_000, os.urandom(200))):
            directory = shutil.copytree(made["victim"], tmp_path / f"{place}-{number}")
            if (directory / name).read_bytes() == body or name.endswith(("commit_success.txt", "orbax.checkpoint")):
                continue
            (directory / name).write_bytes(body)
            hostile.relist(directory)
            try:
                checkpoint.read_record(directory)
                for read in (lambda at: checkpoint.read_arrays(at, "trigger"), _variables):
                    read(directory)
            except InputError as error:
                assert str(error).isprintable() and str(directory) in str(error)


def _variables(directory):
    import jax

    from bdjax import models

    return checkpoint.read_variables(
        directory, jax.eval_shape(models.create("cnn", (8, 8, 1), 4).init, jax.random.key(0))
    )


@pytest.mark.parametrize("case", ["no text", "a list", "deep", "a pipe", "half"])
def test_a_result_that_is_none(case, tmp_path, capsys):
    path = tmp_path / "run" / "result.json"
    path.parent.mkdir()
    if case == "a pipe":
        os.mkfifo(path)
    else:
        path.write_text({"no text": "x", "a list": "[]", "deep": "[" * 99_999, "half": '{"before": {}}'}[case])
    for argv in (["report", tmp_path], ["report", tmp_path, "--markdown"]):
        said = refused(capsys, *argv)
        assert "result.json" in said and said.count("\n") == 1


# --- links and pipes where something is written


@pytest.mark.parametrize("sort", ["link", "dangling", "pipe", "folder"])
def test_a_lock_is_a_regular_file_or_none(sort, tmp_path):
    lock, victim = tmp_path / ".out.lock", tmp_path / "precious"
    victim.write_text("precious")
    if sort == "pipe":
        os.mkfifo(lock)
    elif sort == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(victim if sort == "link" else tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"\.out\.lock would be the lock"), checkpoint.locked(tmp_path / "out"):
        pass
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere").exists()


def test_a_lock_empties_no_file_and_is_gone_afterwards(tmp_path):
    (tmp_path / ".out.lock").write_text("kept while it is held")
    with checkpoint.locked(tmp_path / "out"):
        assert (tmp_path / ".out.lock").read_text() == "kept while it is held"
    assert not (tmp_path / ".out.lock").exists()


def test_nothing_is_written_or_removed_through_a_link(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").write_text("precious")
    (tmp_path / "epochs").symlink_to(tmp_path / "home")
    saver = checkpoint.EpochSaver(tmp_path / "epochs")
    for use in (lambda: saver.save(1, {"w": np.zeros(2, np.float32)}), lambda: saver.restore({})):
        with pytest.raises(InputError, match="symbolic link"):
            use()
    partial = checkpoint.partial_of(tmp_path / "x.json")
    partial.symlink_to(tmp_path / "home" / "precious")
    checkpoint.write_text(tmp_path / "x.json", "new")
    assert (tmp_path / "home" / "precious").read_text() == "precious"


# --- names


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat", "cat"), ("Katze ä 猫", "Katze ä 猫"), ("a\x1b[2Jb", "a\\x1b[2Jb"), ("a\nb", "a\\x0ab"),
        ("\u202egnp.exe", "\\u202egnp.exe"), ("a\u2066b\u200bc", "a\\u2066b\\u200bc"), ("\x85\u2028", "\\x85\\u2028"),
        ("\ud800", "\\ud800"), ("\U000e0001", "\\U000e0001"),
    ],
)  # fmt: skip
def test_controls_and_overrides_are_shown_as_their_numbers(name, shown, tmp_path, capsys):
    from bdjax.cli._output import say
    from bdjax.reports import _html

    assert visible(name) == shown == visible(shown) and shown.isprintable()
    say(name)
    assert capsys.readouterr().out.removesuffix("\n").replace("\n", "").isprintable()
    page = _html._environment().from_string('<p title="{{ name }}">{{ name }}</p>').render(name=name)
    assert "\u202e" not in page and "\x1b" not in page


def test_class_names_are_visible_from_the_start(blobs, tmp_path):
    images, labels = blobs
    names = np.array(["a", "\x1b[31mb", "\u202ec", "d\ne"])
    np.savez(tmp_path / "x.npz", x_train=images, y_train=labels, x_test=images, y_test=labels, classes=names)
    assert datasets.load(f"npz:{tmp_path}/x.npz").classes == ("a", "\\x1b[31mb", "\\u202ec", "d\\x0ae")
