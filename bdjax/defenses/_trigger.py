"""Access to the true trigger, for methods that require it."""

from bdjax.errors import InputError
from bdjax.types import DefenderView, Images, Key, to_float


def triggered(method: str, view: DefenderView, key: Key) -> Images:
    """Put the true trigger on the defender's images.

    Args:
      method: name of the method that requires the trigger, for the message.
      view: images (stored [n, H, W, C]) and the trigger.
      key: random key of the trigger.

    Returns:
      The triggered images, float32 [n, H, W, C] in [0, 1].

    Raises:
      InputError: when the view has no trigger.
    """
    if view.trigger is None:
        raise InputError(f"{method} needs the true trigger, and this model has none. Use a defense that needs none.")
    return view.trigger(to_float(view.images), key)
