"""IMC (input-model co-optimisation): optimise a patch and the model for each other, alternately.

R. Pang, H. Shen, X. Zhang, S. Ji, Y. Vorobeychik, X. Luo, A. Liu and T. Wang, "A Tale of Evil Twins: Adversarial Inputs
versus Poisoned Models", CCS 2020, arXiv:1911.01559.

Threat model: the attacker receives a trained model and clean images and returns another model, as in TrojanNN. With f
the model, k = (tanh(u) + 1) / 2 the mark, x + k an image x that carries it, and y_t the target:

    min over f and k of   E CE(f(x), y) + lambda E CE(f(x + k), y_t)

The attack starts with TrojanNN's mark. Each epoch has two steps:

    mark    Adam at 0.1 on u over a pass of the training set, CE(f(x + k), y_t), with f fixed in evaluation mode; u
            starts at atanh(0.999 (2 k - 1)), the moments at zero
    model   an epoch of fine-tuning with the mark on a share of every batch, with the target's label (this is lambda)

The last mark is the trigger. The defaults are trojanzoo's, the authors' framework: 3x3 pixels, 1 %, target 0, 50
epochs of SGD at 0.01, one pass for the mark. BAERASER compares squares of 3, 5 and 7 (`size`).

Deviations:

- Those of TrojanNN: a share is replaced, not appended; marking comes before augmentation; only active neurons are
  chosen; the position is drawn once per model.
- Images that have the target's label already are not used to optimise the mark.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.attacks import _trojan_marks
from bdjax.attacks._poisoning import keys_of, relabel
from bdjax.engine import parallel, run_epoch
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError, check_fields
from bdjax.types import Arrays, Backdoor, Images, Key, Model, Task, Variables, to_float

NEEDS_ARRAYS = True
"""The trigger uses arrays that only the training of a victim makes."""


@dataclass(frozen=True)
class Config(_trojan_marks.MarkConfig):
    """The mark, its initial and repeated optimisation, and the fine-tuning of the model."""

    mark_epochs: int = 1
    """Passes over the training set in each mark step, at least 1; trojanzoo's help says 20, its code 1."""
    batch_size: int = 96
    """Images per step of the mark, at least 1; the model's are --fit.batch-size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "attack", (("mark_epochs", "batch_size"), "at least 1", lambda v: v >= 1))


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
    """Optimise the mark and the model alternately, starting from the clean model.

    Args:
      config: hyper-parameters of the attack.
      variables: of the model that was trained without poison.
      task: training set, model and training functions.
      key: random key.

    Returns:
      The backdoored model; arrays {"mark": float32 [s, s, C] in [0, 1], "place": int32 [2], "neurons": int32 [n]}.

    Raises:
      InputError: the mark or the share does not fit, too few neurons are active, every image has the target's
        label already, or a batch cannot be divided over the devices.
    """
    targets = relabel(config, task.labels, task.classes)
    pool = np.flatnonzero(targets != task.labels)
    if not len(pool):
        raise InputError(f"all training images are of class {config.target}. Use another --attack.target.")
    parallel.check_batch(min(config.batch_size, len(pool)))
    arrays = _trojan_marks.optimise_mark(config, variables, task, keys_of(key).prepare)
    data = {"images": jnp.asarray(task.images), "targets": jnp.asarray(targets)}
    refresh = partial(_refresh_mark, config, task, pool, data)
    variables, arrays = _trojan_marks.inject(config, variables, task, key, arrays, refresh)
    return Backdoor("imc", config, variables, arrays)


def _refresh_mark(
    config: Config, task: Task, pool: np.ndarray, data: Any, _: Any, attacker: Any, variables: Variables, epoch: int,
    key: Key,
) -> Any:  # fmt: skip
    """`TrainingHook.refresh`: optimise the attacker's mark for the current model.

    `pool`: indices of the images to optimise on; `data`: {"images", "targets"} of the whole training set.
    """
    batch = min(config.batch_size, len(pool))
    steps, fixed = len(pool) // batch, attacker["fixed"]
    u = _trojan_marks.unsquash(fixed["mark"])
    state = {"u": u, "moments": direction("adam").init(u)}
    constants = {**data, "variables": variables, "place": fixed["place"], "rate": jnp.float32(config.mark_rate)}
    for epoch_of_mark in range(config.mark_epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch_of_mark), len(pool))[: steps * batch]
        batches = {"index": jnp.asarray(pool)[order].reshape(steps, batch)}
        state, _ = run_epoch(
            _step(task.model), state, batches, {}, constants, tick=partial(task.callback.on_progress, "mark")
        )
    return {**attacker, "fixed": {**fixed, "mark": _trojan_marks.final_mark(config, state["u"])}}


@lru_cache(maxsize=8)
def _step(model: Model) -> Any:
    """An Adam step on u for :func:`run_epoch`; the variables are among its constants, so they do not change."""

    def step(state: Any, batch: Any, per_step: Any, constants: Any, axis: str | None) -> tuple[Any, Any]:
        images, targets = to_float(constants["images"][batch["index"]]), constants["targets"][batch["index"]]

        def loss(u: jax.Array) -> jax.Array:
            marked = _trojan_marks.paste(images, {"mark": _trojan_marks.squash(u), "place": constants["place"]})
            return optax.softmax_cross_entropy_with_integer_labels(
                model.logits(constants["variables"], marked), targets
            ).mean()

        value, gradient = parallel.average(jax.value_and_grad(loss)(state["u"]), axis)
        update, moments = direction("adam").update(gradient, state["moments"])
        return {"u": state["u"] - constants["rate"] * update, "moments": moments}, {"loss": value}

    return step
