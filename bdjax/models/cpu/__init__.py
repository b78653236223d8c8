"""Convolutions for CPUs: exact reformulations of `lax.conv_general_dilated` that XLA:CPU runs faster.

:func:`enabled` is the only switch. When it is off, :func:`bdjax.models._layers.convolve` uses lax for all convolutions.
"""

import os

import jax

VARIABLE = "BDJAX_CPU_CONVOLUTIONS"
"""Environment variable; 0 disables the reformulations."""


def enabled() -> bool:
    """Whether models use the reformulated convolutions: on a CPU, unless BDJAX_CPU_CONVOLUTIONS is 0.

    Evaluated when a model is traced, so programs that are already compiled do not change.
    """
    return jax.default_backend() == "cpu" and os.environ.get(VARIABLE, "1") != "0"
