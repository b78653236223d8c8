"""Helpers of the tests of the tuning defenses: a small victim, views, and a callback that records scalars."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import perceptron

from bdjax.types import Callback, DefenderView, Victim

KEY, MODEL = jax.random.key(0), perceptron()
VICTIM = Victim(MODEL, MODEL.init(jax.random.key(3)))


def view_of(blobs, count=40, callback=None):
    return DefenderView(blobs[0][:count], blobs[1][:count], callback or Callback())


def cross_entropy(logits, labels):
    return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()


class Seen(Callback):
    def __init__(self):
        self.rows = []

    def on_round_end(self, step, variables, **arrays):
        self.rows.append({name: float(value) for name, value in arrays.items() if np.ndim(value) == 0})
