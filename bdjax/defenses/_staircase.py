"""Trigger recovery: a distribution of triggers for every label, by max-entropy staircases (Qiao et al., NeurIPS 2019).

For each label y and each threshold ε a generator G of noise z ~ N(0, I) and a network T for mutual information learn:

    min over G    mean_x max(0, ε − p_θ(x ⊕ G(z))[y]) − η I(z; G(z))                          (BAERASER, Eq. 2)

The hinge is silent where the model is sure enough already, so that the rest of G's freedom goes into entropy, for which
I(z; G(z)) stands (G is a function of z); :mod:`bdjax.defenses._mine` estimates it. BAERASER writes I with G(z) and a z'
independent of it, which is zero; as in MESA's release, z is G's own noise and z' the other, drawn apart. A patch
replaces the pixels at a place drawn anew for every image; an additive trigger is as large as the image (⊕ is
clip(x + G(z), 0, 1)). T and G take one step of Adam each, in turns.

Where a patch is put (ours; the paper's triggers, and MESA's recovery, are at random places): row and column are drawn
from a distribution π of each generator, uniform at first. A backdoor that answers at one place only, in a network that
tells places apart, would never be met; so π learns by the score function of the same hinge h, again with as much
entropy H as that leaves: descent on mean_x (h(x) − mean h) log π(place of x) − `place_entropy` H(π).
`place_rate=0` keeps it uniform.

Then `samples` triggers are drawn from each G, and the pool keeps those with an ASR of at least τ on a batch of images
of other classes: a universal trigger does that, per-image noise does not. The labels of what is kept are the suspects.

BAERASER states neither n, η, τ, b, networks, nor the trigger's size. n, η, the size and the noises are those of MESA's
release for CIFAR-10; its 625 steps of 128 images, networks of 512 units and rate of 2e-4 are cut to what finds the same
labels on MNIST in a twelfth of the work (`iterations=625 recovery_batch=128 hidden=512 generator_rate=2e-4` are the
release's). Ours: all labels and thresholds learn at once, as many generators under vmap, whose images are one batch
for the model that they share; τ is asked of every trigger drawn and not of its generator; the release counts epochs,
here steps are counted, which are then the same number for any set; trigger noise is clipped to [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import models
from bdjax.defenses import _mine
from bdjax.defenses._batch import batch_of
from bdjax.defenses._pool import Pool, anywhere, batches, corner_of, stamp, stamp_one
from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Images, Key, Model, Victim, to_float


@dataclass(frozen=True)
class RecoveryConfig:
    """How triggers are recovered; the Config of a method that begins with it extends it."""

    form: Literal["patch", "additive"] = "patch"
    """patch: replaces a square anywhere; additive: is added to the whole image."""
    size: int = 3
    """Side of the patch in pixels."""
    strength: float = 0.1
    """Largest change of a value by an additive trigger, in (0, 1]; large ones turn any model to any label."""
    thresholds: tuple[float, ...] = (0.5, 0.8, 0.9)
    """ε of each generator of a label, probabilities in (0, 1]."""
    mi_weight: float = 0.1
    """η, weight of the mutual information."""
    asr_threshold: float = 0.9
    """τ, the least ASR of a trigger that is kept, in [0, 1]."""
    iterations: int = 200
    """Steps of the generators."""
    recovery_batch: int = 32
    """Images a step of the generators, each of which sees all."""
    batch_size: int = 128
    """Images a step after the recovery."""
    samples: int = 8
    """Triggers drawn from each generator for the pool."""
    together: int = 0
    """Labels whose generators learn at once, 0: all. Fewer take less memory and longer, and learn the same."""
    hidden: int = 128
    """Units of a hidden layer of either network; the release takes 2048 for CIFAR-100."""
    noise_size: int = 64
    """Numbers in z, a multiple of 4."""
    trigger_noise: float = 0.1
    """Standard deviation of what is added to triggers while generators learn, in units of [0, 1]."""
    generator_rate: float = 1e-3
    """Adam's learning rate, of both networks."""
    place_rate: float = 0.1
    """Adam's learning rate for the log-odds of where a patch is put; 0: anywhere, for ever."""
    place_entropy: float = 0.01
    """Weight of the entropy of where it is put."""
    adam_beta: float = 0.5
    """Adam's first decay, of both networks; in [0, 1)."""
    moving_average: float = 0.001
    """Share of a batch in the moving average that corrects the estimator's gradient, in (0, 1]."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (
                ("size", "iterations", "recovery_batch", "batch_size", "samples", "hidden"),
                "at least 1",
                lambda v: v >= 1,
            ),
            (("noise_size",), "a positive multiple of 4", lambda v: v > 0 and v % 4 == 0),
            (("mi_weight", "trigger_noise", "together"), "zero or more", lambda v: v >= 0),
            (("place_rate", "place_entropy"), "zero or more", lambda v: v >= 0),
            (("generator_rate",), "positive", lambda v: v > 0),
            (("strength", "moving_average"), "in (0, 1]", lambda v: 0 < v <= 1),
            (("asr_threshold",), "in [0, 1]", lambda v: 0 <= v <= 1),
            (("adam_beta",), "in [0, 1)", lambda v: 0 <= v < 1),
            (("thresholds",), "one or more values in (0, 1]", lambda v: bool(v) and all(0 < e <= 1 for e in v)),
        )


def recover(config: RecoveryConfig, victim: Victim, view: DefenderView, key: Key) -> Pool:
    """Triggers of every label, and which are universal.

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; its watch is told of every step.
    Raises InputError when a patch is larger than the images, a batch cannot be cut over the devices, or a loss is not
      finite.
    """
    model, each = victim.model, len(config.thresholds)
    if config.form == "patch" and config.size > min(model.shape[:2]):
        raise InputError(f"defense.size={config.size} does not fit images of {model.shape[0]}x{model.shape[1]} pixels.")
    size = batch_of(config.recovery_batch, len(view.labels), "clean images a step")
    split = {
        "index": batches(jax.random.fold_in(key, 0), len(view.labels), size, config.iterations),
        "key": jax.random.split(jax.random.fold_in(key, 1), (config.iterations, size)),
    }
    shared: dict[str, Any] = {
        "images": jnp.asarray(view.images),
        "variables": dict(victim.variables),
        "hyper": {name: jnp.float32(getattr(config, name)) for name in _DYNAMIC},
    }
    count, found = min(config.together or model.classes, model.classes), []
    trial = np.asarray(jax.random.permutation(jax.random.fold_in(key, 3), len(view.labels)))[: max(size, _TRIAL)]
    images, labels = to_float(view.images[trial]), jnp.asarray(view.labels[trial])
    for begin in range(0, model.classes, count):
        ids = np.arange(begin * each, (begin + count) * each)
        real = ids[ids < model.classes * each]
        ids = np.minimum(ids, ids[len(real) - 1])  # a last, smaller group is filled up: one program for all
        pairs = {"id": ids, "label": ids // each, "threshold": np.asarray(config.thresholds, np.float32)[ids % each]}
        shared["pairs"] = jax.tree.map(jnp.asarray, pairs)
        what = f"triggers of labels {begin} to {real[-1] // each} of {model.classes}"
        generators, odds = _learn(config, model, (split, shared), key, partial(view.callback.on_progress, what))
        made = _drawer(model.shape, _static(config), config.samples)(generators, shared["pairs"], shared["hyper"], key)
        for i in range(len(real)):
            places = [np.broadcast_to(own[i], (config.samples, own.shape[1])) for own in odds]
            chosen = [shared["variables"], images, labels, made[i], places, shared["pairs"]["label"][i], key]
            label = np.full(config.samples, ids[i] // each, np.int32)
            found.append((made[i], label, _tried(model, config.form)(*chosen), *places))
    triggers, wanted, asr, *where = (
        jnp.concatenate([jnp.asarray(p) for p in parts]) for parts in zip(*found, strict=True)
    )
    return Pool(triggers, wanted, asr, asr >= config.asr_threshold, tuple(where))


_DYNAMIC = (
    "strength", "mi_weight", "trigger_noise", "generator_rate", "adam_beta", "moving_average", "place_rate",
    "place_entropy",
)  # fmt: skip
_TRIAL = 128
"""Images, if there are as many, that τ is asked on."""


class _Static(NamedTuple):
    """What of a Config changes the compiled program."""

    form: str
    size: int
    noise_size: int
    hidden: int


def _static(config: RecoveryConfig) -> _Static:
    return _Static(**{name: getattr(config, name) for name in _Static._fields})


def _shape(shape: tuple[int, int, int], static: _Static) -> tuple[int, int, int]:
    return shape if static.form == "additive" else (static.size, static.size, shape[2])


def _triggers(values: jax.Array, shape: tuple[int, int, int], static: _Static, hyper: Any) -> jax.Array:
    """Values in [0, 1] of a generator [..., h * w * C] as triggers [..., h, w, C]."""
    if static.form == "additive":
        values = hyper["strength"] * (2 * values - 1)
    return values.reshape(*values.shape[:-1], *_shape(shape, static))


def _generator(shape: tuple[int, int, int], static: _Static) -> models.Generator:
    return models.sampler(int(np.prod(_shape(shape, static))), static.noise_size, static.hidden)


def _learn(config: RecoveryConfig, model: Model, given: tuple[Any, Any], key: Key, tick: Callable) -> Any:
    """Of the pairs in shared, with a leading axis [P]: the generators, trained, and the log-odds of their places."""
    static, (split, shared) = _static(config), given
    start = _starter(model.shape, static)
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(start(pair, key) for pair in shared["pairs"]["id"]))
    number = len(shared["pairs"]["id"])
    state["places"] = anywhere(number, model.shape, _shape(model.shape, static))
    moments = {name: optax.scale_by_adam().init(state[name]) for name in ("params", "mine", "places")}
    state |= {"log_average": jnp.zeros(number), "moments": moments}
    state, metrics = run_epoch(_step(model, static), state, split, {}, shared, tick=tick)
    check_finite(metrics["loss"], config.generator_rate, 0, "staircase loss", "defense.generator_rate")
    learnt = {name: state[name] for name in ("params", "batch_stats")}, state["places"]
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), learnt)  # of all devices, on one


@lru_cache(maxsize=16)
def _starter(shape: tuple[int, int, int], static: _Static) -> Callable:
    """(number of a pair, key) -> its two networks as they begin."""
    values = int(np.prod(_shape(shape, static)))

    def start(number: jax.Array, key: Key) -> dict[str, Any]:
        own = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 4), number))
        generator = _generator(shape, static).init(own[0])
        return {**generator, "mine": _mine.init(own[1], static.noise_size, values, static.hidden)}

    return jax.jit(start)


@lru_cache(maxsize=16)
def _step(model: Model, static: _Static) -> Callable:
    """One step of every T, then one of every G, in the engine's form."""
    generator = _generator(model.shape, static)

    def noises(pair: jax.Array, key: Key) -> tuple[jax.Array, jax.Array, jax.Array]:
        shape, size = _shape(model.shape, static), static.noise_size
        drawn = jax.random.normal(jax.random.fold_in(key, pair), (2 * size + int(np.prod(shape)),))
        return drawn[:size], drawn[size : 2 * size], drawn[2 * size :].reshape(shape)

    def place(pair: jax.Array, odds: Any, key: Key) -> jax.Array:
        return corner_of(odds, jax.random.fold_in(jax.random.fold_in(key, pair), 1))

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        hyper, pairs, images = shared["hyper"], shared["pairs"], to_float(shared["images"][split["index"]])
        z, other, added = jax.vmap(lambda pair: jax.vmap(partial(noises, pair))(split["key"]))(pairs["id"])
        draws = jax.vmap(lambda pair, odds: jax.vmap(partial(place, pair, odds))(split["key"]))
        corners = draws(pairs["id"], state["places"])  # [P, B, 2]

        def make(params: Any) -> tuple[jax.Array, Any]:  # [P, B, values]
            def one(params: Any, stats: Any, z: jax.Array) -> tuple[jax.Array, Any]:
                return generator.apply(
                    {"params": params, "batch_stats": stats}, z, weight=jnp.ones(len(z)), axis_name=axis
                )

            return jax.vmap(one)(params, state["batch_stats"], z)

        def judge(mine: Any, values: jax.Array) -> tuple[jax.Array, jax.Array]:  # T of all devices' pairs, [P, B] each
            each = jax.vmap(_mine.scores)
            joint, marginal = each(mine, z, values), each(mine, other, values)
            return parallel.all_gather(joint.T, axis).T, parallel.all_gather(marginal.T, axis).T

        values = make(state["params"])[0]

        def estimator_loss(mine: Any) -> tuple[jax.Array, jax.Array]:
            joint, marginal = judge(mine, values)
            average = jax.vmap(_mine.follow, (0, 0, None))(state["log_average"], marginal, hyper["moving_average"])
            return jax.vmap(_mine.surrogate)(joint, marginal, average).sum(), average

        def loss(params: Any, mine: Any) -> tuple[jax.Array, Any]:
            values, stats = make(params)
            information = jax.vmap(_mine.bound)(*judge(mine, values))
            triggers = _triggers(values, model.shape, static, hyper) + hyper["trigger_noise"] * added
            put = jax.vmap(partial(stamp_one, static.form))
            stamped = jax.vmap(put, (None, 0, 0))(images, triggers, corners)
            logits = model.logits(shared["variables"], stamped.reshape(-1, *model.shape))
            logits = logits.reshape(*z.shape[:2], -1).astype(jnp.float32)
            sure = jnp.take_along_axis(jax.nn.softmax(logits), pairs["label"][:, None, None], -1)[..., 0]
            short = jnp.maximum(0, pairs["threshold"][:, None] - sure)
            hinge = parallel.all_gather(short.T, axis).mean(0)
            value = (hinge - hyper["mi_weight"] * information).sum()
            return value, (stats, short, {"loss": value, "hinge": hinge, "information": information})

        def place_loss(places: Any, short: jax.Array) -> jax.Array:
            logs = [jax.nn.log_softmax(odds) for odds in places]
            each = [jnp.take_along_axis(log, corners[..., i], 1) for i, log in enumerate(logs)]
            chance = each[0] + each[1]
            short, chance = (parallel.all_gather(values.T, axis).T for values in (short, chance))
            scored = ((short - short.mean(1, keepdims=True)) * chance).mean(1)
            entropy = jnp.stack([-(jnp.exp(log) * log).sum(1) for log in logs]).sum(0)
            return (scored - hyper["place_entropy"] * entropy).sum()

        gradient, average = jax.grad(estimator_loss, has_aux=True)(state["mine"])
        after, moments = {"log_average": average}, {}
        after["mine"], moments["mine"] = _adam("mine", gradient, state, hyper, axis)
        gradient, (after["batch_stats"], short, metrics) = jax.grad(loss, has_aux=True)(state["params"], after["mine"])
        after["params"], moments["params"] = _adam("params", gradient, state, hyper, axis)
        gradient = jax.grad(place_loss)(state["places"], jax.lax.stop_gradient(short))
        after["places"], moments["places"] = _adam("places", gradient, state, hyper, axis, "place_rate")
        return {**after, "moments": moments}, metrics

    return step


def _adam(name: str, gradient: Any, state: Any, hyper: Any, axis: str | None, rate: str = "generator_rate") -> Any:
    """state[name] and its moments after a step."""
    gradient = parallel.average(gradient, axis)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        update, moments = optax.scale_by_adam(b1=hyper["adam_beta"]).update(gradient, state["moments"][name])
    return jax.tree.map(lambda p, u: p - hyper[rate] * u, state[name], update), moments


@lru_cache(maxsize=16)
def _drawer(shape: tuple[int, int, int], static: _Static, samples: int) -> Callable:
    """(generators, pairs, hyper, key) -> `samples` triggers of each, [P, samples, h, w, C]."""

    def one(generator: Any, pair: jax.Array, hyper: Any, key: Key) -> jax.Array:
        z = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 5), pair), (samples, static.noise_size))
        return _triggers(_generator(shape, static).apply(generator, z)[0], shape, static, hyper)

    return jax.jit(lambda state, pairs, hyper, key: jax.vmap(one, (0, 0, None, None))(state, pairs["id"], hyper, key))


@lru_cache(maxsize=16)
def _tried(model: Model, form: str) -> Callable:
    """(variables, images [S, ...], labels, triggers [K, h, w, C], places, label, key) -> ASR of each, float32 [K]."""

    def run(
        variables: Any, images: Images, labels: jax.Array, triggers: jax.Array, places: Any, label: Any, key: Key
    ) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 6), label), (len(triggers), len(images)))
        whole = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[:, None], (*keys.shape, *leaf.shape[1:])), (triggers, places)
        )
        stamped = jax.vmap(partial(stamp, form), (None, 0, 0, 0))(images, whole[0], keys, whole[1])
        found = model.logits(variables, stamped.reshape(-1, *model.shape)).argmax(-1).reshape(keys.shape)
        counted = labels != label
        return ((found == label) & counted).sum(1) / jnp.maximum(counted.sum(), 1)

    return jax.jit(run)
