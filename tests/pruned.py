"""What the tests of pruning share: a small victim whose parameters all differ, and a callback that records."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import normalised

from bdjax.types import Callback, Victim

KEY, MODEL = jax.random.key(0), normalised()


class Seen(Callback):
    def __init__(self):
        self.rounds, self.ticks = [], []

    def on_progress(self, stage, done, total):
        self.ticks.append((stage, done, total))

    def on_round_end(self, step, variables, **arrays):
        self.rounds.append((step, jax.tree.map(np.array, variables), {k: np.asarray(v) for k, v in arrays.items()}))


def victim_of(blobs):
    """Its statistics are of no batch, and its scales and biases all differ."""
    rng, variables = np.random.default_rng(1), MODEL.init(KEY)
    params = {**variables["params"], "norm": {"scale": jnp.asarray(rng.uniform(0.5, 1.5, 6), jnp.float32),
                                              "bias": jnp.asarray(rng.normal(0, 0.3, 6), jnp.float32)}}  # fmt: skip
    stats = {"norm": {"mean": jnp.asarray(rng.normal(0, 0.1, 6), jnp.float32),
                      "var": jnp.asarray(rng.uniform(0.05, 0.2, 6), jnp.float32)}}  # fmt: skip
    images = jnp.asarray(blobs[0], jnp.float32) / 255
    features = MODEL.apply({"params": params, "batch_stats": stats}, images)[1]["flat"]
    kernel = 20 * params["head"]["kernel"]
    params["head"] = {"kernel": kernel, "bias": -(features @ kernel).mean(0)}  # so that it tells images apart
    return Victim(MODEL, {"params": params, "batch_stats": stats})
