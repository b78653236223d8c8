"""Measures of attacks and defenses. Each function's docstring gives its formula and source.

All functions can be jitted, except `silhouette` and `tsne`, which call scikit-learn, and `wilson`, which calls SciPy.
"""

from bdjax.metrics.accuracy import accuracy
from bdjax.metrics.asr import attack_success_rate
from bdjax.metrics.bec import BecResult, bec, bec_sigmoid
from bdjax.metrics.cka import linear_cka
from bdjax.metrics.ctca import class_accuracy, ctca
from bdjax.metrics.der import der
from bdjax.metrics.detection import Detection, anomaly_index, detection
from bdjax.metrics.embedding import silhouette, tsne
from bdjax.metrics.interval import clopper_pearson, wilson
from bdjax.metrics.score import score
from bdjax.metrics.significance import Prior, holm, model_p_value, outlier_p_values, outliers, reference_p_values
from bdjax.metrics.similarity import distance, psnr, ssim, ssim_window
from bdjax.metrics.tac import tac

__all__ = [
    "BecResult", "Detection", "Prior", "accuracy", "anomaly_index", "attack_success_rate", "bec", "bec_sigmoid",
    "class_accuracy", "clopper_pearson", "ctca", "der", "detection", "distance", "holm", "linear_cka", "model_p_value",
    "outlier_p_values", "outliers", "psnr", "reference_p_values", "score", "silhouette", "ssim", "ssim_window", "tac",
    "tsne", "wilson",
]  # fmt: skip
