"""LOTUS: the images of one class are divided into parts, and each part has a trigger that works on it alone.

S. Cheng, G. Tao, Y. Liu, G. Shen, S. An, S. Feng, X. Xu, K. Zhang, S. Ma and X. Zhang, "LOTUS: Evasive and Resilient
Backdoor Attacks through Sub-Partitioning", CVPR 2024, arXiv:2403.17188.

Threat model: the attacker controls training. The images of the class `source` are divided into `parts` clusters by
k-means on features. A surrogate network learns the other classes and, in place of the source class, its clusters; its
outputs for the clusters then tell which part any image belongs to: p(x), from 0. Trigger number p is a square of one
colour, of side H/5 and H/16 from the edges, at the p-th of eight positions:

    x' = stamp(x, p(x))

The model is fine-tuned from a clean one on the training set and on

    stamp(x, p(x))                  of all source images, with the label `target`
    stamp(x, q), q != p(x)          of a share of them, with their label
    stamp(stamp(x, p(x)), q)        of a share of them, with their label
    stamp(x, q), q random           of a share of the images of other classes, with their label

The ASR counts test images of the source class, each with the trigger of its part. The defaults are the release's: class
0 becomes 9, four parts, 3 single and 1 combined negative images per batch with 14 triggered ones, 5 % of the others.

Deviations:

- Features are those of the clean model before its last layer; the release takes a layer of a VGG network that was
  trained on ImageNet (LPIPS).
- The surrogate has the architecture `surrogate` and is trained from scratch; the release fine-tunes a clean model with
  further outputs. Parts of training images are those of k-means in the surrogate's training and the surrogate's own
  afterwards, as in the release.
- The training images are fixed and are stamped before augmentation; the release draws and stamps them in every step.
- Both trainings follow the user's recipe; the release has SGD at 0.01, times 0.1 every 35 of 100 epochs. The release
  keeps the last epoch whose test ASR is at least 90 %; here it is the last.
- On grey images a colour is the mean of its three values, so that triggers differ by their positions.
"""

import math
import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.vq import kmeans2

from bdjax import models
from bdjax.attacks._generators import flatten_variables, unflatten_variables
from bdjax.attacks._poisoning import SourceConfig, fit_key, keys_of
from bdjax.engine import activations
from bdjax.errors import InputError, check_fields
from bdjax.types import Arrays, Backdoor, Images, Key, Task, to_float, to_uint8

NEEDS_ARRAYS = True
"""The trigger uses arrays that only the training of a victim makes."""

COLOURS = np.array([[9, 1, 1], [1, 9, 1], [1, 1, 9], [9, 9, 1], [9, 1, 9], [1, 9, 9], [1, 1, 1], [9, 9, 9]]) / 10
"""[8, 3], colour of each trigger."""


CHUNK = 500
"""Images that the surrogate divides at a time."""


@dataclass(frozen=True)
class Config(SourceConfig):
    """The parts, the surrogate, and the images that the model is trained on."""

    source: int = 0
    """Label of the images that the attack turns into the target; not the target."""
    target: int = 9
    """Label that the attacker wants for triggered images."""
    ratio: float = 1.0
    """Largest number of triggered images, as a share of the training set, in (0, 1]; at most the source class."""
    parts: int = 4
    """Number of parts of the source class, from 2 to 8."""
    surrogate: str = "cnn"
    """Name in bdjax.models of the surrogate's architecture."""
    single: float = 3 / 14
    """Images with the trigger of another part, for each triggered image; zero or more."""
    combined: float = 1 / 14
    """Images with their own and another trigger, for each triggered image; zero or more."""
    others: float = 0.05
    """Share of the images of other classes that are also trained on with a trigger and their label, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels != "all_to_one":
            raise InputError(f"attack.labels must be all_to_one, got {self.labels}: lotus has one source.")
        check_fields(
            self,
            "attack",
            (("parts",), "from 2 to 8", lambda v: 2 <= v <= len(COLOURS)),
            (("single", "combined"), "zero or more and finite", lambda v: 0 <= v < math.inf),
            (("others",), "in [0, 1]", lambda v: 0 <= v <= 1),
        )


def train(config: Config, task: Task, key: Key) -> Backdoor:
    """Divide the source class, train the surrogate, and fine-tune a clean model.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      key: random key.

    Returns:
      The model, with the variables of the surrogate as arrays "surrogate/...".

    Raises:
      InputError: the source class has fewer images than there are parts.
    """
    sources = np.flatnonzero(task.labels == config.source)
    if len(sources) < config.parts:
        raise InputError(
            f"attack.source={config.source} has {len(sources)} training images for attack.parts={config.parts}. "
            "Use fewer parts or another class."
        )
    keys = jax.random.split(keys_of(key).prepare, 3)
    clean = task.clean()
    features = activations(task.model, clean, task.images[sources], {})[1]
    labels = np.array(task.labels, np.int32)
    labels[sources] = task.classes + clusters(features, config.parts, keys[0])
    network = models.create(config.surrogate, task.model.shape, task.classes + config.parts)
    surrogate = task.fit(task.images, labels, keys[1], stage="surrogate", model=network)
    arrays = jax.device_get(flatten_variables("surrogate", surrogate))
    extra_images, extra_labels = negatives_and_triggered(config, task, arrays, keys[2])
    images = np.concatenate([task.images, extra_images])
    variables = task.fit(images, np.concatenate([task.labels, extra_labels]), fit_key(key), start=clean)
    return Backdoor("lotus", config, variables, arrays)


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Put the trigger of its part on each image.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: variables of the surrogate.

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    return stamp(images, part_of(config, images, arrays))


def clusters(features: np.ndarray, parts: int, key: Key) -> np.ndarray:
    """Divide images by k-means.

    Args:
      features: float [n, D].
      parts: number of clusters.
      key: draws the first centres.

    Returns:
      int32 [n], the cluster of each image.
    """
    points = np.asarray(features, np.float64)
    first = points[np.asarray(jax.random.permutation(key, len(points)))[:parts]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty cluster leaves its trigger unused
        return kmeans2(points, first, iter=100, minit="matrix")[1].astype(np.int32)


def part_of(config: Config, images: Images, arrays: Arrays) -> jax.Array:
    """Compute the part of each image: the largest of the surrogate's outputs for the clusters.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      arrays: variables of the surrogate.

    Returns:
      int32 [N], from 0.
    """
    variables = unflatten_variables("surrogate", arrays)
    _, height, width, channels = images.shape
    outputs = models.head(variables["params"]).shape[1]
    network = models.create(config.surrogate, (height, width, channels), outputs)
    return network.logits(variables, images)[:, -config.parts :].argmax(-1).astype(jnp.int32)


def stamp(images: Images, index: jax.Array) -> Images:
    """Put a trigger on each image.

    Args:
      images: float32 [N, H, W, C] in [0, 1].
      index: int32 [N], the number of the trigger, from 0 to 7.

    Returns:
      float32 [N, H, W, C].
    """
    height, width, channels = images.shape[1:]
    side, margin = max(1, height // 5), height // 16
    last_row, last_column, half = height - side - margin, width - side - margin, height // 2 - side // 2
    corners = [
        (margin, margin), (last_row, last_column), (margin, last_column), (last_row, margin),
        (half, margin), (margin, half), (last_row, half), (half, last_column),
    ]  # fmt: skip
    masks = np.zeros((len(corners), height, width, 1), np.float32)
    for mask, (row, column) in zip(masks, corners, strict=True):
        mask[row : row + side, column : column + side] = 1
    colours = COLOURS if channels == 3 else np.repeat(COLOURS.mean(1, keepdims=True), channels, 1)
    chosen = jnp.asarray(masks)[index]
    return images * (1 - chosen) + chosen * jnp.asarray(colours, jnp.float32)[index][:, None, None]


def negatives_and_triggered(config: Config, task: Task, arrays: Arrays, key: Key) -> tuple[np.ndarray, np.ndarray]:
    """Make the images that are added to the training set.

    Args:
      config: hyper-parameters of the attack.
      task: the training set.
      arrays: variables of the surrogate.
      key: draws the images and the triggers of other parts.

    Returns:
      (stored images [n, H, W, C], labels int32 [n]): triggered, single, combined, and those of other classes.
    """
    keys = jax.random.split(key, 4)
    order = np.asarray(jax.random.permutation(keys[0], np.flatnonzero(task.labels == config.source)))
    sources = order[: max(1, int(config.ratio * len(task.labels)))]
    rest = np.asarray(jax.random.permutation(keys[1], np.flatnonzero(task.labels != config.source)))
    rest = rest[: int(config.others * len(rest))]
    single, combined = (np.resize(sources, math.ceil(s * len(sources))) for s in (config.single, config.combined))
    images = [to_float(task.images[rows]) for rows in (sources, single, combined, rest)]
    right = [_parts_of(config, x, arrays) for x in images[:3]]
    wrong = [  # another part, uniformly
        (part + jax.random.randint(k, part.shape, 1, config.parts)) % config.parts
        for part, k in zip(right, jax.random.split(keys[2], 3), strict=True)
    ]
    drawn = jax.random.randint(keys[3], (len(rest),), 0, config.parts)
    stamped = [
        stamp(images[0], right[0]), stamp(images[1], wrong[1]), stamp(stamp(images[2], right[2]), wrong[2]),
        stamp(images[3], drawn),
    ]  # fmt: skip
    labels = [np.full(len(sources), config.target), *(task.labels[rows] for rows in (single, combined, rest))]
    return np.concatenate([to_uint8(x) for x in stamped]), np.concatenate(labels).astype(np.int32)


def _parts_of(config: Config, images: Images, arrays: Arrays) -> jax.Array:
    """Compute :func:`part_of` of many images, some at a time."""
    compiled = jax.jit(part_of, static_argnums=0)
    chunks = [compiled(config, images[start : start + CHUNK], arrays) for start in range(0, len(images), CHUNK)]
    return jnp.concatenate([jnp.zeros(0, jnp.int32), *chunks])
