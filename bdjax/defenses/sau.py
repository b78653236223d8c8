"""SAU: unlearn the adversarial examples that the victim and the model share (Wei et al., NeurIPS 2023).

S. Wei, M. Zhang, H. Zha and B. Wu, "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial
Examples".

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

Notation: θ_b the victim, θ the model being repaired (θ_b at first), p softmax outputs, x̃ = x + δ. In every batch, each
image gets a perturbation δ on which both networks shall make the same error: signed gradient steps that descend

    β1 L_adv + β2 L_share
    L_adv   = -½ Σ_{h of θ, θ_b} CE(h(x̃), y)   over the networks that x̃ does not fool yet (same prediction as on x)
    L_share = JS(p_θ(x̃), p_θb(x̃))               for images not shared yet (shared: both fooled, to the same class)

start from δ = +C in every pixel and are clipped to [-C, C], not to the range of pixels. Then θ takes one step that
descends

    λ1 CE(f_θ(x), y) + λ2 CE(f_θ(x̃), y) + λ3 L_sar,     L_sar = -log(1 - p_θ(x̃)[ŷ_b])

where L_sar counts for images that fool θ_b: its prediction ŷ_b on x̃ is neither y nor its prediction on x. L_sar is
computed as the mean of -log(1e-6 + min(Σ_{c≠ŷ_b} p_c, 0.999)) and -log(1 + 1e-6 - max(p[ŷ_b], 0.001)). All sums are
divided by the number of images in the batch. Both networks are in evaluation mode. The defaults are those of the
release (the same as BackdoorBench's): C and step size 0.2, five steps, β = (0.01, 1), λ = (1, 0, 1), Adam with AMSGrad
at 1e-4, batches of 256, 100 epochs, no augmentation.

What to expect: δ changes a pixel by at most C, so a trigger that changes pixels by more can be out of reach. On
scikit-learn's digits with BadNets (a white square on black) ASR falls from 98.6 only to 89.6 % (one seed). There the
victim assigns 1.7 % of the images to the target when the trigger is limited to ±0.2 per pixel, 24 % at ±0.5 and 99.7 %
in full; and from the 16th epoch on, perturbations that fool the victim are found for 3 % of the images on average, so
that little is left to unlearn. Few images also mean few steps: 319 make two per epoch, the release's 2,500 make ten.

**Deviations** from the release: its configuration names a cosine schedule that is never stepped, so that the learning
rate is constant, as here. Its evaluation on triggered images after each epoch has no effect on the result and is left
out. Its early stop of the ascent has none either (where all images are shared the gradient is 0) and is left out, too.
Every epoch is divided into batches of equal size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._tuning import begin, descend, equal_batches, model_of, passes, shown_to
from bdjax.engine import parallel
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Images, Key, Labels, Model, Variables, Victim, to_float


@dataclass(frozen=True)
class Config:
    """The shared adversarial examples, and the steps of the model."""

    epochs: int = 100
    """Passes over the clean images."""
    batch_size: int = 256
    """Images per step, at most."""
    steps: int = 5
    """Signed gradient steps on each perturbation."""
    step: float = 0.2
    """Size of a signed step per pixel, in units of [0, 1]."""
    bound: float = 0.2
    """C, Linf bound of δ, in units of [0, 1]."""
    beta_adversarial: float = 0.01
    """β1, weight of L_adv."""
    beta_shared: float = 1.0
    """β2, weight of L_share."""
    lambda_clean: float = 1.0
    """λ1, weight of the loss on clean images."""
    lambda_adversarial: float = 0.0
    """λ2, weight of the loss on adversarial examples (adversarial training)."""
    lambda_shared: float = 1.0
    """λ3, weight of L_sar."""
    learning_rate: float = 1e-4
    """Learning rate of Adam with AMSGrad."""
    batch_norm: Literal["frozen", "batch"] = "frozen"
    """BatchNorm in the step of the model: "frozen", the running statistics; "batch", those of the batch, clean and
    adversarial images together."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("epochs", "batch_size", "steps"), "at least 1", lambda v: v >= 1),
            (("step", "bound", "learning_rate"), "positive", lambda v: v > 0),
            (_WEIGHTS, "zero or more", lambda v: v >= 0),
        )


_WEIGHTS = ("beta_adversarial", "beta_shared", "lambda_clean", "lambda_adversarial", "lambda_shared")
_DYNAMIC = ("step", "bound", *_WEIGHTS)


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Find shared adversarial examples for every batch, and unlearn them.

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; key: shuffles them.
    Returns: the variables; after each epoch the watch is shown them, the losses, and the shares of x̃ that fool the
      victim (`fooled`) and that both networks assign to the same wrong class (`shared`).
    Raises InputError for fewer images than devices, and for a loss that is not finite.
    """
    number, size = equal_batches(config.batch_size, len(view.labels))
    shared: dict[str, Any] = {
        "images": jnp.asarray(view.images),
        "labels": jnp.asarray(view.labels),
        "original": jax.tree.map(jnp.array, {**victim.variables}),
        "hyper": {name: jnp.float32(getattr(config, name)) for name in _DYNAMIC},
    }

    state = passes(
        _step(victim.model, config.steps, config.batch_norm == "batch"), begin(victim.variables, "amsgrad"), shared,
        np.full((config.epochs, number), config.learning_rate, np.float32), size, key,
        partial(view.callback.on_progress, "SAU"), shown_to(view.callback),
    )  # fmt: skip
    return model_of(state)


def shared_examples(
    model: Model, now: Variables, original: Variables, images: Images, labels: Labels, steps: int, hyper: Any
) -> Images:
    """x̃ of each image [N, H, W, C], in evaluation mode; not clipped to [0, 1].

    Args: now, original: the current model and the victim; hyper: "step", "bound", "beta_adversarial", "beta_shared".
    """
    nets = (now, original)
    clean = [model.logits(net, images).argmax(-1) for net in nets]

    def objective(delta: jax.Array) -> jax.Array:
        logits = [model.logits(net, images + delta) for net in nets]
        adversarial, shared_ = losses(logits, clean, labels)
        return (hyper["beta_adversarial"] * adversarial + hyper["beta_shared"] * shared_).sum()

    def one(_: Any, delta: jax.Array) -> jax.Array:
        moved = delta - hyper["step"] * jnp.sign(jax.grad(objective)(delta))
        return jnp.clip(moved, -hyper["bound"], hyper["bound"])

    written_out = jax.default_backend() == "cpu"  # as in _adversarial: a loop is slower there
    start = jnp.full_like(images, hyper["bound"])
    return images + jax.lax.fori_loop(0, steps, one, start, unroll=written_out)


def losses(logits: list[jax.Array], clean: list[jax.Array], labels: Labels) -> tuple[jax.Array, jax.Array]:
    """L_adv and L_share of each image, [N] each.

    Args: logits: of x̃, [N, classes], of the current model and of the victim; clean: their predictions on x, [N].
    """
    fooled = [own.argmax(-1) != was for own, was in zip(logits, clean, strict=True)]
    alike = fooled[0] & fooled[1] & (logits[0].argmax(-1) == logits[1].argmax(-1))
    each = [optax.softmax_cross_entropy_with_integer_labels(own, labels) for own in logits]
    adversarial = -(jnp.where(fooled[0], 0, each[0]) + jnp.where(fooled[1], 0, each[1])) / 2
    first, second = (jnp.maximum(jax.nn.softmax(own), 1e-8) for own in logits)
    middle = (first + second) / 2
    divergence = (first * jnp.log(first) + second * jnp.log(second)) / 2 - middle * jnp.log(middle)
    return adversarial, jnp.where(alike, 0, divergence.sum(-1))


def unlearning(logits: jax.Array, predicted: jax.Array, counted: jax.Array) -> jax.Array:
    """L_sar of each image [N], 0 where it is not `counted` [N].

    Args: logits: of θ on x̃, [N, classes]; predicted: the class that θ_b assigns to x̃, [N].
    """
    share = jax.nn.softmax(logits)
    hot = jax.nn.one_hot(predicted, logits.shape[-1])
    others, own = (share * (1 - hot)).sum(-1), (share * hot).sum(-1)
    value = jnp.log(1e-6 + jnp.minimum(others, 0.999)) + jnp.log(1 + 1e-6 - jnp.maximum(own, 0.001))
    return jnp.where(counted, -value / 2, 0)


@lru_cache(maxsize=16)
def _step(model: Model, steps: int, train: bool) -> Callable:
    """The perturbations of a batch and one step of θ, in the engine's form."""

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        hyper, original = shared["hyper"], shared["original"]
        images, labels = to_float(shared["images"][split["index"]]), shared["labels"][split["index"]]
        moved = shared_examples(model, model_of(state), original, images, labels, steps, hyper)
        of_victim = [model.logits(original, x).argmax(-1) for x in (images, moved)]
        fooled = (of_victim[1] != labels) & (of_victim[1] != of_victim[0])

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            keys = jnp.concatenate([split["dropout"], split["augment"]]) if train else None
            logits, _, stats = model.apply(variables, jnp.concatenate([images, moved]), train, keys, axis)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.concatenate([labels, labels]))
            clean, adversarial = each[: len(labels)].mean(), each[len(labels) :].mean()
            shared_ = unlearning(logits[len(labels) :], of_victim[1], fooled).mean()
            value = hyper["lambda_clean"] * clean + hyper["lambda_adversarial"] * adversarial
            value += hyper["lambda_shared"] * shared_
            alike = fooled & (logits[len(labels) :].argmax(-1) == of_victim[1])
            found = {"clean_loss": clean, "shared_loss": shared_, "fooled": fooled.mean(), "shared": alike.mean()}
            return value, (stats, {"loss": value, **found})

        gradient, (stats, metrics) = jax.grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        return descend(state, gradient, stats, "amsgrad", whole["rate"]), metrics

    return step
