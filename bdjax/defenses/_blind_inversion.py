"""The steps of BI-BAU: the adversarial image of one clean image, and a step of θ (:mod:`bdjax.defenses.bibau`)."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bdjax.defenses._adversarial import adversarial, project
from bdjax.defenses._cosine import cosine
from bdjax.defenses._distillation import distance, mixtures, targets
from bdjax.defenses._fisher import ewc_penalty
from bdjax.engine import parallel
from bdjax.engine.optimizer import Name, direction, take_step
from bdjax.models import head, penultimate
from bdjax.types import Key, Model, to_float


class Static(NamedTuple):
    """The Config fields that the compiled program depends on."""

    variant: str
    target: int
    constraints_a: bool
    constraints_b: bool
    steps: int
    norm: str
    inverse: str
    optimizer: Name
    batch_norm: str
    distils: bool


def adversarial_objective(
    model: Model, static: Static, current: Any, original: Any, image: Any, label: Any, hyper: Any
) -> Callable:
    """Return the objective L_adv of one image (Eq. 22), a function of the adversarial image [H, W, C].

    Args:
      model: the classifier.
      static: the fields that the program depends on.
      current: θ, {"params", "stats"}.
      original: θ_b, {"params", "stats"}.
      image: float32 [H, W, C] in [0, 1], the clean image.
      label: its label, int32 scalar.
      hyper: hyper-parameters.

    Returns:
      `objective(adversarial image) -> scalar`, to be maximised.
    """

    def evaluate(weights: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, features, _ = model.apply({"params": weights["params"], "batch_stats": weights["stats"]}, images[None])
        return logits[0], penultimate(features)[0]

    teacher, clean_features = evaluate(original, image)[0], evaluate(current, image)[1]
    head_difference = head(original["params"]) - head(current["params"])

    def objective(candidate: jax.Array) -> jax.Array:
        original_logits = evaluate(original, candidate)[0]
        row = jnp.int32(static.target) if static.variant == "targeted" else original_logits.argmax()
        if static.variant == "targeted":
            value = jax.nn.log_softmax(original_logits)[row]
        else:
            value = -jax.nn.log_softmax(original_logits)[label]
        if not (static.constraints_a or static.constraints_b):
            return value
        student, features = evaluate(current, candidate)
        if static.constraints_a:
            soft = jax.nn.softmax(teacher / hyper["temperature"])
            log_soft = jax.nn.log_softmax(student / hyper["temperature"])
            divergence = optax.losses.kl_divergence(log_soft, soft) * hyper["temperature"] ** 2
            entropy = -jax.nn.log_softmax(student)[label]
            value -= hyper["likelihood"] * (hyper["mixing"] * divergence + (1 - hyper["mixing"]) * entropy)
        if static.constraints_b:
            change = features - clean_features
            alignment = cosine(change, head_difference[:, row])
            value += hyper["prior"] * (alignment - hyper["angle"] * jnp.abs(cosine(change, clean_features)))
        return value

    return objective


def adversarial_image(
    model: Model, static: Static, current: Any, original: Any, image: Any, label: Any, key: Key, start: Any, hyper: Any
) -> Any:
    """Compute the adversarial image of one clean image.

    Args:
      model: the classifier.
      static: the fields that the program depends on.
      current: θ, {"params", "stats"}.
      original: θ_b, {"params", "stats"}.
      image: float32 [H, W, C] in [0, 1].
      label: its label, int32 scalar.
      key: draws the initial noise.
      start: (k, δ), float32 [H, W, 1] and [H, W, C]. The ascent stays in the ball around clip(k image + δ, 0, 1).
      hyper: hyper-parameters.

    Returns:
      float32 [H, W, C] in [0, 1], without gradient.
    """
    objective = adversarial_objective(model, static, current, original, image, label, hyper)
    kept_fraction, delta = start
    has_trigger = jnp.any(kept_fraction != 1) | jnp.any(delta != 0)
    scale = jnp.where(has_trigger, hyper["step_at_triggers"], 1.0) / 255
    noise = scale * hyper["noise"] * jax.random.normal(key, image.shape)
    step, bound = scale * hyper["step_size"], hyper["bound"] / 255
    center = jnp.clip(image * kept_fraction + delta, 0, 1)
    initial = project(center + noise, center, bound, static.norm)
    return jax.lax.stop_gradient(adversarial(objective, center, initial, static.steps, step, bound, static.norm))


@lru_cache(maxsize=32)
def compiled_ascent(model: Model, static: Static) -> Callable:
    """Compile (current, original, images, labels, keys, starts, hyper) -> adversarial images, float32 [B, H, W, C]."""
    return jax.jit(_batched_ascent(model, static))


def _batched_ascent(model: Model, static: Static) -> Callable:
    """Return :func:`adversarial_image` for a batch of images, labels, keys and starts."""
    return jax.vmap(partial(adversarial_image, model, static), (None, None, 0, 0, 0, 0, None))


def select_starts(starts: tuple[jax.Array, jax.Array], positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the starts (k, δ) at the given positions."""
    return starts[0][positions], starts[1][positions]


def inverse_ewc(ewc_distance: jax.Array, clip: Any, form: str) -> jax.Array:
    """Inverse-EWC loss (Eq. 24): it decreases as the EWC distance on the unlearning set grows, up to a threshold.

    Args:
      ewc_distance: EWC distance from θ_b, a scalar.
      clip: clipping threshold c.
      form: "negated" or "reciprocal".

    Returns:
      The loss, a scalar.
    """
    if form == "negated":
        return -jnp.minimum(clip, ewc_distance)
    return jnp.minimum(clip, 1 / (ewc_distance + 1e-12))


class _Inputs(NamedTuple):
    """The inputs of the outer loss besides θ, for a batch of B images."""

    images: jax.Array
    """float32 [B, H, W, C] in [0, 1]."""
    labels: jax.Array
    """int32 [B]."""
    adversarial_images: jax.Array
    """float32 [B, H, W, C] in [0, 1]."""
    weights: jax.Array
    """float32 [B], weights of the adversarial images."""
    mixed_images: Any
    """float32 [B, H, W, C], mixtures for the distillation; None without it."""
    soft_labels: Any
    """float32 [B, classes], predictions of θ_b on the mixtures; None without distillation."""
    stats: Any
    """BatchNorm statistics of θ."""
    constants: Any
    axis: str | None


@lru_cache(maxsize=32)
def unlearning_step(model: Model, static: Static) -> Callable:
    """Return one ascent of the images and one step of θ, in the engine's form."""
    ascend = _batched_ascent(model, static)

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        hyper, original = constants["hyper"], constants["original"]
        images, labels = to_float(constants["images"][batch["index"]]), constants["labels"][batch["index"]]
        current = {"params": state["params"], "stats": state["stats"]}
        starts = select_starts(constants["starts"], batch["which"])
        adversarial_images = ascend(current, original, images, labels, batch["start"], starts, hyper)
        weights, mixed_images, soft_labels = jnp.ones(len(labels)), None, None
        if static.variant == "targeted":
            weights = (labels != static.target).astype(jnp.float32)
        if static.distils:
            mixed_images = mixtures(images, to_float(constants["images"][batch["other"]]), batch["start"])
            teacher = {"params": original["params"], "batch_stats": original["stats"]}
            soft_labels = targets(model, teacher, mixed_images)
        inputs = _Inputs(
            images, labels, adversarial_images, weights, mixed_images, soft_labels, state["stats"], constants, axis
        )
        loss = partial(_outer_loss, model=model, static=static, inputs=inputs)
        (_, (metrics, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        update, opt = direction(static.optimizer, 0.9).update(gradient, state["opt"])
        params = take_step(state["params"], update, per_step["rate"])
        mean = jax.tree.map(lambda m, p: p + hyper["averaging"] * (m - p), state["mean"], params)
        return {"params": params, "stats": stats, "opt": opt, "mean": mean}, metrics

    return step


def _outer_loss(params: Any, model: Model, static: Static, inputs: _Inputs) -> tuple[jax.Array, Any]:
    """Return the outer loss (Eq. 23-27), its terms and the new BatchNorm statistics."""
    hyper, original, fisher = (inputs.constants[name] for name in ("hyper", "original", "fisher"))
    train = static.batch_norm != "frozen"
    apply = partial(model.apply, {"params": params, "batch_stats": inputs.stats})
    clean_loss, adversarial_loss, stats = _cross_entropies(apply, static, inputs)
    metrics, loss = {"clean_loss": clean_loss, "adversarial_loss": adversarial_loss}, clean_loss + adversarial_loss
    if static.distils:
        metrics["distillation"] = distance(apply(inputs.mixed_images, train, None, inputs.axis)[0], inputs.soft_labels)
        loss = (1 - hyper["distillation"]) * loss / 2 + hyper["distillation"] * metrics["distillation"]
    if static.constraints_a:
        metrics["ewc"] = ewc_penalty(params, original["params"], fisher["clean"]) * fisher["scale"][0]
        loss += hyper["ewc"] * metrics["ewc"]
    if static.constraints_b:
        metrics["inverse_ewc"] = ewc_penalty(params, original["params"], fisher["unlearning"]) * fisher["scale"][1]
        loss += hyper["inverse_ewc"] * inverse_ewc(metrics["inverse_ewc"], hyper["clip"], static.inverse)
    return loss, ({"loss": loss, **metrics}, stats)


def _cross_entropies(apply: Callable, static: Static, inputs: _Inputs) -> tuple[jax.Array, jax.Array, Any]:
    """Return the mean cross-entropy of the clean and of the adversarial images, and the new BatchNorm statistics."""
    images, labels, adversarial_images, weights = inputs[:4]
    train = static.batch_norm != "frozen"
    if static.batch_norm in ("separate", "both"):
        clean_logits, _, stats = apply(images, train, None, inputs.axis)
        passes = [apply(adversarial_images, train, None, inputs.axis)[0]]
        if static.batch_norm == "both":
            passes.append(apply(adversarial_images, False, None, inputs.axis)[0])
    else:
        logits, _, stats = apply(jnp.concatenate([images, adversarial_images]), train, None, inputs.axis)
        clean_logits, passes = logits[: len(labels)], [logits[len(labels) :]]
    entropy = optax.softmax_cross_entropy_with_integer_labels
    adversarial_losses = jnp.stack([entropy(logits, labels) for logits in passes]).mean(0)
    clean_loss = entropy(clean_logits, labels).mean()
    return clean_loss, (adversarial_losses * weights).sum() / jnp.maximum(weights.sum(), 1), stats
