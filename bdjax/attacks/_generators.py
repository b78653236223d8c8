"""Generator networks, shared by the attacks that learn one: training without a classifier, conversion to arrays."""

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


NULL_CLASSIFIER = Model("nobody", (0, 0, 0), 1, _no_params, _one_logit)
"""A classifier with one class and no parameters, whose cross-entropy is always 0."""


def train_generator(task: Task, key: Key, hook: TrainingHook, attacker: Any, stage: str, config: Any) -> Any:
    """Train attacker["params"] alone on the task's images, by the loss of `hook.transform` and `hook.optimizer`.

    The engine trains a :class:`bdjax.types.Model` without parameters, with all labels 0, so that training is shuffled,
    distributed over the devices and resumable as that of a classifier.

    Args:
      task: training set and recipe.
      key: random key.
      hook: the loss and the optimizer.
      attacker: {"params": ..., "state": ..., "fixed": ...} at the start.
      stage: unique name of the training, by which it resumes.
      config: Config with `epochs`, `batch_size` (capped at the number of images) and `learning_rate`.

    Returns:
      The attacker after training.

    Raises:
      InputError: when a loss is not finite.
    """
    recipe = {
        "epochs": config.epochs,
        "batch_size": images_per_step(config, task),
        "learning_rate": config.learning_rate,  # for the message of a loss that is not finite; the hook has its own
        "schedule": "constant",
        "augment": "none",
    }
    labels = np.zeros(len(task.images), np.int32)
    try:
        return task.fit_with_hook(
            task.images, labels, key, hook, attacker, stage=stage, recipe=recipe, model=NULL_CLASSIFIER
        )[1]
    except InputError as error:
        raise InputError(str(error).replace("fit.", "attack.")) from None


def images_per_step(config: Any, task: Task) -> int:
    """Number of images per step: config.batch_size, or the whole training set if that is smaller."""
    return min(config.batch_size, len(task.images))


def flatten_variables(name: str, variables: Variables) -> dict[str, jax.Array]:
    """Flatten variables into arrays that are called "NAME/params/.../kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
    return {f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf for path, leaf in leaves}


def unflatten_variables(name: str, arrays: Arrays) -> dict[str, Any]:
    """Rebuild the variables that :func:`flatten_variables` stored under `name`; other arrays are ignored."""
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for path, leaf in arrays.items():
        if path.startswith(f"{name}/"):
            branch, (*parents, last) = variables, path.split("/")[1:]
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[last] = jnp.asarray(leaf)
    return variables
