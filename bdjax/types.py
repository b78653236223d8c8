"""What crosses a boundary between two modules: array aliases with their shapes, and the records.

Images are NHWC everywhere. At every method's boundary they are float32 in [0, 1]; in storage and
on the device they are uint8 (:func:`to_float` converts). Labels are int32. Nothing here imports bdjax.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, NewType, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Images: TypeAlias = jax.Array
"""float32 [N, H, W, C] in [0, 1] (uint8 [N, H, W, C] where a docstring says "stored")."""
Labels: TypeAlias = jax.Array
"""int32 [N], 0 <= label < classes."""
Key: TypeAlias = jax.Array
"""A typed JAX random key, as made by `jax.random.key`."""
Variables: TypeAlias = Mapping[str, Any]
"""{"params": pytree, "batch_stats": pytree}; params are float32."""
Arrays: TypeAlias = Mapping[str, Any]
"""Named arrays that belong to an attack: a trigger's pattern, mask, warp ..."""
ArrayFile = NewType("ArrayFile", str)
"""Path of a .png, .jpg or .npy file in a Config: a run reads it for the method and hashes its content."""


def to_float(images: Any) -> Images:
    """Stored images [..., H, W, C] as float32 in [0, 1]: uint8 is divided by 255, floats pass."""
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images.astype(jnp.float32)


def quantise(images: Any) -> jax.Array:
    """Float images in [0, 1] as uint8: clipped, then rounded to the nearest k/255, ties to even; inside jit too."""
    scaled = jnp.clip(jnp.asarray(images, jnp.float32) * 255, 0, 255)
    # next to 1.5 * 2**23 floats are whole and end in their own bits: half the time of XLA's conversion on a CPU
    return lax.bitcast_convert_type(scaled + jnp.float32(1.5 * 2**23), jnp.uint32).astype(jnp.uint8)


def to_uint8(images: Any) -> np.ndarray:
    """Float images in [0, 1] as they are stored: :func:`quantise`."""
    return np.asarray(quantise(images))


@dataclass(frozen=True)
class Data:
    """A labelled data set with its published split, as stored (uint8 NHWC, int32 labels)."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What its source left out or did to the images: sentences."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        h, w, c = self.x_train.shape[1:]
        return int(h), int(w), int(c)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every pixel and label of both splits."""
        digest = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(str((array.shape, array.dtype.name)).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Model:
    """A classifier as two pure functions.

    `init(key) -> variables`.
    `apply(variables, images, train=False, keys=None, axis_name=None) -> (logits, features, batch_stats)`
    with float32 images [N, H, W, C] in [0, 1], float32 logits [N, classes], `features` a dict of every
    stage's activations. `train` uses batch statistics and returns the updated running ones; `keys` [N],
    one random key an image, switches dropout on; `axis_name` averages statistics over a mapped axis.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int
    init: Callable[[Key], Variables]
    apply: Callable[..., tuple[jax.Array, dict[str, jax.Array], Any]]
    outputs: Callable[..., tuple[dict[str, jax.Array], Any]] | None = None
    """`outputs(variables, images, train=False, axis_name=None) -> (outputs, batch_stats)`: what each convolution and
    dense layer gives, bias included and before normalisation, [N, ..., O], in forward order, by the path of its kernel
    in the parameters ("Conv_0/kernel"). None: the model does not tell. Call it by :func:`bdjax.models.outputs`."""
    options: tuple[tuple[str, Any], ...] = ()
    """What `models.create` was given beside name, shape, classes and dtype."""

    def logits(self, variables: Variables, images: Images) -> jax.Array:
        """Evaluation-mode logits, float32 [N, classes]."""
        return self.apply(variables, images)[0]


class Callback:
    """Hooks that a method calls while it runs. They return nothing, so nothing measured flows back into the method."""

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of `stage` are finished."""

    def on_round_end(self, step: int, variables: Variables, **arrays: Any) -> None:
        """A round or an epoch has ended.

        Some array names have a meaning. In a run's figure: `perturbation` [n, H, W, C], which is added to images, and
        `recovered` [n, h, w, C], recovered triggers (patches in [0, 1], or added where h x w is H x W), with
        `recovered_labels` int32 [n]. In its table: `suspected` int32 [k], labels that the method takes for targets.

        Args:
          step: number of the round, from 0.
          variables: the model after the round. Its buffers are donated to the next step when the call returns: copy
            what is to be kept.
          arrays: scalars and arrays to record.
        """

    def on_round_restored(self, step: int, **values: Any) -> None:
        """A round ended before the run was killed and resumed: its recorded scalars, without its variables."""

    def on_detection(self, scores: "Scores") -> None:
        """A defense has also detected: its :class:`Scores`. Its `detect` is then not called again."""

    def on_estimate(self, estimated: Any) -> None:
        """A defense has estimated its own success for the model that it returns; None withdraws the estimate."""


class SampleInfo(NamedTuple):
    """Where the images of a batch (of this device's share of it) stand, for an attacker who controls training."""

    position: jax.Array
    """int32 [B], of each image in the training set."""
    role: Any
    """int8 [B]: 1, 2, ... for the shares of the :class:`TrainingHook`, spread evenly over the batch; 0 for the rest."""
    key: Any
    """[B], a random key each."""
    axis: str | None
    """The mapped axis to average statistics over, or None on one device."""


class Batch(NamedTuple):
    """A batch as an attacker hands it to the model; of the same shape as it was."""

    images: Images
    labels: Labels
    loss: jax.Array | float = 0.0
    """Added to the cross-entropy."""
    state: Any = None
    """attacker["state"] from now on; None: as it was."""


@dataclass(frozen=True)
class TrainingHook:
    """What an attacker who runs the training does to it, inside the jitted step, before augmentation.

    `attacker` is {"fixed": arrays, "params": trained with the model, "state": carried from step to step}, each
    optional. Functions are compared by identity and `config` by value: give functions of a module, for another object
    is compiled anew.
    """

    config: Any
    """Hashable; the first argument of every function."""
    shares: tuple[float, ...] = ()
    """Of the images of an epoch, which get role 1, 2, ..."""
    transform: Callable[..., Batch] | None = None
    """`transform(config, attacker, images, labels, info) -> Batch`, images float32 [B, H, W, C] in [0, 1]."""
    penalty: Callable[..., jax.Array] | None = None
    """`penalty(config, attacker, features, labels, info) -> scalar`, added to the loss; labels are the batch's own."""
    optimizer: Callable[[Any], Any] | None = None
    """`optimizer(config) -> optax.GradientTransformation`, of attacker["params"]."""
    refresh: Callable[..., Any] | None = None
    """`refresh(config, attacker, variables, epoch, key) -> attacker`, outside the step, before each epoch from 0. It is
    no part of the compiled step, so it may be a closure (over images, which do not belong into the saved state)."""


@dataclass(frozen=True)
class Poison:
    """Training images that an attacker replaces: `images` are what stands at `indices`, labelled `labels`."""

    indices: np.ndarray
    """int32 [n], positions in the training set, ascending."""
    images: np.ndarray
    """[n, H, W, C]: uint8, or float32 in [0, 1] where the attack does not quantise."""
    labels: np.ndarray
    """int32 [n]."""
    copies: int = 1
    """The training set is repeated so often, and `indices` go through all copies."""


class NeedsTraining(Exception):
    """A method asked a :class:`Task` that cannot train for a trained model."""


def _cannot_train(*_: Any, **__: Any) -> Any:
    raise NeedsTraining


@dataclass(frozen=True)
class Task:
    """What an attacker holds: the training set, the model, the recipe, and a way to read a file."""

    images: np.ndarray
    """Stored uint8 [N, H, W, C]."""
    labels: np.ndarray
    """int32 [N]."""
    model: Model
    read_array: Callable[[ArrayFile], np.ndarray]
    """`read_array(path) -> array`: pictures uint8 [H, W, C], .npy as stored."""
    callback: Callback = field(default_factory=Callback)
    fit: Callable[..., Variables] = _cannot_train
    """`fit(images, labels, key, *, stage="training", start=None, recipe={}, model=None) -> variables`: train by the
    user's recipe. `stage` names it, so that a killed run resumes there (each name once); `start`: variables to go on
    from; `recipe`: fields of the recipe that differ; `model`: another than the task's."""
    fit_with_hook: Callable[..., tuple[Variables, Any]] = _cannot_train
    """`fit_with_hook(images, labels, key, control, attacker, **as fit) -> (variables, attacker)`."""
    clean: Callable[[], Variables] = _cannot_train
    """`clean() -> variables`: the task's model trained without any attack by the user's recipe."""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.model.classes


@dataclass(frozen=True)
class Backdoor:
    """A planted backdoor: the model that carries it and what wakes it."""

    attack: str
    config: Any
    variables: Variables
    arrays: Arrays
    poison: Poison | None = None


@dataclass(frozen=True)
class ReactivationInputs:
    """The inputs of a re-activation attack."""

    purified: Variables
    """The model that a defense gave back."""
    reactivated: Mapping[str, Variables]
    """By name, what earlier re-activations made of it (a module's NEEDS says which)."""
    clean: Variables
    """A model trained alike without any attack."""
    payload: Poison
    """Training images with the training trigger and the attacker's label, `count` of the attack's Config."""


@dataclass(frozen=True)
class Victim:
    """The suspicious model that a defender is handed."""

    model: Model
    variables: Variables


@dataclass(frozen=True)
class Scores:
    """What an audit of a model finds: which class an attack would aim at, and whether there is one."""

    classes: np.ndarray
    """float32 [C], how suspicious each class is; NaN where it could not be judged."""
    target: int
    """The most suspicious class."""
    score: float
    """How suspicious the model is: the value of that class."""
    poisoned: bool
    """The verdict."""

    def plain(self) -> dict[str, Any]:
        """As JSON values; None for what is not finite."""
        values = [float(value) if np.isfinite(value) else None for value in (self.score, *self.classes)]
        return {"poisoned": self.poisoned, "target": self.target, "score": values[0], "classes": values[1:]}


Trigger: TypeAlias = Callable[[Images, Key], Images]
"""A test-time trigger: float32 [N, H, W, C] in [0, 1] and a key -> the same shape and range."""


@dataclass(frozen=True)
class DefenderView:
    """All that a defense may see beside the victim: clean images with labels. No poisoned image is in it."""

    images: np.ndarray
    """Stored uint8 [n, H, W, C]."""
    labels: np.ndarray
    """int32 [n]."""
    callback: Callback = field(default_factory=Callback)
    trigger: Trigger | None = None
    """The true trigger, only for a method that asks for it (:func:`bdjax.defenses.needs_trigger`)."""
    validation: "DefenderView | None" = None
    """Clean images kept apart from these, to judge a round by; nothing is learnt from them. None: there are none."""

    def split(self, share: float, key: Key) -> tuple["DefenderView", "DefenderView"]:
        """Two views with images of every class in both, as far as a class has two: to learn from, and to judge by.

        Args: share: of the images that the first view gets, in (0, 1), rounded by class; key: draws them.
        """
        order = np.asarray(jax.random.permutation(key, len(self.labels)))
        first = []
        for label in np.unique(self.labels):
            of_class = order[self.labels[order] == label]
            count = round(share * len(of_class))
            first.append(of_class[: min(max(count, 1), max(len(of_class) - 1, 1))])
        chosen = np.zeros(len(self.labels), bool)
        chosen[np.concatenate(first)] = True
        if chosen.all():  # every class has one image: the last in the drawn order judges
            chosen[order[-1]] = False
        learn, judge = (replace(self, images=self.images[part], labels=self.labels[part]) for part in (chosen, ~chosen))
        return learn, judge
