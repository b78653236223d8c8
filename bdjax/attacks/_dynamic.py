"""Input-aware triggers: a mask network, trained alone, and a pattern network, trained with the classifier.

:mod:`bdjax.attacks.iad` has the formulas.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import models
from bdjax.attacks._generators import flatten_variables, images_per_step, train_generator, unflatten_variables
from bdjax.attacks._poisoning import PoisonConfig, fit_key, keys_of
from bdjax.engine import parallel
from bdjax.errors import InputError, check_fields
from bdjax.types import Arrays, Backdoor, Batch, Images, Key, SampleInfo, Task, TrainingHook


@dataclass(frozen=True)
class DynamicConfig(PoisonConfig):
    """The two networks, how they are trained, and the cross images."""

    ratio: float = 0.1
    """Share of the images of every epoch that are triggered and relabelled, in (0, 1)."""
    cross: float = 0.1
    """Share of the images of every epoch that get another image's trigger, in (0, 1); with ratio at most 1."""
    exclude_target: bool = False
    """all_to_one: leave images of the target class unchanged where they are drawn; the authors do not."""
    width: int | None = None
    """Channels of the first layer of both networks; default 32, or 16 under 32 pixels (the authors' for MNIST)."""
    downs: int | None = None
    """Number of times that both networks halve the image; default 3, or 2 under 32 pixels."""
    epochs: int = 25
    """Epochs of M's training, whose learning rate is divided by 10 at 40 % and 80 % of them."""
    batch_size: int = 128
    """Images per step of M's training (all if there are fewer); a multiple of the number of devices."""
    learning_rate: float = 0.01
    """Learning rate of M and of G, by Adam with betas 0.5 and 0.9."""
    milestones: tuple[int, ...] = (78000, 117000, 156000, 195000)
    """Steps of the joint training at which G's learning rate is divided by 10, ascending; the authors' are epochs 200,
    300, 400 and 500, here of the 390 steps that CIFAR-10 has."""
    density: float = 0.032
    """Share of the image that a mask may cover without penalty, in [0, 1)."""
    sparsity: float = 100.0
    """Weight of the penalty on masks beyond `density`, zero or more."""
    diversity: float = 1.0
    """Weight of D, for M and for G, zero or more."""
    clip: float = 10.0
    """Largest norm of M's and of G's gradient, above 0; ours: D's gradient is unbounded as patterns become alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels == "clean":
            raise InputError("attack.labels must be all_to_one or all_to_all, got clean: the attack relabels images.")
        check_fields(
            self,
            "attack",
            (("width", "downs", "epochs", "batch_size"), "at least 1", lambda v: v is None or v >= 1),
            (("cross", "learning_rate", "clip"), "positive and finite", lambda v: 0 < v < math.inf),
            (("sparsity", "diversity"), "zero or more and finite", lambda v: 0 <= v < math.inf),
        )
        if self.ratio + self.cross > 1:
            raise InputError(f"attack.ratio={self.ratio} and attack.cross={self.cross} must not exceed 1 together.")
        if list(self.milestones) != sorted({*self.milestones}) or min(self.milestones, default=1) < 1:
            raise InputError(f"attack.milestones must be ascending steps from 1, got {self.milestones}.")
        if not 0 <= self.density < 1:
            raise InputError(f"attack.density must be in [0, 1), got {self.density}.")


def train_networks(attack: str, config: DynamicConfig, step: Callable[..., Batch], task: Task, key: Key) -> Backdoor:
    """Train the mask network, then the classifier together with the pattern network.

    Args:
      attack: name of the attack, for the result.
      config: hyper-parameters of the attack.
      step: `TrainingHook.transform` of the joint training, a module-level function; its first argument is (config,
        milestones), and the shares of its roles 1 and 2 are `ratio` and `cross`.
      task: training set, model and training functions.
      key: random key.

    Returns:
      The classifier, with the variables of both networks as arrays "pattern/..." and "mask/...".

    Raises:
      InputError: there are too few images to poison one, or they are too small for `downs`.
    """
    if int(config.ratio * len(task.images)) < 1:
        raise InputError(f"attack.ratio={config.ratio} of {len(task.images)} images is none. Use a larger ratio.")
    pattern, mask = networks(config, task.model.shape)
    keys = jax.random.split(keys_of(key).prepare, 3)
    steps = config.epochs * (len(task.images) // images_per_step(config, task))
    milestones = int(0.4 * steps), int(0.8 * steps)
    hook = TrainingHook((config, milestones), transform=mask_step, optimizer=optimizer)
    attacker = train_generator(task, keys[1], hook, to_attacker(mask.init(keys[0])), "mask network", config)
    mask_variables = to_variables(attacker)
    hook = TrainingHook((config, config.milestones), (config.ratio, config.cross), step, optimizer=optimizer)
    fixed = {"mask": mask_variables, "classes": jnp.int32(task.classes)}
    attacker = {**to_attacker(pattern.init(keys[2])), "fixed": fixed}
    variables, attacker = task.fit_with_hook(task.images, task.labels, fit_key(key), hook, attacker)
    arrays = flatten_variables("pattern", to_variables(attacker)) | flatten_variables("mask", mask_variables)
    return Backdoor(attack, config, variables, jax.device_get(arrays))


def individual_trigger(config: DynamicConfig, images: Images, arrays: Arrays) -> Images:
    """Put an individual trigger on each image.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      arrays: variables of the pattern and mask networks.

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    pattern, mask = networks(config, images.shape[1:])
    patterns = pattern.apply(unflatten_variables("pattern", arrays), images)[0]
    masks = mask.apply(unflatten_variables("mask", arrays), images)[0]
    return images + (patterns - images) * threshold(masks)


def networks(config: DynamicConfig, shape: tuple[int, ...]) -> tuple[models.Generator, models.Generator]:
    """Build G and M for images of `shape`. Raises InputError when they are too small to be halved that often."""
    height, width, channels = shape
    small = min(height, width) < 32
    downs = config.downs or (2 if small else 3)
    if 2**downs > min(height, width):
        raise InputError(
            f"attack.downs={downs} halves images of {height}x{width} pixels to nothing. "
            f"Use at most {min(height, width).bit_length() - 1}."
        )
    size = config.width or (16 if small else 32), downs
    return models.autoencoder((*shape,), channels, *size), models.autoencoder((*shape,), 1, *size)


def to_attacker(variables: Any) -> dict[str, Any]:
    """A network's variables as the arrays of an attacker."""
    return {"params": variables["params"], "state": variables["batch_stats"]}


def to_variables(attacker: Any) -> dict[str, Any]:
    """The inverse of :func:`to_attacker`."""
    return {"params": attacker["params"], "batch_stats": attacker["state"]}


def optimizer(static: tuple[DynamicConfig, tuple[int, ...]]) -> optax.GradientTransformation:
    """Adam with clipped gradients; the learning rate is divided by 10 at the milestones."""
    config, milestones = static
    rate = optax.piecewise_constant_schedule(config.learning_rate, dict.fromkeys(milestones, 0.1))
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(rate, b1=0.5, b2=0.9))


def threshold(u: jax.Array) -> jax.Array:
    """tau: map to a mask in [0, 1] that is almost binary."""
    return jnp.tanh(20 * u - 10) / 2 + 0.5


def diversity_of(x: jax.Array, z: jax.Array, of_x: jax.Array, of_z: jax.Array, valid: jax.Array) -> jax.Array:
    """Compute D over pairs of images.

    Args:
      x: first images of the pairs, float32 [N, H, W, C].
      z: second images.
      of_x: a network's outputs for x, float32 [N, H, W, c].
      of_z: its outputs for z.
      valid: bool [N], which pairs count.

    Returns:
      The mean quotient, a scalar; 0 without a pair.
    """
    inputs, outputs = (((a - b) ** 2).mean((1, 2, 3)) for a, b in ((x, z), (of_x, of_z)))
    ratios = jnp.where(valid, jnp.sqrt(inputs) / jnp.sqrt(outputs + 1e-14), 0)
    return ratios.sum() / jnp.maximum(valid.sum(), 1).astype(jnp.float32)


def neighbours(count: int) -> np.ndarray:
    """Index of each image's neighbour, int32 [count]: 1, 0, 3, 2 ...; the last of an odd number has the one before."""
    indices = np.arange(count, dtype=np.int32)
    return np.where(indices ^ 1 < count, indices ^ 1, np.maximum(indices - 1, 0))


def mask_step(static: Any, attacker: Any, images: Images, labels: jax.Array, info: SampleInfo) -> Batch:
    """`TrainingHook.transform` of the training of M: its loss; the images stay unchanged.

    Args:
      static: (config, milestones).
      attacker: M's arrays.
      images: float32 [B, H, W, C] in [0, 1].
      labels: int32 [B].
      info: of the batch.

    Returns:
      The batch with the loss and the statistics of M.
    """
    config, mask = static[0], networks(static[0], images.shape[1:])[1]
    logits, stats = mask.apply(to_variables(attacker), images, weight=jnp.ones(len(images)), axis_name=info.axis)
    masks, others = threshold(logits), neighbours(len(images))
    diversity = diversity_of(images, images[others], masks, masks[others], jnp.ones(len(images), bool))
    sparsity = config.sparsity * jax.nn.relu(masks - config.density).mean()
    return Batch(images, labels, sparsity + config.diversity * diversity, stats)


def stamp_rows(
    static: Any, attacker: Any, images: Images, labels: jax.Array, info: SampleInfo,
    rows: tuple[jax.Array, jax.Array], sources: tuple[jax.Array, jax.Array], receivers: jax.Array,
) -> Batch:  # fmt: skip
    """Put triggers on rows of a batch, and compute D(G) between the two kinds of triggers.

    Args:
      static: (config, milestones).
      attacker: the hook's arrays.
      images: float32 [B, H, W, C] in [0, 1].
      labels: int32 [B], the labels of the returned batch.
      info: of the batch.
      rows: indices of the rows that are triggered and of those that are crossed; B marks an unused entry.
      sources: for both, the index of the image whose trigger is put there.
      receivers: int32, for the rows of both kinds, the index of the image that the trigger is put on.

    Returns:
      The batch, with the statistics of G.
    """
    config, (pattern, mask) = static[0], networks(static[0], images.shape[1:])
    count, fixed = len(images), attacker["fixed"]
    indices = jnp.concatenate(rows)
    x, receiving, valid = images[jnp.concatenate(sources)], images[receivers], indices < count
    patterns, stats = pattern.apply(to_variables(attacker), x, weight=valid.astype(jnp.float32), axis_name=info.axis)
    stamped = receiving + (patterns - receiving) * threshold(mask.apply(fixed["mask"], x)[0])
    kinds = slice(len(rows[0])), slice(len(rows[0]), None)
    sides = [_gather_valid_first(info.axis, x[kind], patterns[kind], valid[kind]) for kind in kinds]
    pairs = min(len(side[0]) for side in sides)
    (x1, p1, valid1), (x2, p2, valid2) = ([value[:pairs] for value in side] for side in sides)
    loss = config.diversity * diversity_of(x1, x2, p1, p2, valid1 & valid2)
    return Batch(images.at[indices].set(stamped, mode="drop"), labels, loss, stats)


def _gather_valid_first(axis: str | None, *values: jax.Array) -> list[jax.Array]:
    """`values` [n, ...] of all devices together, ordered so that entries where the last of them is true come first."""
    values = parallel.all_gather(values, axis)
    return [value[jnp.argsort(~values[-1], stable=True)] for value in values]
