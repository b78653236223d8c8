"""Targeted unlearning: unlearn the smallest universal triggers of suspicious classes, distil the model on clean images.

A combination of published methods (ours); the sources are

- Y. Zeng, S. Chen, W. Park, Z. M. Mao, M. Jin and R. Jia, "Adversarial Unlearning of Backdoors via Implicit
  Hypergradient" (I-BAU), ICLR 2022, arXiv:2110.03735: the minimax objective. Here the inner maximum is restricted to
  small targeted perturbations and patches, and only the direct term of the gradient is used.
- B. Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019: the
  detection of suspicious classes, with perturbations in place of masks.
- G. Hinton, O. Vinyals and J. Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, on mixtures
  as in H. Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv:1710.09412: the second loss term.

Threat model: the defender has the model and clean labelled images, but no trigger and no target class.

1. For each class c, search the smallest universal perturbation δ_c that sends images of other classes to c
   (:mod:`bdjax.defenses._smallest`); r_c is its L2 radius. A class is suspicious if r_c < threshold · median r. If no
   class is, the class with the smallest radius is taken, so that an undetected backdoor is weakened as well. The
   smallest patches to these classes are searched, too (:mod:`bdjax.defenses._patches`). If no class is suspicious, the
   search includes patches that send images to any class other than their own, as an all-to-all backdoor does.
2. In rounds, train on images with these perturbations and patches and their true labels, and distil the victim on clean
   images (:mod:`bdjax.defenses._targeted` has the loss). After each round, search the triggers again in the current
   model, perturbations from several starts.
3. When no radius is smaller than the median and no patch smaller than 0.3 of the image, or after `rounds` rounds, train
   for `settling` more rounds on the last triggers while the learning rate falls to zero.

The combination and all constants are ours, chosen on five victims by the ASR of triggered training images
(experiments/foreign/README.md).
"""

from dataclasses import dataclass

from bdjax.defenses import _targeted, _targeted_search
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Variables, Victim


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the search, of the unlearning rounds and of the stopping rule."""

    rounds: int = 10
    """Largest number of rounds; fewer when neither a small perturbation nor a small patch remains."""
    steps: int = 10
    """Steps of θ per round."""
    batch_size: int = 64
    """Images per step, and as many mixtures; at most the number of images."""
    learning_rate: float = 1e-3
    """Learning rate of Adam on θ."""
    patched_fraction: float = 0.4
    """Fraction of a batch that carries a trigger, in (0, 1]."""
    enlarged: float = 1.2
    """Factor by which a perturbation is enlarged before it is unlearned. Its radius stays at or below the median radius
    of all classes and three times the radius that first led to its class."""
    distillation: float = 0.8
    """λ, weight of the distillation loss, in [0, 1]."""
    starts: int = 4
    """Number of perturbations that are unlearned together, shared by the suspicious classes."""
    patches: int = 2
    """Number of patches (a mask and a pattern) that are unlearned with them; where more classes are suspicious, one for
    each. 0: none."""
    search_steps: int = 30
    """Steps of the search over all classes."""
    search_batch: int = 16
    """Images per step of that search."""
    refresh_steps: int = 10
    """Steps of the search after each round, each on 1.5 search batches."""
    largest_radius: float = 0.1
    """Upper bound of the L2 norm, given as the value of a constant perturbation with that norm, in (0, 1]."""
    threshold: float = 0.7
    """A class is suspicious when its radius is below this fraction of the median, in (0, 1)."""
    settling: int = 3
    """Rounds at the end in which the triggers stay fixed and the learning rate falls to zero."""

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


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Unlearn the small triggers that send images to suspicious classes.

    Args:
      config: the hyper-parameters.
      victim: the model to clean.
      view: clean images (stored [n, H, W, C]) and labels [n]. After each round its callback receives the variables, the
        perturbations, and `radius` (the smallest radius relative to the initial median of all classes).
      key: draws batches, initial perturbations and mixtures.

    Returns:
      The variables after the last round.

    Raises:
      InputError: when there are fewer than two images, or when the loss is not finite.
    """
    rounds = _targeted.Rounds(
        "targeted unlearning", config.rounds, config.steps, config.batch_size, config.learning_rate,
        "defense.learning_rate", config.patched_fraction, config.distillation, config.enlarged, config.settling,
    )  # fmt: skip
    return _targeted.unlearn(rounds, _search_settings(config), victim, view, key)


def _search_settings(config: Config) -> _targeted_search.Search:
    return _targeted_search.Search(
        config.search_steps, config.search_batch, config.refresh_steps, config.largest_radius, config.threshold,
        config.starts, config.patches,
    )  # fmt: skip
