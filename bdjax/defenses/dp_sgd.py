"""DP-SGD: train a new model on the poisoned training set with clipped and noisy per-example gradients.

M. Du, R. Jia and D. Song, "Robust Anomaly Detection and Backdoor Attack Detection via Differential Privacy", ICLR 2020,
arXiv:1911.07116; the algorithm: M. Abadi, A. Chu, I. Goodfellow, H. B. McMahan, I. Mironov, K. Talwar and L. Zhang,
"Deep Learning with Differential Privacy", CCS 2016, arXiv:1607.00133.

Threat model: the defender trains the model on a training set that may be poisoned, does not know which images are, and
has no clean images. The victim gives only its architecture.

For a batch of L images with gradients g_i of the cross-entropy,

    g = (1 / L) (Σ_i g_i min(1, S / ‖g_i‖₂) + N(0, σ² S² I)),     θ <- θ - rate (momentum · v + g)

A few poisoned images then have little influence on θ, and so have a few clean ones: with a σ that stops the backdoor,
accuracy is low. I-BAU's comparison reports accuracies of 5 to 15 % with σ = 50 (CIFAR-10) and 1.5 (GTSRB); the method
serves as a negative control.

Per-example gradients are computed by `vmap` in chunks, so that memory holds `chunk` gradients, not L.

Deviations:
- No release for images is known. S = 1, L = 256, the learning rate and the number of epochs are ours; σ is I-BAU's for
  GTSRB.
- Batch normalisation is in evaluation mode throughout, with mean 0 and variance 1 as initialised, because statistics of
  a batch would make the gradient of one image depend on the others. It is thus an affine map. Dropout is off.
- Batches are drawn by shuffling, not by Poisson sampling, and no privacy budget is accounted for.
- There is no weight decay, and no augmentation, which would have to be averaged within an example.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._batch import batch_of
from bdjax.defenses._tuning import hyper_arrays, image_arrays, round_reporter, run_epochs, training_state, variables_of
from bdjax.engine import parallel
from bdjax.engine.optimizer import direction, take_step
from bdjax.errors import check_fields
from bdjax.types import Key, Model, Task, Variables, to_float


@dataclass(frozen=True)
class Config:
    """Clipping, noise and the training recipe."""

    sigma: float = 1.5
    """σ, standard deviation of the noise in units of `clip`; I-BAU takes 50 for CIFAR-10."""
    clip: float = 1.0
    """S, largest L2 norm of the gradient of one image."""
    epochs: int = 60
    """Passes over the training set."""
    batch_size: int = 256
    """L, images per step, at most."""
    learning_rate: float = 0.1
    """Learning rate of SGD, constant."""
    momentum: float = 0.9
    """Momentum of SGD, in [0, 1)."""
    chunk: int = 64
    """Images whose gradients are in memory at a time on a device, at most."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("epochs", "batch_size", "chunk"), "at least 1", lambda v: v >= 1),
            (("clip", "learning_rate"), "positive", lambda v: v > 0),
            (("sigma",), "zero or more", lambda v: v >= 0),
            (("momentum",), "in [0, 1)", lambda v: 0 <= v < 1),
        )


def train(config: Config, task: Task, key: Key) -> Variables:
    """Train a new model on the task's training set.

    Args:
      config: the hyper-parameters.
      task: the training set (stored [N, H, W, C], poisoned), labels [N] and the architecture. After each epoch, its
        callback receives the variables, `train_loss`, `train_accuracy`, and the share of `clipped` gradients.
      key: random key that initialises the model, shuffles the images and draws the noise.

    Returns:
      The variables of the new model.

    Raises:
      InputError: when the batch size or the number of images is smaller than the number of devices, or when the loss
        becomes NaN or infinite.
    """
    keys = jax.random.split(key, 3)
    size = batch_of(config.batch_size, len(task.labels))
    steps = len(task.labels) // size
    constants = {
        **image_arrays(task.images, task.labels),
        "hyper": hyper_arrays(config, ("sigma", "clip", "momentum")),
        "noise_key": keys[2],
    }
    state = {**training_state(jax.jit(task.model.init)(keys[0]), "sgd"), "step": jnp.int32(0)}
    rates = np.full((config.epochs, steps), config.learning_rate, np.float32)
    chunk = _largest_divisor(size // parallel.count(), config.chunk)
    state = run_epochs(
        _step(task.model, chunk), state, constants, rates, size, keys[1],
        partial(task.callback.on_progress, "DP-SGD"), round_reporter(task.callback),
    )  # fmt: skip
    return variables_of(state)


def clipped_sum(
    loss: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]], params: Any, images: jax.Array,
    labels: jax.Array, clip: Any, chunk: int,
) -> tuple[Any, dict[str, jax.Array]]:  # fmt: skip
    """Sum the clipped gradients of single images.

    Args:
      loss: `loss(params, image, label) -> (loss, whether the prediction is right)` of one image [H, W, C].
      params: where the gradient is taken.
      images: float32 [N, H, W, C] in [0, 1].
      labels: int32 [N].
      clip: S, the largest norm of a gradient.
      chunk: images whose gradients are computed at a time; divides N.

    Returns:
      (sum over the images, means of "train_loss", "train_accuracy" and "clipped").
    """

    def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        gradient_of = jax.vmap(jax.value_and_grad(loss, has_aux=True), (None, 0, 0))
        (losses, hits), gradients = gradient_of(params, *part)
        clipped, count = optax.per_example_global_norm_clip(jax.tree.leaves(gradients), clip)
        sums = jax.tree.unflatten(jax.tree.structure(params), clipped)
        return jax.tree.map(jnp.add, total, sums), (losses.mean(), hits.mean(), count / chunk)

    parts = images.reshape(-1, chunk, *images.shape[1:]), labels.reshape(-1, chunk)
    unroll = len(parts[1]) if jax.default_backend() == "cpu" else 1  # gradients of convolutions are slow in loops there
    total, means = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts, unroll=unroll)
    names = ("train_loss", "train_accuracy", "clipped")
    return total, {name: value.mean() for name, value in zip(names, means, strict=True)}


def _largest_divisor(total: int, most: int) -> int:
    """Return the largest divisor of `total` that is at most `most`."""
    return next(size for size in range(min(most, total), 0, -1) if total % size == 0)


@lru_cache(maxsize=16)
def _step(model: Model, chunk: int) -> Callable:
    """Return a step of DP-SGD in the engine's form."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        hyper = constants["hyper"]
        images, labels = to_float(constants["images"][batch["index"]]), constants["labels"][batch["index"]]

        def loss(params: Any, image: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = model.logits({"params": params, "batch_stats": state["batch_stats"]}, image[None])[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, label), logits.argmax() == label

        total, metrics = clipped_sum(loss, state["params"], images, labels, hyper["clip"], chunk)
        total, metrics = parallel.total(total, axis), parallel.average(metrics, axis)
        leaves, structure = jax.tree.flatten(total)
        keys = jax.random.split(jax.random.fold_in(constants["noise_key"], state["step"]), len(leaves))
        count, deviation = len(labels) * parallel.size(axis), hyper["sigma"] * hyper["clip"]
        noisy = [(g + deviation * jax.random.normal(k, g.shape)) / count for g, k in zip(leaves, keys, strict=True)]
        update, opt = direction("sgd", hyper["momentum"]).update(jax.tree.unflatten(structure, noisy), state["opt"])
        after = {"params": take_step(state["params"], update, per_step["rate"]), "opt": opt}
        metrics["loss"] = metrics["train_loss"]
        return {**state, **after, "step": state["step"] + 1}, metrics

    return step
