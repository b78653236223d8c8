"""CleanCLIP: fine-tuning on clean pairs with self-supervision within images and within captions.

H. Bansal, N. Singhi, Y. Yang, F. Yin, A. Grover and K.-W. Chang, "CleanCLIP: Mitigating Data Poisoning Attacks in
Multimodal Contrastive Learning", ICCV 2023, arXiv:2303.03323.

Threat model: the defender has the model and clean pairs, and knows neither the trigger nor the target.

A backdoor ties the trigger in images to the captions of the target. The in-modal terms make each encoder cluster its
own inputs without the other one, which loosens the tie. With normalised embeddings u of images and v of captions, u'
and v' of second views of them, s = exp(logit_scale), and CE over the pairs of the batch:

    L = cross (CE(s U Vᵀ) + CE(s V Uᵀ)) / 2 + in_modal (CE(s U U'ᵀ) + CE(s V V'ᵀ)) / 2

The in-modal terms have one direction, from the originals to the second views. Without them it is plain fine-tuning.

Deviations:

- The release's second view of an image is AutoAugment's policy for ImageNet. Here it is a random shift, a flip, and
  random brightness, contrast and saturation, which run inside the compiled step.
- Its second view of a caption is EDA (synonyms from WordNet, insertion, exchange, deletion of words). Here tokens are
  deleted and exchanged; synonyms and insertions need a lexicon.
- Batch 64, 10 epochs, 50 steps of warm-up and a learning rate of 1e-5 are the release's; BadCLIP's authors use 4.5e-6.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bdjax.engine.contrastive import PairSamples, fit_pairs, info_nce, normalise, one_way
from bdjax.errors import check_fields
from bdjax.pair_types import DualEncoder, PairVictim, PairView
from bdjax.types import Key, Variables
from bdjax.vision_language.defenses import _recipe, _views


@dataclass(frozen=True)
class Config(_recipe.Recipe):
    """Hyper-parameters of CleanCLIP."""

    cross: float = 1.0
    """Weight of the contrastive loss between images and captions."""
    in_modal: float = 1.0
    """Weight of the self-supervision within images and within captions."""
    jitter: float = 0.4
    """Largest relative change of brightness, contrast and saturation in a second view, in [0, 1)."""
    text_rate: float = 0.1
    """Probability of deleting a token, and of exchanging two, in a second view; in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            "defense",
            (("cross", "in_modal"), "zero or more", lambda v: v >= 0),
            (("jitter", "text_rate"), "in [0, 1)", lambda v: 0 <= v < 1),
        )


def purify(config: Config, victim: PairVictim, view: PairView, key: Key) -> Variables:
    """Fine-tune both encoders with self-supervision.

    Args:
      config: the hyper-parameters.
      victim: the dual encoder to clean.
      view: clean pairs.
      key: draws the order of the pairs and their second views.

    Returns:
      The cleaned variables.
    """
    constants = {name: jnp.float32(getattr(config, name)) for name in ("cross", "in_modal", "jitter", "text_rate")}
    return fit_pairs(
        victim.encoder, view.images, view.tokens, _recipe.recipe(config, view), key, loss=cleanclip_loss,
        constants=constants, start=victim.variables, callback=view.callback, stage="CleanCLIP",
    )  # fmt: skip


def cleanclip_loss(
    encoder: DualEncoder, params: dict, batch_stats: dict, samples: PairSamples
) -> tuple[jax.Array, tuple[dict[str, jax.Array], dict]]:
    """CleanCLIP's loss as a :data:`bdjax.engine.contrastive.PairLoss`.

    Args:
      encoder: the dual encoder.
      params: its parameters.
      batch_stats: its batch statistics.
      samples: the pairs; `constants` are the weights and the strengths of the second views.

    Returns:
      (loss, (the loss and its terms, new batch statistics)).
    """
    hyper, axis, scale = samples.constants, samples.axis, params["logit_scale"]
    variables = {"params": params, "batch_stats": batch_stats}
    keys = jax.vmap(jax.random.split)(samples.keys)
    second = _views.other_images(samples.images, keys[:, 0], hyper["jitter"], max(1, encoder.shape[0] // 8))
    third = _views.other_tokens(samples.tokens, keys[:, 1], hyper["text_rate"])
    images, _, stats = encoder.visual(variables, jnp.concatenate([samples.images, second]), True, axis)
    texts = encoder.text(variables, jnp.concatenate([samples.tokens, third]))
    count = len(samples.images)
    cross = info_nce(images[:count], texts[:count], scale, axis)
    images, texts = normalise(images), normalise(texts)
    within = (
        one_way(images[:count], images[count:], scale, axis) + one_way(texts[:count], texts[count:], scale, axis)
    ) / 2
    loss = hyper["cross"] * cross + hyper["in_modal"] * within
    return loss, ({"loss": loss, "cross": cross, "in_modal": within}, stats)
