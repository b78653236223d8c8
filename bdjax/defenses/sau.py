"""SAU: unlearn the adversarial examples that the victim and the purified model share.

S. Wei, M. Zhang, H. Zha and B. Wu, "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial
Examples", NeurIPS 2023, arXiv:2307.10562.

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

Notation: θ_b the victim, θ the model being purified (θ_b at first), p softmax outputs, x̃ = x + δ. In every batch, each
image gets a perturbation δ on which both networks should make the same error: signed gradient steps that descend

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
that little remains to unlearn. Few images also mean few steps: 319 make two per epoch, the release's 2,500 make ten.

Deviations:
- The release's configuration names a cosine schedule that is never stepped, so that the learning rate is constant, as
  here.
- Its evaluation on triggered images after each epoch has no effect on the result and is left out. Its early stop of the
  ascent has no effect either (where all images are shared the gradient is 0) and is left out as well.
- Every epoch is divided into batches of equal size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.defenses._tuning import (
    descend,
    equal_batches,
    hyper_arrays,
    image_arrays,
    round_reporter,
    run_epochs,
    training_state,
    variables_of,
)
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
    """BatchNorm in the step of the model: "frozen", the running statistics; "batch", the statistics of the batch of
    clean and adversarial images together."""

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

    Args:
      config: hyper-parameters of the method.
      victim: the model to purify.
      view: clean images (stored [n, H, W, C]) and labels [n]. After each epoch, its callback receives the variables,
        the losses, and the shares of x̃ that fool the victim (`fooled`) and that both networks assign to the same wrong
        class (`shared`).
      key: random key that shuffles the images.

    Returns:
      The purified variables.

    Raises:
      InputError: when the batch size or the number of images is smaller than the number of devices, or when the loss
        becomes NaN or infinite.
    """
    number, size = equal_batches(config.batch_size, len(view.labels))
    constants: dict[str, Any] = {
        **image_arrays(view.images, view.labels),
        "original": jax.tree.map(jnp.array, {**victim.variables}),
        "hyper": hyper_arrays(config, _DYNAMIC),
    }

    state = run_epochs(
        _step(victim.model, config.steps, config.batch_norm == "batch"), training_state(victim.variables, "amsgrad"),
        constants, np.full((config.epochs, number), config.learning_rate, np.float32), size, key,
        partial(view.callback.on_progress, "SAU"), round_reporter(view.callback),
    )  # fmt: skip
    return variables_of(state)


def shared_examples(
    model: Model, current: Variables, original: Variables, images: Images, labels: Labels, steps: int, hyper: Any
) -> Images:
    """Compute the shared adversarial example x̃ of each image in evaluation mode.

    Args:
      model: the classifier.
      current: variables of the model being purified.
      original: variables of the victim.
      images: float32 [N, H, W, C] in [0, 1].
      labels: int32 [N].
      steps: number of signed gradient steps.
      hyper: scalars "step", "bound", "beta_adversarial" and "beta_shared" of the Config.

    Returns:
      float32 [N, H, W, C]; not clipped to [0, 1].
    """
    nets = (current, original)
    clean = [model.logits(net, images).argmax(-1) for net in nets]

    def objective(delta: jax.Array) -> jax.Array:
        logits = [model.logits(net, images + delta) for net in nets]
        adversarial, shared = perturbation_losses(logits, clean, labels)
        return (hyper["beta_adversarial"] * adversarial + hyper["beta_shared"] * shared).sum()

    def descend_delta(_: Any, delta: jax.Array) -> jax.Array:
        unclipped = delta - hyper["step"] * jnp.sign(jax.grad(objective)(delta))
        return jnp.clip(unclipped, -hyper["bound"], hyper["bound"])

    unroll = jax.default_backend() == "cpu"  # as in _adversarial: a loop is slower there
    start = jnp.full_like(images, hyper["bound"])
    return images + jax.lax.fori_loop(0, steps, descend_delta, start, unroll=unroll)


def perturbation_losses(
    logits: list[jax.Array], clean: list[jax.Array], labels: Labels
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Losses L_adv and L_share of each image.

    Args:
      logits: of the current model and of the victim on x̃, [N, classes] each.
      clean: predictions of both on x, int32 [N] each.
      labels: int32 [N].

    Returns:
      (L_adv, L_share), float32 [N] each.
    """
    fooled = [perturbed.argmax(-1) != before for perturbed, before in zip(logits, clean, strict=True)]
    agree = fooled[0] & fooled[1] & (logits[0].argmax(-1) == logits[1].argmax(-1))
    losses = [optax.softmax_cross_entropy_with_integer_labels(perturbed, labels) for perturbed in logits]
    adversarial = -(jnp.where(fooled[0], 0, losses[0]) + jnp.where(fooled[1], 0, losses[1])) / 2
    first, second = (jnp.maximum(jax.nn.softmax(perturbed), 1e-8) for perturbed in logits)
    middle = (first + second) / 2
    divergence = (first * jnp.log(first) + second * jnp.log(second)) / 2 - middle * jnp.log(middle)
    return adversarial, jnp.where(agree, 0, divergence.sum(-1))


def unlearning_losses(logits: jax.Array, predicted: jax.Array, counted: jax.Array) -> jax.Array:
    """Loss L_sar of each image.

    Args:
      logits: of θ on x̃, [N, classes].
      predicted: the class that θ_b assigns to x̃, int32 [N].
      counted: whether L_sar counts for the image, bool [N].

    Returns:
      float32 [N]; 0 where the image is not counted.
    """
    probabilities = jax.nn.softmax(logits)
    one_hot = jax.nn.one_hot(predicted, logits.shape[-1])
    others, predicted_share = (probabilities * (1 - one_hot)).sum(-1), (probabilities * one_hot).sum(-1)
    value = jnp.log(1e-6 + jnp.minimum(others, 0.999)) + jnp.log(1 + 1e-6 - jnp.maximum(predicted_share, 0.001))
    return jnp.where(counted, -value / 2, 0)


@lru_cache(maxsize=16)
def _step(model: Model, steps: int, train: bool) -> Callable:
    """Return a step, in the engine's form, that perturbs a batch and then updates θ."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        hyper, original = constants["hyper"], constants["original"]
        images, labels = to_float(constants["images"][batch["index"]]), constants["labels"][batch["index"]]
        perturbed = shared_examples(model, variables_of(state), original, images, labels, steps, hyper)
        victim_classes = [model.logits(original, x).argmax(-1) for x in (images, perturbed)]
        fooled = (victim_classes[1] != labels) & (victim_classes[1] != victim_classes[0])

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            keys = jnp.concatenate([batch["dropout"], batch["augment"]]) if train else None
            logits, _, stats = model.apply(variables, jnp.concatenate([images, perturbed]), train, keys, axis)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.concatenate([labels, labels]))
            clean, adversarial = losses[: len(labels)].mean(), losses[len(labels) :].mean()
            shared = unlearning_losses(logits[len(labels) :], victim_classes[1], fooled).mean()
            value = hyper["lambda_clean"] * clean + hyper["lambda_adversarial"] * adversarial
            value += hyper["lambda_shared"] * shared
            agree = fooled & (logits[len(labels) :].argmax(-1) == victim_classes[1])
            metrics = {"clean_loss": clean, "shared_loss": shared, "fooled": fooled.mean(), "shared": agree.mean()}
            return value, (stats, {"loss": value, **metrics})

        gradient, (stats, metrics) = jax.grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        return descend(state, gradient, stats, "amsgrad", per_step["rate"]), metrics

    return step
