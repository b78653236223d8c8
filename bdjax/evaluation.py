"""What a model is measured on: held-out images, clean and triggered, drawn once for a run."""

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import attacks
from bdjax.engine import predict
from bdjax.errors import InputError
from bdjax.experiment import Experiment, SplitConfig, stream
from bdjax.metrics import accuracy, attack_success_rate
from bdjax.types import Data, Model, Variables


class Evaluation:
    """Held-out images, clean and triggered, drawn once a run; `measure` gives the rates of a model."""

    def __init__(
        self, model: Model, data: Data, experiment: Experiment, arrays: dict[str, np.ndarray], held_out: bool = True
    ) -> None:
        """`held_out`: leave the defender's images out of the test set (False: the whole test set counts)."""
        split, classes = experiment.split, len(data.classes)
        self.model, self.clean_indices = model, clean_indices(split, data, experiment.seed)
        keep = np.ones(len(data.x_test), bool)
        if split.source == "test":
            self.clean_images, self.clean_labels = data.x_test[self.clean_indices], data.y_test[self.clean_indices]
            keep[self.clean_indices] = not held_out
        else:
            self.clean_images, self.clean_labels = data.x_train[self.clean_indices], data.y_train[self.clean_indices]
        self.images, self.labels = data.x_test[keep], data.y_test[keep]
        own = {name: value for name, value in arrays.items() if not name.startswith("on_")}
        trigger = attacks.trigger_of(experiment.attack, experiment.attack_config, own)
        key = stream(experiment.seed, "evaluate")
        self.triggered = attacks.stamped(trigger, experiment.attack_config, self.images, key)
        self.wanted, self.eligible = attacks.goal(experiment.attack_config, self.labels, classes)

    def measure(self, variables: Variables) -> dict[str, float]:
        """{"acc", "asr", "asr_with_target"} as fractions; the last counts target-class images, as I-BAU's release."""
        return self.rates(*self.predictions(variables))

    def predictions(self, variables: Variables) -> tuple[np.ndarray, np.ndarray]:
        """Predicted classes of the clean and of the triggered images, int32 [N] each."""
        return predict(self.model, variables, self.images), predict(self.model, variables, self.triggered)

    def rates(self, clean: np.ndarray, triggered: np.ndarray) -> dict[str, float]:
        """What `measure` gives, of :meth:`predictions`."""
        stamped, wanted, eligible = jnp.asarray(triggered), jnp.asarray(self.wanted), jnp.asarray(self.eligible)
        return {
            "acc": float(accuracy(jnp.asarray(clean), jnp.asarray(self.labels))),
            "asr": float(attack_success_rate(stamped, wanted, eligible)),
            "asr_with_target": float(attack_success_rate(stamped, wanted)),
        }

    def shorten(self, count: int) -> None:
        """Measure on the first `count` held-out images only."""
        for name in ("images", "labels", "triggered", "wanted", "eligible"):
            setattr(self, name, getattr(self, name)[:count])

    def pictures(self, count: int = 6) -> dict[str, np.ndarray]:
        """A few eligible images, clean and triggered, for the figure."""
        shown = np.flatnonzero(self.eligible)[:count]
        return {"clean": self.images[shown], "triggered": self.triggered[shown], "labels": self.labels[shown]}


def clean_indices(split: SplitConfig, data: Data, seed: int) -> np.ndarray:
    """Positions of the defender's images in their source split, int32, ascending.

    Raises InputError when the split has too few, or nothing would be left to evaluate on.
    """
    from_test = split.source == "test"
    pool = len(data.x_test if from_test else data.x_train)
    size = split.size or (pool // 2 if from_test else max(1, pool // 20))
    if size > pool - from_test:
        raise InputError(
            f"split.size={size}, but the {split.source} split has {pool} images"
            f"{' and some must be left to evaluate on' if from_test else ''}. Use a smaller --split.size."
        )
    if split.order == "given":
        return np.arange(size, dtype=np.int32)
    return np.sort(np.asarray(jax.random.permutation(stream(seed, "split"), pool)[:size])).astype(np.int32)
