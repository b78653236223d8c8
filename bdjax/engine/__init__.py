"""Training and evaluation on one device or many: methods call `fit`, `run_epoch`, `predict`; the engine decides how."""

from bdjax.engine.epoch import run_epoch
from bdjax.engine.evaluate import activations, activation_changes, feature_map_names, predict
from bdjax.engine.fit import FitConfig, fit, fit_with_hook
from bdjax.engine.step import capacity

__all__ = [
    "FitConfig", "activations", "capacity", "activation_changes", "fit", "fit_with_hook", "feature_map_names", "predict", "run_epoch",
]  # fmt: skip
