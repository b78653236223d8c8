"""What the attacks with networks of their own share: training them alone, their variables as named arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.errors import InputError
from bdjax.types import Arrays, Images, Key, Model, Task, TrainingHook, Variables


def _no_params(key: Key) -> Variables:
    return {"params": {}, "batch_stats": {}}


def _one_logit(
    variables: Variables, images: Images, train: bool = False, keys: Any = None, axis_name: str | None = None
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    return jnp.zeros((len(images), 1), jnp.float32), {}, {}


NOBODY = Model("nobody", (0, 0, 0), 1, _no_params, _one_logit)
"""A classifier of one class: without parameters, and always right, so that its cross-entropy is 0."""


def learn(task: Task, key: Key, hook: TrainingHook, attacker: Any, stage: str, config: Any) -> Any:
    """Train `attacker` alone on the task's images by control.transform's loss and control.optimizer.

    The engine does it as it trains a classifier (shuffled, on all devices, resumed where it was killed); the labels
    are 0. `config` has `epochs`, `batch_size` (at most all images are taken) and `learning_rate`.
    Returns: attacker as it has become. Raises InputError when a loss is not finite.
    """
    recipe = {
        "epochs": config.epochs,
        "batch_size": step_size(config, task),
        "learning_rate": config.learning_rate,  # named when a loss is not finite; what counts is the optimizer's own
        "schedule": "constant",
        "augment": "none",
    }
    labels = np.zeros(len(task.images), np.int32)
    try:
        return task.fit_with_hook(task.images, labels, key, hook, attacker, stage=stage, recipe=recipe, model=NOBODY)[1]
    except InputError as error:
        raise InputError(str(error).replace("fit.", "attack.")) from None


def step_size(config: Any, task: Task) -> int:
    """Images a step: config.batch_size, or all there are."""
    return min(config.batch_size, len(task.images))


def flat(name: str, variables: Variables) -> dict[str, jax.Array]:
    """Variables as arrays by name: "NAME/params/.../kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
    return {f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf for path, leaf in leaves}


def nested(name: str, arrays: Arrays) -> dict[str, Any]:
    """The variables that :func:`flat` gave `name`, whatever else `arrays` holds."""
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for path, leaf in arrays.items():
        if path.startswith(f"{name}/"):
            branch, (*between, last) = variables, path.split("/")[1:]
            for step in between:
                branch = branch.setdefault(step, {})
            branch[last] = jnp.asarray(leaf)
    return variables
