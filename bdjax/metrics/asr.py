"""Attack success rate (ASR)."""

import jax

from bdjax.metrics.accuracy import accuracy


def attack_success_rate(predictions: jax.Array, wanted: jax.Array, eligible: jax.Array | None = None) -> jax.Array:
    """Share of triggered images that the model gives the label the attacker wants.

    Args:
      predictions: int32 [N], of the triggered images.
      wanted: int32 [N], the target label, or (y + 1) mod C for an all-to-all attack.
      eligible: bool [N]; false for images whose true class is the target already. Counting those
        (None) is what the releases of I-BAU, WaNet and IAD do: a clean model then scores about 1/C.

    Returns: float32 scalar in [0, 1]; NaN when no image is eligible.
    """
    return accuracy(predictions, wanted, eligible)
