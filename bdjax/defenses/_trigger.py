"""The true trigger, for methods that are given it."""

from bdjax.errors import InputError
from bdjax.types import DefenderView, Images, Key, to_float


def triggered(who: str, view: DefenderView, key: Key) -> Images:
    """The defender's images with the trigger on, float32 [n, H, W, C] in [0, 1]. Raises InputError without a trigger.

    Args: who: names the method that needs it.
    """
    if view.trigger is None:
        raise InputError(f"{who} needs the true trigger, and this model has none. Use a defense that needs none.")
    return view.trigger(to_float(view.images), key)
