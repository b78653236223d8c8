"""Trigger recovery by max-entropy staircases: a distribution of triggers for every label.

X. Qiao, Y. Yang and H. Li, "Defending Neural Backdoors via Generative Distribution Modeling" (MESA), NeurIPS 2019,
arXiv:1910.04749, as BAERASER uses it: Y. Liu et al., "Backdoor Defense with Machine Unlearning", INFOCOM 2022,
arXiv:2201.09538.

For each label y and each threshold ε, a generator G with noise z ~ N(0, I) and a network T for the mutual information
minimise

    min over G    mean_x max(0, ε − p_θ(x ⊕ G(z))[y]) − η I(z; G(z))                          (BAERASER, Eq. 2)

The hinge is zero where the model's confidence already exceeds ε, so the remaining freedom of G increases the entropy of
its output. I(z; G(z)) measures this entropy, because G is a deterministic function of z; :mod:`bdjax.defenses._mine`
estimates it. A patch replaces the pixels at a position drawn anew for every image. An additive trigger has the size of
the image (⊕ is clip(x + G(z), 0, 1)). T and G take one step of Adam each, alternately.

Then `samples` triggers are drawn from each G. A trigger is accepted when its ASR is at least τ on a batch of images of
other classes; this separates universal triggers from image-specific adversarial noise. The labels of the accepted
triggers are the suspected target labels.

Deviations:

- Position (ours; the triggers of the paper and MESA's recovery are at uniformly random positions): the row and the
  column of a patch are drawn from a distribution π per generator, uniform at first. Uniform positions would miss a
  backdoor that responds at a single position in a network that distinguishes positions. π is trained by the score
  function of the same hinge h, with an entropy bonus H: descent on mean_x (h(x) − mean h) log π(position of x) −
  `place_entropy` H(π). `place_rate=0` keeps π uniform.
- BAERASER writes I of G(z) and a z' independent of it, which is zero. As in MESA's release, z is the generator's own
  noise, and z' is independent.
- BAERASER states neither n, η, τ, b, the networks, nor the trigger's size. n, η, the size and the noises are those of
  MESA's release for CIFAR-10. Its 625 steps of 128 images, 512 hidden units and learning rate of 2e-4 are reduced to
  settings that find the same labels on MNIST with a twelfth of the work (`iterations=625 recovery_batch=128 hidden=512
  generator_rate=2e-4` are the release's).
- All labels and thresholds are trained at once, as vmapped generators whose images form one batch for the shared model
  (ours). τ is required of each drawn trigger, not of its generator. The release counts epochs; here steps are counted,
  so that their number does not depend on the data set. Triggers with noise are clipped to [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses import _mine
from bdjax.defenses._batch import batch_of
from bdjax.defenses._pool import Pool, draw_batches, stamp, uniform_positions
from bdjax.defenses._staircase_step import Static, as_triggers, generator_network, staircase_step, trigger_shape
from bdjax.engine import run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Images, Key, Model, Victim, to_float


@dataclass(frozen=True)
class RecoveryConfig:
    """Hyper-parameters of the trigger recovery; the Config of a method that starts with it extends this class."""

    form: Literal["patch", "additive"] = "patch"
    """patch: replaces a square at any position; additive: is added to the whole image."""
    size: int = 3
    """Side of the patch in pixels."""
    strength: float = 0.1
    """Largest change of a value by an additive trigger, in (0, 1]; large values change the prediction of any model."""
    thresholds: tuple[float, ...] = (0.5, 0.8, 0.9)
    """ε of each generator of a label: probabilities in (0, 1]."""
    mi_weight: float = 0.1
    """η, weight of the mutual information."""
    asr_threshold: float = 0.9
    """τ, smallest ASR of an accepted trigger, in [0, 1]."""
    iterations: int = 200
    """Steps of the generators."""
    recovery_batch: int = 32
    """Images per step of the generators; every generator uses all of them."""
    batch_size: int = 128
    """Images per step after the recovery."""
    samples: int = 8
    """Number of triggers drawn from each generator."""
    together: int = 0
    """Number of labels whose generators are trained at once; 0: all. A smaller number needs less memory and more time,
    with the same result."""
    hidden: int = 128
    """Units per hidden layer of both networks; the release uses 2048 for CIFAR-100."""
    noise_size: int = 64
    """Size of z, a multiple of 4."""
    trigger_noise: float = 0.1
    """Standard deviation of the noise that is added to triggers in training, in units of [0, 1]."""
    generator_rate: float = 1e-3
    """Learning rate of Adam for both networks."""
    place_rate: float = 0.1
    """Learning rate of Adam for the log-odds of the patch position; 0: uniform throughout."""
    place_entropy: float = 0.01
    """Weight of the entropy of the patch position."""
    adam_beta: float = 0.5
    """First decay rate of Adam for both networks, in [0, 1)."""
    moving_average: float = 0.001
    """Weight of a batch in the moving average that corrects the estimator's gradient, in (0, 1]."""

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
    """Recover triggers for every label, and test which of them are universal.

    Args:
      config: the hyper-parameters.
      victim: the model.
      view: clean images (stored [n, H, W, C]) and labels [n]; its callback receives the progress.
      key: draws initial networks, batches, noise and positions.

    Returns:
      The pool of all drawn triggers.

    Raises:
      InputError: when a patch is larger than the images, a batch cannot be split over the devices, or a loss is not
        finite.
    """
    model, per_label = victim.model, len(config.thresholds)
    if config.form == "patch" and config.size > min(model.shape[:2]):
        raise InputError(f"defense.size={config.size} does not fit images of {model.shape[0]}x{model.shape[1]} pixels.")
    batch_size = batch_of(config.recovery_batch, len(view.labels), "clean images a step")
    batches = {
        "index": draw_batches(jax.random.fold_in(key, 0), len(view.labels), batch_size, config.iterations),
        "key": jax.random.split(jax.random.fold_in(key, 1), (config.iterations, batch_size)),
    }
    constants: dict[str, Any] = {
        "images": jnp.asarray(view.images),
        "variables": dict(victim.variables),
        "hyper": {name: jnp.float32(getattr(config, name)) for name in _DYNAMIC},
    }
    trial = np.asarray(jax.random.permutation(jax.random.fold_in(key, 3), len(view.labels)))
    trial = trial[: max(batch_size, _TRIAL_IMAGES)]
    images, labels = to_float(view.images[trial]), jnp.asarray(view.labels[trial])
    labels_at_once, pools = min(config.together or model.classes, model.classes), []
    measure_asr = _asr(model, config.form)
    for first in range(0, model.classes, labels_at_once):
        ids = np.arange(first * per_label, (first + labels_at_once) * per_label)
        valid = ids[ids < model.classes * per_label]
        ids = np.minimum(ids, ids[len(valid) - 1])  # the last, smaller group is padded: one program for all groups
        thresholds = np.asarray(config.thresholds, np.float32)[ids % per_label]
        pairs = {"id": ids, "label": ids // per_label, "threshold": thresholds}
        constants["pairs"] = jax.tree.map(jnp.asarray, pairs)
        stage = f"triggers of labels {first} to {valid[-1] // per_label} of {model.classes}"
        tick = partial(view.callback.on_progress, stage)
        generators, position_logits = _train_generators(config, model, batches, constants, key, tick)
        sample = _sampler(model.shape, _static(config), config.samples)
        triggers = sample(generators, constants["pairs"], constants["hyper"], key)
        for i in range(len(valid)):
            logits = [np.broadcast_to(leaf[i], (config.samples, leaf.shape[1])) for leaf in position_logits]
            target = constants["pairs"]["label"][i]
            asr = measure_asr(constants["variables"], images, labels, triggers[i], logits, target, key)
            pools.append((triggers[i], np.full(config.samples, ids[i] // per_label, np.int32), asr, *logits))
    triggers, target_labels, asr, *all_logits = (
        jnp.concatenate([jnp.asarray(part) for part in parts]) for parts in zip(*pools, strict=True)
    )
    return Pool(triggers, target_labels, asr, asr >= config.asr_threshold, tuple(all_logits))


_DYNAMIC = (
    "strength", "mi_weight", "trigger_noise", "generator_rate", "adam_beta", "moving_average", "place_rate",
    "place_entropy",
)  # fmt: skip
_TRIAL_IMAGES = 128
"""Number of images on which the ASR of a trigger is measured, if there are as many."""


def _static(config: RecoveryConfig) -> Static:
    return Static(**{name: getattr(config, name) for name in Static._fields})


def _train_generators(
    config: RecoveryConfig, model: Model, batches: Any, constants: Any, key: Key, tick: Callable
) -> tuple[Any, Any]:
    """Train the generators of constants["pairs"]; return them and their position log-odds, with a leading axis [P]."""
    static, pair_ids = _static(config), constants["pairs"]["id"]
    initialise = _initialiser(model.shape, static)
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(initialise(pair_id, key) for pair_id in pair_ids))
    state["position_logits"] = uniform_positions(len(pair_ids), model.shape, trigger_shape(model.shape, static))
    trained = ("params", "mine", "position_logits")
    moments = {name: optax.scale_by_adam().init(state[name]) for name in trained}
    state |= {"log_average": jnp.zeros(len(pair_ids)), "moments": moments}
    state, metrics = run_epoch(staircase_step(model, static), state, batches, {}, constants, tick=tick)
    check_finite(metrics["loss"], config.generator_rate, 0, "staircase loss", "defense.generator_rate")
    result = {name: state[name] for name in ("params", "batch_stats")}, state["position_logits"]
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), result)  # from all devices to one


@lru_cache(maxsize=16)
def _initialiser(shape: tuple[int, int, int], static: Static) -> Callable:
    """Compile (id of a pair, key) -> the initial variables of its generator and its T."""
    values = int(np.prod(trigger_shape(shape, static)))

    def initialise(pair_id: jax.Array, key: Key) -> dict[str, Any]:
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 4), pair_id))
        generator = generator_network(shape, static).init(keys[0])
        return {**generator, "mine": _mine.init(keys[1], static.noise_size, values, static.hidden)}

    return jax.jit(initialise)


@lru_cache(maxsize=16)
def _sampler(shape: tuple[int, int, int], static: Static, samples: int) -> Callable:
    """Compile (generators, pairs, hyper, key) -> `samples` triggers of each generator, [P, samples, h, w, C]."""

    def sample(generator: Any, pair_id: jax.Array, hyper: Any, key: Key) -> jax.Array:
        z = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 5), pair_id), (samples, static.noise_size))
        return as_triggers(generator_network(shape, static).apply(generator, z)[0], shape, static, hyper)

    each = jax.vmap(sample, (0, 0, None, None))
    return jax.jit(lambda generators, pairs, hyper, key: each(generators, pairs["id"], hyper, key))


@lru_cache(maxsize=16)
def _asr(model: Model, form: str) -> Callable:
    """Compile (variables, images [S, ...], labels, triggers [K, h, w, C], position log-odds, label, key) -> ASR [K]."""

    def measure(
        variables: Any, images: Images, labels: jax.Array, triggers: jax.Array, position_logits: Any, label: Any,
        key: Key,
    ) -> jax.Array:  # fmt: skip
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 6), label), (len(triggers), len(images)))
        triggers, position_logits = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[:, None], (*keys.shape, *leaf.shape[1:])), (triggers, position_logits)
        )
        stamped = jax.vmap(partial(stamp, form), (None, 0, 0, 0))(images, triggers, keys, position_logits)
        predictions = model.logits(variables, stamped.reshape(-1, *model.shape)).argmax(-1).reshape(keys.shape)
        of_others = labels != label
        return ((predictions == label) & of_others).sum(1) / jnp.maximum(of_others.sum(), 1)

    return jax.jit(measure)
