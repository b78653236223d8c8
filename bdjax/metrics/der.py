"""Defense effectiveness rating: how much of the attack is gone, less the accuracy that it cost.

M. Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization" (FT-SAM), ICCV 2023;
BackdoorBench prints it as DER.
"""

import jax
import jax.numpy as jnp


def der(acc_before: jax.Array, acc_after: jax.Array, asr_before: jax.Array, asr_after: jax.Array) -> jax.Array:
    """Defense effectiveness rating `(max(0, ASR_b - ASR_a) - max(0, ACC_b - ACC_a) + 1) / 2`.

    0.5 is as good as doing nothing, 1 removes an attack that always succeeded at no cost. A gain of accuracy does not
    count, nor does an ASR that increased.

    Args:
      acc_before: ACC_b of the victim, of any shape. All four are fractions.
      acc_after: ACC_a after the defense.
      asr_before: ASR_b of the victim.
      asr_after: ASR_a after the defense.

    Returns:
      float32 in [0, 1], of the shape of the arguments.
    """
    acc_b, acc_a, asr_b, asr_a = (
        jnp.asarray(value, jnp.float32) for value in (acc_before, acc_after, asr_before, asr_after)
    )
    return (jnp.maximum(asr_b - asr_a, 0) - jnp.maximum(acc_b - acc_a, 0) + 1) / 2
