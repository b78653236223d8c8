"""BI-BAU for CLIP: unlearn adversarial images that imitate the backdoor, in the image encoder alone.

Z. Zhu, Y. Hu, Y. Liu, L. Wei, W. Hou, B. Li, H. Li and W. Luo, "Rethinking Backdoor Adversarial Unlearning through the
Lens of Catastrophic Forgetting in Continual Learning" (Blind Inversion-Backdoor Adversarial Unlearning), 2026,
arXiv:2606.14078, its extension to vision-language models.

Threat model: the defender has the model and clean pairs, and knows neither the trigger nor the target. The text encoder
and logit_scale are frozen.

θ_b are the given weights of the image encoder, θ the current ones; v(x) the features before the projection P, e(x) the
normalised embedding, t_j the normalised embedding of caption j of the batch, s = exp(logit_scale).

Inner step, for one image x_i with caption i, maximised over ‖x' − x_i‖ <= bound by PGD (Eq. 22, 41-45):

    L_adv(x') = trigger + λ1 likelihood + λ2 prior
    trigger      +L_CLIP(x', i; θ_b): mean CE of caption i among the captions, and of x' among the images
    likelihood   −KL(R(x_i; θ_b) ‖ R(x'; θ)),   R(x) = softmax_j(s e(x)·t_j / T)                        (Eq. 44)
    prior        cos(Δv, Δw) − ξ |cos(Δv, v(x_i))|,   Δv = v(x') − v(x_i) by θ                           (Eq. 45)

Outer step, over θ:

    L_CLIP(x, captions) + L_CLIP(x', captions) + λ3 Σ F^c (θ − θ_b)² − λ4 min(c, Σ F^u (θ − θ_b)²)

F^c and F^u are diagonal Fishers at θ_b of the clean and of the first adversarial images, as in
:mod:`bdjax.defenses.bibau`. Constraint set A is the likelihood and EWC, set B the prior and the inverse EWC.

Deviations (most equations were missing from the available text of the paper):

- Δw is not stated for CLIP. Here it is (P(θ_b) − P(θ)) t_j with the caption j that θ_b retrieves for x': the row of the
  difference of the linear classifiers P t. `prior_direction="none"` leaves the angle term alone.
- In the trigger term of one image the other images of the batch are the clean ones, so that PGD can be vmapped.
- The direction of the KL divergence, T, λ, ξ, c, the optimiser (Adam) and its learning rate are ours. Both EWC
  distances are divided by that of the zero weights from θ_b, so that they do not grow with the network.
- The Fisher of an image is that of its classification among the captions of a group of `fisher_group` pairs, and of at
  most `fisher_pairs` pairs. Batch statistics of a ResNet are those of θ_b and stay.
- The paper's 20 epochs, batches of 64, and 20 steps of 2.0 within 25.0 (units of 0..255) are the defaults; the norm's
  symbol is missing.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._fisher import ewc_penalty
from bdjax.engine import embed, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction, learning_rates
from bdjax.errors import InputError, check_fields
from bdjax.pair_types import DualEncoder, PairVictim, PairView
from bdjax.types import Key, Variables, to_float
from bdjax.vision_language.defenses._blind_pairs import (
    Static,
    adversarial_images,
    context_of,
    unlearning_step,
    visual_fisher,
)


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the procedure."""

    epochs: int = 20
    """Passes over the clean pairs."""
    batch_size: int = 64
    """Pairs per step, at most the number of pairs."""
    steps: int = 20
    """PGD steps per image."""
    step_size: float = 2.0
    """Length of a PGD step in units of 0..255."""
    bound: float = 25.0
    """Largest ‖x' − x‖ in units of 0..255."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the PGD step and of the bound."""
    noise: float = 0.5
    """Standard deviation of the initial noise around x, in units of 0..255."""
    constraints_a: bool = True
    """Use the likelihood in the ascent and EWC in the descent."""
    constraints_b: bool = True
    """Use the prior in the ascent and the inverse EWC in the descent."""
    likelihood: float = 0.1
    """λ1, weight of the likelihood."""
    temperature: float = 2.0
    """T of the similarities in the likelihood; positive."""
    prior: float = 1.0
    """λ2, weight of the prior."""
    prior_direction: Literal["projection", "none"] = "projection"
    """What replaces the head's difference in the prior: that of the projections, or nothing."""
    angle: float = 0.9
    """ξ, in [0, 1]."""
    ewc: float = 10.0
    """λ3, weight of EWC."""
    inverse_ewc: float = 1.0
    """λ4, weight of the inverse EWC."""
    clip: float = 0.01
    """c, clipping threshold of the inverse-EWC term; positive."""
    inverse: Literal["negated", "reciprocal"] = "negated"
    """Form of the inverse EWC: −min(c, d) or min(c, 1 / d)."""
    learning_rate: float = 1e-5
    """Peak learning rate of Adam; for a small model that was trained from scratch about a tenth of its own."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Schedule of the learning rate over all steps; cosine ends at zero."""
    fisher_pairs: int = 2048
    """Largest number of pairs from which the Fishers are estimated."""
    fisher_group: int = 8
    """Pairs whose per-example gradients are held in memory at once."""
    fisher_cap: float = 100.0
    """Largest entry of a Fisher whose mean is one."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("epochs", "batch_size", "steps"), "at least 1", lambda v: v >= 1),
            (("fisher_group",), "at least 2", lambda v: v >= 2),
            (("fisher_pairs",), "at least fisher_group", lambda v: v >= self.fisher_group),
            (("step_size", "bound", "clip", "temperature", "fisher_cap"), "positive", lambda v: v > 0),
            (("learning_rate",), "positive and finite", lambda v: 0 < v < math.inf),
            (("noise", "likelihood", "prior", "ewc", "inverse_ewc"), "zero or more", lambda v: v >= 0),
            (("angle",), "in [0, 1]", lambda v: 0 <= v <= 1),
        )


DYNAMIC = (
    "step_size", "bound", "noise", "likelihood", "temperature", "prior", "angle", "ewc", "inverse_ewc", "clip",
)  # fmt: skip
"""Fields that are arguments of the compiled program."""


def purify(config: Config, victim: PairVictim, view: PairView, key: Key) -> Variables:
    """Unlearn the features that adversarial images of the victim share with its backdoor.

    Args:
      config: the hyper-parameters.
      victim: the dual encoder to clean.
      view: clean pairs.
      key: draws the order of the pairs and the starts of the ascent.

    Returns:
      The cleaned variables; the text encoder and logit_scale are the victim's.

    Raises:
      InputError: when there are too few pairs, or a loss is not finite.
    """
    encoder, total = victim.encoder, len(view.images)
    if total < config.fisher_group:
        raise InputError(
            f"the defender has {total} pairs; BI-BAU for CLIP needs at least "
            f"defense.fisher_group={config.fisher_group}."
        )
    batch_size, static = min(config.batch_size, total), Static(*(getattr(config, name) for name in Static._fields))
    original = jax.tree.map(jnp.array, victim.variables["params"]["visual"])
    constants: dict[str, Any] = {
        "images": jnp.asarray(view.images),
        "texts": jnp.asarray(embed.embed_texts(encoder, victim.variables, view.tokens)),
        "original": original,
        "stats": jax.tree.map(jnp.array, victim.variables["batch_stats"]),
        "scale": jnp.exp(jnp.float32(victim.variables["params"]["logit_scale"])),
        "hyper": {name: jnp.float32(getattr(config, name)) for name in DYNAMIC},
    }
    constants |= _fishers(config, static, encoder, view, constants, jax.random.fold_in(key, 0))
    visual = jax.tree.map(jnp.copy, original)
    state = {"visual": visual, "opt": direction("adam").init(visual)}
    step, steps = unlearning_step(encoder, static), total // batch_size
    rates = learning_rates(config.schedule, config.learning_rate, config.epochs * steps)
    for epoch in range(config.epochs):
        epoch_key = jax.random.fold_in(key, epoch + 1)
        order = jax.random.permutation(jax.random.fold_in(epoch_key, 0), total)[: steps * batch_size]
        keys = jax.random.split(jax.random.fold_in(epoch_key, 1), (steps, batch_size))
        batches = {"index": order.reshape(steps, batch_size), "key": keys}
        per_step = {"rate": jnp.asarray(rates[epoch * steps : (epoch + 1) * steps])}
        tick = partial(view.callback.on_progress, f"BI-BAU epoch {epoch + 1} of {config.epochs}")
        state, metrics = run_epoch(step, state, batches, per_step, constants, tick=tick)
        check_finite(metrics["loss"], per_step["rate"], epoch * steps, "outer loss", "defense.learning_rate")
        means = {name: value.mean() for name, value in metrics.items()}
        view.callback.on_round_end(epoch + 1, _with_visual(victim.variables, state["visual"]), **means)
    return _with_visual(victim.variables, state["visual"])


def _with_visual(variables: Variables, visual: Any) -> Variables:
    return {"params": {**variables["params"], "visual": visual}, "batch_stats": variables["batch_stats"]}


def _fishers(
    config: Config, static: Static, encoder: DualEncoder, view: PairView, constants: Any, key: Key
) -> dict[str, Any]:
    """Return both Fishers, divided by the EWC distance between θ_b and zero; zeros where they are not used."""
    original = constants["original"]
    zeros = jax.tree.map(jnp.zeros_like, original)
    chosen = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(view.images))[: config.fisher_pairs])
    images, texts = view.images[chosen], constants["texts"][chosen]

    def fisher(images: np.ndarray) -> Any:
        estimate = visual_fisher(encoder, original, constants["stats"], images, texts, constants["scale"],
                                 config.fisher_group, config.fisher_cap)  # fmt: skip
        distance = jnp.maximum(ewc_penalty(zeros, original, estimate), 1e-12)
        return jax.tree.map(lambda leaf: leaf / distance, estimate)

    result = {"fisher_clean": zeros, "fisher_unlearning": zeros}
    if static.constraints_a:
        result["fisher_clean"] = fisher(images)
    if static.constraints_b:
        size, attacked, ascend = min(config.batch_size, len(images)), [], _first_ascent(encoder, static)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(images))
        for start in range(0, len(images), size):
            rows = np.minimum(np.arange(start, start + size), len(images) - 1)
            attacked.append(np.asarray(ascend(images[rows], texts[rows], keys[rows], constants)))
        result["fisher_unlearning"] = fisher(np.concatenate(attacked)[: len(images)])
    return result


@lru_cache(maxsize=8)
def _first_ascent(encoder: DualEncoder, static: Static) -> Any:
    """Compile (images, texts, keys, constants) -> adversarial images of the original encoder."""

    def ascend(images: Any, texts: Any, keys: Key, constants: Any) -> jax.Array:
        clean = to_float(images)
        context, own = context_of(encoder, clean, texts, constants["original"], constants, None)
        return adversarial_images(encoder, static, clean, own, keys, context)

    return jax.jit(ascend)
