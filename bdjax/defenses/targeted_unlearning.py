"""Targeted unlearning: unlearn the smallest universal perturbations of suspicious classes, distil everything else.

Threat model: the defender has the model and clean labelled images, no trigger and no target class.

1. For each class c, search the smallest universal perturbation δ_c that sends images of other classes there
   (:mod:`bdjax.defenses._smallest`); r_c is its L2 radius. A class is suspicious if r_c < threshold · median r; where
   none is, the class of the smallest radius is taken, so that a backdoor that is missed is weakened all the same.
2. In rounds, train θ from the victim θ₀, BatchNorm's statistics frozen, on

       (1 − λ) CE(f_θ(x + δ), y) + λ CE(f_θ(z), softmax f_θ₀(z)),

   where a share of the batch x carries perturbations and z are mixtures of augmented clean images, on which the victim
   is right to be followed, since they carry no trigger. After each round the perturbations, several for each
   suspicious class from different starts, are searched anew in the present model.
3. Stop when their radii have been no smaller than the median for `patience` rounds. Of the defender's images a share
   is kept apart to measure accuracy on; where it falls by more than `largest_drop`, the last round before is returned.

This is the minimax form of I-BAU (Zeng et al., ICLR 2022, arXiv:2110.03735) with the inner maximum restricted to small
targeted perturbations from several starts, in the direct term alone; the suspicion is Neural Cleanse's (Wang et al.,
IEEE S&P 2019), with perturbations in place of masks; the second term is distillation (Hinton et al., 2015,
arXiv:1503.02531) on mixtures (Zhang et al., ICLR 2018, arXiv:1710.09412). The combination and all constants are ours,
chosen on five victims by the ASR of triggered training images (experiments/foreign/README.md).

Limits: an all-to-all backdoor has no class that all other images are sent to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import augment
from bdjax.defenses._batch import batch_of
from bdjax.defenses._pool import batches
from bdjax.defenses._smallest import Perturbations, largest, none, norms, search
from bdjax.engine import parallel, predict, run_epoch
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError, check_fields
from bdjax.types import DefenderView, Key, Model, Scores, Variables, Victim, to_float


@dataclass(frozen=True)
class Config:
    """The search for perturbations, the rounds of unlearning, and when to stop."""

    rounds: int = 12
    """Rounds at most."""
    steps: int = 10
    """Steps of θ a round."""
    batch_size: int = 64
    """Images a step, and as many mixtures; fewer where there are fewer images."""
    learning_rate: float = 3e-4
    """Of Adam on θ."""
    patched_fraction: float = 0.4
    """Share of a batch that carries a perturbation, in (0, 1]."""
    enlarged: float = 1.2
    """A perturbation is unlearned at so many times its radius, but at no more than the median radius of all classes."""
    distillation: float = 0.8
    """λ, in [0, 1]."""
    starts: int = 4
    """Perturbations that are unlearned together, shared by the suspicious classes."""
    search_steps: int = 30
    """Steps of the search over all classes."""
    search_batch: int = 16
    """Images a step of that search."""
    refresh_steps: int = 10
    """Steps by which the perturbations are searched anew after each round, each on 1.5 search batches."""
    largest_radius: float = 0.1
    """No perturbation has a larger L2 norm than one of this value in every pixel and channel, in (0, 1]."""
    threshold: float = 0.7
    """A class whose radius is below this share of the median is suspicious, in (0, 1)."""
    patience: int = 5
    """Rounds in a row in which no small perturbation may be left."""
    validation: float = 0.2
    """Share of the defender's images that accuracy is measured on and nothing is learnt from, in (0, 1)."""
    largest_drop: float = 0.1
    """Loss of accuracy on them, as a fraction, beyond which an earlier round is returned."""

    def __post_init__(self) -> None:
        counts = (
            "rounds", "steps", "batch_size", "starts", "search_steps", "search_batch", "refresh_steps", "patience",
        )  # fmt: skip
        check_fields(
            self,
            "defense",
            (counts, "at least 1", lambda v: v >= 1),
            (("learning_rate",), "positive", lambda v: v > 0),
            (("enlarged",), "at least 1", lambda v: v >= 1),
            (("patched_fraction", "largest_radius"), "in (0, 1]", lambda v: 0 < v <= 1),
            (("threshold", "validation"), "in (0, 1)", lambda v: 0 < v < 1),
            (("distillation", "largest_drop"), "in [0, 1]", lambda v: 0 <= v <= 1),
        )


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Whether a class is reached by a perturbation far smaller than the others'.

    Args: view: clean images (stored [n, H, W, C]) and labels [n]; key: draws batches.
    Returns: per class the median radius over its own; the model is called poisoned above 1 / threshold. The watch is
      shown the perturbations of the three most suspicious classes.
    """
    perturbations = _of_all_classes(config, victim, view, key)
    nearest = np.argsort(perturbations.radii, kind="stable")[:3]
    view.watch.observe(
        0,
        victim.variables,
        perturbation=perturbations.deltas[nearest],
        perturbation_labels=perturbations.goals[nearest],
    )
    return _scores(config, perturbations)


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Unlearn what sends all images to a suspicious class.

    Args:
      config: the procedure; victim: the model; view: clean images (stored [n, H, W, C]) and labels [n].
      key: splits the images, draws batches, starts and mixtures.

    Returns: the variables of the last round, or of an earlier one where accuracy fell too far (the watch is told which,
      as `rolled_back_to`, 0 for the victim itself). After each round the watch is shown the variables, the
      perturbations, `radius` (the smallest, over the median of all classes before) and `validation_accuracy`.
    """
    model, cap = victim.model, largest(victim.model, config.largest_radius)
    learning, validation = view.split(1 - config.validation, jax.random.fold_in(key, 0))
    perturbations = _of_all_classes(config, victim, learning, jax.random.fold_in(key, 1))
    view.watch.judge(_scores(config, perturbations))
    median = float(np.median(perturbations.radii))
    refresh = partial(
        search, model, images=learning.images, labels=learning.labels, steps=config.refresh_steps,
        batch_size=config.search_batch * 3 // 2, cap=cap,
    )  # fmt: skip
    present = _starts(config, model, perturbations, jax.random.fold_in(key, 2))
    present = refresh(victim.variables, start=present, key=jax.random.fold_in(key, 3), steps=2 * config.refresh_steps)

    def accuracy(variables: Variables) -> float:
        return float(np.mean(np.asarray(predict(model, variables, validation.images)) == validation.labels))

    lowest = accuracy(victim.variables) - config.largest_drop
    state = {"params": jax.tree.map(jnp.copy, victim.variables["params"])}
    state["opt"] = direction("adam").init(state["params"])
    shared: dict[str, Any] = {
        "images": jnp.asarray(learning.images), "labels": jnp.asarray(learning.labels),
        "victim": dict(victim.variables),
        "rate": jnp.float32(config.learning_rate),
        "distillation": jnp.float32(config.distillation),
    }  # fmt: skip
    kept, kept_round, quiet, round_ = victim.variables, 0, 0, 0
    while round_ < config.rounds and quiet < config.patience:
        round_key = jax.random.fold_in(jax.random.fold_in(key, 4), round_)
        length = norms(present.deltas)
        unlearned = present.deltas * jnp.minimum(config.enlarged, median / length)
        shared["deltas"] = jnp.concatenate([jnp.zeros((1, *model.shape)), unlearned])
        tick = partial(view.watch.tick, f"unlearning round {round_ + 1} of at most {config.rounds}")
        split = _batches(config, len(learning.labels), round_key)
        state, metrics = run_epoch(_step(model), state, split, {}, shared, tick=tick)
        check_finite(
            metrics["loss"], config.learning_rate, round_ * config.steps, "unlearning loss", "defense.learning_rate"
        )
        round_ += 1
        variables = {**victim.variables, "params": jax.tree.map(jnp.copy, state["params"])}
        again = present._replace(radii=np.minimum(1.4 * present.radii, cap).astype(np.float32))
        present = refresh(variables, start=again, key=jax.random.fold_in(round_key, 9))
        smallest, right = float(present.radii.min()) / median, accuracy(variables)
        quiet = quiet + 1 if smallest >= 1 or present.radii.min() >= cap else 0
        if right >= lowest:
            kept, kept_round = variables, round_
        view.watch.observe(
            round_, variables, perturbation=present.deltas, radius=jnp.float32(smallest),
            validation_accuracy=jnp.float32(right),
        )  # fmt: skip
    if kept_round < round_:
        view.watch.observe(round_ + 1, kept, rolled_back_to=jnp.int32(kept_round))
    return kept


def _of_all_classes(config: Config, victim: Victim, view: DefenderView, key: Key) -> Perturbations:
    if len(view.labels) < 2:
        raise InputError(
            f"targeted_unlearning got {len(view.labels)} clean images to learn from; it needs two at the least, and "
            "some hundred are better. Use a larger --split.size, or a smaller --defense.validation."
        )
    cap = largest(victim.model, config.largest_radius)
    return search(
        victim.model, victim.variables, view.images, view.labels, none(victim.model, cap), config.search_steps,
        config.search_batch, cap, key, partial(view.watch.tick, "smallest perturbation of every class"),
    )  # fmt: skip


def _scores(config: Config, perturbations: Perturbations) -> Scores:
    classes = (np.median(perturbations.radii) / perturbations.radii).astype(np.float32)
    target = int(classes.argmax())
    return Scores(classes, target, float(classes[target]), bool(classes[target] > 1 / config.threshold))


def _starts(config: Config, model: Model, perturbations: Perturbations, key: Key) -> Perturbations:
    """`starts` perturbations of the suspicious classes: each class's own first, the others from random directions."""
    order = np.argsort(perturbations.radii, kind="stable")
    suspicious = order[perturbations.radii[order] < config.threshold * np.median(perturbations.radii)][: config.starts]
    classes = np.resize(suspicious if len(suspicious) else order[:1], config.starts)
    noise = jax.random.normal(key, (config.starts, *model.shape))
    radii = perturbations.radii[classes]
    noise = noise / norms(noise) * (0.3 * radii)[:, None, None, None]
    first = np.arange(config.starts) < max(1, len(suspicious))
    deltas = jnp.where(jnp.asarray(first)[:, None, None, None], perturbations.deltas[classes], noise)
    return Perturbations(classes.astype(np.int32), deltas, radii)


def _batches(config: Config, total: int, key: Key) -> dict[str, jax.Array]:
    """Of one round, each [steps, batch]: images, which perturbation each carries (0: none), and what is mixed."""
    size = batch_of(config.batch_size, total)
    carried = max(1, round(config.patched_fraction * size))
    row = np.where(np.arange(size) < carried, 1 + np.arange(size) % config.starts, 0)
    which = jnp.broadcast_to(jnp.asarray(row, jnp.int32), (config.steps, size))
    return {
        "index": jnp.asarray(batches(jax.random.fold_in(key, 0), total, size, config.steps)),
        "which": jax.random.permutation(jax.random.fold_in(key, 1), which, axis=1, independent=True),
        "other": jax.random.randint(jax.random.fold_in(key, 2), (config.steps, size), 0, total),
        "key": jax.random.split(jax.random.fold_in(key, 3), (config.steps, size)),
    }


@lru_cache(maxsize=16)
def _step(model: Model) -> Callable:
    """One step of θ, in the engine's form."""

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images, labels = to_float(shared["images"][split["index"]]), shared["labels"][split["index"]]
        delta = shared["deltas"][split["which"]]
        stamped = jnp.where((split["which"] > 0)[:, None, None, None], jnp.clip(images + delta, 0, 1), images)
        shifted = augment.policy("crop_flip")(to_float(shared["images"][split["other"]]), split["key"])
        weight = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 2)))(split["key"])
        mixed = images + weight[:, None, None, None] * (shifted - images)
        wanted = jax.nn.softmax(model.logits(shared["victim"], mixed))

        def loss(params: Any) -> jax.Array:
            variables = {**shared["victim"], "params": params}
            logits = model.logits(variables, jnp.concatenate([stamped, mixed]))
            hard = optax.softmax_cross_entropy_with_integer_labels(logits[: len(images)], labels).mean()
            soft = optax.softmax_cross_entropy(logits[len(images) :], wanted).mean()
            return (1 - shared["distillation"]) * hard + shared["distillation"] * soft

        value, gradient = parallel.average(jax.value_and_grad(loss)(state["params"]), axis)
        update, opt = direction("adam").update(gradient, state["opt"])
        params = jax.tree.map(lambda p, u: p - shared["rate"] * u, state["params"], update)
        return {"params": params, "opt": opt}, {"loss": value}

    return step
