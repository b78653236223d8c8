"""Benchmark workloads: each prepares its data once and returns a :class:`Job` that calls the library's functions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import attacks, models
from bdjax.config import config_of
from bdjax.datasets._files import read_array
from bdjax.defenses import age, bibau, ibau
from bdjax.detectors import _smallest_patches, neural_cleanse
from bdjax.engine import FitConfig, fit, fit_with_hook, many, predict, run_epoch
from bdjax.engine.epoch import intercept_epochs
from bdjax.types import DefenderView, Task, Victim

CLASSES = 10


@dataclass(frozen=True)
class Sizes:
    """Sizes of the workloads; images have CIFAR-10's shape except in small runs."""

    shape: tuple[int, int, int] = (32, 32, 3)
    """(H, W, C) of an image."""
    width: int | None = None
    """Channels of the networks' first convolution; None: the default of each network."""
    batch: int = 128
    """Images per training step."""
    steps: int = 6
    """Training steps per run of small_vgg; a third of it for resnet18."""
    test: int = 2000
    """Images per evaluation."""
    clean: int = 5000
    """Number of the defender's images."""
    clean_batch: int = 100
    """Batch size of I-BAU."""
    edited: int = 512
    """Images for AGE."""
    searched: int = 512
    """Images for the trigger inversion."""
    adversarial: int = 256
    """Images per outer step of BI-BAU."""
    victims: int = 8
    """Models trained at the same time."""
    stamped: int = 50_000
    """Images that receive a static trigger."""


SUITES = {
    "cpu": Sizes(),
    "gpu": Sizes(batch=512, steps=96, test=10_000, searched=2048),
}
SMALL = Sizes((8, 8, 3), 4, 32, 3, 20, 20, 10, 16, 16, 16, 2, 40)


class Job(NamedTuple):
    """A prepared workload."""

    run: Callable[[], Any]
    """Execute the workload once; the result is waited for."""
    units: float
    """Number of units (see `unit`) per run."""
    unit: str = "images"
    dtype: str = "float32"
    """Type of the activations, and of the matrix product that the rate is compared with."""
    extra: tuple[tuple[float, Callable, tuple], ...] = ()
    """(executions, function, arguments) of programs that `engine.run_epoch` does not run."""


def random_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw random images and labels.

    Args:
      count: number of images N.
      shape: (H, W, C).
      seed: seed of the random generator.

    Returns:
      (uint8 [N, H, W, C], int32 [N]).
    """
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.integers(0, CLASSES, count).astype(np.int32)


def _model(name: str, sizes: Sizes, dtype: str = "float32") -> Any:
    return models.create(name, sizes.shape, CLASSES, jnp.dtype(dtype), sizes.width)


def _victim(name: str, sizes: Sizes) -> Victim:
    model = _model(name, sizes)
    return Victim(model, jax.jit(model.init)(jax.random.key(0)))


def _train(name: str, attack: str, dtype: str, sizes: Sizes) -> Job:
    """One epoch of training under an attack; networks that the attack trains before (IAD's mask) are not measured."""
    model, steps = _model(name, sizes, dtype), sizes.steps if name == "small_vgg" else max(1, sizes.steps // 3)
    images, labels = random_images(steps * sizes.batch, sizes.shape)
    recipe = FitConfig(1, sizes.batch, precision=dtype)  # type: ignore[arg-type]
    calls: list[tuple] = []

    def record_call(*arguments: Any, stage: str = "training", **_: Any) -> tuple[Any, Any]:
        if stage != "training":
            return model.init(jax.random.key(0)), arguments[4]
        calls.append(arguments)
        return model.init(jax.random.key(0)), arguments[4]

    task = Task(
        images, labels, model, read_array,
        fit=lambda *arguments, **options: record_call(*arguments, None, None, **options)[0],
        fit_with_hook=record_call,
    )  # fmt: skip
    config = config_of("attacks", attack)()
    attacks.plant(attack, config, task, jax.random.key(0))
    poisoned_images, poisoned_labels, key, hook, attacker = calls[-1]
    start = jax.jit(model.init)(jax.random.key(0))
    run = partial(fit_with_hook, model, poisoned_images, poisoned_labels, recipe, key, hook, attacker, start=start)
    return Job(run, steps * sizes.batch, dtype=dtype)


def _evaluate(name: str, sizes: Sizes) -> Job:
    victim, images = _victim(name, sizes), random_images(sizes.test, sizes.shape)[0]
    forward = (lambda v, x: victim.model.logits(v, x).argmax(-1), (victim.variables, _floats(sizes, sizes.test)))
    return Job(partial(predict, victim.model, victim.variables, images), sizes.test, extra=((1, *forward),))


def _floats(sizes: Sizes, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *sizes.shape), jnp.float32)


def _ibau(schedule: Any, sizes: Sizes) -> Job:
    """One round of I-BAU with batches of `clean_batch` images."""
    victim, view = _victim("small_vgg", sizes), DefenderView(*random_images(sizes.clean, sizes.shape))
    config = ibau.Config(schedule, rounds=1, batch_size=sizes.clean_batch)
    return Job(partial(ibau.purify, config, victim, view, jax.random.key(0)), 1, "rounds")


def _bibau(sizes: Sizes) -> Job:
    """One inner ascent and one outer step of BI-BAU, with the arguments that `purify` passes to the engine."""
    victim, view = _victim("small_vgg", sizes), DefenderView(*random_images(2 * sizes.adversarial, sizes.shape))
    view.labels[:CLASSES] = np.arange(CLASSES)
    config, calls = bibau.Config(procedure="paper", epochs=1, batch_size=sizes.adversarial, fisher_batch=8), []

    def record_call(step: Any, state: Any, batch: Any, per_step: Any, constants: Any, **_: Any) -> Any:
        calls.append((step, state, *jax.tree.map(lambda leaf: leaf[:1], (batch, per_step)), constants))
        raise _Recorded

    try:
        with intercept_epochs(record_call):
            bibau.purify(config, victim, view, jax.random.key(0))
    except _Recorded:
        pass
    step, state, *rest = calls[0]
    return Job(lambda: run_epoch(step, jax.tree.map(jnp.copy, state), *rest), sizes.adversarial)


class _Recorded(Exception):
    """The arguments of the first call have been recorded."""


def _age(sizes: Sizes) -> Job:
    """AGE on ResNet-18."""
    victim, view = _victim("resnet18", sizes), DefenderView(*random_images(sizes.edited, sizes.shape))
    config = age.Config(batch_size=min(age.Config().batch_size, sizes.edited))
    number = -(-sizes.edited // config.batch_size)
    forward = (
        lambda v, x: models.outputs(victim.model, v, x, True)[0],
        (victim.variables, _floats(sizes, sizes.edited // number)),
    )
    run = partial(age.purify, config, victim, view, jax.random.key(0))
    return Job(run, sizes.edited, extra=((number, *forward),))


def _inversion(sizes: Sizes) -> Job:
    """One epoch of the trigger inversion for all classes; an image counts once per class."""
    victim, view = _victim("small_vgg", sizes), DefenderView(*random_images(sizes.searched, sizes.shape))
    config = neural_cleanse.Config(epochs=1)
    run = partial(_smallest_patches.search, config, victim, view, jax.random.key(0))
    return Job(run, sizes.searched * CLASSES)


def _many(how: Any, sizes: Sizes) -> Job:
    """A few training steps of several models that differ in their seed."""
    model, count = _model("small_vgg", sizes), sizes.batch * max(1, sizes.steps // 3)
    images, labels = random_images(count, sizes.shape)
    data: Any = jnp.asarray(images), jnp.asarray(labels)  # the same object in all runs, so it is not copied
    recipe = FitConfig(1, sizes.batch)
    runs = [partial(fit, model, data[0], data[1], recipe, jax.random.key(i)) for i in range(sizes.victims)]
    return Job(partial(many.run_together, runs, how), count * sizes.victims)


def _trigger(attack: str, sizes: Sizes) -> Job:
    """Apply a static trigger to stored images."""
    images, labels = random_images(sizes.stamped, sizes.shape)
    spec, config = attacks.registry.load("attacks", attack), config_of("attacks", attack)()
    task = Task(images, labels, _model("small_vgg", sizes), read_array)
    arrays = spec.prepare(config, task, jax.random.key(0)) if spec.prepare is not None else {}
    stamp = partial(attacks.stamped, attack, config, images, jax.random.key(0), arrays)
    return Job(stamp, sizes.stamped)


_KINDS: dict[str, Callable[..., Job]] = {
    "train": _train, "evaluate": _evaluate, "ibau": _ibau, "bibau": _bibau, "age": _age, "inversion": _inversion,
    "many": _many, "trigger": _trigger,
}  # fmt: skip


def job(name: str, sizes: Sizes) -> Job:
    """Prepare the workload KIND/ARGUMENT/... of :data:`bdjax.bench.NAMES`."""
    kind, *arguments = name.split("/")
    return _KINDS[kind](*arguments, sizes)
