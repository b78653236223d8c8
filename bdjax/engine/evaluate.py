"""Predictions over a whole set in equal, padded batches: one compiled program a model and batch shape."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.types import Model, Variables, to_float


def predict(model: Model, variables: Variables, images: np.ndarray, batch_size: int = 500) -> np.ndarray:
    """Predicted classes of `images` (stored [N, H, W, C]) in evaluation mode, int32 [N]."""
    total = len(images)
    if total == 0:
        return np.zeros(0, np.int32)
    batch = -(-total // -(-total // batch_size))  # equal batches, so that one shape is compiled
    variables = jax.device_put(variables, jax.local_devices()[0])  # a pmapped step leaves some leaves on all devices
    step, found = _step(model), []
    for start in range(0, total, batch):
        part = images[start : start + batch]
        short = batch - len(part)
        part = np.concatenate([part, np.zeros((short, *part.shape[1:]), part.dtype)]) if short else part
        found.append(np.asarray(step(variables, part))[: batch - short])
    return np.concatenate(found)


@lru_cache(maxsize=64)
def _step(model: Model):
    return jax.jit(
        lambda variables, images: jnp.argmax(model.logits(variables, to_float(images)), -1).astype(jnp.int32)
    )
