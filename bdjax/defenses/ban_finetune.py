"""BAN fine-tuning: fine-tune on clean images and on adversarial noise in the neurons.

X. Xu, Z. Liu, S. Koffas, S. Yu and S. Picek, "BAN: Detecting Backdoors Activated by Adversarial Neuron Noise", NeurIPS
2024, arXiv:2405.19928.

Threat model: the defender has the model and clean labelled images, no trigger and no target label.

For every batch, noise ξ, δ ~ U[-ε, ε] is drawn on the scale γ and the bias β of every batch normalisation, and moved by
`noise_steps` signed gradient steps of ε / `noise_steps` (without projection, so that it may reach 2 ε) up

    CE(f(x; (1 + ξ) γ, (1 + δ) β), y)

Then all parameters take one SGD step that descends

    CE(f(x; γ, β), y) + λ CE(f(x; (1 + ξ) γ, (1 + δ) β), y)

where the gradient passes through both terms, and batch normalisation uses the batch's statistics. The defaults are
those of the release: ε 0.3, one step, λ 0.2, SGD 0.01 with momentum 0.9 and weight decay 5e-4, batches of 128, 199
epochs, the learning rate times 0.1 after 99 and 149 of them; the authors take 5 % of the training set.

Requires batch normalisation: every model in bdjax.models but mnist_cnn, vgg16, vgg19, vit and convnext. This is the
mitigation of the paper; its detection (a mask on features and the share of predictions under noise) is left out.

Deviations:
- The release keeps statistics of its own for the noisy passes, which nothing reads; here only the pass without noise
  updates the running statistics.
- Its images are in file order (no shuffling); here they are shuffled in each epoch.
- Images are cropped but not flipped (`augment=crop_flip` does both, as in the release).
- Every epoch has batches of equal size. The release trains epochs 1 to 199; its schedule is counted from 0 here, too.
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
from bdjax.defenses._masks import draw_noise, norm_scales
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
from bdjax.engine import augment, parallel
from bdjax.errors import check_fields
from bdjax.types import DefenderView, Key, Model, Variables, Victim, to_float


@dataclass(frozen=True)
class Config:
    """The noise, and the fine-tuning."""

    epsilon: float = 0.3
    """ε, bound of the noise before the signed steps, relative to scale and bias."""
    noise_steps: int = 1
    """Signed gradient steps of the noise, of size ε / `noise_steps` each."""
    noise_weight: float = 0.2
    """λ, weight of the loss under noise."""
    epochs: int = 199
    """Passes over the clean images."""
    milestones: tuple[int, ...] = (100, 150)
    """Epochs, from 0, at which the learning rate is multiplied by 0.1."""
    batch_size: int = 128
    """Images per step, at most."""
    learning_rate: float = 0.01
    """Learning rate of SGD in the first epochs."""
    momentum: float = 0.9
    """Momentum of SGD, in [0, 1)."""
    weight_decay: float = 5e-4
    """L2 term that is added to the gradient."""
    augment: Literal["none", "crop", "crop_flip", "crop_flip_cutout"] = "crop"
    """Random crop (zero padding 4), horizontal flip, cut-out of 16 pixels."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "defense",
            (("epochs", "noise_steps", "batch_size"), "at least 1", lambda v: v >= 1),
            (("epsilon", "learning_rate"), "positive", lambda v: v > 0),
            (("noise_weight", "weight_decay"), "zero or more", lambda v: v >= 0),
            (("momentum",), "in [0, 1)", lambda v: 0 <= v < 1),
            (("milestones",), "epochs from 1 in ascending order", lambda v: list(v) == sorted({*v} - {0})),
        )


_DYNAMIC = ("epsilon", "noise_weight", "momentum", "weight_decay")


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Fine-tune on clean images, with and without adversarial noise in the neurons.

    Args:
      config: hyper-parameters of the method.
      victim: the model to purify.
      view: clean images (stored [n, H, W, C]) and labels [n]. After each epoch, its callback receives the variables and
        the losses without noise (`clean_loss`) and with noise (`noisy_loss`).
      key: random key that shuffles and augments the images, and draws the noise.

    Returns:
      The purified variables.

    Raises:
      InputError: when the model has no batch normalisation, when the batch size or the number of images is smaller than
        the number of devices, or when the loss becomes NaN or infinite.
    """
    norm_scales("ban_finetune", victim.model, victim.variables)
    number, size = equal_batches(config.batch_size, len(view.labels))
    constants = {**image_arrays(view.images, view.labels), "hyper": hyper_arrays(config, _DYNAMIC)}
    state = {**training_state(victim.variables, "sgd"), "noise_key": jax.random.fold_in(key, 1)}
    epochs = np.arange(config.epochs)
    passed = np.array([epochs >= milestone for milestone in config.milestones]).reshape(-1, config.epochs).sum(0)
    table = np.repeat((config.learning_rate * 0.1**passed).astype(np.float32)[:, None], number, 1)
    state = run_epochs(
        _step(victim.model, config.noise_steps, config.augment), state, constants, table, size,
        jax.random.fold_in(key, 0), partial(view.callback.on_progress, "BAN fine-tuning"),
        round_reporter(view.callback),
    )  # fmt: skip
    return variables_of(state)


def with_noise(params: Any, noise: Any) -> Any:
    """Return the parameters with (1 + ξ) γ and (1 + δ) β in place of γ and β.

    Args:
      params: parameters of a model.
      noise: ξ in "scale" and δ in "bias", float32 [C] by the path of the layer.

    Returns:
      The parameters.
    """
    leaves = models.kernels(params)
    changed = {
        path: (1 + value) * leaves[path]
        for kind, layers in noise.items()
        for layer, value in layers.items()
        if (path := f"{layer}/{kind}") in leaves
    }
    return models.with_kernels(params, changed)


@lru_cache(maxsize=16)
def _step(model: Model, noise_steps: int, policy: str) -> Callable:
    """Return a step, in the engine's form, that finds the noise of a batch and then updates the parameters."""
    augmented = augment.policy(policy)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        hyper, stats = constants["hyper"], state["batch_stats"]
        images = augmented(to_float(constants["images"][batch["index"]]), batch["augment"])
        labels = constants["labels"][batch["index"]]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": stats}
            logits, _, updated = model.apply(variables, images, True, batch["dropout"], axis)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

        key, noise_key = jax.random.split(state["noise_key"])
        noise = draw_noise(noise_key, norm_scales("ban_finetune", model, variables_of(state)), hyper["epsilon"])
        for _ in range(noise_steps):
            uphill = jax.grad(lambda n: loss(with_noise(state["params"], n))[0])(noise)
            uphill = parallel.average(uphill, axis)
            noise = jax.tree.map(lambda n, g: n + hyper["epsilon"] / noise_steps * jnp.sign(g), noise, uphill)

        def objective(params: Any) -> tuple[jax.Array, Any]:
            clean, updated = loss(params)
            noisy = loss(with_noise(params, noise))[0]
            value = clean + hyper["noise_weight"] * noisy
            return value, (updated, {"loss": value, "clean_loss": clean, "noisy_loss": noisy})

        gradient, (updated, metrics) = jax.grad(objective, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        after = descend(
            state, gradient, updated, "sgd", per_step["rate"], hyper["momentum"], hyper["weight_decay"]
        )  # fmt: skip
        return {**after, "noise_key": key}, metrics

    return step
