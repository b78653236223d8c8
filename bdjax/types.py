"""Types that modules exchange: array aliases with their shapes, and dataclasses.

Images are NHWC everywhere. At every method's boundary they are float32 in [0, 1]; in storage and
on the device they are uint8 (:func:`to_float` converts). Labels are int32. This module does not import bdjax.
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
"""A typed JAX random key, as `jax.random.key` returns."""
Variables: TypeAlias = Mapping[str, Any]
"""{"params": pytree, "batch_stats": pytree}; params are float32."""
Arrays: TypeAlias = Mapping[str, Any]
"""Named arrays of an attack, for example the pattern, mask or warping field of its trigger."""
ArrayFile = NewType("ArrayFile", str)
"""Path of a .png, .jpg or .npy file in a Config. The run reads the file for the method and hashes its content."""


def to_float(images: Any) -> Images:
    """Convert stored images [..., H, W, C] to float32: uint8 is divided by 255, floats keep their values."""
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images.astype(jnp.float32)


def quantise(images: Any) -> jax.Array:
    """Quantise float images to uint8: clip to [0, 1], then round to the nearest k/255, ties to even. Traceable."""
    scaled = jnp.clip(jnp.asarray(images, jnp.float32) * 255, 0, 255)
    # adding 1.5 * 2**23 leaves the rounded integer in the low bits: half the time of XLA's conversion on a CPU
    return lax.bitcast_convert_type(scaled + jnp.float32(1.5 * 2**23), jnp.uint32).astype(jnp.uint8)


def to_uint8(images: Any) -> np.ndarray:
    """Quantise float images in [0, 1] to a NumPy uint8 array, as images are stored (see :func:`quantise`)."""
    return np.asarray(quantise(images))


@dataclass(frozen=True)
class Data:
    """A labelled data set with its published train/test split: images uint8 [N, H, W, C], labels int32 [N]."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Sentences that state which images the loader left out and how it changed the others."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        h, w, c = self.x_train.shape[1:]
        return int(h), int(w), int(c)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all pixels and labels of both splits, as hexadecimal digits."""
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
    with float32 images [N, H, W, C] in [0, 1], float32 logits [N, classes], and `features` a dict with the
    activations of every stage. `train` uses batch statistics and returns the updated running statistics; `keys` [N],
    one random key per image, enables dropout; `axis_name` averages the statistics over a mapped axis.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int
    init: Callable[[Key], Variables]
    apply: Callable[..., tuple[jax.Array, dict[str, jax.Array], Any]]
    outputs: Callable[..., tuple[dict[str, jax.Array], Any]] | None = None
    """`outputs(variables, images, train=False, axis_name=None) -> (outputs, batch_stats)`: the output [N, ..., O] of
    each convolution and dense layer, bias included and before normalisation, in forward order, keyed by the path of
    its kernel in the parameters ("Conv_0/kernel"). None: not available. Call it through
    :func:`bdjax.models.outputs`."""
    options: tuple[tuple[str, Any], ...] = ()
    """Further arguments of `models.create` (width, input, variant) as pairs."""

    def logits(self, variables: Variables, images: Images) -> jax.Array:
        """Evaluation-mode logits, float32 [N, classes]."""
        return self.apply(variables, images)[0]


class Callback:
    """Hooks that a method calls while it runs. They return None, so no measurement can influence the method."""

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """Report progress.

        Args:
          stage: name of the stage, for example "training".
          done: number of finished steps.
          total: number of steps of the stage.
        """

    def on_round_end(self, step: int, variables: Variables, **arrays: Any) -> None:
        """Report the end of a round or an epoch.

        Reports use these array names. Figures: `perturbation` [n, H, W, C], added to images, and `recovered`
        [n, h, w, C], recovered triggers (patches in [0, 1], or additive where h x w is H x W), with
        `recovered_labels` int32 [n]. Tables: `suspected` int32 [k], the suspected target labels.

        Args:
          step: number of the round, from 0.
          variables: the model after the round. Its buffers are donated to the next step when the call returns, so
            copy them to keep them.
          **arrays: scalars and arrays to record.
        """

    def on_round_restored(self, step: int, **values: Any) -> None:
        """Report the recorded scalars of a round that ended before the run was interrupted and resumed."""

    def on_detection(self, scores: "Scores") -> None:
        """Report the :class:`Scores` of a defense that also detects; its `detect` is then not called again."""

    def on_estimate(self, estimated: Any) -> None:
        """Report a defense's estimate of its own success for the model it returns; None withdraws the estimate."""


class SampleInfo(NamedTuple):
    """Positions, roles and keys of the images of a batch (on this device), for an attacker who controls training."""

    position: jax.Array
    """int32 [B], index of each image in the training set."""
    role: Any
    """int8 [B]: 1, 2, ... for the shares of the :class:`TrainingHook`, spread evenly over the batch; 0 otherwise."""
    key: Any
    """[B], one random key per image."""
    axis: str | None
    """Name of the mapped axis to average statistics over, or None on a single device."""


class Batch(NamedTuple):
    """A batch after the attacker's transformation; shapes do not change."""

    images: Images
    labels: Labels
    loss: jax.Array | float = 0.0
    """Scalar that is added to the cross-entropy."""
    state: Any = None
    """New value of attacker["state"]; None keeps the current one."""


@dataclass(frozen=True)
class TrainingHook:
    """Interventions of an attacker who controls training. They run inside the jitted step, before augmentation.

    `attacker` is {"fixed": constant arrays, "params": trained with the model, "state": updated at each step}, each
    optional. Functions are compared by identity and `config` by value, so use module-level functions: a new function
    object triggers a recompilation.
    """

    config: Any
    """Hashable; passed as the first argument of every function."""
    shares: tuple[float, ...] = ()
    """Fractions of the images of an epoch that get role 1, 2, ..."""
    transform: Callable[..., Batch] | None = None
    """`transform(config, attacker, images, labels, info) -> Batch`, images float32 [B, H, W, C] in [0, 1]."""
    penalty: Callable[..., jax.Array] | None = None
    """`penalty(config, attacker, features, labels, info) -> scalar`, added to the loss; `labels` of the batch."""
    optimizer: Callable[[Any], Any] | None = None
    """`optimizer(config) -> optax.GradientTransformation` for attacker["params"]."""
    refresh: Callable[..., Any] | None = None
    """`refresh(config, attacker, variables, epoch, key) -> attacker`, called before each epoch (from 0), outside the
    compiled step. It may therefore be a closure, for example over images that are not part of the saved state."""


@dataclass(frozen=True)
class Poison:
    """Training images that an attacker replaces by `images` with `labels`, at the positions `indices`."""

    indices: np.ndarray
    """int32 [n], positions in the training set, ascending."""
    images: np.ndarray
    """[n, H, W, C]: uint8, or float32 in [0, 1] where the attack does not quantise."""
    labels: np.ndarray
    """int32 [n]."""
    copies: int = 1
    """Number of repetitions of the training set; `indices` run over all copies."""


class NeedsTraining(Exception):
    """Raised when a method requests training from a :class:`Task` that cannot train."""


def _cannot_train(*_: Any, **__: Any) -> Any:
    raise NeedsTraining


@dataclass(frozen=True)
class Task:
    """An attacker's resources: training set, model, training recipe, and a function that reads files."""

    images: np.ndarray
    """Stored uint8 [N, H, W, C]."""
    labels: np.ndarray
    """int32 [N]."""
    model: Model
    read_array: Callable[[ArrayFile], np.ndarray]
    """`read_array(path) -> array`: pictures as uint8 [H, W, C], .npy files as stored."""
    callback: Callback = field(default_factory=Callback)
    fit: Callable[..., Variables] = _cannot_train
    """`fit(images, labels, key, *, stage="training", start=None, recipe={}, model=None) -> variables`: train with
    the user's recipe. `stage`: unique name by which an interrupted run resumes; `start`: initial variables; `recipe`:
    fields of the recipe to change; `model`: another model than the task's."""
    fit_with_hook: Callable[..., tuple[Variables, Any]] = _cannot_train
    """`fit_with_hook(images, labels, key, hook, attacker, **as fit) -> (variables, attacker)`."""
    clean: Callable[[], Variables] = _cannot_train
    """`clean() -> variables`: the task's model, trained without an attack with the user's recipe."""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.model.classes


@dataclass(frozen=True)
class Backdoor:
    """A planted backdoor: the backdoored model and the arrays of the trigger that activates it."""

    attack: str
    config: Any
    variables: Variables
    arrays: Arrays
    poison: Poison | None = None


@dataclass(frozen=True)
class ReactivationInputs:
    """The inputs of a re-activation attack."""

    purified: Variables
    """The model that a defense returned."""
    reactivated: Mapping[str, Variables]
    """Results of earlier re-activation attacks on it, by attack name (those that the module lists in NEEDS)."""
    clean: Variables
    """A model trained with the same recipe without an attack."""
    payload: Poison
    """Training images with the training trigger and the attacker's label; their number is `count` of the Config."""


@dataclass(frozen=True)
class Victim:
    """The suspicious model that a defender receives."""

    model: Model
    variables: Variables


@dataclass(frozen=True)
class Scores:
    """Result of auditing a model: the anomaly of each class as a backdoor target, and the verdict."""

    classes: np.ndarray
    """float32 [C], anomaly score of each class; NaN where it could not be computed."""
    target: int
    """The class with the highest anomaly score."""
    score: float
    """Anomaly score of that class, and so of the model."""
    poisoned: bool
    """Whether the model is judged to be backdoored."""
    p_value: float | None = None
    """Probability of so high a score in a clean model, corrected for the number of classes; None for a detector that
    has no null distribution."""
    targets: tuple[int, ...] = ()
    """All classes that the detector accuses, the most suspicious first; empty where it accuses none or `target` alone
    by a rule without p-values."""

    def plain(self) -> dict[str, Any]:
        """Return the scores as JSON values, with None in place of NaN and infinity."""
        values = [float(value) if np.isfinite(value) else None for value in (self.score, *self.classes)]
        return {
            "poisoned": self.poisoned, "target": self.target, "score": values[0], "classes": values[1:],
            "p_value": self.p_value, "targets": list(self.targets),
        }  # fmt: skip


Trigger: TypeAlias = Callable[[Images, Key], Images]
"""A test-time trigger: maps images float32 [N, H, W, C] in [0, 1] and a key to images of the same shape and range."""


@dataclass(frozen=True)
class DefenderView:
    """A defense's data: clean labelled images. It contains no poisoned image."""

    images: np.ndarray
    """Stored uint8 [n, H, W, C]."""
    labels: np.ndarray
    """int32 [n]."""
    callback: Callback = field(default_factory=Callback)
    trigger: Trigger | None = None
    """The true trigger, only for a method that requires it (:func:`bdjax.defenses.needs_trigger`)."""
    validation: "DefenderView | None" = None
    """Held-out clean images for model selection, never trained on; None when there are none."""

    def split(self, share: float, key: Key) -> tuple["DefenderView", "DefenderView"]:
        """Split into a training and a validation view, stratified: a class of two or more images is in both.

        Args:
          share: fraction of each class that the training view gets, in (0, 1), rounded per class.
          key: random key of the draw.

        Returns:
          (training view, validation view).
        """
        order = np.asarray(jax.random.permutation(key, len(self.labels)))
        training = []
        for label in np.unique(self.labels):
            of_class = order[self.labels[order] == label]
            count = round(share * len(of_class))
            training.append(of_class[: min(max(count, 1), max(len(of_class) - 1, 1))])
        chosen = np.zeros(len(self.labels), bool)
        chosen[np.concatenate(training)] = True
        if chosen.all():  # one image per class: the last in the drawn order is for validation
            chosen[order[-1]] = False
        train, validate = (replace(self, images=self.images[m], labels=self.labels[m]) for m in (chosen, ~chosen))
        return train, validate
