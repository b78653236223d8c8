"""IAD (input-aware dynamic): a network generates an individual trigger for each image.

T. A. Nguyen and A. Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020, arXiv:2010.08138.

Threat model: the attacker controls training. A generator G gives the pattern p = G(x) and a mask network M its
position:

    x' = x + (p - x) tau(M(x)),        tau(u) = tanh(20 u - 10) / 2 + 1/2

First M is trained alone, for sparse masks that differ as much as the images do, and then fixed:

    100 mean(relu(tau(M(x)) - 0.032)) + D(tau(M(x))),   D(f) = mean rms(x - z) / rms(f(x) - f(z))  over pairs (x, z)

Then the classifier and G are trained together. In every step a share of the images get their trigger and the target's
label, and a share (cross images) get the pattern *and* mask of another image and keep their label, so that only an
image's own trigger works. The loss is the cross-entropy of all images plus D(G), where x is a triggered image and z an
image whose trigger a cross image got. The defaults are the paper's; both networks are
:func:`bdjax.models.autoencoder`.

Deviations:

- Images are in [0, 1], as I-BAU trained it, so nothing is normalised.
- The trigger is applied before augmentation, not after.
- Shares are spread evenly over an epoch; the authors take int(ratio B) images of every batch.
- The other image is the neighbour in the batch (positions 0 and 1, 2 and 3 ...) and does not come from a second loader;
  M's pairs are the same.
- The two kinds of images share G's batch statistics.
- The authors never reset G's gradient, which therefore accumulates; here every step has its own gradient, clipped.
- rms(f(x) - f(z)) + 1e-7 is the root of the mean square plus 1e-14, whose gradient exists at 0.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import models
from bdjax.attacks._generators import flatten_variables, images_per_step, train_generator, unflatten_variables
from bdjax.attacks._poisoning import PoisonConfig, fit_key, keys_of, relabel_batch
from bdjax.engine import capacity, parallel
from bdjax.errors import InputError, check_fields
from bdjax.types import Arrays, Backdoor, Batch, Images, Key, SampleInfo, Task, TrainingHook

NEEDS_ARRAYS = True
"""The trigger uses arrays that only the training of a victim makes."""


@dataclass(frozen=True)
class Config(PoisonConfig):
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
            raise InputError("attack.labels must be all_to_one or all_to_all, got clean: iad relabels images.")
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


def train(config: Config, task: Task, key: Key) -> Backdoor:
    """Train the mask network, then the classifier together with the pattern network.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      key: random key.

    Returns:
      The classifier, with the variables of both networks as arrays "pattern/..." and "mask/...".

    Raises:
      InputError: there are too few images to poison one, or they are too small for `downs`.
    """
    if int(config.ratio * len(task.images)) < 1:
        raise InputError(f"attack.ratio={config.ratio} of {len(task.images)} images is none. Use a larger ratio.")
    pattern, mask = _networks(config, task.model.shape)
    keys = jax.random.split(keys_of(key).prepare, 3)
    steps = config.epochs * (len(task.images) // images_per_step(config, task))
    milestones = int(0.4 * steps), int(0.8 * steps)
    hook = TrainingHook((config, milestones), transform=_mask_step, optimizer=_optimizer)
    attacker = train_generator(task, keys[1], hook, _to_attacker(mask.init(keys[0])), "mask network", config)
    mask_variables = _to_variables(attacker)
    hook = TrainingHook((config, config.milestones), (config.ratio, config.cross), _joint_step, optimizer=_optimizer)
    fixed = {"mask": mask_variables, "classes": jnp.int32(task.classes)}
    attacker = {**_to_attacker(pattern.init(keys[2])), "fixed": fixed}
    variables, attacker = task.fit_with_hook(task.images, task.labels, fit_key(key), hook, attacker)
    arrays = flatten_variables("pattern", _to_variables(attacker)) | flatten_variables("mask", mask_variables)
    return Backdoor("iad", config, variables, jax.device_get(arrays))


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Put an individual trigger on each image.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: variables of the pattern and mask networks.

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    pattern, mask = _networks(config, images.shape[1:])
    patterns = pattern.apply(unflatten_variables("pattern", arrays), images)[0]
    masks = mask.apply(unflatten_variables("mask", arrays), images)[0]
    return images + (patterns - images) * _threshold(masks)


def _networks(config: Config, shape: tuple[int, ...]) -> tuple[models.Generator, models.Generator]:
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


def _to_attacker(variables: Any) -> dict[str, Any]:
    """A network's variables as the arrays of an attacker."""
    return {"params": variables["params"], "state": variables["batch_stats"]}


def _to_variables(attacker: Any) -> dict[str, Any]:
    """The inverse of :func:`_to_attacker`."""
    return {"params": attacker["params"], "batch_stats": attacker["state"]}


def _optimizer(static: tuple[Config, tuple[int, ...]]) -> optax.GradientTransformation:
    """Adam with clipped gradients; the learning rate is divided by 10 at the milestones."""
    config, milestones = static
    rate = optax.piecewise_constant_schedule(config.learning_rate, dict.fromkeys(milestones, 0.1))
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(rate, b1=0.5, b2=0.9))


def _threshold(u: jax.Array) -> jax.Array:
    """tau: map to a mask in [0, 1] that is almost binary."""
    return jnp.tanh(20 * u - 10) / 2 + 0.5


def _diversity(x: jax.Array, z: jax.Array, of_x: jax.Array, of_z: jax.Array, valid: jax.Array) -> jax.Array:
    """D over pairs of images x, z [N, H, W, C] and a network's outputs for them; `valid` bool [N]: pairs that count."""
    inputs, outputs = (((a - b) ** 2).mean((1, 2, 3)) for a, b in ((x, z), (of_x, of_z)))
    ratios = jnp.where(valid, jnp.sqrt(inputs) / jnp.sqrt(outputs + 1e-14), 0)
    return ratios.sum() / jnp.maximum(valid.sum(), 1).astype(jnp.float32)


def _neighbours(count: int) -> np.ndarray:
    """Index of each image's neighbour, int32 [count]: 1, 0, 3, 2 ...; the last of an odd number has the one before."""
    indices = np.arange(count, dtype=np.int32)
    return np.where(indices ^ 1 < count, indices ^ 1, np.maximum(indices - 1, 0))


def _mask_step(static: Any, attacker: Any, images: Images, labels: jax.Array, info: SampleInfo) -> Batch:
    """`TrainingHook.transform` of the training of M: its loss; the images stay unchanged."""
    config, mask = static[0], _networks(static[0], images.shape[1:])[1]
    logits, stats = mask.apply(_to_variables(attacker), images, weight=jnp.ones(len(images)), axis_name=info.axis)
    masks, others = _threshold(logits), _neighbours(len(images))
    diversity = _diversity(images, images[others], masks, masks[others], jnp.ones(len(images), bool))
    sparsity = config.sparsity * jax.nn.relu(masks - config.density).mean()
    return Batch(images, labels, sparsity + config.diversity * diversity, stats)


def _joint_step(static: Any, attacker: Any, images: Images, labels: jax.Array, info: SampleInfo) -> Batch:
    """`TrainingHook.transform` of the joint training: role 1 is triggered, role 2 gets its neighbour's trigger."""
    config, (pattern, mask) = static[0], _networks(static[0], images.shape[1:])
    count, fixed = len(images), attacker["fixed"]
    poisoned, labels = relabel_batch(config, labels, fixed["classes"], info.role)
    triggered, cross = (
        jnp.nonzero(chosen, size=capacity(share, count), fill_value=count)[0]  # unused entries point past the batch
        for chosen, share in ((poisoned, config.ratio), (info.role == 2, config.cross))
    )
    indices = jnp.concatenate([triggered, cross])
    within = jnp.minimum(indices, count - 1)
    sources = jnp.where(jnp.arange(len(indices)) < len(triggered), within, jnp.asarray(_neighbours(count))[within])
    x, receivers, valid = images[sources], images[within], indices < count
    patterns, stats = pattern.apply(_to_variables(attacker), x, weight=valid.astype(jnp.float32), axis_name=info.axis)
    stamped = receivers + (patterns - receivers) * _threshold(mask.apply(fixed["mask"], x)[0])
    kinds = slice(len(triggered)), slice(len(triggered), None)
    sides = [_gather_valid_first(info.axis, x[kind], patterns[kind], valid[kind]) for kind in kinds]
    pairs = min(len(side[0]) for side in sides)
    (x1, p1, valid1), (x2, p2, valid2) = ([value[:pairs] for value in side] for side in sides)
    loss = config.diversity * _diversity(x1, x2, p1, p2, valid1 & valid2)
    return Batch(images.at[indices].set(stamped, mode="drop"), labels, loss, stats)


def _gather_valid_first(axis: str | None, *values: jax.Array) -> list[jax.Array]:
    """`values` [n, ...] of all devices together, ordered so that entries where the last of them is true come first."""
    values = parallel.all_gather(values, axis)
    return [value[jnp.argsort(~values[-1], stable=True)] for value in values]
