"""Which model a state dict is of: by the names and shapes of all its tensors, or not at all."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from bdjax import models, registry
from bdjax.errors import InputError
from bdjax.interop import names
from bdjax.interop._tensors import Tensor, quote
from bdjax.models import Input
from bdjax.types import Model

_FLOATS = ("float32", "float64", "float16", "bfloat16")
_SHOWN = 20  # lines of what does not fit
_MAX_PREFIXES = 8  # that are looked at in one dictionary
_MAX_TRIED = 8  # places and namings that a model is built for
_MAX_BUILT = 1_000  # tensors of the different models that are built until no other is
_WIDEST = 16  # times the usual width
_MAX_CHANNELS = 64  # of images
_AVERAGED = "n_averaged"  # how many models torch.optim.swa_utils took the mean of


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model beside its weights."""

    model: str
    classes: int | None
    """None: as many as the last layer has outputs."""
    size: tuple[int, int] | None
    """(H, W) of the images."""
    input: Input | None
    inputs: Mapping[str, Input] = field(default_factory=dict)
    """By dictionary: what a normalisation layer in it does, in place of `input`."""
    waived: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By dictionary: tensors that need no counterpart."""
    strange: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By dictionary: what is no plain tensor in it, name -> the name of its type."""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """Options of the network that its owner gave, which no file tells."""


def with_options(wanted: ModelFacts, options: Mapping[str, Any]) -> ModelFacts:
    """The same with more options chosen."""
    return replace(wanted, chosen={**wanted.chosen, **options})


class Fit(NamedTuple):
    """A state dict under one naming."""

    naming: names.Naming
    model: Model
    key: str
    prefix: str
    entries: list[names.Entry]
    tensors: Mapping[str, Tensor]
    differences: list[tuple[str, str]]
    """What the model needs and what the file has, where they are not the same."""
    options: names.Options
    """What the network was had with, and what else the file would fit."""


def best_fit(file: Path, dicts: Mapping[str, Mapping[str, Tensor]], wanted: ModelFacts, key: str | None) -> Fit:
    """The state dict and the naming that fit without a difference.

    Raises InputError with the differences of the nearest one, or when several dictionaries fit.
    """
    if key is not None:
        dicts = {key: tensors_under(file, dicts, key)}
    places = [one for place, tensors in dicts.items() for one in _fits(wanted, place, tensors)]
    found, errors, built = [], list[InputError](), dict[Model, int]()
    for likely in _likeliest(places):
        try:
            model = _sized(likely[0], likely[1], _shapes(*likely[1:]))[0]
            if model in built or sum(built.values()) <= _MAX_BUILT:
                found.append(_fit(*likely))
                built[model] = len(found[-1].entries)
                continue
        except InputError as error:
            errors.append(error)
            continue
        raise InputError(
            f"{file} holds several different networks that might be {wanted.model}; after "
            f"{sum(built.values())} tensors no more are compared. Choose one with --key; there are some "
            f"under {_listed(dicts)}."
        )
    if errors and all(fit.differences for fit in found):
        raise errors[0]
    if not found:
        first = names.namings(wanted.model)[0].first_weight
        place, tensors = max(dicts.items(), key=lambda item: len(item[1]))
        has = ", ".join(quote(name) for name in list(tensors)[:3])
        raise InputError(
            f"{file} is not of {wanted.model}: nothing under {_listed(dicts)} ends in {first!r} with four axes; "
            f"there are {len(tensors)} tensors such as {has}. Give its --model: {', '.join(names.families())}."
        )
    least = min(len(fit.differences) for fit in found)
    nearest = [fit for fit in found if len(fit.differences) == least]
    if least:
        if parts := _fitting_parts(found):
            raise InputError(
                f"{file} holds several networks that fit {wanted.model}: under {_listed(dict.fromkeys(parts))}. "
                "Choose one with --key."
            )
        meant = [fit for fit in found if fit.naming.model == wanted.model] or found
        raise InputError(_differing(file, min(meant, key=lambda fit: len(fit.differences))))
    if len({fit.key for fit in nearest}) > 1:
        raise InputError(
            f"{file} holds several networks that fit {wanted.model}: under {_listed({fit.key: 0 for fit in nearest})}. "
            "Choose one with --key."
        )
    return nearest[0]


def tensors_under(file: Path, dicts: Mapping[str, Mapping[str, Tensor]], key: str) -> dict[str, Tensor]:
    """The tensors that --key names: a dictionary, or what begins so in one. Raises InputError for none."""
    if key in dicts:
        return dict(dicts[key])
    for place, tensors in dicts.items():
        begin = key if not place else key.removeprefix(f"{place}.") if key.startswith(f"{place}.") else None
        if begin and (found := {name: one for name, one in tensors.items() if name.startswith(f"{begin}.")}):
            return found
    raise InputError(f"{file} has no tensors under --key {key!r}; there are some under {_listed(dicts)}.")


def _fitting_parts(found: list[Fit]) -> list[str]:
    """Keys of the parts of one dictionary, each a network of its own, as averaged weights beside the others are."""
    whole = [
        fit
        for fit in found
        if fit.prefix and not any(needs or has.startswith(fit.prefix) for needs, has in fit.differences)
    ]
    parts = dict.fromkeys(".".join(part for part in (fit.key, fit.prefix.removesuffix(".")) if part) for fit in whole)
    return list(parts) if len(parts) > 1 else []


_Place: TypeAlias = tuple[ModelFacts, names.Naming, str, str, Mapping[str, Tensor]]  # arguments of `_fit`


def _likeliest(places: list[_Place]) -> list[_Place]:
    """At most _MAX_TRIED, for a model is built for each: those whose names are nearest to the usual model's."""
    if len(places) <= _MAX_TRIED:
        return places

    def differing(place: _Place) -> tuple[int, int]:
        _, naming, _, prefix, tensors = place
        inside = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        usual = _usual_names(naming.model, naming.label)
        return len(usual - inside), len(inside - usual) + len(tensors) - len(inside)  # a deeper one has more names

    return sorted(places, key=differing)[:_MAX_TRIED]


@lru_cache
def _usual_names(model: str, label: str) -> frozenset[str]:
    """What the tensors of a model are called by one table, at the usual size and depth, without the counters."""
    naming = next(one for one in names.namings_of_model(model) if one.label == label)
    usual = models.create(naming.model, (naming.side, naming.side, 3), 10)
    return frozenset(entry.name for entry in names.entries(naming, usual))


def _fits(wanted: ModelFacts, key: str, tensors: Mapping[str, Tensor]) -> list[_Place]:
    """The state dict under each naming whose first convolution is in it, behind any prefix.

    Where the last layer of some is there, too, the others are left out.
    """
    found, whole = list[_Place](), list[_Place]()
    wanted = replace(wanted, input=wanted.inputs.get(key, wanted.input))
    for naming in names.namings(wanted.model):
        first, last = naming.first_weight, f"{naming.layer('head')}.weight"
        places = [
            name.removesuffix(first) for name in tensors if name.endswith(first) and len(tensors[name].shape) == 4
        ]
        prefixes = [place for place in places if not place or place.endswith(".")]
        outer = _outermost(prefixes)
        here: list[_Place] = [(wanted, naming, key, prefix, tensors) for prefix in outer[:_MAX_PREFIXES]]
        found += here
        whole += [place for place in here if place[3] + last in tensors]
    return whole or found


def _outermost(prefixes: list[str]) -> list[str]:
    """Those that do not begin with another one."""
    outer: dict[str, None] = {}
    last = None
    for one in sorted(prefixes):  # what begins with another one comes behind it
        if last is None or not one.startswith(last):
            outer[one], last = None, one
    return [one for one in prefixes if one in outer]


def _fit(wanted: ModelFacts, naming: names.Naming, key: str, prefix: str, tensors: Mapping[str, Tensor]) -> Fit:
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    model, options = _sized(wanted, naming, _shapes(naming, key, prefix, tensors))
    entries = names.entries(naming, model)
    differences = _contradicting(wanted, naming, options)
    strange = wanted.strange.get(key, {})
    for entry in entries:
        tensor = inside.get(entry.name)
        needs = f"{quote(prefix + entry.name)[1:-1]} {list(entry.shape)}"
        if tensor is None:
            what = strange.get(prefix + entry.name)
            differences.append((needs, "missing" if what is None else f"{quote(what)[1:-1]}, no plain tensor"))
        elif tensor.shape != entry.shape:
            differences.append((needs, str(list(tensor.shape))))
        elif tensor.dtype not in _FLOATS:
            differences.append((needs, f"{tensor.dtype}, no floating-point numbers"))
    expected = {entry.name for entry in entries}
    expected |= {entry.name.replace("running_var", names.COUNTER) for entry in entries if entry.path[-1] == "var"}
    waived = wanted.waived.get(key, frozenset())
    for name, tensor in tensors.items():
        if name in waived or name.rpartition(".")[2] == _AVERAGED:
            continue
        own = name.removeprefix(prefix) if name.startswith(prefix) else None
        if own is None or not (own in expected or own.startswith(naming.ignored)):
            differences.append(("", f"{quote(name)[1:-1]} {list(tensor.shape)}"))
    return Fit(naming, model, key, prefix, entries, tensors, differences, options)


def _shapes(naming: names.Naming, key: str, prefix: str, tensors: Mapping[str, Tensor]) -> names.Shapes:
    """Of the tensors behind the prefix of a place."""
    begun = {name.removeprefix(prefix): tensor.shape for name, tensor in tensors.items() if name.startswith(prefix)}
    return names.Shapes(naming, begun)


def _contradicting(wanted: ModelFacts, naming: names.Naming, options: names.Options) -> list[tuple[str, str]]:
    """Where the name that its owner gave says another network than the shapes do: a ResNet-20 with 56 layers."""
    found = []
    for option, values in (naming.options_of_name(wanted.model) or {}).items():
        if options[option][0] not in values:
            found.append(
                (f"{wanted.model}: {option} {' or '.join(map(str, values))}", f"{option} {options[option][0]}")
            )
    return found


def _sized(wanted: ModelFacts, naming: names.Naming, of: names.Shapes) -> tuple[Model, names.Options]:
    """The model as wide as its first convolution is, for the images that it was given, and its options."""
    net = registry.load("models", naming.model).Net
    usual = getattr(net, "width", None)
    first, channels = of.named[naming.first_weight][:2]
    other = usual is not None and first != usual and 1 <= first <= _WIDEST * usual  # else it is listed as misshapen
    head = of("head")
    outputs = head[0] if len(head) == (4 if "head" in naming.convolved else 2) else 2
    given, measured = wanted.input or Input(), naming.image_side(of)
    size = wanted.size or (measured or naming.side,) * 2
    if measured and naming.side_is_fixed and size != (measured, measured) and not given.resize:
        given = replace(given, resize=measured)  # its positions belong to one size, so its owner brings images to it
    done = None if given == Input() else given
    shape = (*size, min(max(channels, 1), _MAX_CHANNELS))
    options = dict(naming.options(of, (given.resize,) * 2 if given.resize else size))
    for option, value in wanted.chosen.items():
        if option not in options:
            raise InputError(
                f"{option} {value} was asked for, and {naming.model} has no {option}; it has "
                f"{', '.join(options) or 'no options'}. Leave it away, or give another --model."
            )
        options[option] = (value, *(one for one in options[option] if one != value))
    own = models.variant({name: values[0] for name, values in options.items() if values[0] != getattr(net, name)})
    return models.create(
        naming.model, shape, wanted.classes or max(2, outputs), width=first if other else None, input=done, variant=own
    ), options


def _differing(file: Path, fit: Fit) -> str:
    heads = (f"{fit.model.name} needs", "the file has")
    rows = fit.differences[:_SHOWN]
    wide = max(len(heads[0]), *(len(needs) for needs, _ in rows))
    lines = [f"{needs:{wide}}  {has}".rstrip() for needs, has in (heads, *rows)]
    more = len(fit.differences) - len(rows)
    left_over = all(not needs for needs, _ in fit.differences)
    where = f" (under {fit.key!r})" if fit.key else ""
    return "\n  ".join(
        [
            f"{file}{where} does not fit {fit.model.name} for {fit.model.classes} classes under the names of "
            f"{fit.naming.label}; nothing was written.",
            *lines,
            *([f"... and {more} more"] if more else []),
            *(["What is left over and the network can do without is waived by --ignore NAME."] if left_over else []),
        ]
    )


def _listed(dicts: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) if key else "the file itself" for key in list(dicts)[:8])
