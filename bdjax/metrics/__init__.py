"""Measures of attacks and defenses; masked and jittable. Each function's docstring gives its formula and source."""

from bdjax.metrics.accuracy import accuracy
from bdjax.metrics.asr import attack_success_rate
from bdjax.metrics.similarity import distance, psnr, ssim, ssim_window

__all__ = ["accuracy", "attack_success_rate", "distance", "psnr", "ssim", "ssim_window"]
