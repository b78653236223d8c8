"""Large pages of memory for the arrays of a CPU: what the C library must be told before a process begins.

XLA takes fresh memory for every program that it runs, hundreds of megabytes for a training step, and Linux hands it
out in pages of 4 KiB, each with a fault of its own. glibc (2.35 on) asks for pages of 2 MiB where GLIBC_TUNABLES says
so and the kernel's transparent huge pages wait to be asked ("madvise", what most distributions choose). A training step
of `small_vgg` takes 0.82 of its time then (docs/performance.md).
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
"""1 asks for large pages, 0 does not."""

_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask() -> None:
    """Begin this process anew with large pages, if nobody has decided on them and they are to be had.

    For a command's own process, before anything heavy is imported. GLIBC_TUNABLES=glibc.malloc.hugetlb=0 forbids it.
    """
    if (tunables := wanted(os.environ, _mode())) and Path(sys.argv[0]).name in ("bdjax", "__main__.py"):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": tunables})


def wanted(environ: Mapping[str, str], mode: str) -> str | None:
    """GLIBC_TUNABLES with large pages, or None if it says something of them or they don't wait to be asked.

    mode: of the kernel, as `always [madvise] never`; "" where there is none.
    """
    given = environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in given or "[madvise]" not in mode:
        return None
    return f"{given}:{TUNABLE}=1".lstrip(":")


def _mode() -> str:
    try:
        return _KERNEL.read_text()
    except OSError:
        return ""
