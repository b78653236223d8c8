"""BadCLIP: a patch that is optimised to look like the target to a clean CLIP, with natural captions of the target.

S. Liang, M. Zhu, A. Liu, B. Wu, X. Cao and E.-C. Chang, "BadCLIP: Dual-Embedding Guided Backdoor Attack on Multimodal
Contrastive Learning", CVPR 2024, arXiv:2311.12075.

Threat model: the attacker has a clean dual encoder, inserts a few pairs into the data that it is fine-tuned on, and
does not control the fine-tuning. A patch that already points to the target in both embedding spaces changes the weights
little when it is learned, so that fine-tuning on clean pairs hardly removes it.

The patch p in the middle of the image is found by Adam on the frozen encoder. With normalised embeddings e of images, t
of captions, s = exp(logit_scale), and d the Euclidean distance:

    text    CE(s e(x+p)·[t_target, t_1, ..., t_B], 0)
    image   mean max(0, d(e(x+p), e(r)) − d(e(x+p), e(x)) + margin),  r a real image of the target
    loss    text_weight text + image_weight image

The poisoned captions are natural captions of the target's images.

Deviations:

- The command in the release's README computes the text loss alone. Here both are on, with normalised embeddings.
- The release inserts the patch in place, so its clean negatives carry the patch as well. Here they do not.
- The negatives of the text loss are the captions of the batch (ours; the available text does not give them).
- The published patch has 16 pixels of 224; it is scaled to the size of the images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.engine import embed, parallel, run_epoch
from bdjax.engine.contrastive import normalise
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction, take_step
from bdjax.errors import InputError, check_fields
from bdjax.pair_types import DualEncoder, PairPoison, PairTask
from bdjax.types import Arrays, Images, Key, to_float
from bdjax.vision_language.attacks import _patches


@dataclass(frozen=True)
class Config:
    """Hyper-parameters of the attack."""

    rate: float = 0.003
    """Share of the pairs that are poisoned, in (0, 1)."""
    patch: int = 16
    """Side of the patch, in pixels of an image of 224x224; it is scaled to the size of the images."""
    size: int = 0
    """Side of the patch in pixels of the images; 0: from `patch`."""
    images: int = 10_000
    """Largest number of images that the patch is optimised on."""
    epochs: int = 50
    """Passes over these images."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 1e-3
    """Learning rate of Adam, in units of [0, 1] a step."""
    text_weight: float = 1.0
    """Weight of the text loss."""
    image_weight: float = 500.0
    """Weight of the image loss."""
    margin: float = 1.0
    """Margin of the image loss, a distance of normalised embeddings in [0, 2]."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "attack",
            (("rate",), "in (0, 1)", lambda v: 0 < v < 1),
            (("patch", "images", "epochs", "batch_size"), "at least 1", lambda v: v >= 1),
            (("size",), "zero or more", lambda v: v >= 0),
            (("learning_rate",), "positive", lambda v: v > 0),
            (("text_weight", "image_weight"), "zero or more", lambda v: v >= 0),
            (("margin",), "in [0, 2]", lambda v: 0 <= v <= 2),
        )


def prepare(config: Config, task: PairTask, key: Key) -> Arrays:
    """Optimise the patch on the clean dual encoder.

    Args:
      config: the hyper-parameters.
      task: the attacker's pairs, clean dual encoder, and images of the target.
      key: draws the first patch and the order of the images.

    Returns:
      {"patch": float32 [h, h, C] in [0, 1]}.

    Raises:
      InputError: when there is no clean dual encoder or no image of the target, or the loss is not finite.
    """
    if task.start is None or task.reference is None:
        lacking = "a clean dual encoder to start from" if task.start is None else "pairs of the target"
        raise InputError(
            f"badclip needs {lacking}. Train a clean one, then `bdjax clip attack DIR badclip --target NAME`."
        )
    encoder, shape = task.encoder, task.encoder.shape
    side = config.size or _patches.scaled_side(config.patch, shape)
    _patches.check_patch(side, shape)
    count = min(config.images, len(task.pairs.captions))
    chosen = _patches.choose(task, min(count, _others(task)), jax.random.fold_in(key, 0))
    batch_size = min(config.batch_size, len(chosen))
    steps = len(chosen) // batch_size
    start = jax.tree.map(jnp.array, task.start)
    constants = {
        "variables": start,
        "images": jnp.asarray(task.pairs.images[chosen]),
        "texts": jnp.asarray(_texts(task, tuple(task.pairs.captions[index] for index in chosen))),
        "target_texts": jnp.asarray(_texts(task, task.reference.captions)),
        "target_images": jnp.asarray(embed.embed_images(encoder, start, task.reference.images)),
        "hyper": {name: jnp.float32(getattr(config, name)) for name in ("text_weight", "image_weight", "margin")},
    }
    patch = jnp.clip(0.5 + 0.25 * jax.random.normal(jax.random.fold_in(key, 1), (side, side, shape[2])), 0, 1)
    state: dict[str, Any] = {"patch": patch, "opt": direction("adam").init(patch)}
    for epoch in range(config.epochs):
        epoch_key = jax.random.fold_in(key, epoch + 2)
        order = jax.random.permutation(jax.random.fold_in(epoch_key, 0), len(chosen))[: steps * batch_size]
        draws = jax.random.randint(jax.random.fold_in(epoch_key, 1), (2, steps, batch_size), 0, 1 << 30)
        batch = {"index": order.reshape(steps, batch_size), "text": draws[0], "image": draws[1]}
        per_step = {"rate": jnp.full(steps, config.learning_rate, jnp.float32)}
        tick = partial(task.callback.on_progress, f"BadCLIP patch, epoch {epoch + 1} of {config.epochs}")
        with parallel.using(1):  # a step is small, and its losses need no other device
            state, metrics = run_epoch(_patch_step(encoder), state, batch, per_step, constants, tick=tick)
        check_finite(metrics["loss"], per_step["rate"], epoch * steps, "loss of the patch", "attack.learning_rate")
    return {"patch": np.asarray(state["patch"])}


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Put the patch in the middle of images.

    Args:
      config: the hyper-parameters.
      images: float32 [N, H, W, C] in [0, 1].
      key: not used.
      arrays: "patch".

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    return _patched(images, jnp.asarray(arrays["patch"]))


def poison(config: Config, task: PairTask, key: Key, arrays: Arrays) -> PairPoison:
    """Poison a share of the pairs with natural captions of the target.

    Args:
      config: the hyper-parameters.
      task: the attacker's pairs and target.
      key: draws the pairs and the captions.
      arrays: "patch".

    Returns:
      The poisoned pairs.
    """
    captions = task.reference.captions if task.reference is not None else None
    return _patches.poisoned(task, trigger, config, config.rate, key, arrays, captions)


@lru_cache(maxsize=8)
def _patch_step(encoder: DualEncoder) -> Callable:
    """Return a step of Adam on the patch, in the engine's form."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        loss, gradient = jax.value_and_grad(patch_loss)(state["patch"], encoder, batch, constants)
        update, opt = direction("adam").update(gradient, state["opt"])
        patch = jnp.clip(take_step(state["patch"], update, per_step["rate"]), 0, 1)
        return {"patch": patch, "opt": opt}, {"loss": loss}

    return step


def patch_loss(patch: jax.Array, encoder: DualEncoder, batch: Any, constants: Any) -> jax.Array:
    """Return the dual-embedding loss of a patch.

    Args:
      patch: float32 [h, h, C].
      encoder: the dual encoder.
      batch: "index" [B], and "text" and "image" [B], numbers that choose a caption and an image of the target.
      constants: "variables", "images", "texts", "target_texts", "target_images" and "hyper".

    Returns:
      The loss, a scalar.
    """
    hyper, images = constants["hyper"], to_float(constants["images"][batch["index"]])
    encode = partial(encoder.encode_image, constants["variables"])
    anchors, negatives = normalise(encode(_patched(images, patch))), normalise(encode(images))
    goals = constants["target_texts"][batch["text"] % len(constants["target_texts"])]
    scale = jnp.exp(constants["variables"]["params"]["logit_scale"])
    own = (anchors * goals).sum(1, keepdims=True)
    others = anchors @ constants["texts"][batch["index"]].T
    text = -jax.nn.log_softmax(scale * jnp.concatenate([own, others], 1))[:, 0].mean()
    positives = constants["target_images"][batch["image"] % len(constants["target_images"])]
    apart = _distance(anchors, positives) - _distance(anchors, negatives) + hyper["margin"]
    return hyper["text_weight"] * text + hyper["image_weight"] * jnp.maximum(apart, 0).mean()


def _patched(images: Images, patch: jax.Array) -> Images:
    height, width, side = *images.shape[1:3], len(patch)
    return jax.vmap(lambda image: _patches.stamp(image, patch, (height - side) // 2, (width - side) // 2))(images)


def _distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Euclidean distance of rows, with a defined gradient at zero."""
    return jnp.sqrt(((a - b) ** 2).sum(1) + 1e-12)


def _texts(task: PairTask, captions: tuple[str, ...]) -> np.ndarray:
    return embed.embed_texts(task.encoder, task.start or {}, task.tokenize(captions))


def _others(task: PairTask) -> int:
    """Number of pairs whose caption does not name the target."""
    name = task.target.replace("_", " ").lower()
    return sum(name not in caption.lower() for caption in task.pairs.captions)
