"""IMC: a square mark and the model, optimised alternately (Pang et al., CCS 2020, arXiv:1911.01559).

Threat model: as TrojanNN, the attacker receives a trained model and clean images, and returns another model.
With f the model, k = (tanh(u) + 1) / 2 the mark, x + k an image x that carries it, and y_t the target:

    min over f and k of   E CE(f(x), y) + lambda E CE(f(x + k), y_t)

It starts with TrojanNN's mark. Each epoch has two steps:

    mark    Adam at 0.1 on u over a pass of the training set, CE(f(x + k), y_t), f frozen in evaluation mode; u starts
            at atanh(0.999 (2 k - 1)), the moments at zero
    model   an epoch of fine-tuning with the mark on a share of every batch, with the target's label (this is lambda)

The last mark is the trigger. The defaults are trojanzoo's, the authors' framework: 3x3 pixels, 1 %, target 0, 50
epochs of SGD at 0.01, one pass for the mark. BAERASER compares squares of 3, 5 and 7 (`size`).

Deviations: those of TrojanNN (a share is replaced, not appended; marked before augmentation; active neurons only;
the place is drawn once a model). Images that have the target's label already are not used to optimise the mark.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax.attacks import _marks
from bdjax.attacks._helpers import keys_of, relabel
from bdjax.engine import parallel, run_epoch
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError, check_fields
from bdjax.types import Arrays, Backdoor, Images, Key, Model, Task, Variables, to_float

NEEDS_ARRAYS = True
"""The trigger uses arrays that only the training of a victim makes."""


@dataclass(frozen=True)
class Config(_marks.MarkConfig):
    """The mark, how it is found and found again, and how the model is taught."""

    mark_epochs: int = 1
    """Passes over the training set in each mark step, at least 1; trojanzoo's help says 20, its code 1."""
    batch_size: int = 96
    """Images a step of the mark, at least 1; the model's are --fit.batch-size."""

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
    return _marks.paste(images, arrays)


def edit(config: Config, variables: Variables, task: Task, key: Key) -> Backdoor:
    """Optimise the mark and the model alternately, starting from the clean model.

    Args:
      config: hyper-parameters of the attack.
      variables: of the model that was trained without poison.
      task: training set, model and training functions.
      key: random key.

    Returns:
      The backdoored model, with arrays {"mark": float32 [s, s, C] in [0, 1], "place": int32 [2], "neurons": int32
      [n]}.

    Raises:
      InputError: the mark or the share does not fit, too few neurons are active, every image has the target's
        label already, or a batch cannot be divided over the devices.
    """
    wanted = relabel(config, task.labels, task.classes)
    pool = np.flatnonzero(wanted != task.labels)
    if not len(pool):
        raise InputError(f"all training images are of class {config.target}. Use another --attack.target.")
    parallel.check_batch(min(config.batch_size, len(pool)))
    arrays = _marks.optimise_mark(config, variables, task, keys_of(key).prepare)
    data = {"images": jnp.asarray(task.images), "wanted": jnp.asarray(wanted)}
    refresh = partial(_mark_step, config, task, pool, data)
    variables, arrays = _marks.inject(config, variables, task, key, arrays, refresh)
    return Backdoor("imc", config, variables, arrays)


def _mark_step(
    config: Config, task: Task, pool: np.ndarray, data: Any, _: Any, attacker: Any, variables: Variables, epoch: int,
    key: Key,
) -> Any:  # fmt: skip
    """`TrainingHook.refresh`: the attacker with a mark that suits the model as it is now.

    Args: pool: indices of the images that it sees; data: {"images", "wanted"} of the whole training set.
    """
    batch = min(config.batch_size, len(pool))
    steps, fixed = len(pool) // batch, attacker["fixed"]
    u = _marks.unsquash(fixed["mark"])
    state = {"u": u, "moments": direction("adam").init(u)}
    shared = {**data, "variables": variables, "place": fixed["place"], "rate": jnp.float32(config.mark_rate)}
    for again in range(config.mark_epochs):
        order = jax.random.permutation(jax.random.fold_in(key, again), len(pool))[: steps * batch]
        split = {"index": jnp.asarray(pool)[order].reshape(steps, batch)}
        state, _ = run_epoch(
            _step(task.model), state, split, {}, shared, tick=partial(task.callback.on_progress, "mark")
        )
    return {**attacker, "fixed": {**fixed, "mark": _marks.final_mark(config, state["u"])}}


@lru_cache(maxsize=8)
def _step(model: Model) -> Any:
    """One step of Adam on u, in the engine's form; the variables are among what is shared, so nothing changes them."""

    def step(state: Any, split: Any, whole: Any, shared: Any, axis: str | None) -> tuple[Any, Any]:
        images, wanted = to_float(shared["images"][split["index"]]), shared["wanted"][split["index"]]

        def loss(u: jax.Array) -> jax.Array:
            marked = _marks.paste(images, {"mark": _marks.squash(u), "place": shared["place"]})
            return optax.softmax_cross_entropy_with_integer_labels(
                model.logits(shared["variables"], marked), wanted
            ).mean()

        value, gradient = parallel.average(jax.value_and_grad(loss)(state["u"]), axis)
        update, moments = direction("adam").update(gradient, state["moments"])
        return {"u": state["u"] - shared["rate"] * update, "moments": moments}, {"loss": value}

    return step
