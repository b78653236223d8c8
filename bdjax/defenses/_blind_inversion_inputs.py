"""Inputs of the steps of BI-BAU: initial points of the ascents, Fishers and batches (:mod:`bdjax.defenses.bibau`)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._blind_inversion import Static, compiled_ascent, select_starts
from bdjax.defenses._fisher import ewc_penalty, fisher
from bdjax.defenses._pool import draw_batches
from bdjax.defenses._targeted_search import TARGET_CLASS_SHARE, TargetedSearch
from bdjax.types import DefenderView, Key, Model, Victim, to_float


def initial_points(model: Model, search: TargetedSearch | None) -> tuple[jax.Array, jax.Array]:
    """Return the affine maps (k, δ) of the images at which ascents start.

    Args:
      model: the classifier.
      search: the triggers to suspicious classes; None without a search.

    Returns:
      k, float32 [K, H, W, 1], and δ, float32 [K, H, W, C]: first the identity, then one map per trigger.
    """
    kept_fractions, deltas = jnp.ones((1, *model.shape[:2], 1)), jnp.zeros((1, *model.shape))
    if search is None:
        return kept_fractions, deltas
    trigger_maps = search.triggers(1.2)
    return jnp.concatenate([kept_fractions, trigger_maps[0]]), jnp.concatenate([deltas, trigger_maps[1]])


def fishers(
    config: Any, static: Static, victim: Victim, view: DefenderView, constants: Any, batch_size: int, key: Key
) -> dict[str, Any]:
    """Compute the Fishers of both EWC terms, and the scales of the EWC distances.

    Args:
      config: the Config of BI-BAU.
      static: the fields that the program depends on.
      victim: the given model.
      view: clean images (stored [n, H, W, C]) and labels [n].
      constants: "original", "starts" and "hyper", as for the unlearning step.
      batch_size: images of one ascent.
      key: draws the initial noise of the ascents.

    Returns:
      "clean" and "unlearning", pytrees like the parameters, zero when their constraint set is not used; "scale",
      float32 [2]: 1 over the EWC distances between θ_b and zero, or 1 in the paper's procedure.
    """
    original = constants["original"]
    zeros = jax.tree.map(jnp.zeros_like, original["params"])
    result: dict[str, Any] = {"clean": zeros, "unlearning": zeros, "scale": jnp.ones(2)}
    fisher_options = (config.fisher_batch, config.fisher_cap)
    if config.constraints_a:
        result["clean"] = fisher(victim.model, victim.variables, view.images, view.labels, *fisher_options)
    if config.constraints_b:
        ascend = compiled_ascent(victim.model, static)
        starts = select_starts(constants["starts"], jnp.arange(batch_size) % len(constants["starts"][0]))
        batches = [
            np.asarray(ascend(original, original, images, labels, keys, starts, constants["hyper"]))
            for images, labels, keys in _padded_batches(view, batch_size, key)
        ]
        images = np.concatenate(batches)[: len(view.labels)]
        result["unlearning"] = fisher(victim.model, victim.variables, images, view.labels, *fisher_options)
    if config.procedure == "robust":
        distances = [ewc_penalty(zeros, original["params"], result[name]) for name in ("clean", "unlearning")]
        result["scale"] = 1 / jnp.maximum(jnp.stack(distances), 1e-12)
    return result


def epoch_batches(
    total: int, batch_size: int, steps: int, search: TargetedSearch | None, key: Key
) -> dict[str, jax.Array]:
    """Draw the batches of one epoch. With a search, a share of each batch belongs to the suspicious classes.

    Args:
      total: number of images.
      batch_size: images per step.
      steps: number of steps.
      search: the triggers to suspicious classes; None without a search.
      key: random key.

    Returns:
      Arrays [steps, batch size]: "index" (positions of the images), "start" (random keys), "which" (initial point of
      each ascent; 0: the image itself) and "other" (positions of the images to mix in).
    """
    index = draw_batches(jax.random.fold_in(key, 0), total, batch_size, steps)
    start_count = 1
    if search is not None:
        start_count, target_count = 1 + search.trigger_count, round(TARGET_CLASS_SHARE * batch_size)
        target_images = search.draw_target_images(jax.random.fold_in(key, 3), (steps, target_count))
        if target_images is not None:
            index = jnp.concatenate([index[:, target_count:], target_images], 1)
    return {
        "index": jnp.asarray(index),
        "start": jax.random.split(jax.random.fold_in(key, 1), (steps, batch_size)),
        "which": jnp.broadcast_to(jnp.arange(batch_size) % start_count, index.shape),
        "other": jax.random.randint(jax.random.fold_in(key, 4), (steps, batch_size), 0, total),
    }


def _padded_batches(view: DefenderView, batch_size: int, key: Key) -> list[tuple[jax.Array, jax.Array, Key]]:
    """Split all images into batches of one size, the last padded with its last image, with one key per image."""
    keys, total = jax.random.split(key, len(view.labels)), len(view.labels)
    positions = [np.minimum(np.arange(start, start + batch_size), total - 1) for start in range(0, total, batch_size)]
    return [(to_float(view.images[rows]), jnp.asarray(view.labels[rows]), keys[rows]) for rows in positions]
