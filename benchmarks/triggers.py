"""Time applying each trigger to 50,000 images of 32x32x3, after compilation.

    python benchmarks/triggers.py [NAME ...] [--images 50000] [--repeats 3] [--json]

Random stored images (uint8), default settings, one device, in parts as in a run (`attacks.stamped`): convert to float,
apply the trigger, round, convert to uint8. Default: all attacks whose trigger needs no training. The goal is less than
1 s for a static trigger on 2 CPU cores.
"""

import argparse
import json
import os
import statistics
import time

import jax
import numpy as np

from bdjax import attacks, registry
from bdjax.config import config_of
from bdjax.types import Model, NeedsTraining, Task


def seconds(name: str, images: np.ndarray, repeats: int) -> list[float] | None:
    """Time each repeat after one that compiles; return None for a trigger that is trained."""
    spec, config = registry.load("attacks", name), config_of("attacks", name)()

    def untrained(*_: object, **__: object) -> None:
        raise NeedsTraining

    labels = np.arange(len(images), dtype=np.int32) % 10
    model = Model("untrained", images.shape[1:], 10, untrained, untrained)  # type: ignore[arg-type]
    task = Task(images, labels, model, lambda path: np.zeros((32, 32, 3), np.uint8))
    if spec.needs_arrays:
        return None
    try:
        arrays = spec.prepare(config, task, jax.random.key(0)) if spec.prepare is not None else {}
        attacks.stamped(name, config, images[: 2 * attacks.CHUNK], jax.random.key(0), arrays)
    except NeedsTraining:
        return None
    durations = []
    for _ in range(repeats):
        begin = time.perf_counter()
        attacks.stamped(name, config, images, jax.random.key(1), arrays)
        durations.append(time.perf_counter() - begin)
    return durations


def main() -> None:
    """Time the triggers and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="attacks; default all")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args()
    images = np.random.default_rng(0).integers(0, 256, (options.images, 32, 32, 3), dtype=np.uint8)
    attack_names = [name for name in registry.names("attacks") if registry.load("attacks", name).trigger is not None]
    results = {name: seconds(name, images, options.repeats) for name in options.names or attack_names}
    if options.json:
        print(json.dumps({"images": options.images, "cores": os.cpu_count(), "seconds": results}))
        return
    print(f"{options.images} images, {os.cpu_count()} cores, jax {jax.__version__}: median (minimum to maximum, n)")
    for name, values in results.items():
        if values is None:
            print(f"{name:22s} its trigger is trained")
        else:
            spread = f"({min(values):.3f} to {max(values):.3f}, n = {len(values)})"
            print(f"{name:22s}{statistics.median(values):7.3f} s {spread}")


if __name__ == "__main__":
    main()
