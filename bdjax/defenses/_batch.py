"""How many images a step takes."""

from bdjax.engine import parallel
from bdjax.errors import InputError


def batch_of(wanted: int, total: int, what: str = "images") -> int:
    """Images a step: `wanted`, or all there are, that the devices divide. Raises InputError when that is none.

    Args: what: names the images in the message.
    """
    size = min(wanted, total) // parallel.count() * parallel.count()
    if size == 0:
        raise InputError(
            f"{min(wanted, total)} {what} cannot be split over {parallel.count()} devices. "
            "Use --devices 1 or a larger --defense.batch-size."
        )
    return size
