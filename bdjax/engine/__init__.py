"""Training and evaluation on one or several devices. Methods call `fit`, `run_epoch` and `predict`."""

from bdjax.engine.epoch import run_epoch
from bdjax.engine.evaluate import activation_changes, activations, feature_map_names, predict
from bdjax.engine.fit import FitConfig, fit, fit_with_hook
from bdjax.engine.step import capacity

__all__ = [
    "FitConfig", "activation_changes", "activations", "capacity", "feature_map_names", "fit", "fit_with_hook",
    "predict", "run_epoch",
]  # fmt: skip
