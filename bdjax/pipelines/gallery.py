"""Triggers side by side: how each attack changes held-out images, in numbers and in pictures.

A row comes from a victim directory, whose stored arrays are used, or from an attack's name: then its trigger is made
as `bdjax train NAME --seed S` would make it with the default Config, which needs no training for most attacks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bdjax import attacks, datasets, metrics, registry
from bdjax.config import config_of, stage_key, to_json
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines.artifact import experiment_of
from bdjax.pipelines.environment import environment
from bdjax.pipelines.opening import trigger_arrays
from bdjax.types import Arrays, Data, Key, NeedsTraining, to_float

SHOWN, MOST_SHOWN = 3, 6
_BATCH = 100  # images measured at a time
_LEARNED = "its trigger is learned. Train a victim (bdjax train NAME --dataset D --out DIR) and give DIR"


class Pictures(NamedTuple):
    """Pictures of a row, float32 [n, H, W, C] in [0, 1]."""

    clean: np.ndarray
    triggered: np.ndarray


class _StampSource(NamedTuple):
    """An attack with its config and arrays, and the directory that they come from."""

    attack: str
    origin: str | None
    config: Any
    arrays: Arrays


def gallery(
    sources: tuple[str, ...] = (),
    *,
    dataset: str | None = None,
    seed: int = 0,
    images: tuple[int, ...] | None = None,
    count: int = 100,
    tick: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[dict[str, Any], list[Pictures]]:
    """Put triggers on the same images of the test split.

    Args:
      sources: names of attacks and victim directories; none: every attack whose trigger needs no training.
      dataset: None: that of the victims, else digits.
      seed: draws the images that are measured, and the random numbers of the triggers.
      images: positions in the test split of the images to show; None: the first SHOWN of the measured ones.
      count: number of images to measure on; all, if the test split has fewer.

      tick: called with the progress.

    Returns:
      (JSON values with means over the measured images in "rows", pictures of each row).

    Raises:
      InputError: a source is neither, learns its trigger or does not fit the images; an image is not in the test split.
    """
    sources = tuple(dict.fromkeys(sources))
    victims = {source: checkpoint.model_directory(Path(source)) for source in sources if _is_directory(source)}
    manifests = {source: checkpoint.read_record(path) for source, path in victims.items()}
    data = datasets.load(dataset or _dataset_of(manifests))
    drawing, stamping = jax.random.split(stage_key(seed, "evaluate"))
    measured = np.asarray(jax.random.permutation(drawing, len(data.x_test)))[: _at_least_one(count)]
    shown = np.array(_shown(images, data) if images is not None else measured[:SHOWN], int)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    result = {
        "dataset": data.name,
        "seed": seed,
        "n": len(measured),
        "shown": shown.tolist(),
        "ssim_window": metrics.ssim_window(*data.shape[:2]),
        "rows": rows,
        "left_out": left_out,
        "env": environment(1),
    }
    pictures: list[Pictures] = []
    names = sources or tuple(registry.names("attacks"))
    for done, source in enumerate(names):
        tick("triggers", done, len(names))
        try:
            if source in victims:
                stamp = _from_victim(source, victims[source], manifests[source], data)
            else:
                stamp = _from_name(source, data, seed)
            row, pair = _row(stamp, data, measured, shown, stamping)
            if row["unchanged"] == len(measured) and not sources:
                raise InputError(f"{source} changes no image")
        except (InputError, NeedsTraining) as error:
            why = str(error) if isinstance(error, InputError) else _LEARNED
            if sources:
                raise InputError(why if isinstance(error, InputError) else f"{source}: {why}.") from None
            left_out[source] = why
        else:
            rows.append(row)
            pictures.append(pair)
    if not pictures:
        raise InputError(f"no trigger fits {data.name}: {'; '.join(left_out.values())}")
    return result, pictures


def _row(
    stamp: _StampSource, data: Data, measured: np.ndarray, shown: np.ndarray, key: Key
) -> tuple[dict[str, Any], Pictures]:
    stored, n = data.x_test[np.concatenate([measured, shown])], len(measured)
    triggered = attacks.stamped(stamp.attack, stamp.config, stored, key, stamp.arrays)
    parts = [slice(start, min(start + _BATCH, n)) for start in range(0, n, _BATCH)]
    values = [_measure(to_float(stored[part]), to_float(triggered[part])) for part in parts]
    psnr, ssim, l2, linf = (np.concatenate(column) for column in zip(*values, strict=True))
    changed = linf > 0
    row = {
        "attack": stamp.attack,
        "from": stamp.origin,
        "config": to_json(stamp.config),
        "psnr": float(psnr[changed].mean()) if changed.any() else None,  # None: infinite
        "ssim": float(ssim.mean()),
        "l2": float(l2.mean()),
        "linf": float(linf.mean()),
        "unchanged": int(n - changed.sum()),
    }
    return row, Pictures(np.asarray(to_float(stored[n:])), np.asarray(to_float(triggered[n:])))


@jax.jit
def _measure(clean: jax.Array, triggered: jax.Array) -> tuple[jax.Array, ...]:
    return metrics.psnr(clean, triggered), metrics.ssim(clean, triggered), *metrics.distance(clean, triggered)


def _from_victim(source: str, directory: Path, manifest: dict[str, Any], data: Data) -> _StampSource:
    if tuple(manifest["shape"]) != data.shape:
        raise InputError(
            f"{source} has a trigger for {tuple(manifest['shape'])} images; {data.name} has {data.shape}. "
            "Give data of its shape with --dataset."
        )
    experiment = experiment_of(manifest)
    arrays = attacks.without_previews(checkpoint.read_arrays(directory, "trigger"))
    return _StampSource(experiment.attack, source, experiment.attack_config, arrays)


def _from_name(attack: str, data: Data, seed: int) -> _StampSource:
    config = config_of("attacks", attack)()
    return _StampSource(attack, None, config, trigger_arrays(attack, config, data, seed))


def _is_directory(source: str) -> bool:
    """Whether `source` is meant as a victim directory. Raises InputError when it is nothing that there is."""
    if source in registry.names("attacks") or source.endswith(".py"):
        return False
    if not Path(source).exists() and "/" not in source:
        try:
            registry.check("attacks", source)  # its message has the nearest name
        except InputError as error:
            raise InputError(f"{error} There is no directory of that name either.") from None
    return True


def _dataset_of(manifests: dict[str, dict[str, Any]]) -> str:
    specs = {manifest["dataset"]["spec"] for manifest in manifests.values()}
    if len(specs) > 1:
        raise InputError(
            f"the victims are of several data sets: {', '.join(sorted(specs))}. Choose one with --dataset."
        )
    return specs.pop() if specs else "digits"


def _shown(images: tuple[int, ...], data: Data) -> tuple[int, ...]:
    if not 1 <= len(images) <= MOST_SHOWN:
        raise InputError(f"--image takes 1 to {MOST_SHOWN} images, got {len(images)}.")
    for image in images:
        if not 0 <= image < len(data.x_test):
            raise InputError(
                f"--image {image} is not in the test split of {data.name}; its images go from 0 to "
                f"{len(data.x_test) - 1}."
            )
    return images


def _at_least_one(count: int) -> int:
    if count < 1:
        raise InputError(f"--count must be at least 1 image, got {count}.")
    return count
