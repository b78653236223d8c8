"""The inner step of BI-BAU: the adversarial image of one clean image (:mod:`bdjax.defenses.bibau` has the formulas)."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bdjax.defenses._adversarial import adversarial, project
from bdjax.defenses._cosine import cosine
from bdjax.engine.optimizer import Name
from bdjax.models import head, penultimate
from bdjax.types import Key, Model


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
    noise = hyper["noise"] / 255 * jax.random.normal(key, image.shape)
    step, bound = hyper["step_size"] / 255, hyper["bound"] / 255
    kept, delta = start
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
