"""A toy that audits are tried on: five classes, each looking at three pixels of its own; one may have a back door."""

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.types import Callback, DefenderView, Model, Victim

SHAPE = (4, 4, 1)


def _apply(variables, images, train=False, keys=None, axis_name=None):
    """Class 1 has a back door: the top left pixel. The others ask for the mean of a quarter of the image."""
    flat = images.reshape(len(images), -1)
    logits = flat @ variables["params"]["head"]["kernel"]
    return logits, {"flat": flat}, variables["batch_stats"]


def victim(planted):
    rows = np.zeros((16, 5), np.float32)
    for label in range(5):
        rows[3 * label + 1 : 3 * label + 4, label] = 4.0
    if planted:
        rows[0, 1] = 60.0
    variables = {"params": {"head": {"kernel": jnp.asarray(rows)}}, "batch_stats": {}}
    return Victim(Model("quarters", SHAPE, 5, None, _apply), variables)


class Seen(Callback):
    def __init__(self):
        self.arrays = {}

    def on_round_end(self, step, variables, **arrays):
        self.arrays.update(arrays)


def clean_images():
    """80 images, each bright where its class looks, and the watch that they are shown with."""
    rng = np.random.default_rng(0)
    labels = np.arange(80, dtype=np.int32) % 5
    images = rng.integers(0, 60, (80, 16)).astype(np.uint8)
    for i, label in enumerate(labels):
        images[i, 3 * label + 1 : 3 * label + 4] = 230
    images[:, 0] = 0
    return DefenderView(images.reshape(80, *SHAPE), labels, Seen())


def rolled():
    """A model with an all-to-all back door and clean images: the first pixel moves every label on by one.

    No class is near to all images, but all images are near to another class.
    """
    weights = np.zeros((16, 4), np.float32)
    weights[4:8, 0] = weights[8:12, 1] = weights[12:16, 2] = 1.0
    labels = np.arange(60, dtype=np.int32) % 3
    images = np.full((60, 16), 0.1, np.float32)
    for row, label in zip(images, labels, strict=True):
        row[4 * label + 4 : 4 * label + 8] = 0.9

    def apply(variables, images, train=False, keys=None, axis_name=None):
        flat = images.reshape(len(images), -1)
        logits = 10 * flat @ variables["params"]["weights"]
        moved = jnp.roll(logits[:, :3], 1, axis=1)
        on = jax.nn.sigmoid(30 * (flat[:, :1] - 0.4))
        return jnp.concatenate([(1 - on) * logits[:, :3] + on * moved, logits[:, 3:]], 1), {"flat": flat}, {}

    variables = {"params": {"weights": jnp.asarray(weights)}, "batch_stats": {}}
    artifact = Victim(Model("roll", (4, 4, 1), 4, None, apply), variables)
    return artifact, DefenderView(images.reshape(60, 4, 4, 1), labels, Seen())
