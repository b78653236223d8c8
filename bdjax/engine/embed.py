"""Embeddings of images and captions in equal, padded batches, and zero-shot classification with them.

A class is represented by the mean of the normalised embeddings of its captions (prompt ensemble; Radford et al., ICML
2021), normalised again; an image belongs to the class with the largest cosine similarity.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.engine.contrastive import normalise
from bdjax.pair_types import DualEncoder
from bdjax.types import Variables, to_float


def embed_images(encoder: DualEncoder, variables: Variables, images: np.ndarray, batch_size: int = 250) -> np.ndarray:
    """Embed stored images in evaluation mode.

    Args:
      encoder: the dual encoder.
      variables: its variables.
      images: stored [N, H, W, C].
      batch_size: largest number of images per batch.

    Returns:
      Normalised embeddings, float32 [N, D].
    """
    return _batched(_image_step(encoder), variables, images, batch_size)


def embed_texts(encoder: DualEncoder, variables: Variables, tokens: np.ndarray, batch_size: int = 250) -> np.ndarray:
    """Embed captions.

    Args:
      encoder: the dual encoder.
      variables: its variables.
      tokens: int32 [N, L].
      batch_size: largest number of captions per batch.

    Returns:
      Normalised embeddings, float32 [N, D].
    """
    return _batched(_text_step(encoder), variables, tokens, batch_size)


def class_embeddings(encoder: DualEncoder, variables: Variables, tokens: np.ndarray) -> np.ndarray:
    """Embed classes by their captions.

    Args:
      encoder: the dual encoder.
      variables: its variables.
      tokens: int32 [C, T, L], T captions of each of C classes.

    Returns:
      Normalised embeddings, float32 [C, D].
    """
    classes, count, length = tokens.shape
    embeddings = embed_texts(encoder, variables, tokens.reshape(classes * count, length))
    return np.asarray(normalise(jnp.asarray(embeddings.reshape(classes, count, -1).mean(1))))


def rank_classes(images: np.ndarray, classes: np.ndarray, most: int = 5) -> np.ndarray:
    """Rank the classes of each image by cosine similarity.

    Args:
      images: normalised embeddings [N, D].
      classes: normalised embeddings [C, D].
      most: number of classes to return, at most C.

    Returns:
      int64 [N, most], the most similar class first.
    """
    return np.argsort(-(images @ classes.T), axis=1, kind="stable")[:, :most]


@lru_cache(maxsize=16)
def _image_step(encoder: DualEncoder) -> Callable:
    return jax.jit(lambda variables, images: normalise(encoder.encode_image(variables, to_float(images))))


@lru_cache(maxsize=16)
def _text_step(encoder: DualEncoder) -> Callable:
    return jax.jit(lambda variables, tokens: normalise(encoder.encode_text(variables, tokens)))


def _batched(step: Callable, variables: Variables, rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Apply a step to all rows, in batches of one size."""
    parts: list[Any] = []
    size = min(batch_size, len(rows))
    for start in range(0, len(rows), max(1, size)):
        positions = np.minimum(np.arange(start, start + size), len(rows) - 1)  # one shape is compiled
        parts.append(np.asarray(step(variables, rows[positions])))
    return np.concatenate(parts)[: len(rows)]
