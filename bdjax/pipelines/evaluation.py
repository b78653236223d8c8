"""What a model is measured on: held-out images, clean and triggered, drawn once for a run."""

import copy
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import attacks
from bdjax.config import Experiment, SplitConfig, stage_key
from bdjax.engine import predict
from bdjax.errors import InputError
from bdjax.metrics import accuracy, attack_success_rate, ctca
from bdjax.types import Data, Images, Model, Variables, to_float

MEASURED = 1000  # images at most that tell the networks apart which a weight file fits


def measure_on(data: Data) -> Callable[[Model, Variables], float]:
    """`measure(model, variables) -> accuracy`, a fraction, on up to MEASURED images of the test split, drawn once.

    It raises InputError when they do not fit the model.
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
    """Held-out images, clean and triggered, drawn once a run; `measure` gives the rates of a model."""

    def __init__(
        self, model: Model, data: Data, experiment: Experiment, arrays: dict[str, np.ndarray], held_out: bool = True
    ) -> None:
        """`held_out`: leave the defender's images out of the test set (False: the whole test set counts)."""
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
        own = attacks.own_arrays(arrays)
        self.has_trigger = experiment.attack != "clean"
        """Whether images get a trigger at all; without one there is no attack success rate."""
        self.trigger = attacks.trigger_of(experiment.attack, experiment.attack_config, own)
        parts = attacks.parts_of(experiment.attack, experiment.attack_config, own)
        key = stage_key(experiment.seed, "evaluate")
        self.parts = [part.label for part, _ in parts]
        whole = [part.config for part, _ in parts if part.config.labels != "all_to_all"]
        whole = whole if self.has_trigger else []
        self.targets = sorted({own.target for own in whole})
        """Classes that triggered images shall be taken for; none of an all-to-all attack."""
        triggered, goals = [], []
        for place, (part, stored) in enumerate(parts):
            own_key = jax.random.fold_in(key, place) if place else key
            triggered.append(attacks.stamped(part.attack, part.config, self.images, own_key, stored))
            goals.append(attacks.goal(part.config, self.labels, classes))
        self.triggered = np.concatenate(triggered)  # all images with the first part's trigger, then the next's
        self.wanted, self.eligible = (np.concatenate(each) for each in zip(*goals, strict=True))
        self.eligible &= self.has_trigger

    def measure(self, variables: Variables, perturb: Callable[[Images], Images] | None = None) -> dict[str, Any]:
        """{"acc", "asr", "asr_with_target", "ctca"} as fractions; `asr_with_target` counts target-class images, as
        I-BAU's release; `ctca` is None where no class, or no image of one, is the target, else the mean over targets.
        Both ASRs are None where no trigger is known.

        `perturb`, float32 [N, H, W, C] in [0, 1] to the same, is done to clean and triggered images alike.
        Of an attack with parts, also {"asr_by_trigger": {label: ASR}}; its ASRs are the mean over the parts.
        """
        return self.rates(*self.predictions(variables, perturb))

    def predictions(
        self, variables: Variables, perturb: Callable[[Images], Images] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predicted classes of the clean images, int32 [N], and of the triggered ones, int32 [parts * N]."""
        clean = predict(self.model, variables, _perturbed(self.images, perturb))
        if not self.has_trigger:  # the images as they are
            return clean, clean
        return clean, predict(self.model, variables, _perturbed(self.triggered, perturb))

    def rates(self, clean: np.ndarray, triggered: np.ndarray) -> dict[str, Any]:
        """What `measure` gives, of :meth:`predictions`."""
        acc = float(accuracy(jnp.asarray(clean), jnp.asarray(self.labels)))
        if not self.has_trigger:
            return {"acc": acc, "asr": None, "asr_with_target": None, "ctca": None}
        each = [jnp.asarray(a).reshape(len(self.parts), -1) for a in (triggered, self.wanted, self.eligible)]
        rates = [float(attack_success_rate(*of_part)) for of_part in zip(*each, strict=True)]
        whole = [float(attack_success_rate(*of_part)) for of_part in zip(*each[:2], strict=True)]
        return {
            "acc": acc,
            "asr": float(np.mean(rates)),
            "asr_with_target": float(np.mean(whole)),
            "ctca": self._ctca(clean),
            **({"asr_by_trigger": dict(zip(self.parts, rates, strict=True))} if any(self.parts) else {}),
        }

    def _ctca(self, clean: np.ndarray) -> float | None:
        seen = [target for target in self.targets if (self.labels == target).any()]
        rates = [float(ctca(jnp.asarray(clean), jnp.asarray(self.labels), target)) for target in seen]
        return float(np.mean(rates)) if rates else None

    def shorten(self, count: int) -> None:
        """Measure on the first `count` held-out images only."""
        self._keep(np.arange(min(count, len(self.images))))

    def sample(self, count: int) -> "Evaluation":
        """The same on `count` held-out images drawn at random, always the same ones; itself where there are no more."""
        if len(self.images) <= count:
            return self
        drawn = copy.copy(self)
        drawn._keep(np.sort(np.random.default_rng(0).permutation(len(self.images))[:count]))
        return drawn

    def _keep(self, index: np.ndarray) -> None:
        size = len(self.images)
        for name in ("triggered", "wanted", "eligible"):
            of_parts = getattr(self, name).reshape(len(self.parts), size, *getattr(self, name).shape[1:])
            setattr(self, name, np.concatenate(of_parts[:, index]))
        self.images, self.labels = self.images[index], self.labels[index]

    def pictures(self, count: int = 6) -> dict[str, np.ndarray]:
        """A few eligible images, clean and triggered, for the figure; of parts one each in turn, and at least one."""
        size = len(self.images)
        shown_of = self.eligible if self.has_trigger else np.ones_like(self.eligible)
        eligible = shown_of.reshape(len(self.parts), size)
        turns = zip_longest(*(np.flatnonzero(own)[:count] + i * size for i, own in enumerate(eligible)))
        shown = np.array([row for turn in turns for row in turn if row is not None][: max(count, len(self.parts))], int)
        at = shown % size
        return {"clean": self.images[at], "triggered": self.triggered[shown], "labels": self.labels[at]}


def _perturbed(images: np.ndarray, perturb: Callable[[Images], Images] | None) -> np.ndarray:
    if perturb is None:
        return images
    program = jax.jit(perturb)
    parts = [images[start : start + 500] for start in range(0, len(images), 500)]
    return np.concatenate([np.asarray(program(to_float(part))) for part in parts])


def pool(source: str, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels that the defender's are drawn from; of "all" the training images come first."""
    if source == "all":
        return np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])
    return (data.x_test, data.y_test) if source == "test" else (data.x_train, data.y_train)


def clean_indices(split: SplitConfig, data: Data, seed: int) -> np.ndarray:
    """Positions of the defender's images in their source split, int32, ascending.

    Raises InputError when the split has too few, or nothing would be left to evaluate on.
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
    """How many of `size` images each class gives: in proportion to its count, at least one, but one stays where there
    are two; where that cannot be, for there are more classes than images, any number."""
    least, most = np.minimum(counts, 1), np.maximum(counts - 1, np.minimum(counts, 1))
    if not least.sum() <= size <= most.sum():
        least, most = np.zeros_like(counts), counts
    exact = counts * size / counts.sum()
    found = np.clip(np.floor(exact).astype(int), least, most)
    while (missing := size - found.sum()) != 0:
        step = 1 if missing > 0 else -1
        open_ = found < most if step > 0 else found > least
        found[np.argmax(np.where(open_, step * (exact - found), -np.inf))] += step
    return found
