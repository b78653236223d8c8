"""Measures of a defense; masked and jittable. Each function's docstring gives its formula and source."""

from bdjax.metrics.accuracy import accuracy
from bdjax.metrics.asr import attack_success_rate

__all__ = ["accuracy", "attack_success_rate"]
