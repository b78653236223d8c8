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
from bdjax.engine.optimizer import Name, direction
from bdjax.models import head, penultimate
from bdjax.types import Key, Model, to_float


class Static(NamedTuple):
    """What of a Config changes the compiled program."""

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


def objective_of(model: Model, static: Static, now: Any, original: Any, image: Any, label: Any, hyper: Any) -> Callable:
    """L_adv of one image [H, W, C] (Eq. 22); `now` and `original` are {"params", "stats"}."""

    def of(weights: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, features, _ = model.apply({"params": weights["params"], "batch_stats": weights["stats"]}, images[None])
        return logits[0], penultimate(features)[0]

    teacher, clean = of(original, image)[0], of(now, image)[1]
    difference = head(original["params"]) - head(now["params"])

    def objective(moved: jax.Array) -> jax.Array:
        seen = of(original, moved)[0]
        row = jnp.int32(static.target) if static.variant == "targeted" else seen.argmax()
        value = jax.nn.log_softmax(seen)[row] if static.variant == "targeted" else -jax.nn.log_softmax(seen)[label]
        if not (static.constraints_a or static.constraints_b):
            return value
        student, features = of(now, moved)
        if static.constraints_a:
            soft = jax.nn.softmax(teacher / hyper["temperature"])
            log_soft = jax.nn.log_softmax(student / hyper["temperature"])
            distance = optax.losses.kl_divergence(log_soft, soft) * hyper["temperature"] ** 2
            entropy = -jax.nn.log_softmax(student)[label]
            value -= hyper["likelihood"] * (hyper["mixing"] * distance + (1 - hyper["mixing"]) * entropy)
        if static.constraints_b:
            change = features - clean
            aligned = cosine(change, difference[:, row]) - hyper["angle"] * jnp.abs(cosine(change, clean))
            value += hyper["prior"] * aligned
        return value

    return objective


def one(
    model: Model, static: Static, now: Any, original: Any, image: Any, label: Any, key: Key, start: Any, hyper: Any
) -> Any:
    """The adversarial image of one image, float32 [H, W, C] in [0, 1].

    start: (k, δ), float32 [H, W, 1] and [H, W, C]; the ascent stays in the ball around k image + δ.
    """
    objective = objective_of(model, static, now, original, image, label, hyper)
    kept, delta = start
    triggered = jnp.any(kept != 1) | jnp.any(delta != 0)
    share = jnp.where(triggered, hyper["step_at_triggers"], 1.0) / 255
    noise = share * hyper["noise"] * jax.random.normal(key, image.shape)
    step, bound = share * hyper["step_size"], hyper["bound"] / 255
    center = jnp.clip(image * kept + delta, 0, 1)
    begin = project(center + noise, center, bound, static.norm)
    return jax.lax.stop_gradient(adversarial(objective, center, begin, static.steps, step, bound, static.norm))


@lru_cache(maxsize=32)
def ascender(model: Model, static: Static) -> Callable:
    """(now, original, images, labels, keys, starts, hyper) -> adversarial images, all float32 [B, H, W, C]."""
    return jax.jit(jax.vmap(partial(one, model, static), (None, None, 0, 0, 0, 0, None)))


def taken(starts: tuple[jax.Array, jax.Array], which: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Those at the positions `which`."""
    return starts[0][which], starts[1][which]


def inverse_ewc(distance: jax.Array, clip: Any, form: str) -> jax.Array:
    """What the descent adds for an EWC distance on the unlearning set: it falls with it until clipped (Eq. 24)."""
    if form == "negated":
        return -jnp.minimum(clip, distance)
    return jnp.minimum(clip, 1 / (distance + 1e-12))


@lru_cache(maxsize=32)
def outer(model: Model, static: Static) -> Callable:
    """One ascent and one step of θ, in the engine's form."""

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        hyper, original = shared["hyper"], shared["original"]
        images, labels = to_float(shared["images"][split["index"]]), shared["labels"][split["index"]]
        now = {"params": state["params"], "stats": state["stats"]}
        ascend = jax.vmap(partial(one, model, static), (None, None, 0, 0, 0, 0, None))
        moved = ascend(now, original, images, labels, split["start"], taken(shared["starts"], split["which"]), hyper)
        weight = jnp.ones(len(labels))
        if static.variant == "targeted":
            weight = (labels != static.target).astype(jnp.float32)
        train = static.batch_norm != "frozen"
        if static.distils:
            mixed = mixtures(images, to_float(shared["images"][split["other"]]), split["start"])
            wanted = targets(model, {"params": original["params"], "batch_stats": original["stats"]}, mixed)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            of = partial(model.apply, {"params": params, "batch_stats": state["stats"]})
            if static.batch_norm == "separate":
                logits, _, stats = of(images, train, None, axis)
                logits = jnp.concatenate([logits, of(moved, train, None, axis)[0]])
            else:
                logits, _, stats = of(jnp.concatenate([images, moved]), train, None, axis)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.concatenate([labels, labels]))
            clean = each[: len(labels)].mean()
            moved_ = (each[len(labels) :] * weight).sum() / jnp.maximum(weight.sum(), 1)
            found, value = {"clean_loss": clean, "adversarial_loss": moved_}, clean + moved_
            if static.distils:
                found["distillation"] = distance(of(mixed, train, None, axis)[0], wanted)
                value = (1 - hyper["distillation"]) * value / 2 + hyper["distillation"] * found["distillation"]
            if static.constraints_a:
                found["ewc"] = (
                    ewc_penalty(params, original["params"], shared["fisher"]["clean"]) * shared["fisher"]["scale"][0]
                )
                value += hyper["ewc"] * found["ewc"]
            if static.constraints_b:
                moved_by = ewc_penalty(params, original["params"], shared["fisher"]["unlearning"])
                found["inverse_ewc"] = moved_by * shared["fisher"]["scale"][1]
                value += hyper["inverse_ewc"] * inverse_ewc(found["inverse_ewc"], hyper["clip"], static.inverse)
            return value, ({"loss": value, **found}, stats)

        (_, (metrics, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        gradient, metrics = parallel.average((gradient, metrics), axis)
        update, opt = direction(static.optimizer, 0.9).update(gradient, state["opt"])
        params = jax.tree.map(lambda p, u: p - whole["rate"] * u, state["params"], update)
        mean = jax.tree.map(lambda m, p: p + hyper["averaging"] * (m - p), state["mean"], params)
        return {"params": params, "stats": stats, "opt": opt, "mean": mean}, metrics

    return step
