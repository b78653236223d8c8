"""Following a model on mixtures of clean images: distillation that keeps accuracy with few images.

A mixture is x + w (x' − x) with w uniform in [0, 1] and x' another image, cropped and flipped at random (Zhang et al.,
mixup, ICLR 2018, arXiv:1710.09412, with the labels of the model that is followed: Hinton et al., 2015,
arXiv:1503.02531). They carry no trigger, so that the given model can be followed on them.
"""

import jax
import optax

from bdjax.engine import augment
from bdjax.types import Images, Key, Model, Variables


def mixtures(images: Images, others: Images, keys: Key) -> Images:
    """Mix images with augmented others, all float32 [B, H, W, C] in [0, 1]; keys: [B], one for each."""
    shifted = augment.policy("crop_flip")(others, keys)
    weight = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 2)))(keys)
    return images + weight[:, None, None, None] * (shifted - images)


def targets(model: Model, given: Variables, mixed: Images) -> jax.Array:
    """What the given model says of the mixtures: probabilities, float32 [B, C]."""
    return jax.nn.softmax(model.logits(given, mixed))


def distance(logits: jax.Array, wanted: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits [B, C] with the wanted probabilities, a scalar."""
    return optax.softmax_cross_entropy(logits, wanted).mean()
