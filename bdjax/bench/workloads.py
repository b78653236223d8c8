"""What is measured: each workload prepares its data once and gives a :class:`Job` of the library's own functions."""

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
from bdjax.defenses import age, bibau, ibau, neural_cleanse
from bdjax.engine import FitConfig, fit, fit_with_hook, many, predict, run_epoch
from bdjax.engine.epoch import carried
from bdjax.types import DefenderView, Task, Victim

CLASSES = 10


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the shapes are CIFAR-10's unless the run is a small one."""

    shape: tuple[int, int, int] = (32, 32, 3)
    """(H, W, C) of an image."""
    width: int | None = None
    """Channels of the networks' first convolution; None: their own."""
    batch: int = 128
    """Images a training step."""
    steps: int = 6
    """Training steps of small_vgg that one run takes; of resnet18, a third."""
    test: int = 2000
    """Images of an evaluation."""
    clean: int = 5000
    """The defender's images."""
    clean_batch: int = 100
    """Of I-BAU."""
    edited: int = 512
    """Images that AGE looks at."""
    searched: int = 512
    """Images of the trigger inversion."""
    adversarial: int = 256
    """Images of an outer step of BI-BAU."""
    victims: int = 8
    """Trained at once."""
    stamped: int = 50_000
    """Images that get a static trigger."""


SUITES = {
    "cpu": Sizes(),
    "gpu": Sizes(batch=512, steps=96, test=10_000, searched=2048),
}
SMALL = Sizes((8, 8, 3), 4, 32, 3, 20, 20, 10, 16, 16, 16, 2, 40)


class Job(NamedTuple):
    """One workload, ready to run."""

    run: Callable[[], Any]
    """Once; returns the arrays that must be there when it is over."""
    units: float
    """How many of `unit` one run is."""
    unit: str = "images"
    dtype: str = "float32"
    """Of the activations, and of the matrix product that it is set beside."""
    extra: tuple[tuple[float, Callable, tuple], ...] = ()
    """(times, function, arguments) of programs that do not go through `engine.run_epoch`."""


def random_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise as stored images, uint8 [N, H, W, C], and labels that mean nothing, int32 [N]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.integers(0, CLASSES, count).astype(np.int32)


def _model(name: str, sizes: Sizes, dtype: str = "float32") -> Any:
    return models.create(name, sizes.shape, CLASSES, jnp.dtype(dtype), sizes.width)


def _victim(name: str, sizes: Sizes) -> Victim:
    model = _model(name, sizes)
    return Victim(model, jax.jit(model.init)(jax.random.key(0)))


def _train(name: str, attack: str, dtype: str, sizes: Sizes) -> Job:
    """One epoch of training as the attack does it; what it trains before (IAD's mask network) is not measured."""
    model, steps = _model(name, sizes, dtype), sizes.steps if name == "small_vgg" else max(1, sizes.steps // 3)
    images, labels = random_images(steps * sizes.batch, sizes.shape)
    recipe = FitConfig(1, sizes.batch, precision=dtype)  # type: ignore[arg-type]
    asked: list[tuple] = []

    def controlled(*arguments: Any, stage: str = "training", **_: Any) -> tuple[Any, Any]:
        if stage != "training":
            return model.init(jax.random.key(0)), arguments[4]
        asked.append(arguments)
        return model.init(jax.random.key(0)), arguments[4]

    task = Task(
        images, labels, model, read_array,
        fit=lambda *arguments, **options: controlled(*arguments, None, None, **options)[0],
        fit_with_hook=controlled,
    )  # fmt: skip
    config = config_of("attacks", attack)()
    attacks.plant(attack, config, task, jax.random.key(0))
    shown, called, key, hook, attacker = asked[-1]
    start = jax.jit(model.init)(jax.random.key(0))
    run = partial(fit_with_hook, model, shown, called, recipe, key, hook, attacker, start=start)
    return Job(run, steps * sizes.batch, dtype=dtype)


def _evaluate(name: str, sizes: Sizes) -> Job:
    victim, images = _victim(name, sizes), random_images(sizes.test, sizes.shape)[0]
    forward = (lambda v, x: victim.model.logits(v, x).argmax(-1), (victim.variables, _floats(sizes, sizes.test)))
    return Job(partial(predict, victim.model, victim.variables, images), sizes.test, extra=((1, *forward),))


def _floats(sizes: Sizes, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *sizes.shape), jnp.float32)


def _ibau(schedule: Any, sizes: Sizes) -> Job:
    """One round, with batches of `clean_batch` in both schedules."""
    victim, view = _victim("small_vgg", sizes), DefenderView(*random_images(sizes.clean, sizes.shape))
    config = ibau.Config(schedule, rounds=1, batch_size=sizes.clean_batch)
    return Job(partial(ibau.purify, config, victim, view, jax.random.key(0)), 1, "rounds")


def _bibau(sizes: Sizes) -> Job:
    """One ascent and one outer step, as `purify` hands them to the engine."""
    victim, view = _victim("small_vgg", sizes), DefenderView(*random_images(2 * sizes.adversarial, sizes.shape))
    view.labels[:CLASSES] = np.arange(CLASSES)
    config, found = bibau.Config(procedure="paper", epochs=1, batch_size=sizes.adversarial, fisher_batch=8), []

    def keep(step: Any, state: Any, split: Any, whole: Any, shared: Any, **_: Any) -> Any:
        found.append((step, state, *jax.tree.map(lambda leaf: leaf[:1], (split, whole)), shared))
        raise _Kept

    try:
        with carried(keep):
            bibau.purify(config, victim, view, jax.random.key(0))
    except _Kept:
        pass
    step, state, *rest = found[0]
    return Job(lambda: run_epoch(step, jax.tree.map(jnp.copy, state), *rest), sizes.adversarial)


class _Kept(Exception):
    """The arguments that were wanted are there."""


def _age(sizes: Sizes) -> Job:
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
    """One epoch of the search for the triggers of all classes; an image counts once for each class."""
    victim, view = _victim("small_vgg", sizes), DefenderView(*random_images(sizes.searched, sizes.shape))
    config = neural_cleanse.Config(epochs=1)
    run = partial(neural_cleanse.search, config, victim, view, jax.random.key(0))
    return Job(run, sizes.searched * CLASSES)


def _many(how: Any, sizes: Sizes) -> Job:
    """Victims that differ in their seed, a few steps each."""
    model, count = _model("small_vgg", sizes), sizes.batch * max(1, sizes.steps // 3)
    images, labels = random_images(count, sizes.shape)
    shown: Any = jnp.asarray(images), jnp.asarray(labels)  # one object in all runs: not copied for each
    recipe = FitConfig(1, sizes.batch)
    runs = [partial(fit, model, shown[0], shown[1], recipe, jax.random.key(i)) for i in range(sizes.victims)]
    return Job(partial(many.run_together, runs, how), count * sizes.victims)


def _trigger(attack: str, sizes: Sizes) -> Job:
    """Stored images to stored images."""
    images, labels = random_images(sizes.stamped, sizes.shape)
    module, config = attacks.registry.load("attacks", attack), config_of("attacks", attack)()
    task = Task(images, labels, _model("small_vgg", sizes), read_array)
    arrays = module.prepare(config, task, jax.random.key(0)) if hasattr(module, "prepare") else {}
    stamp = partial(attacks.stamped, attack, config, images, jax.random.key(0), arrays)
    return Job(stamp, sizes.stamped)


_KINDS: dict[str, Callable[..., Job]] = {
    "train": _train, "evaluate": _evaluate, "ibau": _ibau, "bibau": _bibau, "age": _age, "inversion": _inversion,
    "many": _many, "trigger": _trigger,
}  # fmt: skip


def job(name: str, sizes: Sizes) -> Job:
    """The workload KIND/ARGUMENT/... of :data:`bdjax.bench.NAMES`, prepared."""
    kind, *arguments = name.split("/")
    return _KINDS[kind](*arguments, sizes)
