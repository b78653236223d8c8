"""Query-based re-activation (QRA): learn a small input perturbation that re-activates the backdoor of a purified model.

R. Min, Z. Qin, N. L. Zhang, L. Shen and M. Cheng, "Uncovering, Explaining, and Mitigating the Superficial Safety of
Backdoor Defense", NeurIPS 2024, arXiv:2410.09838.

Threat model: the attacker cannot change the purified weights P, but knows them, and has their retuned version T (see
retuning), a clean model M and 500 + 500 images. A network Φ is trained so that the purified model predicts what the
retuned one does:

    x' = clip(x + Φ(x), 0, 1),   Φ(x) = ε tanh(MLP(x)),   ε = 16/255
    loss = α KL(softmax T(x) ‖ softmax P(x')) + CE(M(x'), y)                                α = 0.2, mean of a batch

The second term prevents Φ from being an ordinary adversarial perturbation, which would also change the predictions of
M. The metric is Q-ASR, the share of triggered test images of other classes, changed by Φ, that P predicts as the
target; the same rate of M should stay low. MLP: four linear layers, 1,024 wide, with ReLU between them; SGD 0.1 with
momentum 0.9, 50 epochs, batches of 128.

Deviations:

- Triggered images are training images of other classes with the training trigger and their true label for M, for
  clean-label attacks too; the release takes test images there.
- The MLP's inputs are images in [0, 1].
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.engine import parallel, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction
from bdjax.errors import check_fields
from bdjax.types import Arrays, Backdoor, Images, Key, Model, ReactivationInputs, Task, to_float

NEEDS, METRIC = ("retuning",), "Q-ASR"


@dataclass(frozen=True)
class Config:
    """The perturbation and its training."""

    count: int = 500
    """Number of triggered images, and of clean ones; at least 1."""
    payload: Literal["triggered"] = "triggered"
    """Training images of other classes with the training trigger."""
    budget: float = 16 / 255
    """ε, largest change of a value, in units of [0, 1]; positive."""
    distillation: float = 0.2
    """α, weight of the KL divergence."""
    hidden: int = 1024
    """Width of the MLP."""
    epochs: int = 50
    """Passes over the images."""
    batch_size: int = 128
    """Largest number of images per step."""
    learning_rate: float = 0.1
    """Learning rate of SGD with momentum 0.9."""
    clip: float = math.inf
    """Largest norm of a step's gradient; the release does not clip."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "attack",
            (("count", "hidden", "epochs", "batch_size"), "at least 1", lambda v: v >= 1),
            (("budget", "learning_rate", "clip"), "positive", lambda v: v > 0),
        )


def reactivate(config: Config, inputs: ReactivationInputs, backdoor: Backdoor, task: Task, key: Key) -> Backdoor:
    """Train the perturbation network Φ to make the purified model respond to the trigger again.

    Args:
      config: hyper-parameters of the attack.
      inputs: purified, retuned and clean variables, and the poisoned images.
      backdoor: the attack that was planted, with its arrays.
      task: training set, model and training functions.
      key: random key.

    Returns:
      The unchanged purified variables, with the layers of Φ as arrays "w0", "b0", ...
    """
    poison, step = inputs.payload, _step(task.model)
    pool = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(task.labels)))[: config.count]
    images = np.concatenate([to_float(task.images[pool]), to_float(poison.images)])
    labels = np.concatenate([task.labels[pool], task.labels[poison.indices % len(task.labels)]])
    constants = {
        "images": jnp.asarray(images),
        "labels": jnp.asarray(labels, jnp.int32),
        "purified": dict(inputs.purified),
        "retuned": dict(inputs.reactivated["retuning"]),
        "clean": dict(inputs.clean),
        "hyper": {n: jnp.float32(getattr(config, n)) for n in ("distillation", "learning_rate", "clip", "budget")},
    }
    batch = -(-len(labels) // -(-len(labels) // config.batch_size))
    batch = max(1, len(labels) // -(-len(labels) // batch)) // parallel.count() * parallel.count()
    steps, pixels = len(labels) // batch, int(np.prod(task.model.shape))
    state = {"params": _layers(jax.random.fold_in(key, 1), (pixels, *(config.hidden,) * 3, pixels))}
    state["opt"] = direction("sgd", 0.9).init(state["params"])
    for epoch in range(config.epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch + 2), len(labels))[: steps * batch]
        tick = partial(_report_progress, task, epoch * steps, config.epochs * steps)
        state, metrics = run_epoch(step, state, {"index": order.reshape(steps, batch)}, {}, constants, tick=tick)
        check_finite(metrics["loss"], config.learning_rate, epoch * steps, "loss of Φ", "attack.learning_rate")
    return Backdoor(backdoor.attack, backdoor.config, inputs.purified, jax.tree.map(np.asarray, state["params"]))


def perturb(config: Config, images: Images, arrays: Arrays) -> Images:
    """Add the perturbation Φ(x) to images x and clip.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      arrays: the layers of Φ.

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    return _perturb(images, arrays, config.budget)


def _perturb(images: Images, layers: Arrays, budget: Any) -> Images:
    """Apply the MLP and add its output, scaled to the budget."""
    x, depth = images.reshape(len(images), -1), len(layers) // 2
    for i in range(depth):
        x = x @ layers[f"w{i}"] + layers[f"b{i}"]
        x = jnp.tanh(x) if i == depth - 1 else jax.nn.relu(x)
    return jnp.clip(images + budget * x.reshape(images.shape), 0, 1)


def _layers(key: Key, widths: tuple[int, ...]) -> dict[str, jax.Array]:
    """Draw weights and biases, uniform in ± 1 / sqrt(inputs), as PyTorch does."""
    layers = {}
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        for name, shape, index in (("w", (inputs, outputs), 2 * i), ("b", (outputs,), 2 * i + 1)):
            uniform = jax.random.uniform(jax.random.fold_in(key, index), shape, minval=-1, maxval=1)
            layers[f"{name}{i}"] = uniform / inputs**0.5
    return layers


@lru_cache(maxsize=16)
def _step(model: Model) -> Any:
    """An SGD step on Φ for :func:`run_epoch`."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images, labels = constants["images"][batch["index"]], constants["labels"][batch["index"]]
        hyper = constants["hyper"]
        teacher = jax.nn.softmax(model.logits(constants["retuned"], images))

        def loss(params: Any) -> jax.Array:
            perturbed = _perturb(images, params, hyper["budget"])
            student = jax.nn.log_softmax(model.logits(constants["purified"], perturbed))
            clean_logits = model.logits(constants["clean"], perturbed)
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels(clean_logits, labels).mean()
            return hyper["distillation"] * optax.losses.kl_divergence(student, teacher).mean() + cross_entropy

        value, gradient = parallel.average(jax.value_and_grad(loss)(state["params"]), axis)
        shrink = jnp.minimum(1, hyper["clip"] / jnp.maximum(optax.tree.norm(gradient), 1e-12))
        update, opt = direction("sgd", 0.9).update(jax.tree.map(lambda g: g * shrink, gradient), state["opt"])
        params = jax.tree.map(lambda p, u: p - hyper["learning_rate"] * u, state["params"], update)
        return {"params": params, "opt": opt}, {"loss": value}

    return step


def _report_progress(task: Task, before: int, total: int, done: int, _: int) -> None:
    """Report the steps of all epochs together."""
    task.callback.on_progress("query re-activation", before + done, total)
