"""Neural Cleanse: detect a backdoor by the smallest patch that sends images to each class.

B. Wang, Y. Yao, S. Shan, H. Li, B. Viswanath, H. Zheng and B. Y. Zhao, "Neural Cleanse: Identifying and Mitigating
Backdoor Attacks in Neural Networks", IEEE Symposium on Security and Privacy 2019.

Threat model: the auditor has the model and clean labelled images, but no trigger.

For every class t, a mask m [H, W, 1] and a pattern p [H, W, C], both parametrised as tanh(u) / (2 + 1e-7) + 0.5, solve

    min_{m, p} mean CE(f((1 - m) x + m p), t) + λ_t ‖m‖₁

λ_t starts at `cost`. It is multiplied by `multiplier` after `patience` consecutive epochs in which the patch sends at
least `threshold` of the images to t, and divided by `multiplier`^1.5 after as many epochs in which it does not. The
search returns the smallest mask that reached the threshold. A class is suspected when the anomaly index of its mask's
norm (the distance below the median in units of 1.4826 median absolute deviations) exceeds 2.

All classes are searched in one program: they share the victim's weights, so their images form one batch, and the
gradients of different classes are independent.

`schedule="original"` (the default) starts at random masks with λ = 0 and lets it rise once the threshold holds;
`schedule="bench"` is BackdoorBench's, which starts at λ = `cost` and masks that cover most of the image.

Deviations:

- There is no early stopping, because all classes run together.
- An epoch has at least eight steps, so that a few hundred images are enough (ours).
- A class for which no mask reached the threshold counts with the largest possible norm, H W (ours).
- The p-value compares the logarithms of the norms (:func:`bdjax.metrics.outlier_p_values`; ours). The verdict is the
  paper's, by the anomaly index.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np

from bdjax.detectors._smallest_patches import SearchConfig, patch_scores, search
from bdjax.metrics import model_p_value, outlier_p_values
from bdjax.types import DefenderView, Key, Scores, Victim

ON_REQUEST = True


@dataclass(frozen=True)
class Config(SearchConfig):
    """Hyper-parameters of the search and of the decision."""

    threshold: float = 0.99
    """Fraction of the images that a patch must send to its class, in (0, 1]."""
    schedule: Literal["bench", "original"] = "original"
    """original: masks and patterns start at random values, and λ is 0 until the patch has reached the threshold in
    `patience` consecutive epochs; bench: λ is `cost` from the first step on, as in BackdoorBench (with threshold
    0.98)."""


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Score each class by the anomaly index of its smallest patch.

    Args:
      config: the hyper-parameters.
      victim: the model to audit.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the recovered patches.
      key: shuffles the images.

    Returns:
      The anomaly index of each class, whether the largest index exceeds `config.anomaly`, and the p-value of the model.
    """
    patches = search(config, victim, view, jax.random.fold_in(key, 0))
    view.callback.on_round_end(0, victim.variables, **patches.as_arrays())
    p_value = model_p_value(outlier_p_values(-np.log(np.maximum(patches.norms, 1e-3))))
    return replace(patch_scores(config, patches), p_value=p_value)
