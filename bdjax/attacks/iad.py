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

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from bdjax.attacks._dynamic import DynamicConfig, individual_trigger, neighbours, stamp_rows, train_networks
from bdjax.attacks._poisoning import relabel_batch
from bdjax.engine import capacity
from bdjax.types import Arrays, Backdoor, Batch, Images, Key, Labels, SampleInfo, Task

NEEDS_ARRAYS = True
"""The trigger uses arrays that only the training of a victim makes."""


@dataclass(frozen=True)
class Config(DynamicConfig):
    """The two networks, how they are trained, and the cross images (the fields of DynamicConfig)."""


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
    return train_networks("iad", config, _joint_step, task, key)


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
    """`TrainingHook.transform` of the joint training: role 1 is triggered, role 2 gets its neighbour's trigger."""
    config, count = static[0], len(images)
    poisoned, labels = relabel_batch(config, labels, attacker["fixed"]["classes"], info.role)
    triggered, cross = (
        jnp.nonzero(chosen, size=capacity(share, count), fill_value=count)[0]  # unused entries point past the batch
        for chosen, share in ((poisoned, config.ratio), (info.role == 2, config.cross))
    )
    within = jnp.minimum(jnp.concatenate([triggered, cross]), count - 1)
    own, others = jnp.split(within, [len(triggered)])
    sources = own, jnp.asarray(neighbours(count))[others]
    return stamp_rows(static, attacker, images, labels, info, (triggered, cross), sources, within)
