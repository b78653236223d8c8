"""AGE's score: what is left of the backdoor and of the accuracy, in one number (Hsieh et al., 2024, Eq. 6)."""

import jax
import jax.numpy as jnp


def score(
    asr_unlearned: jax.Array, asr_victim: jax.Array, acc_unlearned: jax.Array, acc_retrained: jax.Array
) -> jax.Array:
    """`(1 - ASR_U / ASR_V) * ACC_U / ACC_R` of an unlearned model U, its victim V and a model R trained without poison.

    1 is as good as training anew; more where U is more accurate than R, negative where the ASR rose. The paper prints
    percent, and averages the score over runs, which is a little less than the score of averages.

    Args: fractions, all measured on the same images and with the same trigger.
    Returns: float32; NaN where ASR_V or ACC_R is zero.
    """
    asr_u, asr_v, acc_u, acc_r = (
        jnp.asarray(value, jnp.float32) for value in (asr_unlearned, asr_victim, acc_unlearned, acc_retrained)
    )
    defined = (asr_v > 0) & (acc_r > 0)
    value = (1 - asr_u / jnp.where(defined, asr_v, 1)) * acc_u / jnp.where(defined, acc_r, 1)
    return jnp.where(defined, value, jnp.nan)
