"""AGE as a detector: the class that an edit of the weights by mean activations makes the model forget.

F. Hsieh, H. H. Nguyen, A. MaungMaung, D. Usynin and I. Echizen, "Mitigating Backdoor Attacks using Activation-Guided
Model Editing", 2024, arXiv:2407.07662. The paper does not name its method.

Threat model: the auditor has the model and a few clean labelled images, but no trigger.

The later layers are edited without backdoor knowledge (:mod:`bdjax.defenses.age` has the formulas), and the accuracy of
each class is compared before and after. In a backdoored model the target class loses its accuracy. The paper looks for
one class with an unusual drop and does not print its rule.

Deviations:

- Detection rule (ours): the class with the largest drop; the model is judged to be backdoored if that drop has an
  anomaly index (metrics.anomaly_index) above `threshold` and less than the fraction `collapse` of the accuracy remains.
- "Half of the total weights" is read as half of the layers with a kernel.
"""

from dataclasses import dataclass

from bdjax.defenses._activation_edit import Edit, detect_by_edit
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Scores, Victim

ON_REQUEST = True


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the edit and of the decision."""

    share: float = 0.5
    """Part of the layers with a kernel that is edited, counted from the output; in (0, 1]."""
    batch_size: int = 128
    """Images per batch, at most."""
    scale: float = 0.5
    """γ, standard deviation of the factors; positive."""
    shift: float = 1.0
    """λ, mean of the factors."""
    epsilon: float = 1e-5
    """ε, added to the variance; positive."""
    threshold: float = 3.0
    """Anomaly index that the largest drop must exceed, in deviations estimated by the median."""
    collapse: float = 0.5
    """Less than this fraction of the class's accuracy must remain; in (0, 1]."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "detector",
            (("share", "collapse"), "in (0, 1]", lambda v: 0 < v <= 1),
            (("batch_size",), "at least 1", lambda v: v >= 1),
            (("scale", "epsilon"), "positive", lambda v: v > 0),
        )


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Find the class that the edit makes the model forget.

    Args:
      config: the hyper-parameters.
      victim: the model to audit.
      view: clean images (stored [n, H, W, C]) and labels [n].
      key: draws the batches.

    Returns:
      For each class the anomaly index of its drop in accuracy on these images.

    Raises:
      InputError: when the model does not provide the outputs of its layers.
    """
    edit = Edit(config.share, "layers", config.batch_size, config.scale, config.shift, config.epsilon, True)
    return detect_by_edit(edit, config.threshold, config.collapse, victim, view, key)
