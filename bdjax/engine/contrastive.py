"""Training of dual encoders: the contrastive loss over the pairs of all devices, AdamW, and the epochs.

Radford et al., ICML 2021. With L2-normalised embeddings u of the images and v of the captions of a batch of B pairs and
the factor s = exp(logit_scale), both directions are classification problems whose right answer is the own partner:

    L = (CE(s U Vᵀ, 1..B) + CE(s V Uᵀ, 1..B)) / 2

On several devices each one compares its own pairs with those of all devices (all-gather), so that the loss and its
gradient are those of one device with the whole batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.engine import augment, parallel
from bdjax.engine.epoch import check_finite, run_epoch
from bdjax.engine.fit import Saver
from bdjax.engine.optimizer import take_step
from bdjax.engine.step import draw
from bdjax.errors import InputError, check_fields
from bdjax.pair_types import DualEncoder
from bdjax.types import Callback, Images, Key, Variables, to_float

LARGEST_SCALE = math.log(100)
"""Largest value of logit_scale in CLIP's training."""


@dataclass(frozen=True)
class PairFitConfig:
    """Training recipe of a dual encoder."""

    epochs: int = 20
    """Number of passes over the pairs."""
    batch_size: int = 128
    """Pairs per step over all devices; a smaller last batch is dropped."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    warmup: int = 100
    """Steps of linear warm-up, before the cosine decay to zero; at most half of all steps are used."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and kernels; biases, normalisation and logit_scale are not decayed."""
    beta1: float = 0.9
    """Decay of AdamW's first moment, in [0, 1)."""
    beta2: float = 0.999
    """Decay of AdamW's second moment, in [0, 1)."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "none"
    """Augmentation of the images: random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""
    largest_scale: float = LARGEST_SCALE
    """Upper bound of logit_scale; its lower bound is 0."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the activations; parameters and the loss are float32."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "fit",
            (("epochs", "batch_size"), "at least 1", lambda v: v >= 1),
            (("warmup",), "zero or more", lambda v: v >= 0),
            (("learning_rate",), "positive and finite", lambda v: 0 < v < math.inf),
            (("weight_decay", "largest_scale"), "zero or more and finite", lambda v: 0 <= v < math.inf),
            (("beta1", "beta2"), "in [0, 1)", lambda v: 0 <= v < 1),
        )


class PairSamples(NamedTuple):
    """A batch of pairs on one device."""

    images: Images
    """float32 [B, H, W, C] in [0, 1], augmented."""
    tokens: jax.Array
    """int32 [B, L]."""
    keys: Key
    """[B], one random key per pair."""
    constants: Any
    """Arrays that a loss needs beside the pairs."""
    axis: str | None
    """Name of the mapped axis, or None on a single device."""


PairLoss = Callable[[DualEncoder, Any, Any, PairSamples], tuple[jax.Array, tuple[dict[str, jax.Array], Any]]]
"""`loss(encoder, params, batch_stats, samples) -> (loss of this device, (metrics, new batch_stats))`; a module-level
function. The loss of the batch is the mean over the devices."""


def normalise(embeddings: jax.Array) -> jax.Array:
    """Scale embeddings [N, D] to length one."""
    return embeddings / jnp.maximum(jnp.linalg.norm(embeddings, axis=-1, keepdims=True), 1e-12)


def one_way(anchors: jax.Array, partners: jax.Array, logit_scale: jax.Array, axis: str | None) -> jax.Array:
    """Cross-entropy of finding each anchor's partner among the partners of all devices.

    Args:
      anchors: normalised [B, D], those of this device.
      partners: normalised [B, D], in the same order.
      logit_scale: logarithm of the factor s, a scalar.
      axis: mapped axis, or None.

    Returns:
      The mean over the anchors of this device, a scalar.
    """
    candidates = parallel.all_gather(partners, axis)
    first = 0 if axis is None else jax.lax.axis_index(axis) * len(anchors)
    logits = jnp.exp(logit_scale) * anchors @ candidates.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, first + jnp.arange(len(anchors))).mean()


def info_nce(images: jax.Array, texts: jax.Array, logit_scale: jax.Array, axis: str | None = None) -> jax.Array:
    """CLIP's loss of a batch.

    Args:
      images: embeddings of the images on this device, float32 [B, D].
      texts: embeddings of their captions, float32 [B, D].
      logit_scale: logarithm of the factor s, a scalar.
      axis: mapped axis over which pairs are gathered, or None.

    Returns:
      The loss of this device's pairs, a scalar; its mean over the devices is the loss of the batch.
    """
    u, v = normalise(images), normalise(texts)
    return (one_way(u, v, logit_scale, axis) + one_way(v, u, logit_scale, axis)) / 2


def clip_loss(
    encoder: DualEncoder, params: Any, batch_stats: Any, samples: PairSamples
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    """CLIP's loss as a :data:`PairLoss`.

    Args:
      encoder: the dual encoder.
      params: its parameters.
      batch_stats: its batch statistics.
      samples: the pairs.

    Returns:
      (loss, ({"loss"}, new batch statistics)).
    """
    variables = {"params": params, "batch_stats": batch_stats}
    images, _, stats = encoder.visual(variables, samples.images, True, samples.axis)
    loss = info_nce(images, encoder.text(variables, samples.tokens), params["logit_scale"], samples.axis)
    return loss, ({"loss": loss}, stats)


def trained_part(params: Any, part: str) -> Any:
    """Return the parameters that are trained: all of them, or "visual" and nothing else."""
    return params if part == "all" else {"visual": params["visual"]}


def fit_pairs(
    encoder: DualEncoder,
    images: np.ndarray,
    tokens: np.ndarray,
    config: PairFitConfig,
    key: Key,
    *,
    loss: PairLoss = clip_loss,
    constants: Any = None,
    start: Variables | None = None,
    part: Literal["all", "visual"] = "all",
    callback: Callback | None = None,
    saver: Saver | None = None,
    stage: str = "training",
) -> Variables:
    """Train a dual encoder from scratch or from given variables.

    Args:
      encoder: the dual encoder; its activations have the dtype that it was created with.
      images: stored [N, H, W, C].
      tokens: int32 [N, L].
      config: the training recipe.
      key: random key of the run.
      loss: loss of a batch.
      constants: arrays for the loss, replicated on every device.
      start: initial variables; None: initialise from `key`.
      part: "all", or "visual" to train the image encoder alone.
      callback: receives the progress of every step and the variables after every epoch.
      saver: saves the state after every epoch; training resumes from it.
      stage: name of the training stage, for progress and messages.

    Returns:
      The trained variables.

    Raises:
      InputError: when the batch size exceeds the number of pairs or is not divisible by the number of devices, or when
        the loss becomes NaN or infinite.
    """
    callback = callback or Callback()
    if config.batch_size > len(images):
        raise InputError(
            f"fit.batch_size={config.batch_size} is larger than the {len(images)} pairs. Use a smaller one."
        )
    parallel.check_batch(config.batch_size)
    steps = len(images) // config.batch_size
    init_key, data_key = jax.random.split(key)
    variables = jax.tree.map(jnp.array, {**start}) if start else jax.jit(encoder.init)(init_key)
    state: dict[str, Any] = dict(variables)
    state["opt"] = optax.scale_by_adam().init(trained_part(variables["params"], part))
    curve, first_epoch = np.zeros(config.epochs, np.float32), 0
    if saver and (saved := saver.restore({**state, "curve": curve})):
        first_epoch, state = saved[0], dict(saved[1])
        curve = np.array(state.pop("curve"))
    step = pair_step(encoder, loss, part, config.augment, config.beta1, config.beta2)
    rates = warmup_cosine(config.learning_rate, config.warmup, config.epochs * steps)
    arrays = {
        "images": jnp.asarray(images), "tokens": jnp.asarray(tokens), "extra": constants,
        "weight_decay": jnp.float32(config.weight_decay), "largest_scale": jnp.float32(config.largest_scale),
    }  # fmt: skip
    for epoch in range(first_epoch, config.epochs):
        batch = draw(jax.random.fold_in(data_key, epoch), len(images), steps, config.batch_size)
        per_step = {"rate": jnp.asarray(rates[epoch * steps : (epoch + 1) * steps])}
        before = epoch * steps
        tick = partial(_report, callback, stage, before, config.epochs * steps)
        state, metrics = run_epoch(step, state, batch, per_step, arrays, tick=tick)
        check_finite(metrics["loss"], per_step["rate"], before, f"{stage} loss", "fit.learning_rate")
        curve[epoch] = metrics["loss"].mean()
        if saver:
            saver.save(epoch + 1, {**state, "curve": curve})
        means = {name: value.mean() for name, value in metrics.items()}
        callback.on_round_end(epoch + 1, _variables(state), **means)
    return _variables(state)


@lru_cache(maxsize=32)
def pair_step(
    encoder: DualEncoder, loss: PairLoss, part: str = "all", policy: str = "none", beta1: float = 0.9,
    beta2: float = 0.999,
) -> Callable:  # fmt: skip
    """Return a step of AdamW in the engine's form, the same object for the same arguments.

    Args:
      encoder: the dual encoder.
      loss: loss of a batch.
      part: "all", or "visual" to train the image encoder alone.
      policy: augmentation of the images (:func:`bdjax.engine.augment.policy`).
      beta1: decay of the first moment.
      beta2: decay of the second moment.

    Returns:
      The step. `constants` holds "images", "tokens", "weight_decay", "largest_scale" and "extra".
    """
    augmented, adam = augment.policy(policy), optax.scale_by_adam(beta1, beta2)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images = augmented(to_float(constants["images"][batch["index"]]), batch["augment"])
        samples = PairSamples(
            images, constants["tokens"][batch["index"]], batch["dropout"], constants["extra"], axis
        )  # fmt: skip

        def of_trained(trained: Any) -> tuple[jax.Array, Any]:
            return loss(encoder, {**state["params"], **trained}, state["batch_stats"], samples)

        trained = trained_part(state["params"], part)
        (_, (metrics, stats)), gradient = jax.value_and_grad(of_trained, has_aux=True)(trained)
        gradient, metrics = parallel.average((gradient, metrics), axis)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            update, opt = adam.update(gradient, state["opt"], trained)
        update = jax.tree.map(lambda u, p: u + (constants["weight_decay"] * p if p.ndim > 1 else 0), update, trained)
        params = {**state["params"], **take_step(trained, update, per_step["rate"])}
        params["logit_scale"] = jnp.clip(params["logit_scale"], 0, constants["largest_scale"])
        return {"params": params, "batch_stats": stats, "opt": opt}, metrics

    return step


def warmup_cosine(peak: float, warmup: int, total: int) -> np.ndarray:
    """Return the learning rate of each step: linear warm-up, then cosine to zero.

    Args:
      peak: largest learning rate.
      warmup: steps of the warm-up, reduced to half of all steps.
      total: number of steps.

    Returns:
      float32 [total].
    """
    warmup = min(warmup, total // 2)
    step = np.arange(total)
    cosine = 0.5 * (1 + np.cos(np.pi * (step - warmup) / max(1, total - warmup)))
    return np.asarray(peak * np.where(step < warmup, (step + 1) / max(1, warmup), cosine), np.float32)


def _report(callback: Callback, stage: str, before: int, total: int, done: int, _: int) -> None:
    callback.on_progress(stage, before + done, total)


def _variables(state: Any) -> Variables:
    return {"params": state["params"], "batch_stats": state["batch_stats"]}
