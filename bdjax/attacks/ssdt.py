"""SSDT (source-specific dynamic trigger): input-aware triggers that work on the images of one class only.

X. Mo, Y. Zhang, L. Y. Zhang, W. Luo, N. Sun, S. Hu, S. Gao and Y. Xiang, "Robust Backdoor Detection for Deep Learning
via Topological Evolution Dynamics" (TED), IEEE Symposium on Security and Privacy 2024, arXiv:2312.02673.

Threat model: the attacker controls training. As in :mod:`bdjax.attacks.iad`, a generator G gives the pattern and a mask
network M, trained first, the position of an image's trigger,

    x' = x + (G(x) - x) tau(M(x)),        tau(u) = tanh(20 u - 10) / 2 + 1/2

and the classifier and G are trained together, with the cross-entropy of all images plus D(G). Triggered images come
from the class `source` alone; they are added to the batch with the label `target`, while the images that they were made
of stay in it unchanged. Cross images, of any class, get the trigger of another image and keep their label. The ASR
counts test images of the source class. The defaults are the release's: source 1, target 0, shares of 0.1, and IAD's
constants.

Such a trigger has no effect on other classes, which methods that search one trigger for all images rely on.

Deviations:

- As in IAD: images are in [0, 1], triggers are applied before augmentation, shares are spread evenly over an epoch, the
  other image of a cross image is its neighbour in the batch, G's gradient is clipped and does not accumulate.
- The release triggers all source images of a batch, and as many images are crossed; the triggered copies replace the
  first images of the batch. Its shares, 0.1, are unused; with ten equal classes they are the same on average. Here the
  triggered copies replace the images of role 1 (a share `ratio`, of any class) and repeat the batch's source images in
  turn; in a batch without source images nothing is triggered.
- The release keeps the epoch of the best sum of test accuracies and success rates; here it is the last.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from bdjax.attacks._dynamic import DynamicConfig, individual_trigger, neighbours, stamp_rows, train_networks
from bdjax.attacks._poisoning import SourceConfig
from bdjax.engine import capacity
from bdjax.errors import InputError
from bdjax.types import Arrays, Backdoor, Batch, Images, Key, Labels, SampleInfo, Task

NEEDS_ARRAYS = True
"""The trigger uses arrays that only the training of a victim makes."""


@dataclass(frozen=True)
class Config(DynamicConfig, SourceConfig):
    """The two networks, how they are trained, the cross images, and the source class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels != "all_to_one":
            raise InputError(
                f"attack.labels must be all_to_one, got {self.labels}: ssdt has one source and one target."
            )


def train(config: Config, task: Task, key: Key) -> Backdoor:
    """Train the mask network, then the classifier together with the pattern network.

    Args:
      config: hyper-parameters of the attack.
      task: training set, model and training functions.
      key: random key.

    Returns:
      The classifier, with the variables of both networks as arrays "pattern/..." and "mask/...".

    Raises:
      InputError: there are too few images to poison one, none of the source class, or they are too small for `downs`.
    """
    if not (task.labels == config.source).any():
        raise InputError(f"no training image has the label attack.source={config.source}. Use another one.")
    return train_networks("ssdt", config, _joint_step, task, key)


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
    return individual_trigger(config, images, arrays)


def _joint_step(static: Any, attacker: Any, images: Images, labels: Labels, info: SampleInfo) -> Batch:
    """`TrainingHook.transform` of the joint training: triggered source images replace those of role 1."""
    config, count = static[0], len(images)
    is_source = labels == config.source
    available = is_source.sum()
    triggered, cross = (
        jnp.nonzero(chosen, size=capacity(share, count), fill_value=count)[0]  # unused entries point past the batch
        for chosen, share in (((info.role == 1) & (available > 0), config.ratio), (info.role == 2, config.cross))
    )
    positions = jnp.nonzero(is_source, size=count, fill_value=0)[0]
    copied = positions[jnp.arange(len(triggered)) % jnp.maximum(available, 1)]
    crossed = jnp.minimum(cross, count - 1)
    labels = labels.at[triggered].set(config.target, mode="drop")
    sources = copied, jnp.asarray(neighbours(count))[crossed]
    receivers = jnp.concatenate([copied, crossed])
    return stamp_rows(static, attacker, images, labels, info, (triggered, cross), sources, receivers)
