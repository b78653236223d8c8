"""Targeted unlearning: unlearn the smallest universal perturbations of suspicious classes, distil everything else.

Threat model: the defender has the model and clean labelled images, no trigger and no target class.

1. For each class c, search the smallest universal perturbation δ_c that sends images of other classes there
   (:mod:`bdjax.defenses._smallest`); r_c is its L2 radius. A class is suspicious if r_c < threshold · median r; where
   none is, the class of the smallest radius is taken, so that a backdoor that is missed is weakened all the same.
   The smallest patches to these classes are searched, too (:mod:`bdjax.defenses._patches`); where no class is
   suspicious, patches that send images to any class but their own, as an all-to-all backdoor does.
2. In rounds, train on images with these perturbations and patches and their true labels, and follow the victim on clean
   images (:mod:`bdjax.defenses._targeted` has the loss). After each round they are searched anew in the present model,
   perturbations from several starts.
3. When no radius is smaller than the median and no patch smaller than 0.3 of the image, or after `rounds` rounds, train
   for `settling` more on the last triggers while the learning rate falls to zero.

This is the minimax form of I-BAU (Zeng et al., ICLR 2022, arXiv:2110.03735) with the inner maximum restricted to small
targeted perturbations and patches, in the direct term alone; the suspicion is Neural Cleanse's (Wang et al.,
IEEE S&P 2019), with perturbations in place of masks; the second term is distillation (Hinton et al., 2015,
arXiv:1503.02531) on mixtures (Zhang et al., ICLR 2018, arXiv:1710.09412). The combination and all constants are ours,
chosen on five victims by the ASR of triggered training images (experiments/foreign/README.md).
"""

from dataclasses import dataclass

import numpy as np

from bdjax.defenses import _targeted, _targeted_search
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Scores, Variables, Victim


@dataclass(frozen=True)
class Config:
    """The search for perturbations, the rounds of unlearning, and when to stop."""

    rounds: int = 10
    """Rounds at most until neither a small perturbation nor a small patch is left."""
    steps: int = 10
    """Steps of θ a round."""
    batch_size: int = 64
    """Images a step, and as many mixtures; fewer where there are fewer images."""
    learning_rate: float = 1e-3
    """Of Adam on θ."""
    patched_fraction: float = 0.4
    """Share of a batch that carries a perturbation, in (0, 1]."""
    enlarged: float = 1.2
    """A perturbation is unlearned at so many times its radius, at no more than the median radius of all classes, and at
    no more than three times the radius that first led to its class."""
    distillation: float = 0.8
    """λ, in [0, 1]."""
    starts: int = 4
    """Perturbations that are unlearned together, shared by the suspicious classes."""
    patches: int = 2
    """Patches (a mask and a pattern) that are unlearned beside them."""
    search_steps: int = 30
    """Steps of the search over all classes."""
    search_batch: int = 16
    """Images a step of that search."""
    refresh_steps: int = 10
    """Steps by which the perturbations are searched anew after each round, each on 1.5 search batches."""
    largest_radius: float = 0.1
    """No perturbation has a larger L2 norm than one of this value in every pixel and channel, in (0, 1]."""
    threshold: float = 0.7
    """A class whose radius is below this share of the median is suspicious, in (0, 1)."""
    settling: int = 3
    """Rounds after that in which the triggers stay as they are and the learning rate falls to zero."""

    def __post_init__(self) -> None:
        counts = (
            "rounds", "steps", "batch_size", "starts", "search_steps", "search_batch", "refresh_steps",
        )  # fmt: skip
        check_fields(
            self,
            "defense",
            (counts, "at least 1", lambda v: v >= 1),
            (("patches", "settling"), "zero or more", lambda v: v >= 0),
            (("learning_rate",), "positive", lambda v: v > 0),
            (("enlarged",), "at least 1", lambda v: v >= 1),
            (("patched_fraction", "largest_radius"), "in (0, 1]", lambda v: 0 < v <= 1),
            (("threshold",), "in (0, 1)", lambda v: 0 < v < 1),
            (("distillation",), "in [0, 1]", lambda v: 0 <= v <= 1),
        )


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Whether a class is reached by a perturbation far smaller than the others'.

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; key: draws batches.
    Returns: per class the median radius over its own; the model is called poisoned above 1 / threshold. The watch is
      shown the perturbations of the three most suspicious classes.
    """
    search = _search(config)
    perturbations = _targeted_search.all_classes(search, victim, view, key, "targeted_unlearning")
    nearest = np.argsort(perturbations.radii, kind="stable")[:3]
    view.callback.on_round_end(
        0,
        victim.variables,
        perturbation=perturbations.deltas[nearest],
        perturbation_labels=perturbations.goals[nearest],
    )
    return _targeted_search.scores(search, perturbations)


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Unlearn what sends all images to a suspicious class.

    Args:
      config: the procedure; victim: the model; view: clean images (stored [n, H, W, C]) and labels [n].
      key: draws batches, starts and mixtures.

    Returns: the variables after the last round. After each round the watch is shown them, the perturbations and
      `radius` (the smallest, over the median of all classes before).
    """
    rounds = _targeted.Rounds(
        "targeted unlearning", config.rounds, config.steps, config.batch_size, config.learning_rate,
        "defense.learning_rate", config.patched_fraction, config.distillation, config.enlarged, config.settling,
    )  # fmt: skip
    return _targeted.unlearn(rounds, _search(config), victim, view, key)


def _search(config: Config) -> _targeted_search.Search:
    return _targeted_search.Search(
        config.search_steps, config.search_batch, config.refresh_steps, config.largest_radius, config.threshold,
        config.starts, config.patches,
    )  # fmt: skip
