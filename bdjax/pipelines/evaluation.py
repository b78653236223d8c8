"""The images that a model is measured on, clean and triggered, drawn once for a run, and the rates on them."""

import copy
from collections.abc import Callable
from itertools import zip_longest

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import attacks
from bdjax.config import Experiment, SplitConfig, stage_key
from bdjax.engine import predict
from bdjax.errors import InputError
from bdjax.metrics import accuracy, attack_success_rate, ctca
from bdjax.pipelines.results import Rates
from bdjax.types import Arrays, Data, Images, Model, Variables, to_float

MEASURED = 1000
"""Images, at most, on which the networks that a weight file fits are compared."""


def measure_on(data: Data) -> Callable[[Model, Variables], float]:
    """Make `measure(model, variables) -> accuracy` on up to MEASURED images of the test split, drawn once.

    `measure` returns a fraction and raises InputError when the images do not fit the model.
    """
    drawn = np.sort(np.random.default_rng(0).permutation(len(data.y_test))[:MEASURED])
    images, labels = data.x_test[drawn], data.y_test[drawn]

    def measure(model: Model, variables: Variables) -> float:
        if model.shape != data.shape or model.classes != len(data.classes):
            raise InputError(
                f"the model takes {model.shape} images of {model.classes} classes; {data.name} has {data.shape} and "
                f"{len(data.classes)}. Give images of the model's shape, or --size."
            )
        return float((predict(model, variables, images) == labels).mean())

    return measure


class Evaluation:
    """Held-out images, clean and triggered, drawn once for a run; `measure` gives the rates of a model.

    Attributes:
      images: stored [N, H, W, C], held out; labels: int32 [N].
      clean_images: stored [n, H, W, C], the defender's; clean_labels: int32 [n]; clean_indices: their positions.
      has_trigger: whether images get a trigger at all; without one there is no attack success rate.
      targets: classes that triggered images are meant to be predicted as; empty for an all-to-all attack.
      parts: labels of the attacks that are measured on their own, "" for an attack without parts.
      triggered: stored [parts * N, H, W, C], all images with the first part's trigger, then with the next one's.
      goals: int32 [parts * N], the class that each triggered image is meant to be predicted as.
      eligible: bool [parts * N], whether the ASR counts the image.
    """

    def __init__(
        self, model: Model, data: Data, experiment: Experiment, arrays: dict[str, np.ndarray], held_out: bool = True
    ) -> None:
        """Draw the images and put the triggers on them.

        Args:
          model: that is measured.
          data: the data set.
          experiment: its attack, split and seed.
          arrays: of the trigger.
          held_out: leave the defender's images out of the test set; False: the whole test set counts.
        """
        split, classes = experiment.split, len(data.classes)
        self.model, self.clean_indices = model, clean_indices(split, data, experiment.seed)
        images, labels = pool(split.source, data)
        self.clean_images, self.clean_labels = images[self.clean_indices], labels[self.clean_indices]
        if split.source == "train":
            images, labels = data.x_test, data.y_test
        elif held_out:
            keep = np.ones(len(labels), bool)
            keep[self.clean_indices] = False
            images, labels = images[keep], labels[keep]
        self.images, self.labels = images, labels
        self.has_trigger = experiment.attack != "clean"
        self._stamp(experiment, attacks.without_previews(arrays), classes)

    def _stamp(self, experiment: Experiment, arrays: Arrays, classes: int) -> None:
        """Put the trigger of each part on all images, and set what the ASR counts."""
        self.trigger = attacks.trigger_of(experiment.attack, experiment.attack_config, arrays)
        parts = attacks.parts_of(experiment.attack, experiment.attack_config, arrays)
        key = stage_key(experiment.seed, "evaluate")
        self.parts = [part.label for part, _ in parts]
        targeted = [part.config for part, _ in parts if part.config.labels != "all_to_all"] if self.has_trigger else []
        self.targets = sorted({config.target for config in targeted})
        triggered, goals = [], []
        for number, (part, stored) in enumerate(parts):
            part_key = jax.random.fold_in(key, number) if number else key
            triggered.append(attacks.stamped(part.attack, part.config, self.images, part_key, stored))
            goals.append(attacks.goal(part.config, self.labels, classes))
        self.triggered = np.concatenate(triggered)
        self.goals, self.eligible = (np.concatenate(each) for each in zip(*goals, strict=True))
        self.eligible &= self.has_trigger

    def measure(self, variables: Variables, perturb: Callable[[Images], Images] | None = None) -> Rates:
        """Measure a model. `perturb` maps float32 images [N, H, W, C] in [0, 1], clean and triggered ones alike."""
        return self.rates(*self.predictions(variables, perturb))

    def predictions(
        self, variables: Variables, perturb: Callable[[Images], Images] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predicted classes of the clean images, int32 [N], and of the triggered ones, int32 [parts * N]."""
        clean = predict(self.model, variables, _perturbed(self.images, perturb))
        if not self.has_trigger:  # the images as they are
            return clean, clean
        return clean, predict(self.model, variables, _perturbed(self.triggered, perturb))

    def rates(self, clean: np.ndarray, triggered: np.ndarray) -> Rates:
        """The rates of a model from its :meth:`predictions`; for an attack with parts the mean over them."""
        acc = float(accuracy(jnp.asarray(clean), jnp.asarray(self.labels)))
        if not self.has_trigger:
            return {"acc": acc, "asr": None, "asr_with_target": None, "ctca": None}
        by_part = [jnp.asarray(a).reshape(len(self.parts), -1) for a in (triggered, self.goals, self.eligible)]
        asr = [float(attack_success_rate(*part)) for part in zip(*by_part, strict=True)]
        with_target = [float(attack_success_rate(*part)) for part in zip(*by_part[:2], strict=True)]
        rates: Rates = {
            "acc": acc,
            "asr": float(np.mean(asr)),
            "asr_with_target": float(np.mean(with_target)),
            "ctca": self._ctca(clean),
        }
        if any(self.parts):
            rates["asr_by_trigger"] = dict(zip(self.parts, asr, strict=True))
        return rates

    def _ctca(self, clean: np.ndarray) -> float | None:
        """Mean clean accuracy of the target classes; None where no image is of one."""
        targets = [target for target in self.targets if (self.labels == target).any()]
        rates = [float(ctca(jnp.asarray(clean), jnp.asarray(self.labels), target)) for target in targets]
        return float(np.mean(rates)) if rates else None

    def shorten(self, count: int) -> None:
        """Measure on the first `count` held-out images only."""
        self._keep(np.arange(min(count, len(self.images))))

    def sample(self, count: int) -> "Evaluation":
        """The same with `count` held-out images, drawn at random but always alike; itself where it has fewer."""
        if len(self.images) <= count:
            return self
        drawn = copy.copy(self)
        drawn._keep(np.sort(np.random.default_rng(0).permutation(len(self.images))[:count]))
        return drawn

    def _keep(self, indices: np.ndarray) -> None:
        def of_parts(array: np.ndarray) -> np.ndarray:
            by_part = array.reshape(len(self.parts), len(self.images), *array.shape[1:])
            return np.concatenate(by_part[:, indices])

        self.triggered, self.goals = of_parts(self.triggered), of_parts(self.goals)
        self.eligible = of_parts(self.eligible)
        self.images, self.labels = self.images[indices], self.labels[indices]

    def pictures(self, count: int = 6) -> dict[str, np.ndarray]:
        """A few eligible images for a figure, clean and triggered: at least one of each part, by turns."""
        size = len(self.images)
        selectable = self.eligible if self.has_trigger else np.ones_like(self.eligible)
        by_part = selectable.reshape(len(self.parts), size)
        turns = zip_longest(*(np.flatnonzero(part)[:count] + i * size for i, part in enumerate(by_part)))
        rows = [row for turn in turns for row in turn if row is not None]
        selected = np.array(rows[: max(count, len(self.parts))], int)
        at = selected % size
        return {"clean": self.images[at], "triggered": self.triggered[selected], "labels": self.labels[at]}


def _perturbed(images: np.ndarray, perturb: Callable[[Images], Images] | None) -> np.ndarray:
    """Stored images after `perturb`, in batches; the images themselves without one."""
    if perturb is None:
        return images
    program = jax.jit(perturb)
    parts = [images[start : start + 500] for start in range(0, len(images), 500)]
    return np.concatenate([np.asarray(program(to_float(part))) for part in parts])


def pool(source: str, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a source split; of "all" the training images come first."""
    if source == "all":
        return np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])
    return (data.x_test, data.y_test) if source == "test" else (data.x_train, data.y_train)


def clean_indices(split: SplitConfig, data: Data, seed: int) -> np.ndarray:
    """Draw the defender's images.

    Args:
      split: source, number and order.
      data: the data set.
      seed: draws them.

    Returns:
      Their positions in the source split, int32 [n], ascending.

    Raises:
      InputError: the split has too few images, or none would remain to evaluate on.
    """
    evaluated = split.source != "train"
    labels = pool(split.source, data)[1]
    size = split.size or (len(labels) // 2 if evaluated else max(1, len(labels) // 20))
    if size > len(labels) - evaluated:
        raise InputError(
            f"split.size={size}, but the {split.source} split has {len(labels)} images"
            f"{' and some must be left to evaluate on' if evaluated else ''}. Use a smaller --split.size."
        )
    if split.order == "given":
        return np.arange(size, dtype=np.int32)
    order = np.asarray(jax.random.permutation(stage_key(seed, "split"), len(labels)))
    if split.order == "stratified":
        quotas = _quotas(np.bincount(labels, minlength=len(data.classes)), size)
        drawn = [order[labels[order] == label][:quota] for label, quota in enumerate(quotas)]
        return np.sort(np.concatenate(drawn)).astype(np.int32)
    return np.sort(order[:size]).astype(np.int32)


def _quotas(counts: np.ndarray, size: int) -> np.ndarray:
    """Number of images that each class contributes to `size` images.

    It is proportional to the class's count, at least one, and leaves one image where the class has two; where that is
    impossible, because there are more classes than images, any number.
    """
    least, most = np.minimum(counts, 1), np.maximum(counts - 1, np.minimum(counts, 1))
    if not least.sum() <= size <= most.sum():
        least, most = np.zeros_like(counts), counts
    exact = counts * size / counts.sum()
    quotas: np.ndarray = np.clip(np.floor(exact).astype(int), least, most)
    while (missing := size - quotas.sum()) != 0:
        step = 1 if missing > 0 else -1
        adjustable = quotas < most if step > 0 else quotas > least
        quotas[np.argmax(np.where(adjustable, step * (exact - quotas), -np.inf))] += step
    return quotas
