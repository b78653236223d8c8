"""Where a number comes from: versions, commit, device, date."""

import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from bdjax import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "jaxopt", "orbax-checkpoint", "numpy")


def environment(devices: int = 0) -> dict[str, Any]:
    """Versions, commit, hardware and date of this process, JSON-able.

    `devices`: how many the run is mapped over, 0 for all.
    """
    device = jax.local_devices()[0]
    return {
        "bdjax": __version__,
        "commit": _commit(),
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: metadata.version(name) for name in _PACKAGES},
        "platform": device.platform,
        "device": device.device_kind,
        "devices": devices or jax.local_device_count(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None if (here.parent / ".git").exists() else None
