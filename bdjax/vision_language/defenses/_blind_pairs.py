"""The steps of BI-BAU for dual encoders (:mod:`bdjax.vision_language.defenses.bibau_clip`).

The text encoder is frozen, so the captions enter as normalised embeddings that are computed once.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._adversarial import adversarial, project
from bdjax.defenses._cosine import cosine
from bdjax.defenses._fisher import ewc_penalty
from bdjax.engine import parallel
from bdjax.engine.contrastive import info_nce, normalise
from bdjax.engine.optimizer import direction, take_step
from bdjax.pair_types import DualEncoder
from bdjax.types import Key, to_float


class Static(NamedTuple):
    """The Config fields that the compiled program depends on."""

    constraints_a: bool
    constraints_b: bool
    steps: int
    norm: str
    inverse: str
    prior_direction: str


class Context(NamedTuple):
    """What the objective of one image needs besides the image: the pairs of all devices, and both image encoders."""

    texts: jax.Array
    """Normalised embeddings of the captions, [B, D]."""
    images: jax.Array
    """Normalised embeddings of the clean images by the original encoder, [B, D]."""
    original: Any
    """Parameters of the original image encoder."""
    current: Any
    """Parameters of the current image encoder."""
    stats: Any
    """Batch statistics, the same for both."""
    scale: jax.Array
    """exp(logit_scale)."""
    hyper: Any


def encode(encoder: DualEncoder, visual: Any, stats: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Embed images in evaluation mode by the parameters of an image encoder.

    Args:
      encoder: the dual encoder.
      visual: parameters of its image encoder.
      stats: its batch statistics.
      images: float32 [N, H, W, C] in [0, 1].

    Returns:
      (embeddings [N, D], features before the projection [N, F]).
    """
    embeddings, features, _ = encoder.visual({"params": {"visual": visual}, "batch_stats": stats}, images)
    return embeddings, features


def projection(visual: Any) -> jax.Array:
    """Return the matrix [F, D] from the features to the embedding: of the transformer, or of the attention pooling."""
    return visual["proj"] if "proj" in visual else visual["attnpool.c_proj"]["kernel"]


def pair_objective(encoder: DualEncoder, static: Static, image: Any, own: Any, context: Context) -> Callable:
    """Return the objective of one adversarial image, which is maximised.

    Args:
      encoder: the dual encoder.
      static: the fields that the program depends on.
      image: float32 [H, W, C] in [0, 1], the clean image.
      own: position of its pair in the context, int32 scalar.
      context: the pairs and the encoders.

    Returns:
      `objective(adversarial image) -> scalar`.
    """
    hyper, texts, scale = context.hyper, context.texts, context.scale
    one = partial(encode, encoder, stats=context.stats)
    clean_features = one(context.current, images=image[None])[1][0]
    teacher = scale * context.images[own] @ texts.T / hyper["temperature"]
    difference = projection(context.original) - projection(context.current)

    def objective(candidate: jax.Array) -> jax.Array:
        embedding = normalise(one(context.original, images=candidate[None])[0])[0]
        to_texts = scale * embedding @ texts.T
        to_images = scale * context.images @ texts[own]
        to_images = jnp.where(jnp.arange(len(texts)) == own, to_texts[own], to_images)
        value = -(jax.nn.log_softmax(to_texts)[own] + jax.nn.log_softmax(to_images)[own]) / 2
        if not (static.constraints_a or static.constraints_b):
            return value
        student, features = (part[0] for part in one(context.current, images=candidate[None]))
        if static.constraints_a:
            logits = scale * normalise(student[None])[0] @ texts.T / hyper["temperature"]
            log_teacher, log_student = jax.nn.log_softmax(teacher), jax.nn.log_softmax(logits)
            value -= hyper["likelihood"] * (jnp.exp(log_teacher) * (log_teacher - log_student)).sum()
        if static.constraints_b:
            change = features - clean_features
            prior = -hyper["angle"] * jnp.abs(cosine(change, clean_features))
            if static.prior_direction == "projection":
                prior += cosine(change, difference @ texts[to_texts.argmax()])
            value += hyper["prior"] * prior
        return value

    return objective


def adversarial_images(
    encoder: DualEncoder, static: Static, images: jax.Array, own: jax.Array, keys: Key, context: Context
) -> jax.Array:
    """Compute the adversarial image of each clean image by PGD, vmapped over the images.

    Args:
      encoder: the dual encoder.
      static: the fields that the program depends on.
      images: float32 [B, H, W, C] in [0, 1].
      own: int32 [B], positions of their pairs in the context.
      keys: [B], draw the initial noise.
      context: the pairs and the encoders.

    Returns:
      float32 [B, H, W, C] in [0, 1], without gradient.
    """
    hyper = context.hyper
    step, bound = hyper["step_size"] / 255, hyper["bound"] / 255

    def one(image: jax.Array, own: jax.Array, key: Key) -> jax.Array:
        noise = hyper["noise"] / 255 * jax.random.normal(key, image.shape)
        start = project(image + noise, image, bound, static.norm)
        objective = pair_objective(encoder, static, image, own, context)
        return adversarial(objective, image, start, static.steps, step, bound, static.norm)

    return jax.lax.stop_gradient(jax.vmap(one)(images, own, keys))


def context_of(
    encoder: DualEncoder, images: jax.Array, texts: jax.Array, visual: Any, constants: Any, axis: str | None
) -> tuple[Context, jax.Array]:
    """Gather the pairs of all devices.

    Args:
      encoder: the dual encoder.
      images: float32 [B, H, W, C], the clean images of this device.
      texts: normalised embeddings of their captions, [B, D].
      visual: parameters of the current image encoder.
      constants: "original" (parameters of the original image encoder), "stats", "scale" and "hyper".
      axis: mapped axis, or None.

    Returns:
      (context, positions of this device's pairs in it, int32 [B]).
    """
    embeddings = normalise(encode(encoder, constants["original"], constants["stats"], images)[0])
    embeddings, gathered = jax.lax.stop_gradient(parallel.all_gather((embeddings, texts), axis))
    first = 0 if axis is None else jax.lax.axis_index(axis) * len(images)
    context = Context(
        gathered, embeddings, constants["original"], visual, constants["stats"], constants["scale"], constants["hyper"]
    )  # fmt: skip
    return context, first + jnp.arange(len(images))


def inverse_ewc(distance: jax.Array, clip: Any, form: str) -> jax.Array:
    """Inverse-EWC loss, which falls as the distance grows up to a threshold.

    Args:
      distance: EWC distance from the original weights, a scalar.
      clip: threshold.
      form: "negated" or "reciprocal".

    Returns:
      The loss, a scalar.
    """
    return -jnp.minimum(clip, distance) if form == "negated" else jnp.minimum(clip, 1 / (distance + 1e-12))


@lru_cache(maxsize=16)
def unlearning_step(encoder: DualEncoder, static: Static) -> Callable:
    """Return one ascent of the images and one step of the image encoder, in the engine's form."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images, texts = to_float(constants["images"][batch["index"]]), constants["texts"][batch["index"]]
        context, own = context_of(encoder, images, texts, state["visual"], constants, axis)
        attacked = adversarial_images(encoder, static, images, own, batch["key"], context)
        loss = partial(_outer_loss, encoder=encoder, static=static, images=images, attacked=attacked, texts=texts,
                       constants=constants, axis=axis)  # fmt: skip
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state["visual"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        update, opt = direction("adam").update(gradient, state["opt"])
        return {"visual": take_step(state["visual"], update, per_step["rate"]), "opt": opt}, metrics

    return step


def _outer_loss(
    visual: Any, encoder: DualEncoder, static: Static, images: Any, attacked: Any, texts: Any, constants: Any,
    axis: str | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """Return the outer loss and its terms."""
    hyper, count = constants["hyper"], len(images)
    embeddings = encode(encoder, visual, constants["stats"], jnp.concatenate([images, attacked]))[0]
    log_scale = jnp.log(constants["scale"])
    metrics = {
        "clean_loss": info_nce(embeddings[:count], texts, log_scale, axis),
        "adversarial_loss": info_nce(embeddings[count:], texts, log_scale, axis),
    }
    loss = metrics["clean_loss"] + metrics["adversarial_loss"]
    if static.constraints_a:
        metrics["ewc"] = ewc_penalty(visual, constants["original"], constants["fisher_clean"])
        loss += hyper["ewc"] * metrics["ewc"]
    if static.constraints_b:
        metrics["inverse_ewc"] = ewc_penalty(visual, constants["original"], constants["fisher_unlearning"])
        loss += hyper["inverse_ewc"] * inverse_ewc(metrics["inverse_ewc"], hyper["clip"], static.inverse)
    return loss, {"loss": loss, **metrics}


def visual_fisher(
    encoder: DualEncoder, visual: Any, stats: Any, images: np.ndarray, texts: Any, scale: Any, size: int, cap: float
) -> Any:
    """Estimate the diagonal Fisher information of the image encoder.

    An example is an image that is classified among the captions of its group of `size` pairs: the mean over examples of
    (∂ log p(own caption | image) / ∂θ)².

    Args:
      encoder: the dual encoder.
      visual: parameters of its image encoder.
      stats: its batch statistics.
      images: stored or float [n, H, W, C]; a last, smaller group is left out.
      texts: normalised embeddings of their captions, [n, D].
      scale: exp(logit_scale).
      size: pairs of a group, whose gradients are held in memory at once.
      cap: upper bound of an entry, applied after scaling.

    Returns:
      A pytree like `visual`, scaled to mean one over all entries, then clipped to at most `cap`.
    """
    total = jax.tree.map(jnp.zeros_like, visual)
    for start in range(0, max(1, len(images) // size) * size, size):
        rows = slice(start, start + size)
        part = _squares(encoder)(visual, stats, to_float(images[rows]), jnp.asarray(texts[rows]), scale)
        total = jax.tree.map(jnp.add, total, part)
    mean = sum(leaf.sum() for leaf in jax.tree.leaves(total)) / sum(leaf.size for leaf in jax.tree.leaves(total))
    return jax.tree.map(lambda leaf: jnp.minimum(leaf / jnp.maximum(mean, 1e-30), cap), total)


@lru_cache(maxsize=8)
def _squares(encoder: DualEncoder) -> Callable:
    """Compile the sum of the squared per-example gradients of a group."""

    def squares(visual: Any, stats: Any, images: jax.Array, texts: jax.Array, scale: Any) -> Any:
        def loss(visual: Any, image: jax.Array, own: jax.Array) -> jax.Array:
            embedding = normalise(encode(encoder, visual, stats, image[None])[0])[0]
            return -jax.nn.log_softmax(scale * embedding @ texts.T)[own]

        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(visual, images, jnp.arange(len(images)))
        return jax.tree.map(lambda g: (g**2).sum(0), gradients)

    return jax.jit(squares)
