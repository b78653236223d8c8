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

Deviations:

- The constants are BackdoorBench's. The original has threshold 0.99.
- There is no early stopping, because all classes run together.
- An epoch has at least eight steps, so that a few hundred images are enough (ours).
- A class for which no mask reached the threshold counts with the largest possible norm, H W (ours).
"""

from dataclasses import dataclass

import jax

from bdjax.detectors._smallest_patches import SearchConfig, patch_scores, search
from bdjax.types import DefenderView, Key, Scores, Victim


@dataclass(frozen=True)
class Config(SearchConfig):
    """Hyper-parameters of the search and of the decision."""


def detect(config: Config, victim: Victim, view: DefenderView, key: Key) -> Scores:
    """Score each class by the anomaly index of its smallest patch.

    Args:
      config: the hyper-parameters.
      victim: the model to audit.
      view: clean images (stored [n, H, W, C]) and labels [n]. Its callback receives the recovered patches.
      key: shuffles the images.

    Returns:
      The anomaly index of each class, and whether the largest index exceeds `config.anomaly`.
    """
    patches = search(config, victim, view, jax.random.fold_in(key, 0))
    view.callback.on_round_end(0, victim.variables, **patches.as_arrays())
    return patch_scores(config, patches)
