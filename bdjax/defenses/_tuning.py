"""Fine-tuning on the defender's images by the engine, in batches of what there is: by its step, or by one's own."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses._batch import batch_of
from bdjax.engine import FitConfig, fit, parallel, run_epoch
from bdjax.engine.callbacks import ForwardingCallback
from bdjax.engine.epoch import check_finite
from bdjax.engine.optimizer import Name, direction
from bdjax.engine.step import draw
from bdjax.types import Callback, Key, Variables, Victim


def tune(
    victim: Victim, images: Any, labels: np.ndarray, recipe: FitConfig, key: Key, callback: Callback, stage: str,
    before: int = 0,
) -> Variables:  # fmt: skip
    """Train the victim on by `recipe`, in training mode, and return its variables; the watch sees each epoch.

    Args:
      images: stored [n, H, W, C]; labels: [n]. The batch is cut to what there is and what the devices divide.
      before: how many steps the watch was shown already.

    Raises InputError for fewer images than devices, and for a loss that is not finite.
    """
    size = batch_of(recipe.batch_size, len(labels))
    return fit(
        victim.model, images, labels, replace(recipe, batch_size=size), key, start=victim.variables,
        callback=_Later(callback, before), stage=stage, part="defense",
    )  # fmt: skip


def equal_batches(wanted: int, total: int) -> tuple[int, int]:
    """(batches, images in each) of a pass over `total` images: as few as batches of `wanted` make, all of one size.

    So hardly an image waits for the next shuffle. Raises InputError for fewer images than devices.
    """
    devices = parallel.count()
    batch_of(wanted, total)
    size = max(total // -(-total // wanted) // devices, 1) * devices
    return total // size, size


def each_pass(
    step: Callable, state: Any, shared: Any, rates: np.ndarray, size: int, key: Key, tick: Callable[[int, int], None],
    more: Callable[[Key], dict[str, jax.Array]] = lambda key: {}, what: str = "loss",
    field: str = "defense.learning_rate",
) -> Iterator[tuple[int, Any, dict[str, Any]]]:  # fmt: skip
    """Pass after pass over the images by `step`, in the engine's form.

    Args:
      state: is donated; shared: what every step gets, "labels" [n] among it.
      rates: [passes, batches], `whole["rate"]` of every step; size: images in a batch.
      key: shuffles, by `engine.step.draw`: `split` has "index", "augment" and "dropout", [batches, size] each.
      tick: is told of every step.
      more: further entries of `split`, [batches, size, ...], drawn by a key.
      what, field: for the message about metrics["loss"] that is not finite (InputError).
    Yields: passes done, the state (donated to the next pass), and means of the metrics over the pass.
    """
    count, number = rates.shape
    for done in range(count):
        own = jax.random.fold_in(key, done)
        split = {**draw(own, len(shared["labels"]), number, size), **more(jax.random.fold_in(own, 9))}
        whole = {"rate": jnp.asarray(rates[done], jnp.float32)}
        counted = _counted(tick, done * number, count * number)
        state, metrics = run_epoch(step, state, split, whole, shared, tick=counted)
        check_finite(metrics["loss"], rates[done], done * number, what, field)
        yield done + 1, state, {name: value.mean() for name, value in metrics.items()}


def passes(
    step: Callable, state: Any, shared: Any, rates: np.ndarray, size: int, key: Key, tick: Callable[[int, int], None],
    after: Callable[[int, Any, dict[str, Any]], None] = lambda *_: None, **others: Any,
) -> Any:  # fmt: skip
    """All of :func:`each_pass`, with the same arguments; `after` is called with what each pass yields.

    Returns: the state.
    """
    for done in each_pass(step, state, shared, rates, size, key, tick, **others):
        after(*done)
        state = done[1]
    return state


def shown_to(callback: Callback, before: int = 0, **beside: Any) -> Callable[[int, Any, dict[str, Any]], None]:
    """What :func:`passes` calls after each pass: it shows the watch the model, the metrics and what is `beside` them.

    Args: before: how many steps the watch was shown already.
    """

    def after(done: int, state: Any, metrics: dict[str, Any]) -> None:
        callback.on_round_end(before + done, model_of(state), **metrics, **beside)

    return after


def begin(variables: Variables, optimizer: Name) -> dict[str, Any]:
    """The state of a model in training: a copy, for it is donated."""
    state = {name: jax.tree.map(jnp.array, variables[name]) for name in ("params", "batch_stats")}
    return {**state, "opt": direction(optimizer, jnp.float32(0)).init(state["params"])}


def model_of(state: Any) -> Variables:
    """The variables of a state."""
    return {"params": state["params"], "batch_stats": state["batch_stats"]}


def descend(
    state: Any, gradient: Any, stats: Any, optimizer: Name, rate: Any, momentum: Any = None, decay: Any = 0.0
) -> dict[str, Any]:
    """The state after one step; `gradient` is of all devices, `decay` times the parameters is added to it."""
    gradient = jax.tree.map(lambda g, p: g + decay * p, gradient, state["params"])
    update, opt = direction(optimizer, momentum).update(gradient, state["opt"])
    params = jax.tree.map(lambda p, u: p - rate * u, state["params"], update)
    return {"params": params, "batch_stats": stats, "opt": opt}


def _counted(tick: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: tick(before + done, total)


class _Later(ForwardingCallback):
    """A watch that was shown some steps before."""

    def __init__(self, callback: Callback, before: int) -> None:
        super().__init__(callback)
        self._before = before

    def on_round_end(self, step: int, variables: Variables, **arrays: Any) -> None:
        """Pass the variables on, as of a later step."""
        super().on_round_end(self._before + step, variables, **arrays)
