"""Large memory pages for the arrays of a CPU, which the C library must be told of before a process starts.

XLA allocates fresh memory for every program that it runs, hundreds of megabytes for a training step, and Linux provides
it in pages of 4 KiB, with a page fault for each. glibc (from 2.35) requests pages of 2 MiB where GLIBC_TUNABLES says so
and the kernel's transparent huge pages are in the mode "madvise", the default of most distributions. A training step of
`small_vgg` then takes 0.82 of its time (docs/performance.md).
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
"""Setting of glibc: 1 requests large pages, 0 does not."""

_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_large_pages() -> None:
    """Restart this process with large pages, if they are available and GLIBC_TUNABLES does not decide about them.

    For a command's own process, before anything heavy is imported. GLIBC_TUNABLES=glibc.malloc.hugetlb=0 prevents it.
    """
    tunables = large_page_tunables(os.environ, _kernel_mode())
    if tunables and Path(sys.argv[0]).name in ("bdjax", "__main__.py"):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": tunables})


def large_page_tunables(environ: Mapping[str, str], mode: str) -> str | None:
    """Return the value of GLIBC_TUNABLES that requests large pages.

    Args:
      environ: environment variables.
      mode: the kernel's mode of transparent huge pages, such as `always [madvise] never`; "" where there is none.

    Returns:
      The value, or None if GLIBC_TUNABLES decides about large pages already or the mode is not madvise.
    """
    tunables = environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or "[madvise]" not in mode:
        return None
    return f"{tunables}:{TUNABLE}=1".lstrip(":")


def _kernel_mode() -> str:
    """The kernel's mode of transparent huge pages; "" where there is none."""
    try:
        return _KERNEL.read_text()
    except OSError:
        return ""
