"""Convolutions for CPUs: exact rewritings of `lax` that XLA:CPU runs faster."""
