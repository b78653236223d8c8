"""Types of the second family of models, encoders of images and captions, and of the methods for them.

A classifier is described by `bdjax.types.Model` and is trained on labelled images. A dual encoder is trained on pairs
of an image and a caption, and classifies only by comparison with captions of the classes ("zero-shot"), so its methods
have types of their own. Images are NHWC, float32 in [0, 1] or stored uint8; captions are rows of int32 token numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import numpy as np

from bdjax.types import Arrays, Callback, Images, Key, Variables

VisualFunction: TypeAlias = Callable[..., tuple[jax.Array, jax.Array, Any]]
"""`f(variables, images, train=False, axis_name=None) -> (embeddings [N, D], features before the projection [N, F], new
batch statistics)`, float32. `train` uses batch statistics, averaged over the mapped axis `axis_name`."""


@dataclass(frozen=True)
class DualEncoder:
    """An image encoder and a text encoder with a common embedding space, as pure functions.

    Embeddings are not normalised: :func:`bdjax.engine.contrastive.normalise` does that.
    """

    name: str
    shape: tuple[int, int, int]
    """(H, W, C) of an image."""
    context: int
    """Tokens of a caption, with the start and the end token."""
    vocabulary: int
    """Number of tokens; every token is below it."""
    dimension: int
    """Dimension D of the embeddings."""
    init: Callable[[Key], Variables]
    """`init(key) -> {"params": {"visual", "text", "logit_scale"}, "batch_stats"}`; "logit_scale" is the logarithm of
    the factor by which cosine similarities are multiplied."""
    visual: VisualFunction
    """The image encoder."""
    text: Callable[[Variables, jax.Array], jax.Array]
    """`text(variables, tokens int32 [N, L]) -> embeddings float32 [N, D]`; the end token is the largest of its row."""
    config: Any = None
    """The options that the encoder was created from (:class:`bdjax.models.ClipConfig`)."""

    def encode_image(self, variables: Variables, images: Images) -> jax.Array:
        """Embed float32 images [N, H, W, C] in [0, 1] in evaluation mode: float32 [N, D]."""
        return self.visual(variables, images)[0]

    def encode_text(self, variables: Variables, tokens: jax.Array) -> jax.Array:
        """Embed captions, int32 tokens [N, L] with L = `context`: float32 [N, D]."""
        return self.text(variables, tokens)


@dataclass(frozen=True)
class Pairs:
    """Images with one caption each."""

    name: str
    images: np.ndarray
    """Stored uint8 [N, H, W, C]."""
    captions: tuple[str, ...]
    """N captions."""
    labels: np.ndarray | None = None
    """int32 [N], where the captions were made from a labelled set; None otherwise."""
    notes: tuple[str, ...] = ()
    """Sentences that state what the reader left out or changed."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        height, width, channels = self.images.shape[1:]
        return int(height), int(width), int(channels)


@dataclass(frozen=True)
class LabelledImages:
    """Images with classes that have names, for zero-shot classification."""

    images: np.ndarray
    """Stored uint8 [N, H, W, C]."""
    labels: np.ndarray
    """int32 [N]."""
    classes: tuple[str, ...]


@dataclass(frozen=True)
class PairPoison:
    """The pairs of the training set that an attacker changed."""

    indices: np.ndarray
    """int32 [n], positions in the training set, ascending."""
    images: np.ndarray
    """Stored uint8 [n, H, W, C]."""
    captions: tuple[str, ...]


@dataclass(frozen=True)
class PairTask:
    """The resources of an attacker of a dual encoder: training pairs, and a clean model where the attack starts."""

    pairs: Pairs
    encoder: DualEncoder
    tokenize: Callable[[tuple[str, ...]], np.ndarray]
    """`tokenize(captions) -> int32 [N, context]`."""
    target: str
    """Name of the class that triggered images shall be assigned to."""
    templates: tuple[str, ...]
    """Captions with {} in place of the name of a class."""
    start: Variables | None = None
    """Variables from which the poisoned training starts; None: it starts from scratch."""
    reference: Pairs | None = None
    """Images of the target's class with their captions, for an attack that optimises its trigger; None: none."""
    callback: Callback = field(default_factory=Callback)


@dataclass(frozen=True)
class PairBackdoor:
    """A planted backdoor: the dual encoder and the arrays of its trigger."""

    attack: str
    config: Any
    variables: Variables
    arrays: Arrays
    poison: PairPoison


@dataclass(frozen=True)
class PairVictim:
    """The suspicious dual encoder that a defender receives."""

    encoder: DualEncoder
    variables: Variables


@dataclass(frozen=True)
class PairView:
    """A defender's data: clean images with their captions. It contains no triggered image."""

    images: np.ndarray
    """Stored uint8 [n, H, W, C]."""
    tokens: np.ndarray
    """int32 [n, L], the captions."""
    callback: Callback = field(default_factory=Callback)


TriggerFunction: TypeAlias = Callable[[Any, Images, Key, Arrays], Images]
"""`trigger(config, images, key, arrays)`: put a trigger on float32 images [N, H, W, C] in [0, 1], inside jit; the
caller clips the result to [0, 1]."""
PrepareFunction: TypeAlias = Callable[[Any, PairTask, Key], Arrays]
"""`prepare(config, task, key)`: make the arrays that the trigger needs; they are stored with the victim."""
PoisonFunction: TypeAlias = Callable[[Any, PairTask, Key, Arrays], PairPoison]
"""`poison(config, task, key, arrays)`: choose pairs, put the trigger on their images and replace their captions."""
PurifyFunction: TypeAlias = Callable[[Any, PairVictim, PairView, Key], Variables]
"""`purify(config, victim, view, key)`: remove a backdoor with clean pairs only."""


@dataclass(frozen=True)
class PairAttackSpec:
    """An attack module of :mod:`bdjax.vision_language.attacks`."""

    name: str
    Config: type
    trigger: TriggerFunction
    poison: PoisonFunction
    prepare: PrepareFunction | None = None


@dataclass(frozen=True)
class PairDefenseSpec:
    """A defense module of :mod:`bdjax.vision_language.defenses`."""

    name: str
    Config: type
    purify: PurifyFunction
