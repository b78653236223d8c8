"""A command asks for large pages of memory once, where they wait to be asked for and nobody has decided."""

import os
import subprocess
import sys

import pytest

from bdjax.cli import _large_pages

MADVISE = "always [madvise] never"


@pytest.mark.parametrize(
    ("given", "mode", "wanted"),
    [
        (None, MADVISE, "glibc.malloc.hugetlb=1"),
        ("", MADVISE, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=1", MADVISE, "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", MADVISE, None),
        ("glibc.malloc.hugetlb=1", MADVISE, None),
        (None, "[always] madvise never", None),
        (None, "always madvise [never]", None),
        (None, "", None),
    ],
)
def test_what_is_asked_for(given, mode, wanted):
    assert _large_pages.large_page_tunables({} if given is None else {"GLIBC_TUNABLES": given}, mode) == wanted


@pytest.fixture
def begun(monkeypatch):
    """Processes that were begun in place of this one; the kernel waits to be asked."""
    found = []
    monkeypatch.setattr(_large_pages, "_kernel_mode", lambda: MADVISE)
    monkeypatch.setattr(os, "execve", lambda *given: found.append(given))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "bdjax", "list", "a b"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return found


@pytest.mark.parametrize("name", ["/somewhere/bin/bdjax", "/somewhere/bdjax/__main__.py"])
def test_the_same_command_begins_anew(begun, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [name, "list", "a b"])
    monkeypatch.setenv("KEPT", "as it was")
    _large_pages.restart_with_large_pages()
    ((program, arguments, environ),) = begun
    assert (program, arguments) == (sys.executable, [sys.executable, "-X", "dev", "-m", "bdjax", "list", "a b"])
    assert environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1" and environ["KEPT"] == "as it was"


@pytest.mark.parametrize("name", ["/usr/bin/ipython", "notebook.py", "-c"])
def test_another_program_goes_on(begun, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [name])
    _large_pages.restart_with_large_pages()
    assert begun == []


def test_once(begun, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bdjax"])
    monkeypatch.setenv("GLIBC_TUNABLES", _large_pages.large_page_tunables({}, MADVISE))
    _large_pages.restart_with_large_pages()
    assert begun == []


def test_a_command_runs_and_keeps_its_exit_code():
    """As the machine is: with a new beginning or without."""
    run = [sys.executable, "-m", "bdjax"]
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.startswith("bdjax ")
    assert subprocess.run([*run, "nonsense"], capture_output=True, check=False, env=environ).returncode == 2
