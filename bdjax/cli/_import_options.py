"""Flags that describe a weight file, converted to the arguments of `interop.import_model`."""

from typing import Any

from bdjax.cli._devices import prepare_jax
from bdjax.cli._options import WeightFileFlags
from bdjax.errors import InputError
from bdjax.text import parse_floats, parse_integers, parse_names


def import_options(options: WeightFileFlags) -> dict[str, Any]:
    """Convert the flags to keyword arguments of `interop.import_model`.

    Raises InputError for a value that is not of the documented form.
    """
    if options.classes is not None and options.classes < 2:
        raise InputError(f"--classes must be at least 2, got {options.classes}.")
    size = parse_integers("--size", options.size, "32 or 32,48") if options.size else None
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise InputError(f"--size must be a side in pixels, or height,width; got {options.size!r}.")
    mean = parse_floats("--input-mean", options.input_mean, "0.4914,0.4822,0.4465")
    std = parse_floats("--input-std", options.input_std, "0.247,0.243,0.261")
    prepare_jax()
    from bdjax.models import Input

    preprocessing = Input(mean, std, options.channels, options.layout, options.resize)
    return {
        "model": options.model,
        "classes": options.classes,
        "size": None if size is None else (size[0], size[-1]),
        "input": None if preprocessing == Input() else preprocessing,
        "key": options.key,
        **({"ignore": tuple(parse_names(options.ignore))} if options.ignore else {}),
        "network": _network_options(options) or None,
    }


def _network_options(options: WeightFileFlags) -> dict[str, Any]:
    """Options of the network by name. Raises InputError when a pair of --network is not NAME=VALUE."""
    network: dict[str, Any] = {"stem": options.stem} if options.stem else {}
    if options.pool:
        network["pool"] = 0 if options.pool == "global" else _parse_value(options.pool)
    if options.transform_input:
        network["transform_input"] = True
    for pair in parse_names(options.network):
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise InputError(f"--network must be comma-separated NAME=VALUE pairs, such as heads=6; got {pair!r}.")
        network[name.strip()] = _parse_value(value.strip())
    return network


def _parse_value(text: str) -> bool | int | str:
    """Parse true, false and non-negative integers; other text stays text."""
    return {"true": True, "false": False}.get(text.lower(), int(text) if text.isdecimal() and text.isascii() else text)
