"""bdjax: plant backdoors in neural networks, remove them, and prove that they are gone (JAX/Flax)."""

__version__ = "0.1.0"
