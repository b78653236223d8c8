"""BAERASER as a detector: the labels whose triggers, recovered by a max-entropy generator, work on clean images.

Y. Liu, M. Fan, C. Chen, X. Liu, Z. Ma, L. Wang and J. Ma, "Backdoor Defense with Machine Unlearning", INFOCOM 2022,
arXiv:2201.09538.

Threat model: the auditor has the model and clean labelled images, but no trigger.

Triggers are recovered for every label (:mod:`bdjax.defenses.baeraser` has the formulas). A label is suspected when one
of its triggers sends at least τ of the other images to it.
"""

from dataclasses import dataclass

from bdjax.defenses._pool import PoolCallback, pool_scores
from bdjax.defenses._staircase import RecoveryConfig, recover
from bdjax.types import DefenderView, Key, Scores, Victim

ON_REQUEST = True
"""An audit runs this method only when it is named: three generators per class take minutes on a CPU."""


@dataclass(frozen=True)
class Config(RecoveryConfig):
    """Hyper-parameters of the recovery (the fields of RecoveryConfig)."""


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Score each label by the ASR of its best recovered trigger; labels with an ASR of at least τ are suspected.

    Args:
      config: the hyper-parameters.
      victim: the model to audit.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the accepted triggers.
      key: draws all random numbers.

    Returns:
      For each label the largest ASR of its triggers; the model is judged to be backdoored when a trigger is accepted.

    Raises:
      InputError: when nothing can be recovered.
    """
    pool = recover(config, victim, view, key)
    PoolCallback(view.callback, pool).on_round_end(0, victim.variables)
    return pool_scores(pool, victim.model.classes)
