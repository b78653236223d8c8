"""The victims and I-BAU's settings that the comparison of solvers and Theorem 1 share."""

from bdjax.config import Experiment
from bdjax.defenses import ibau
from bdjax.engine import FitConfig

SOURCES = {"mnist": "tfds:mnist", "cifar10": "tfds:cifar10"}
CONFIG = ibau.Config(schedule="release", norm_bound=10.0, batch_size=10, inner_steps=50, outer_steps=50)
"""Batches of 10, not I-BAU's 100, keep the dense reference to minutes."""
EPOCHS = {
    ("mnist", "badnets"): 1,
    ("mnist", "image_trigger"): 1,
    ("cifar10", "badnets"): 6,
    ("cifar10", "image_trigger"): 2,
}


def victim_of(dataset: str, attack: str, source: str, model: str, epochs: int = 0) -> Experiment:
    """The experiment that trains a victim.

    Args:
      dataset: name in SOURCES.
      attack: badnets or image_trigger.
      source: of the data set.
      model: the network.
      epochs: of the training; 0: those of EPOCHS.

    Returns:
      The experiment, without a defense.
    """
    return Experiment(attack, None, source, model, fit=FitConfig(epochs=epochs or EPOCHS[dataset, attack]))
