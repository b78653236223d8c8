"""NPD: train one linear layer inside the frozen network so that it suppresses what a trigger adds.

M. Zhu, S. Wei, H. Zha and B. Wu, "Neural Polarizer: A Lightweight and Effective Backdoor Defense via Purifying Poisoned
Features", NeurIPS 2023, arXiv:2306.16697.

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

A matrix A [C, C] (the identity at first) multiplies the channels of the input h of one convolution with kernel W. The
rest of the network is frozen. For each batch, with t the best class of an image other than its label y,

    δ = 0; at most `steps` times: δ = project(δ - `step` sign ∇_δ CE(f_A(x + δ), t)), |δ|₂ <= `bound`,
    no further step once `fooled` of the images are assigned to t

and A takes one SGD step that descends, with x̃ = x + δ and p = softmax f_A(x̃),

    CE(f_A(x), y) + λ1 CE(f_A(x̃), argmax f_A(x)) - λ2 log(1 - max_{c≠y} p_c) - λ3 log(1 - p_t)

A 1x1 convolution without bias followed by a convolution is a convolution, so that A is multiplied into the kernel:
W'[.., i, o] = Σ_j A[i, j] W[.., j, o], for h' = h A. The purified model thus has the network's own layers, and can be
exported and purified again. The defaults are BackdoorBench's.

Deviations:
- The release inserts the layer before the first convolution of the last block of a pre-activation ResNet-18, the only
  network that it supports. Here it is before the first convolution that at least `depth` = 0.9 of the convolutions
  precede: the same one in ResNet-18 and pre-activation ResNet-18 (18 of 20 precede it), the last convolution in cnn,
  mnist_cnn and the VGG networks. Depthwise convolutions are not counted. In a network without convolutions the rule
  applies to the dense layers before the last. `layer` names another one.
- The release's layer has a batch normalisation after the 1x1 convolution, and five epochs of CE at a learning rate of
  1e-4 in which its statistics settle. Here there is none (a shift could not be multiplied into the kernel), A starts at
  the victim, and these epochs are left out.
- t is the best class other than the label; the release takes the second best class, which is the label itself where the
  model errs.
- x̃ is clipped to [0, 1], and `step` and `bound` are in these units.
- Images are cropped but not flipped (`augment=crop_flip` does both). Every epoch has batches of equal size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import models
from bdjax.defenses._tuning import equal_batches, hyper_arrays, image_arrays, iterate_epochs
from bdjax.engine import augment, parallel
from bdjax.engine.optimizer import direction, take_step
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Images, Key, Labels, Model, Variables, Victim, to_float


@dataclass(frozen=True)
class Config:
    """The layer, the perturbations and the steps of the matrix."""

    layer: str = ""
    """Path of the kernel whose input is transformed, such as "Conv_18/kernel"; empty: chosen by `depth`."""
    depth: float = 0.9
    """Share of the convolutions that precede the chosen one at least, in [0, 1]; the last one where there is none."""
    epochs: int = 50
    """Passes over the clean images."""
    batch_size: int = 128
    """Images per step, at most."""
    learning_rate: float = 0.01
    """Learning rate of SGD on A."""
    momentum: float = 0.9
    """Momentum of SGD, in [0, 1)."""
    weight_decay: float = 5e-4
    """L2 term that is added to the gradient of A."""
    steps: int = 2
    """Largest number of signed gradient steps of a perturbation."""
    step: float = 0.1
    """Size of a step per pixel, in units of [0, 1]."""
    bound: float = 3.0
    """L2 bound of a perturbation, in units of [0, 1]."""
    fooled: float = 0.6
    """Share of the images assigned to t from which on the perturbations take no further step, in (0, 1]."""
    lambda_consistent: float = 0.4
    """λ1, weight of the cross-entropy of x̃ with the class of x."""
    lambda_untargeted: float = 0.4
    """λ2, weight of the term of the best wrong class."""
    lambda_targeted: float = 0.4
    """λ3, weight of the term of t."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "crop"
    """Random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("depth",), "in [0, 1]", lambda v: 0 <= v <= 1),
            (("epochs", "batch_size", "steps"), "at least 1", lambda v: v >= 1),
            (("learning_rate", "step", "bound"), "positive", lambda v: v > 0),
            (("momentum",), "in [0, 1)", lambda v: 0 <= v < 1),
            (("fooled",), "in (0, 1]", lambda v: 0 < v <= 1),
            (("weight_decay", *_WEIGHTS), "zero or more", lambda v: v >= 0),
        )


_WEIGHTS = ("lambda_consistent", "lambda_untargeted", "lambda_targeted")
_DYNAMIC = ("momentum", "weight_decay", "step", "bound", "fooled", *_WEIGHTS)


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Train the matrix on clean images and their perturbations, and multiply it into the kernel.

    Args:
      config: hyper-parameters of the method.
      victim: the model to purify.
      view: clean images (stored [n, H, W, C]) and labels [n]. After each epoch, its callback receives the variables,
        the `loss`, and the share of the perturbed images that are assigned to t (`reached`).
      key: random key that shuffles and augments the images.

    Returns:
      The purified variables, which differ from the victim's in one kernel.

    Raises:
      InputError: when the network has no such layer, when the batch size or the number of images is smaller than the
        number of devices, or when the loss becomes NaN or infinite.
    """
    layer = config.layer or layer_at(victim, config.depth)
    kernel = models.kernels(victim.variables["params"]).get(layer)
    if kernel is None or kernel.ndim not in (2, 4):
        raise InputError(
            f"defense.layer={layer!r} is no kernel of a convolution or dense layer of model {victim.model.name!r}. "
            "Use the path of one, such as Conv_1/kernel, or leave defense.layer empty."
        )
    number, size = equal_batches(config.batch_size, len(view.labels))
    constants = {
        **image_arrays(view.images, view.labels),
        "victim": jax.tree.map(jnp.array, {**victim.variables}),
        "hyper": hyper_arrays(config, _DYNAMIC),
    }
    matrix = jnp.eye(kernel.shape[-2])
    start = {"matrix": matrix, "opt": direction("sgd", config.momentum).init(matrix)}
    rates = np.full((config.epochs, number), config.learning_rate, np.float32)
    purified = victim.variables
    for epoch, state, metrics in iterate_epochs(
        _step(victim.model, layer, config.steps, config.augment), start, constants, rates, size, key,
        partial(view.callback.on_progress, "NPD"),
    ):  # fmt: skip
        purified = transformed(victim.variables, layer, state["matrix"])
        view.callback.on_round_end(epoch, purified, **metrics)
    return purified


def layer_at(victim: Victim, depth: float) -> str:
    """Return the path of the first convolution that at least a share `depth` of all convolutions precede.

    Args:
      victim: the model; its forward pass is traced, not computed.
      depth: the share, in [0, 1].

    Returns:
      The path of the kernel; of the last convolution, if no share is as large. Depthwise convolutions are not counted.
      In a network without convolutions, the path of a dense layer before the head.

    Raises:
      InputError: when the network has no layer before the head, or does not provide the outputs of its layers.
    """
    order: list[str] = []

    def trace(images: Images) -> None:
        order.extend(models.outputs(victim.model, victim.variables, images)[0])  # in forward order

    jax.eval_shape(trace, jax.ShapeDtypeStruct((1, *victim.model.shape), jnp.float32))
    kernels = models.kernels(victim.variables["params"])
    convolutions = [path for path in order if kernels[path].ndim == 4 and kernels[path].shape[-2] > 1]
    layers = convolutions or [path for path in order if kernels[path].ndim == 2 and path != "head/kernel"]
    if not layers:
        raise InputError(
            f"npd transforms the input of a layer before the last one, and model {victim.model.name!r} has none with "
            "several input channels. Use a model with more layers."
        )
    preceding = np.arange(len(layers)) / len(layers)
    return next((path for path, share in zip(layers, preceding, strict=True) if share >= depth - 1e-9), layers[-1])


def transformed(variables: Variables, layer: str, matrix: jax.Array) -> Variables:
    """Return the variables with h' = h A in place of the input h of a layer.

    Args:
      variables: variables of a model.
      layer: path of the layer's kernel, [.., I, O].
      matrix: A, float32 [I, I].

    Returns:
      The variables with the kernel A W.
    """
    kernel = models.kernels(variables["params"])[layer]
    changed = {layer: jnp.einsum("ij,...jo->...io", matrix, kernel, precision="highest")}
    return {**variables, "params": models.with_kernels(variables["params"], changed)}


def perturb(
    logits_of: Callable[[Images], jax.Array], images: Images, goals: Labels, steps: int, hyper: Any,
    axis: str | None = None,
) -> Images:  # fmt: skip
    """Move images towards other classes by signed gradient steps.

    Args:
      logits_of: `logits_of(images) -> logits`.
      images: float32 [N, H, W, C] in [0, 1].
      goals: int32 [N], the class t of each image.
      steps: largest number of steps.
      hyper: scalars "step", "bound" and "fooled" of the Config.
      axis: mapped axis over which the share of fooled images is averaged, or None.

    Returns:
      The perturbed images x̃, float32 [N, H, W, C] in [0, 1].
    """

    def objective(delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(jnp.clip(images + delta, 0, 1))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, goals).sum()
        return loss, (logits.argmax(-1) == goals).mean()

    delta = jnp.zeros_like(images)
    for _ in range(steps):
        gradient, rate = jax.grad(objective, has_aux=True)(delta)
        candidate = delta - hyper["step"] * jnp.sign(gradient)
        norm = jnp.sqrt((candidate**2).sum((1, 2, 3), keepdims=True))
        candidate = candidate * jnp.minimum(1, hyper["bound"] / jnp.maximum(norm, 1e-12))
        delta = jnp.where(parallel.average(rate, axis) < hyper["fooled"], candidate, delta)
    return jnp.clip(images + delta, 0, 1)


def polarizing_loss(
    clean: jax.Array, perturbed: jax.Array, labels: Labels, goals: Labels, hyper: Any
) -> jax.Array:  # fmt: skip
    """Loss of the matrix, averaged over a batch.

    Args:
      clean: logits of x, [N, classes].
      perturbed: logits of x̃, [N, classes].
      labels: y, int32 [N].
      goals: t, int32 [N].
      hyper: scalars λ1 to λ3 by their names in the Config.

    Returns:
      The loss, a scalar.
    """
    wrong = jnp.where(jax.nn.one_hot(labels, clean.shape[-1], dtype=bool), -jnp.inf, perturbed).argmax(-1)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    losses = (
        entropy(clean, labels)
        + hyper["lambda_consistent"] * entropy(perturbed, clean.argmax(-1))
        + hyper["lambda_untargeted"] * _minus_log_without(perturbed, wrong)
        + hyper["lambda_targeted"] * _minus_log_without(perturbed, goals)
    )
    return losses.mean()


def _minus_log_without(logits: jax.Array, excluded: Labels) -> jax.Array:
    """Return -log(1 - p[excluded]) of each image, from the logits of the other classes."""
    others = jnp.where(jax.nn.one_hot(excluded, logits.shape[-1], dtype=bool), -jnp.inf, logits)
    return jax.nn.logsumexp(logits, -1) - jax.nn.logsumexp(others, -1)


@lru_cache(maxsize=16)
def _step(model: Model, layer: str, steps: int, policy: str) -> Callable:
    """Return a step, in the engine's form, that perturbs a batch and then updates A."""
    augmented = augment.policy(policy)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        hyper, victim = constants["hyper"], constants["victim"]
        images = augmented(to_float(constants["images"][batch["index"]]), batch["augment"])
        labels = constants["labels"][batch["index"]]
        current = transformed(victim, layer, state["matrix"])
        is_label = jax.nn.one_hot(labels, model.classes, dtype=bool)
        goals = jnp.where(is_label, -jnp.inf, model.logits(current, images)).argmax(-1)
        adversarial = perturb(partial(model.logits, current), images, goals, steps, hyper, axis)

        def loss(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = model.logits(transformed(victim, layer, matrix), jnp.concatenate([images, adversarial]))
            clean, perturbed = jnp.split(logits, 2)
            reached = (perturbed.argmax(-1) == goals).mean()
            return polarizing_loss(clean, perturbed, labels, goals, hyper), reached

        (value, reached), gradient = jax.value_and_grad(loss, has_aux=True)(state["matrix"])
        value, reached, gradient = parallel.average((value, reached, gradient), axis)
        gradient += hyper["weight_decay"] * state["matrix"]
        update, opt = direction("sgd", hyper["momentum"]).update(gradient, state["opt"])
        matrix = take_step(state["matrix"], update, per_step["rate"])
        return {"matrix": matrix, "opt": opt}, {"loss": value, "reached": reached}

    return step
