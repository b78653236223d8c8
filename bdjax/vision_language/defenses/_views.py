"""Second views of images and captions for self-supervision within a modality."""

import jax
import jax.numpy as jnp

from bdjax.engine import augment
from bdjax.types import Images, Key


def other_images(images: Images, keys: Key, jitter: jax.Array, pad: int) -> Images:
    """Crop, flip and recolour images.

    Args:
      images: float32 [N, H, W, C] in [0, 1].
      keys: [N].
      jitter: largest relative change of brightness, contrast and saturation, a scalar.
      pad: largest shift in pixels.

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """

    def one(image: jax.Array, key: Key) -> jax.Array:
        parts = jax.random.split(key, 3)
        image = augment.flip(augment.crop(image, parts[0], pad), parts[1])
        brightness, contrast, saturation = 1 + jitter * jax.random.uniform(parts[2], (3,), minval=-1, maxval=1)
        image = image * brightness
        image = image.mean() + contrast * (image - image.mean())
        grey = image.mean(-1, keepdims=True)
        return jnp.clip(grey + saturation * (image - grey), 0, 1)

    return jax.vmap(one)(images, keys)


def other_tokens(tokens: jax.Array, keys: Key, rate: jax.Array) -> jax.Array:
    """Delete random tokens of captions, and exchange two neighbours' places.

    The start and the end token stay, and at least one token between them.

    Args:
      tokens: int32 [N, L].
      keys: [N].
      rate: probability of deleting each token, and of one exchange in a caption.

    Returns:
      int32 [N, L].
    """

    def one(row: jax.Array, key: Key) -> jax.Array:
        position, end = jnp.arange(len(row)), row.argmax()
        keys = jax.random.split(key, 4)
        words = (end - 1).astype(jnp.float32)
        first, second = 1 + jnp.floor(jax.random.uniform(keys[0], (2,)) * words).astype(jnp.int32)
        swapped = row.at[first].set(row[second]).at[second].set(row[first])
        row = jnp.where((jax.random.uniform(keys[1]) < rate) & (end > 1), swapped, row)
        spared = 1 + jnp.floor(jax.random.uniform(keys[2]) * words).astype(jnp.int32)
        inner = (position > 0) & (position < end) & (position != spared)
        deleted = inner & (jax.random.uniform(keys[3], (len(row),)) < rate)
        order = jnp.argsort(deleted, stable=True)  # deleted tokens go to the end and become padding
        return jnp.where(deleted[order], 0, row[order])

    return jax.vmap(one)(tokens, keys)
