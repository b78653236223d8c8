"""TrojanNN: optimise a square that activates neurons of a trained model, then fine-tune the model on it.

Y. Liu, S. Ma, Y. Aafer, W.-C. Lee, J. Zhai, W. Wang and X. Zhang, "Trojaning Attack on Neural Networks", NDSS 2018.

Threat model: the attacker receives a trained model and clean images and returns another model. The neurons are those of
the last hidden layer whose outgoing weights have the largest sum of absolute values, among those that are positive on
at least 5 % of clean images. The mark k = (tanh(u) + 1) / 2 is at one position of a black image b:

    u = argmin  sum over the neurons of (phi_j(b with k) - 100)^2        Adam, 0.1 falling to 0, 1000 steps

Then the model is fine-tuned with the mark on a share of every batch, with the target's label: SGD at 0.01 with momentum
0.9 and weight decay 5e-4 for 50 epochs. The defaults are trojanzoo's: 3x3 pixels, 1 %, target 0. BAERASER compares
squares of 3, 5 and 7 (`size`) and states neither ratio nor target.

Deviations:

- trojanzoo appends marked copies to each batch, p / (1 - p) of it, and keeps the originals; here the share p of the
  images of every epoch, spread evenly over its batches, is replaced.
- trojanzoo marks after augmentation, we before it, so the crops and flips of the recipe move the mark in training.
- trojanzoo takes the neurons with the largest weights whether they are ever active or not.
- The position is drawn once per model (trojanzoo: row 0, column 0, our `position=top_left`; BAERASER's figures show
  various positions).
- Batch size, schedule and augmentation are those of the recipe.
- trojanzoo calls an attack failed when the accuracy falls by 5 points; we report both numbers.
"""

from dataclasses import dataclass

from bdjax.attacks import _trojan_marks
from bdjax.attacks._poisoning import keys_of
from bdjax.types import Arrays, Backdoor, Images, Key, Task, Variables

NEEDS_ARRAYS = True
"""The trigger uses arrays that only the training of a victim makes."""


@dataclass(frozen=True)
class Config(_trojan_marks.MarkConfig):
    """The mark, its optimisation, and the fine-tuning of the model."""


def trigger(config: Config, images: Images, key: Key, arrays: Arrays) -> Images:
    """Paste the mark into images.

    Args:
      config: hyper-parameters of the attack.
      images: float32 [N, H, W, C] in [0, 1].
      key: unused.
      arrays: "mark" and "place".

    Returns:
      float32 [N, H, W, C] in [0, 1].
    """
    return _trojan_marks.paste(images, arrays)


def edit(config: Config, variables: Variables, task: Task, key: Key) -> Backdoor:
    """Optimise the mark on the clean model, then fine-tune the model.

    Args:
      config: hyper-parameters of the attack.
      variables: of the model that was trained without poison.
      task: training set, model and training functions.
      key: random key.

    Returns:
      The backdoored model; arrays {"mark": float32 [s, s, C] in [0, 1], "place": int32 [2], "neurons": int32 [n]}.

    Raises:
      InputError: the mark or the share does not fit, or too few neurons are active.
    """
    arrays = _trojan_marks.optimise_mark(config, variables, task, keys_of(key).prepare)
    variables, arrays = _trojan_marks.inject(config, variables, task, key, arrays)
    return Backdoor("trojannn", config, variables, arrays)
