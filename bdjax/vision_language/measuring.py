"""Zero-shot measurement of a stored dual encoder, and of what defenses and attacks make of it."""

from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np

from bdjax.errors import InputError
from bdjax.pair_types import LabelledImages
from bdjax.types import Variables
from bdjax.vision_language import pairs as pair_sets
from bdjax.vision_language import prompts, zero_shot
from bdjax.vision_language.artifact import DualArtifact, Planted


@dataclass(frozen=True)
class Measure:
    """Test images, captions of their classes, and the trigger: what accuracy and ASR are measured with."""

    dual: DualArtifact
    test: LabelledImages
    templates: tuple[str, ...]
    planted: Planted | None
    """The attack whose trigger is put on the test images; None: the ASR is not measured."""
    seed: int = 0
    """Seed of the trigger's random numbers."""

    @cached_property
    def tokens(self) -> np.ndarray:
        """Captions of the classes, int32 [C, T, L]."""
        return zero_shot.class_tokens(self.dual.tokenizer, self.test.classes, self.templates)

    @cached_property
    def triggered(self) -> np.ndarray | None:
        """The test images with the trigger, stored."""
        if self.planted is None:
            return None
        key = jax.random.fold_in(jax.random.key(self.seed), 7)
        planted = self.planted
        return zero_shot.put_triggers(planted.spec.trigger, planted.config, self.test.images, key, planted.arrays)

    def __call__(self, variables: Variables) -> zero_shot.ZeroShotResult:
        """Measure the dual encoder with these variables."""
        target = zero_shot.target_number(self.test.classes, self.planted.target) if self.planted else -1
        return zero_shot.evaluate(
            self.dual.encoder, variables, self.test, self.tokens, triggered=self.triggered, target=target
        )


def measure_of(dual: DualArtifact, dataset: str = "", templates: str = "", most: int = 0, seed: int = 0) -> Measure:
    """Prepare the measurement of a dual encoder.

    Args:
      dual: the dual encoder.
      dataset: labelled data set whose test images are classified; "": that of its training pairs.
      templates: captions of the classes; "": those of its training.
      most: largest number of test images; 0: all.
      seed: draws the images, where there are more, and the triggers.

    Returns:
      The measurement.

    Raises:
      InputError: when there is no labelled data set.
    """
    spec = str(dual.manifest.get("pairs") or "")
    if not dataset and not spec.startswith("captions:"):
        raise InputError(
            "the training pairs have no classes. Name a labelled data set whose test images are classified: --test."
        )
    test = pair_sets.labelled(dataset or spec.removeprefix("captions:"))
    if most and most < len(test.labels):
        chosen = np.random.default_rng(seed).permutation(len(test.labels))[:most]
        test = LabelledImages(test.images[chosen], test.labels[chosen], test.classes)
    chosen_templates = prompts.templates(templates or str(dual.manifest.get("templates") or "cifar"))
    return Measure(dual, test, chosen_templates, dual.planted, seed)
