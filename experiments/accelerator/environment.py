"""The environment that child processes are given. No option is read from it; this is the only file that touches it."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child, with some variables changed."""
    return {**os.environ, **changes}


def of_steps(work: Path, site: Path, smoke: bool) -> dict[str, str]:
    """What the steps' processes are given: where modules lie, no second start for large pages, memory, the cache."""
    env = child_environment()
    paths = [str(site), str(ROOT), str(ROOT / "experiments"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    env.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.8")
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "jax"))
    env |= {"PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
    if smoke:  # quick to compile, slow to run: there is next to nothing to run
        env.setdefault("JAX_PLATFORMS", "cpu")
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {quick}".strip()
    return env
