"""Attack success rate (ASR)."""

import jax

from bdjax.metrics.accuracy import accuracy


def attack_success_rate(
    predictions: jax.Array, target_labels: jax.Array, eligible: jax.Array | None = None
) -> jax.Array:
    """Fraction of triggered images that the model assigns to the attacker's label.

    Args:
      predictions: int32 [N], of the triggered images.
      target_labels: int32 [N], the target class, or (y + 1) mod C for an all-to-all attack.
      eligible: bool [N], False for images whose true class is already the target. The releases of I-BAU, WaNet and IAD
        count those as well (None): a clean model then scores about 1/C.

    Returns:
      float32 scalar in [0, 1]; NaN when no image is eligible.
    """
    return accuracy(predictions, target_labels, eligible)
