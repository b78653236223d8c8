"""The main job: plant a backdoor, checkpoint the victim, load it, defend it, measure, and write it all down.

Phases are separate functions over directories, so two processes give the numbers of one:
:func:`train` makes a victim directory, :func:`defend` reads it. Results are content-addressed.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from bdjax import __version__, attacks, checkpoint, datasets, models, registry
from bdjax.engine import FitConfig, fit, parallel, predict
from bdjax.engine.clock import Clock, peak_memory
from bdjax.errors import InputError
from bdjax.experiment import (
    Experiment,
    SplitConfig,
    attack_record,
    config_of,
    digest,
    from_json,
    run_record,
    to_json,
)
from bdjax.metrics import accuracy, attack_success_rate
from bdjax.types import ArrayFile, Data, DefenderView, Model, Task, Variables, Victim, Watch

Tick = Callable[[str, int, int], None]
_ATTACK, _DEFENSE, _SPLIT, _EVALUATE = range(4)  # streams folded into the run's key


@dataclass
class Context:
    """How a run is carried out; none of it changes the numbers."""

    devices: int = 0
    """Local devices to use, 0 for all."""
    tick: Tick = field(default=lambda stage, done, total: None)
    """Told of progress: stage, steps done, steps in all."""


def train(experiment: Experiment, directory: Path, context: Context | None = None, data: Data | None = None) -> Path:
    """Plant experiment.attack and write the victim directory, unless it is there already.

    A training that was killed goes on from its last epoch, kept beside the directory until it is done.
    Raises InputError when `directory` holds something else.
    """
    context, directory = context or Context(), Path(directory)
    data = data or datasets.load(experiment.dataset)
    record = attack_record(experiment, data.fingerprint)
    if directory.exists():
        _check_same(directory, checkpoint.read_manifest(directory).get("hash"), digest(record))
        return directory
    model = models.create(experiment.model, data.shape, len(data.classes), experiment.fit.dtype)
    saver = checkpoint.EpochSaver(directory.with_name(f".{directory.name}.training-{digest(record)[:12]}"))
    clock, watch = Clock(), _Recorder(context)
    with parallel.using(context.devices):
        task = Task(
            data.x_train,
            data.y_train,
            model,
            lambda images, labels, key: fit(model, images, labels, experiment.fit, key, watch=watch, saver=saver),
            _read_array,
            watch,
        )
        planted = attacks.plant(experiment.attack, experiment.attack_config, task, _key(experiment.seed, _ATTACK))
    seconds, compiling = clock.read()
    arrays = {"trigger": {**planted.arrays, **_portraits(experiment, data, planted.arrays)}}
    if planted.poison is not None:
        indices = planted.poison.indices
        arrays["poison"] = {
            "indices": indices,
            "labels_before": data.y_train[indices],
            "labels_after": planted.poison.labels,
        }
    manifest = {
        "kind": "victim",
        "hash": digest(record),
        **_describe(experiment, data),
        "seconds": {"attack": seconds, "compile": compiling},
        "curve": watch.rows,
        **_origin(),
    }
    checkpoint.write_model(directory, manifest, planted.variables, arrays)
    saver.clear()
    return directory


def defend(
    victim: Path,
    defense: str,
    defense_config: Any,
    directory: Path,
    *,
    split: SplitConfig | None = None,
    seed: int | None = None,
    dataset: str | None = None,
    context: Context | None = None,
    extra: dict[str, Any] | None = None,
    data: Data | None = None,
) -> dict[str, Any]:
    """Defend the model in a victim directory, write the cleaned model and the numbers, return the result.

    Args:
      victim: directory that :func:`train` wrote; its data set is looked up again and must be the same.
      directory: gets config.json, env.json, metrics.jsonl, arrays.npz, purified/ and, last, result.json.
      seed: of the defense; default the victim's.
      dataset: where the data set lies now, when it has moved.
      extra: goes into the result as it is (which cell of which paper this is).
    """
    context, victim, directory = context or Context(), Path(victim), Path(directory)
    manifest = checkpoint.read_manifest(victim)
    experiment = _experiment(manifest, defense, defense_config, split, seed)
    data = data or datasets.load(dataset or experiment.dataset)
    _check_fingerprint(manifest, data, victim)
    record = run_record(experiment, manifest["hash"])
    hashed = digest(record)
    if (finished := read_result(directory)) is not None:
        _check_same(directory, finished.get("config_hash"), hashed)
        return finished
    _check_unused(directory, hashed)

    model, variables = _load_model(manifest, victim, data)
    evaluation = Evaluation(model, data, experiment, checkpoint.read_arrays(victim, "trigger"))
    before = evaluation.measure(variables)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", record)
    origin = _origin()
    _write_json(directory / "env.json", origin["env"])
    lines = directory / "metrics.jsonl"
    lines.write_text("")

    clock = Clock()
    watch = _Recorder(context, clock, evaluation.measure, lines)
    view = DefenderView(evaluation.clean_images, evaluation.clean_labels, watch)
    module = registry.load("defenses", defense)
    with parallel.using(context.devices):
        cleaned = module.purify(
            experiment.defense_config, Victim(model, variables), view, _key(experiment.seed, _DEFENSE)
        )
        jax.block_until_ready(cleaned)
    seconds, compiling = clock.read()
    after = evaluation.measure(cleaned)
    memory, what = peak_memory()
    result = {
        "attack": experiment.attack,
        "defense": defense,
        "dataset": data.name,
        "model": model.name,
        "seed": experiment.seed,
        "n_test": len(evaluation.images),
        "n_asr": int(evaluation.eligible.sum()),
        "n_defender": len(evaluation.clean_labels),
        "before": before,
        "after": after,
        "seconds": {
            "attack": manifest["seconds"]["attack"],
            "defense": seconds,
            "compile": manifest["seconds"]["compile"] + compiling,
        },
        "peak_memory_bytes": memory,
        "peak_memory_of": what,
        "rounds": watch.rows,
        "attack_config": to_json(experiment.attack_config),
        "defense_config": to_json(experiment.defense_config),
        "fit": to_json(experiment.fit),
        "split": to_json(experiment.split),
        "victim_hash": manifest["hash"],
        "config_hash": hashed,
        **origin,
        **(extra or {}),
    }
    pictures = {**evaluation.pictures(), **watch.arrays, "clean_indices": evaluation.clean_indices}
    np.savez(directory / "arrays.npz", **pictures)
    purified = {
        **manifest,
        "kind": "purified",
        "hash": hashed,
        "victim_hash": manifest["hash"],
        "defense": {"name": defense, "config": to_json(experiment.defense_config), "seed": experiment.seed},
        "split": to_json(experiment.split),
        **origin,
    }
    if (directory / "purified").exists():  # of a run that was killed before its result stood
        checkpoint.remove(directory / "purified")
    checkpoint.write_model(
        directory / "purified",
        purified,
        cleaned,
        {
            "trigger": checkpoint.read_arrays(victim, "trigger"),
            "split": {"indices": evaluation.clean_indices},
        },
    )
    _write_json(directory / "result.json", result)
    return result


def evaluate(directory: Path, dataset: str | None = None) -> dict[str, Any]:
    """Accuracy and ASR of a victim or purified directory, on its own data set or another of its shape."""
    directory = Path(directory)
    if not (directory / checkpoint.MANIFEST).exists() and (directory / "purified").is_dir():
        directory = directory / "purified"
    manifest = checkpoint.read_manifest(directory)
    data = datasets.load(dataset or manifest["dataset"]["spec"])
    defense = manifest.get("defense")
    split = from_json(SplitConfig, manifest["split"]) if defense else None
    experiment = _experiment(manifest, None, None, split, defense["seed"] if defense else None)
    if dataset is None:
        _check_fingerprint(manifest, data, directory)
    model, variables = _load_model(manifest, directory, data)
    held_out = defense is not None and dataset is None
    evaluation = Evaluation(model, data, experiment, checkpoint.read_arrays(directory, "trigger"), held_out)
    return {
        "directory": str(directory),
        "kind": manifest["kind"],
        "attack": experiment.attack,
        "dataset": data.name,
        "n_test": len(evaluation.images),
        "n_asr": int(evaluation.eligible.sum()),
        **evaluation.measure(variables),
    }


def run(
    experiment: Experiment,
    root: Path,
    out: Path | None = None,
    context: Context | None = None,
    extra: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], Path]:
    """Train (or find) the victim, defend it from its checkpoint. Returns (result, its directory).

    Args:
      root: results go to root/HASH, victims to root/victims/HASH, so a grid trains each victim once.
      out: put this run's result into that directory instead, and its victim into out/victim.
    """
    data = datasets.load(experiment.dataset)
    attack_hash = digest(attack_record(experiment, data.fingerprint))
    run_hash = digest(run_record(experiment, attack_hash))
    directory = out or Path(root) / run_hash[:16]
    finished = read_result(directory)
    if finished is not None:
        _check_same(directory, finished.get("config_hash"), run_hash)
        return finished, directory
    _check_unused(directory, run_hash)
    victim = out / "victim" if out else Path(root) / "victims" / attack_hash[:16]
    train(experiment, victim, context, data)
    result = defend(
        victim,
        experiment.defense or "",
        experiment.defense_config,
        directory,
        split=experiment.split,
        context=context,
        extra=extra,
        data=data,
    )
    return result, directory


def victim_directory_of(experiment: Experiment, root: Path) -> Path:
    """Where :func:`run` keeps the victim of an experiment: root/victims/HASH."""
    return Path(root) / "victims" / digest(attack_record(experiment, datasets.load(experiment.dataset).fingerprint))[:16]


def directory_of(experiment: Experiment, root: Path) -> Path:
    """Where :func:`run` puts the result of an experiment: root/HASH."""
    victim = digest(attack_record(experiment, datasets.load(experiment.dataset).fingerprint))
    return Path(root) / digest(run_record(experiment, victim))[:16]


def defense_directory_of(
    victim: Path, defense: str, defense_config: Any, split: SplitConfig, seed: int | None, root: Path
) -> Path:
    """Where a defense of the model in `victim` belongs: root/HASH, the same as that of the whole run."""
    manifest = checkpoint.read_manifest(victim)
    experiment = _experiment(manifest, defense, defense_config, split, seed)
    return Path(root) / digest(run_record(experiment, manifest["hash"]))[:16]


class Evaluation:
    """Held-out images, clean and triggered, drawn once a run; `measure` gives the rates of a model."""

    def __init__(
        self, model: Model, data: Data, experiment: Experiment, arrays: dict[str, np.ndarray], held_out: bool = True
    ) -> None:
        """`held_out`: leave the defender's images out of the test set (False: the whole test set counts)."""
        split, classes = experiment.split, len(data.classes)
        self.model, pool = model, len(data.x_test if split.source == "test" else data.x_train)
        self.clean_indices = clean_indices(split, pool, _key(experiment.seed, _SPLIT))
        keep = np.ones(len(data.x_test), bool)
        if split.source == "test":
            self.clean_images, self.clean_labels = data.x_test[self.clean_indices], data.y_test[self.clean_indices]
            keep[self.clean_indices] = not held_out
        else:
            self.clean_images, self.clean_labels = data.x_train[self.clean_indices], data.y_train[self.clean_indices]
        self.images, self.labels = data.x_test[keep], data.y_test[keep]
        own = {name: value for name, value in arrays.items() if not name.startswith("on_")}
        trigger = attacks.trigger_of(experiment.attack, experiment.attack_config, own)
        key = _key(experiment.seed, _EVALUATE)
        self.triggered = attacks.stamped(trigger, experiment.attack_config, self.images, key)
        self.wanted, self.eligible = attacks.goal(experiment.attack_config, self.labels, classes)

    def measure(self, variables: Variables) -> dict[str, float]:
        """{"acc", "asr", "asr_with_target"} as fractions; the last counts target-class images, as I-BAU's release."""
        clean = predict(self.model, variables, self.images)
        stamped = predict(self.model, variables, self.triggered)
        return {
            "acc": float(accuracy(jnp.asarray(clean), jnp.asarray(self.labels))),
            "asr": float(attack_success_rate(stamped, self.wanted, self.eligible)),
            "asr_with_target": float(attack_success_rate(stamped, self.wanted)),
        }

    def pictures(self, count: int = 6) -> dict[str, np.ndarray]:
        """A few eligible images, clean and triggered, for the figure."""
        shown = np.flatnonzero(self.eligible)[:count]
        return {"clean": self.images[shown], "triggered": self.triggered[shown], "labels": self.labels[shown]}


def clean_indices(split: SplitConfig, pool: int, key: jax.Array) -> np.ndarray:
    """Positions of the defender's images in its source split of `pool` images, int32, ascending.

    Raises InputError when nothing would be left to evaluate on.
    """
    size = split.size or (pool // 2 if split.source == "test" else max(1, pool // 20))
    if size >= pool + (split.source == "train"):
        raise InputError(
            f"split.size={size}, but the {split.source} split has {pool} images"
            f"{' and some must be left to evaluate on' if split.source == 'test' else ''}. Use a smaller --split.size."
        )
    if split.order == "given":
        return np.arange(size, dtype=np.int32)
    return np.sort(np.asarray(jax.random.permutation(key, pool)[:size])).astype(np.int32)


def read_result(directory: Path) -> dict[str, Any] | None:
    """The result.json of a finished run, or None. Raises InputError when it is damaged."""
    path = Path(directory) / "result.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}). Remove it to run again.") from None


class _Recorder(Watch):
    """Turns what a method shows into progress, a curve, and the last arrays; its own time is not counted."""

    def __init__(
        self,
        context: Context,
        clock: Clock | None = None,
        measure: Callable[[Variables], dict[str, float]] | None = None,
        lines: Path | None = None,
    ) -> None:
        self._context, self._clock, self._measure, self._lines = context, clock, measure, lines
        self.rows: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}

    def tick(self, stage: str, done: int, total: int) -> None:
        self._context.tick(stage, done, total)

    def observe(self, step: int, variables: Variables, **arrays: Any) -> None:
        with self._clock or Clock():
            row: dict[str, Any] = {"step": step}
            for name, value in arrays.items():
                if jnp.ndim(value) == 0:
                    row[name] = float(value)
                else:
                    self.arrays[name] = np.asarray(value)
            if self._measure:
                row |= self._measure(variables)
        if self._clock:
            row["seconds"] = self._clock.read()[0]
        self.rows.append(row)
        if self._lines:
            with open(self._lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _key(seed: int, stream: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), stream)


def _describe(experiment: Experiment, data: Data) -> dict[str, Any]:
    return {
        "model": experiment.model,
        "shape": data.shape,
        "classes": data.classes,
        "seed": experiment.seed,
        "fit": to_json(experiment.fit),
        "attack": {"name": experiment.attack, "config": to_json(experiment.attack_config)},
        "dataset": {
            "spec": experiment.dataset,
            "name": data.name,
            "fingerprint": data.fingerprint,
            "n_train": len(data.x_train),
            "n_test": len(data.x_test),
        },
    }


def _experiment(
    manifest: dict[str, Any], defense: str | None, defense_config: Any, split: SplitConfig | None, seed: int | None
) -> Experiment:
    attack = manifest["attack"]
    return Experiment(
        attack=attack["name"],
        defense=defense,
        dataset=manifest["dataset"]["spec"],
        model=manifest["model"],
        seed=manifest["seed"] if seed is None else seed,
        attack_config=from_json(config_of("attacks", attack["name"]), attack["config"]),
        defense_config=defense_config,
        fit=from_json(FitConfig, manifest["fit"]),
        split=split or SplitConfig(),
    )


def _load_model(manifest: dict[str, Any], directory: Path, data: Data) -> tuple[Model, Variables]:
    shape, classes = tuple(manifest["shape"]), len(manifest["classes"])
    if data.shape != shape or len(data.classes) != classes:
        raise InputError(
            f"{directory} holds a model for {shape} images of {classes} classes; "
            f"{data.name} has {data.shape} and {len(data.classes)}. Give data of the model's shape."
        )
    model = models.create(manifest["model"], data.shape, classes, from_json(FitConfig, manifest["fit"]).dtype)
    like = jax.eval_shape(model.init, jax.random.key(0))
    return model, checkpoint.read_variables(directory, like)


def _portraits(experiment: Experiment, data: Data, arrays: Any) -> dict[str, np.ndarray]:
    """The trigger on a black and on a white image: enough to recognise it without this library."""
    trigger = attacks.trigger_of(experiment.attack, experiment.attack_config, arrays)
    key = _key(experiment.seed, _EVALUATE)
    return {
        f"on_{name}": attacks.stamped(trigger, experiment.attack_config, np.full((1, *data.shape), v, np.uint8), key)[0]
        for name, v in (("black", 0), ("white", 255))
    }


def _read_array(path: ArrayFile) -> np.ndarray:
    """A picture as uint8 [H, W, C], or an .npy array as stored; nothing is unpickled."""
    try:
        if str(path).endswith(".npy"):
            return np.load(path, allow_pickle=False)
        with Image.open(path) as picture:
            modes = {"1": "L", "L": "L", "RGB": "RGB", "RGBA": "RGBA", "LA": "RGBA", "P": "RGBA"}
            array = np.asarray(picture.convert(modes.get(picture.mode, "RGB")))
    except FileNotFoundError:
        raise InputError(f"no such file: {path}.") from None
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an image or .npy array: {error}") from None
    return array[..., None] if array.ndim == 2 else array


def _origin() -> dict[str, Any]:
    device = jax.local_devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "jaxopt", "orbax-checkpoint", "numpy")
    return {
        "env": {
            "bdjax": __version__,
            "commit": _commit(),
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: metadata.version(name) for name in packages},
            "platform": device.platform,
            "device": device.device_kind,
            "devices": parallel.count(),
            "cores": os.cpu_count(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
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


def _write_json(path: Path, value: Any) -> None:
    checkpoint.write_text(path, json.dumps(value, indent=1) + "\n")


def _check_same(directory: Path, found: str | None, expected: str) -> None:
    if found != expected:
        raise InputError(
            f"{directory} holds a run of another configuration (hash {str(found)[:12]}, this one is {expected[:12]}). "
            "Choose another --out."
        )


def _check_unused(directory: Path, expected: str) -> None:
    """A directory without a result may be an interrupted run of this very configuration, or new, or empty."""
    config = Path(directory) / "config.json"
    if config.is_file():
        try:
            found = digest(json.loads(config.read_text()))
        except ValueError:
            found = None
        _check_same(directory, found, expected)
    elif Path(directory).exists() and any(p.name != "victim" and not p.name.startswith(".") for p in directory.iterdir()):
        raise InputError(f"{directory} is not empty and holds no bdjax run. Choose another --out.")


def _check_fingerprint(manifest: dict[str, Any], data: Data, directory: Path) -> None:
    if data.fingerprint != manifest["dataset"]["fingerprint"]:
        raise InputError(
            f"the data set {manifest['dataset']['spec']!r} is not the one that {directory} was trained on "
            "(its fingerprint differs). Give the original with --dataset."
        )
