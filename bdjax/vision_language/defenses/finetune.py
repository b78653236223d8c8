"""Fine-tuning of a dual encoder: CLIP's contrastive loss on clean pairs.

The baseline of H. Bansal, N. Singhi, Y. Yang, F. Yin, A. Grover and K.-W. Chang, "CleanCLIP: Mitigating Data Poisoning
Attacks in Multimodal Contrastive Learning", ICCV 2023, arXiv:2303.03323: CleanCLIP without its in-modal term.

Threat model: the defender has the model and clean pairs, and knows neither the trigger nor the target.

Deviations:

- The optimiser, the number of epochs and the learning rate are those that the authors' release gives for CleanCLIP.
"""

from dataclasses import dataclass

from bdjax.engine.contrastive import fit_pairs
from bdjax.pair_types import PairVictim, PairView
from bdjax.types import Key, Variables
from bdjax.vision_language.defenses import _recipe


@dataclass(frozen=True)
class Config(_recipe.Recipe):
    """Hyper-parameters of the fine-tuning."""


def purify(config: Config, victim: PairVictim, view: PairView, key: Key) -> Variables:
    """Fine-tune both encoders.

    Args:
      config: the hyper-parameters.
      victim: the dual encoder to clean.
      view: clean pairs.
      key: draws the order of the pairs and the augmentation.

    Returns:
      The cleaned variables.
    """
    return fit_pairs(
        victim.encoder, view.images, view.tokens, _recipe.recipe(config, view), key, start=victim.variables,
        callback=view.callback, stage="fine-tuning",
    )  # fmt: skip
