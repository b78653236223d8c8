"""VGG networks for CIFAR: with a single dense layer (kuangliu, BackdoorBox) or several (weiaicunzai, others)."""

import re
from math import isqrt
from typing import Any

from bdjax.interop.names import Naming, Options, Shapes

_PLANS = {
    11: ((1, 1, 2, 2, 2),), 13: ((2, 2, 2, 2, 2),), 16: ((2, 2, 3, 3, 3),),
    19: ((2, 2, 4, 4, 4), (2, 2, 4, 4, 5)),  # weiaicunzai's has one more convolution in the last block
}  # fmt: skip
_LABELS: dict[tuple[int, ...], str] = {
    (0, 3, 6): "chenyaofo",
    (0, 3, 5): "weiaicunzai",
    (1, 4, 6): "backdoor-toolbox",
}
_PLACES = ((0,), (1,), (0, 3, 6), (0, 3, 5), (1, 4, 6), (0, 2, 4), (1, 4, 7), (1, 3, 5), (0, 2), (0, 3), (1, 3), (1, 4))
"""Positions of the dense layers in `classifier`, between ReLU and dropout."""


def _blocks(shapes: Shapes) -> tuple[int, ...]:
    """Return the number of convolutions of each block; a pooling takes one position between two blocks."""
    step = 3 if len(shapes("features.1")) == 1 else 2
    plan, index = [0], 0
    while len(plan) <= 16 and index < 500:
        if len(shapes(f"features.{index}")) == 4:
            plan[-1], index = plan[-1] + 1, index + step
        elif len(shapes(f"features.{index + 1}")) == 4:
            plan, index = [*plan, 0], index + 1
        else:
            break
    return tuple(plan)


def _options(shapes: Shapes, size: tuple[int, int]) -> Options:
    plan, hidden = _blocks(shapes), list[int]()
    while units := shapes(f"hidden{len(hidden) + 1}"):
        hidden.append(units[0])
    return {
        "plan": (plan if len(plan) == 5 and all(0 < count <= 16 for count in plan) else (2, 2, 3, 3, 3),),
        "normed": (len(shapes("features.1")) == 1,),
        "biased": (bool(shapes("features.0", "bias")),),
        "hidden": (tuple(hidden),),
    }


def _side(shapes: Shapes) -> int:
    """Return the side of the images, which five poolings reduce to a 32nd before the first dense layer."""
    dense = shapes("hidden1") or shapes("head")
    places = dense[1] // max(1, 8 * shapes("features.0")[0]) if len(dense) == 2 else 0
    return 32 * isqrt(places) if places and isqrt(places) ** 2 == places else 0


def _name_options(name: str) -> Options | None:
    match = re.fullmatch(r"vgg_?(11|13|16|19)(_?bn)?(?:_cifar\d*)?", name)
    if match is None:
        return None
    plans = {"plan": _PLANS[int(match[1])]}
    return {**plans, "normed": (True,)} if match[2] else plans


def _naming(places: tuple[int, ...] | None) -> Naming:
    shared: dict[str, Any] = {
        "first": "features.0", "side": 32, "image_side": _side, "options": _options, "name_options": _name_options,
    }  # fmt: skip
    if places is None:
        return Naming("vgg_cifar", "kuangliu", {"head": "classifier"}, flattened=("head", "block5"), **shared)
    layers = {f"hidden{index}": f"classifier.{place}" for index, place in enumerate(places[:-1], 1)}
    layers["head"] = f"classifier.{places[-1]}"
    label = _LABELS.get(places) or f"classifier.{' .'.join(map(str, places))}"
    return Naming("vgg_cifar", label, layers, flattened=(next(iter(layers)), "block5"), **shared)


NAMINGS = tuple(map(_naming, (None, *_PLACES)))
