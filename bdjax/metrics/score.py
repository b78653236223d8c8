"""Unlearning score of AGE: remaining attack success and remaining accuracy in one number.

Hsieh et al., "Mitigating Backdoor Attacks using Activation-Guided Model Editing", 2024, Eq. 6.
"""

import jax
import jax.numpy as jnp


def score(
    asr_unlearned: jax.Array, asr_victim: jax.Array, acc_unlearned: jax.Array, acc_retrained: jax.Array
) -> jax.Array:
    """Unlearning score `(1 - ASR_U / ASR_V) * ACC_U / ACC_R`.

    1 is as good as retraining; the score exceeds 1 where the unlearned model is more accurate than the retrained one,
    and is negative where the ASR increased. The paper prints percent, and averages the score over runs, which is
    slightly less than the score of the averages.

    Args:
      asr_unlearned: ASR_U of the unlearned model. All four are fractions, measured on the same images and with the
        same trigger.
      asr_victim: ASR_V of the victim.
      acc_unlearned: ACC_U of the unlearned model.
      acc_retrained: ACC_R of a model that was trained without poison.

    Returns:
      float32; NaN where ASR_V or ACC_R is zero.
    """
    asr_u, asr_v, acc_u, acc_r = (
        jnp.asarray(value, jnp.float32) for value in (asr_unlearned, asr_victim, acc_unlearned, acc_retrained)
    )
    defined = (asr_v > 0) & (acc_r > 0)
    value = (1 - asr_u / jnp.where(defined, asr_v, 1)) * acc_u / jnp.where(defined, acc_r, 1)
    return jnp.where(defined, value, jnp.nan)
