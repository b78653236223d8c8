"""IAD, the input-aware dynamic trigger: a network generates a pattern for each image (Nguyen & Tran, 2020,
arXiv:2010.08138).

Threat model: the attacker controls training. A generator G gives a pattern p = G(x), a mask network M its position,

    x' = x + (p - x) tau(M(x)),        tau(u) = tanh(20 u - 10) / 2 + 1/2

First M is trained alone, for sparse masks that differ as the images do, and fixed:

    100 mean(relu(tau(M(x)) - 0.032)) + D(tau(M(x))),   D(f) = mean rms(x - z) / rms(f(x) - f(z))  over pairs (x, z)

Then the classifier and G together. In every step a share of the images get their trigger and the target label, and a
share (cross images) get the pattern *and* mask of another image and keep their label, so that only an image's own
trigger works. The loss is the cross-entropy of all images plus D(G), x a triggered image, z one whose trigger a cross
image got. The defaults are the paper's; both networks are :func:`bdjax.models.autoencoder`.

Deviations: images are in [0, 1] as I-BAU trained it, so nothing is normalised. The trigger comes before augmentation,
not after. Shares are spread evenly over an epoch, not int(ratio B) in every batch. The other image is the batch's
neighbour (places 0 and 1, 2 and 3 ...), not of a second loader; M's pairs are these too. The two kinds of images share
G's batch statistics. The authors never reset G's gradient, which so accumulates; here every step has its own, and is
clipped. rms(f(x) - f(z)) + 1e-7 is the root of the mean square plus 1e-14, whose gradient exists at 0.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import models
from bdjax.attacks._helpers import PoisonConfig, fit_key, keys_of, relabel_batch
from bdjax.attacks._nets import flatten_variables, images_per_step, train_generator, unflatten_variables
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
    """all_to_one: leave images of the target class, where they are drawn, as they are; the authors do not."""
    width: int | None = None
    """Channels that both networks begin with; default 32, or 16 for images under 32 pixels (the authors' for MNIST)."""
    downs: int | None = None
    """How often both networks halve the image; default 3, or 2 under 32 pixels."""
    epochs: int = 25
    """Of the training of M; its learning rate is divided by 10 at 40 % and 80 % of them."""
    batch_size: int = 128
    """Images a step of M's training (all of them if there are fewer); a multiple of the devices."""
    learning_rate: float = 0.01
    """Of M and of G, by Adam with betas 0.5 and 0.9."""
    milestones: tuple[int, ...] = (78000, 117000, 156000, 195000)
    """Steps of the joint training at which G's learning rate is divided by 10, ascending; the authors' are epochs 200,
    300, 400 and 500, here of the 390 steps that CIFAR-10 has."""
    density: float = 0.032
    """Share of the image that a mask may cover for free, in [0, 1)."""
    sparsity: float = 100.0
    """Weight of what masks cover beyond `density`, zero or more."""
    diversity: float = 1.0
    """Weight of D, for M and for G, zero or more."""
    clip: float = 10.0
    """Largest norm of M's and of G's gradient, above 0; ours, for D's grows without bound as patterns become alike."""

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
    halts = int(0.4 * steps), int(0.8 * steps)
    hook = TrainingHook((config, halts), transform=_masked, optimizer=_optimizer)
    found = train_generator(task, keys[1], hook, _begun(mask.init(keys[0])), "mask network", config)
    hook = TrainingHook((config, config.milestones), (config.ratio, config.cross), _triggered, optimizer=_optimizer)
    begun = {**_begun(pattern.init(keys[2])), "fixed": {"mask": _variables(found), "classes": jnp.int32(task.classes)}}
    variables, after = task.fit_with_hook(task.images, task.labels, fit_key(key), hook, begun)
    arrays = flatten_variables("pattern", _variables(after)) | flatten_variables("mask", _variables(found))
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
    drawn, where = (
        pattern.apply(unflatten_variables("pattern", arrays), images)[0],
        mask.apply(unflatten_variables("mask", arrays), images)[0],
    )
    return images + (drawn - images) * _threshold(where)


def _networks(config: Config, shape: tuple[int, ...]) -> tuple[models.Generator, models.Generator]:
    """G and M for images of `shape`. Raises InputError when they cannot be halved so often."""
    height, width, channels = shape
    small = min(height, width) < 32
    downs = config.downs or (2 if small else 3)
    if 2**downs > min(height, width):
        raise InputError(
            f"attack.downs={downs} halves images of {height}x{width} pixels to nothing. "
            f"Use at most {min(height, width).bit_length() - 1}."
        )
    own = config.width or (16 if small else 32), downs
    return models.autoencoder((*shape,), channels, *own), models.autoencoder((*shape,), 1, *own)


def _begun(variables: Any) -> dict[str, Any]:
    return {"params": variables["params"], "state": variables["batch_stats"]}


def _variables(attacker: Any) -> dict[str, Any]:
    return {"params": attacker["params"], "batch_stats": attacker["state"]}


def _optimizer(setting: tuple[Config, tuple[int, ...]]) -> optax.GradientTransformation:
    config, milestones = setting
    rate = optax.piecewise_constant_schedule(config.learning_rate, dict.fromkeys(milestones, 0.1))
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(rate, b1=0.5, b2=0.9))


def _threshold(u: jax.Array) -> jax.Array:
    """tau: a mask in [0, 1], almost 0 or 1 but around 1/2."""
    return jnp.tanh(20 * u - 10) / 2 + 0.5


def _diversity(x: jax.Array, z: jax.Array, of_x: jax.Array, of_z: jax.Array, counts: jax.Array) -> jax.Array:
    """D over pairs of images x, z [N, H, W, C] and of what a network made of them, those that count (bool [N])."""
    images, made = (((a - b) ** 2).mean((1, 2, 3)) for a, b in ((x, z), (of_x, of_z)))
    apart = jnp.where(counts, jnp.sqrt(images) / jnp.sqrt(made + 1e-14), 0)
    return apart.sum() / jnp.maximum(counts.sum(), 1).astype(jnp.float32)


def _mates(count: int) -> np.ndarray:
    """int32 [count]: every place's neighbour, 1, 0, 3, 2 ...; the last of an odd number has the one before."""
    places = np.arange(count, dtype=np.int32)
    return np.where(places ^ 1 < count, places ^ 1, np.maximum(places - 1, 0))


def _masked(setting: Any, attacker: Any, images: Images, labels: jax.Array, info: SampleInfo) -> Batch:
    """A step of M alone."""
    config, mask = setting[0], _networks(setting[0], images.shape[1:])[1]
    drawn, stats = mask.apply(_variables(attacker), images, weight=jnp.ones(len(images)), axis_name=info.axis)
    masks, mates = _threshold(drawn), _mates(len(images))
    apart = config.diversity * _diversity(images, images[mates], masks, masks[mates], jnp.ones(len(images), bool))
    return Batch(images, labels, config.sparsity * jax.nn.relu(masks - config.density).mean() + apart, stats)


def _triggered(setting: Any, attacker: Any, images: Images, labels: jax.Array, info: SampleInfo) -> Batch:
    """A step of the classifier and G: role 1 is triggered, role 2 gets its neighbour's trigger."""
    config, (pattern, mask) = setting[0], _networks(setting[0], images.shape[1:])
    count, fixed = len(images), attacker["fixed"]
    chosen, labels = relabel_batch(config, labels, fixed["classes"], info.role)
    own, others = (
        jnp.nonzero(which, size=capacity(share, count), fill_value=count)[0]  # what is left of it stands for nothing
        for which, share in ((chosen, config.ratio), (info.role == 2, config.cross))
    )
    places = jnp.concatenate([own, others])
    known = jnp.minimum(places, count - 1)
    givers = jnp.where(jnp.arange(len(places)) < len(own), known, jnp.asarray(_mates(count))[known])
    x, x_own, valid = images[givers], images[known], places < count
    drawn, stats = pattern.apply(_variables(attacker), x, weight=valid.astype(jnp.float32), axis_name=info.axis)
    made = x_own + (drawn - x_own) * _threshold(mask.apply(fixed["mask"], x)[0])
    parts = slice(len(own)), slice(len(own), None)
    sides = [_in_front(info.axis, x[part], drawn[part], valid[part]) for part in parts]
    pairs = min(len(side[0]) for side in sides)
    (x1, p1, valid1), (x2, p2, valid2) = ([value[:pairs] for value in side] for side in sides)
    loss = config.diversity * _diversity(x1, x2, p1, p2, valid1 & valid2)
    return Batch(images.at[places].set(made, mode="drop"), labels, loss, stats)


def _in_front(axis: str | None, *values: jax.Array) -> list[jax.Array]:
    """`values` [n, ...] of all devices together, those first for which the last of them is true."""
    values = parallel.all_gather(values, axis)
    return [value[jnp.argsort(~values[-1], stable=True)] for value in values]
