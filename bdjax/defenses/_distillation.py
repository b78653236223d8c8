"""Distillation from a model on mixtures of clean images, which preserves accuracy when images are few.

A mixture is x + w (x' − x), with w uniform in [0, 1] and x' another image after a random crop and flip (H. Zhang,
M. Cisse, Y. N. Dauphin and D. Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv:1710.09412). The
labels are the predictions of a teacher (G. Hinton, O. Vinyals and J. Dean, "Distilling the Knowledge in a Neural
Network", 2015, arXiv:1503.02531). Mixtures carry no trigger, so the backdoored model can serve as the teacher.
"""

import jax
import optax

from bdjax.engine import augment
from bdjax.types import Images, Key, Model, Variables


def mixtures(images: Images, partners: Images, keys: Key) -> Images:
    """Mix images with augmented partners.

    Args:
      images: float32 [B, H, W, C] in [0, 1].
      partners: float32 [B, H, W, C] in [0, 1], the images to mix in.
      keys: [B], one random key per image.

    Returns:
      The mixtures, float32 [B, H, W, C] in [0, 1].
    """
    augmented = augment.policy("crop_flip")(partners, keys)
    weight = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 2)))(keys)
    return images + weight[:, None, None, None] * (augmented - images)


def targets(model: Model, teacher: Variables, mixed_images: Images) -> jax.Array:
    """Return the class probabilities, float32 [B, C], that the teacher predicts for the mixtures.

    Args:
      model: the classifier.
      teacher: variables of the teacher.
      mixed_images: float32 [B, H, W, C] in [0, 1].

    Returns:
      Probabilities, float32 [B, C].
    """
    return jax.nn.softmax(model.logits(teacher, mixed_images))


def distance(logits: jax.Array, probabilities: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits [B, C] with target probabilities [B, C], a scalar."""
    return optax.softmax_cross_entropy(logits, probabilities).mean()
