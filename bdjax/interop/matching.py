"""Identification of the model of a state dict by the names and shapes of all its tensors."""

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
_SHOWN = 20  # lines of differences in a message
_MAX_PREFIXES = 8  # prefixes that are examined in one dictionary
_MAX_TRIED = 8  # candidates that a model is built for
_MAX_BUILT = 1_000  # tensors of the models built so far, after which no other model is built
_WIDEST = 16  # largest multiple of the usual width
_MAX_CHANNELS = 64  # channels of an image
_AVERAGED = "n_averaged"  # counter of torch.optim.swa_utils


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model beside its weights."""

    model: str
    classes: int | None
    """Number of classes; None: the number of outputs of the last layer."""
    size: tuple[int, int] | None
    """(H, W) of the images."""
    input: Input | None
    inputs: Mapping[str, Input] = field(default_factory=dict)
    """By dictionary: the preprocessing of its normalisation layer, in place of `input`."""
    unmatched: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By dictionary: tensors that need no counterpart in the model."""
    other_objects: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By dictionary: objects that are not plain tensors, name -> name of the type."""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """Options of the network that the user stated, because a file does not determine them."""


def with_options(facts: ModelFacts, options: Mapping[str, Any]) -> ModelFacts:
    """Return the facts with further options chosen."""
    return replace(facts, chosen={**facts.chosen, **options})


class Fit(NamedTuple):
    """Result of matching a state dict with one table of names."""

    naming: names.Naming
    model: Model
    key: str
    prefix: str
    entries: list[names.Entry]
    tensors: Mapping[str, Tensor]
    differences: list[tuple[str, str]]
    """Pairs (what the model needs, what the file has) where they differ."""
    options: names.Options
    """Options of the network, each with the alternatives that the file would also fit."""


def best_fit(file: Path, dicts: Mapping[str, Mapping[str, Tensor]], facts: ModelFacts, key: str | None) -> Fit:
    """Find the state dict and the table of names that match without a difference.

    Args:
      file: path of the weight file, for messages.
      dicts: dictionaries of tensors by their place in the file.
      facts: what is known of the model.
      key: place of the dictionary to use; None: all are tried.

    Returns:
      The match.

    Raises:
      InputError: with the differences of the nearest candidate when none matches, or when several dictionaries match.
    """
    if key is not None:
        dicts = {key: tensors_under(file, dicts, key)}
    candidates = [one for place, tensors in dicts.items() for one in _candidates(facts, place, tensors)]
    fits, errors, built = [], list[InputError](), dict[Model, int]()
    for candidate in _likeliest(candidates):
        try:
            model = _model(candidate[0], candidate[1], _shapes(*candidate[1:]))[0]
            if model in built or sum(built.values()) <= _MAX_BUILT:
                fits.append(_fit(*candidate))
                built[model] = len(fits[-1].entries)
                continue
        except InputError as error:
            errors.append(error)
            continue
        raise InputError(
            f"{file} holds several different networks that might be {facts.model}; after "
            f"{sum(built.values())} tensors no more are compared. Choose one with --key; there are some "
            f"under {_listed(dicts)}."
        )
    if errors and all(fit.differences for fit in fits):
        raise errors[0]
    if not fits:
        first = names.namings(facts.model)[0].first_weight
        place, tensors = max(dicts.items(), key=lambda item: len(item[1]))
        has = ", ".join(quote(name) for name in list(tensors)[:3])
        raise InputError(
            f"{file} is not of {facts.model}: nothing under {_listed(dicts)} ends in {first!r} with four axes; "
            f"there are {len(tensors)} tensors such as {has}. Give its --model: {', '.join(names.families())}."
        )
    least = min(len(fit.differences) for fit in fits)
    nearest = [fit for fit in fits if len(fit.differences) == least]
    if least:
        if parts := _fitting_parts(fits):
            raise InputError(
                f"{file} holds several networks that fit {facts.model}: under {_listed(dict.fromkeys(parts))}. "
                "Choose one with --key."
            )
        of_model = [fit for fit in fits if fit.naming.model == facts.model] or fits
        raise InputError(_mismatch_message(file, min(of_model, key=lambda fit: len(fit.differences))))
    if len({fit.key for fit in nearest}) > 1:
        raise InputError(
            f"{file} holds several networks that fit {facts.model}: under {_listed({fit.key: 0 for fit in nearest})}. "
            "Choose one with --key."
        )
    return nearest[0]


def tensors_under(file: Path, dicts: Mapping[str, Mapping[str, Tensor]], key: str) -> dict[str, Tensor]:
    """Select the tensors that --key names.

    Args:
      file: path of the weight file, for messages.
      dicts: dictionaries of tensors by their place in the file.
      key: place of a dictionary, or the prefix of names in one.

    Returns:
      The tensors by name.

    Raises:
      InputError: when there are none.
    """
    if key in dicts:
        return dict(dicts[key])
    for place, tensors in dicts.items():
        prefix = key if not place else key.removeprefix(f"{place}.") if key.startswith(f"{place}.") else None
        if prefix and (selected := {name: one for name, one in tensors.items() if name.startswith(f"{prefix}.")}):
            return selected
    raise InputError(f"{file} has no tensors under --key {key!r}; there are some under {_listed(dicts)}.")


def _fitting_parts(fits: list[Fit]) -> list[str]:
    """Return the keys of parts of one dictionary that are complete networks, for example averaged weights."""
    complete = [
        fit
        for fit in fits
        if fit.prefix and not any(needs or has.startswith(fit.prefix) for needs, has in fit.differences)
    ]
    parts = dict.fromkeys(
        ".".join(part for part in (fit.key, fit.prefix.removesuffix(".")) if part) for fit in complete
    )
    return list(parts) if len(parts) > 1 else []


_Candidate: TypeAlias = tuple[ModelFacts, names.Naming, str, str, Mapping[str, Tensor]]  # arguments of `_fit`


def _likeliest(candidates: list[_Candidate]) -> list[_Candidate]:
    """Return the _MAX_TRIED candidates with the names nearest to the usual model's, as a model is built for each."""
    if len(candidates) <= _MAX_TRIED:
        return candidates

    def difference_count(candidate: _Candidate) -> tuple[int, int]:
        _, naming, _, prefix, tensors = candidate
        inside = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        usual = _usual_names(naming.model, naming.label)
        return len(usual - inside), len(inside - usual) + len(tensors) - len(inside)  # deeper models have more names

    return sorted(candidates, key=difference_count)[:_MAX_TRIED]


@lru_cache
def _usual_names(model: str, label: str) -> frozenset[str]:
    """Return the tensor names of a model of the usual size and depth by one table, without the counters."""
    naming = next(one for one in names.namings_of_model(model) if one.label == label)
    usual = models.create(naming.model, (naming.side, naming.side, 3), 10)
    return frozenset(entry.name for entry in names.entries(naming, usual))


def _candidates(facts: ModelFacts, key: str, tensors: Mapping[str, Tensor]) -> list[_Candidate]:
    """Return the tables and prefixes under which a state dict has the first convolution.

    If some of them also have the last layer, only these are returned.
    """
    candidates, complete = list[_Candidate](), list[_Candidate]()
    facts = replace(facts, input=facts.inputs.get(key, facts.input))
    for naming in names.namings(facts.model):
        first, last = naming.first_weight, f"{naming.layer('head')}.weight"
        prefixes = [
            name.removesuffix(first) for name in tensors if name.endswith(first) and len(tensors[name].shape) == 4
        ]
        prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
        outer = _outermost(prefixes)
        of_naming: list[_Candidate] = [(facts, naming, key, prefix, tensors) for prefix in outer[:_MAX_PREFIXES]]
        candidates += of_naming
        complete += [candidate for candidate in of_naming if candidate[3] + last in tensors]
    return complete or candidates


def _outermost(prefixes: list[str]) -> list[str]:
    """Return the prefixes that do not start with another one."""
    outer: dict[str, None] = {}
    last = None
    for prefix in sorted(prefixes):  # sorted, a prefix follows the one that it starts with
        if last is None or not prefix.startswith(last):
            outer[prefix], last = None, prefix
    return [prefix for prefix in prefixes if prefix in outer]


def _fit(facts: ModelFacts, naming: names.Naming, key: str, prefix: str, tensors: Mapping[str, Tensor]) -> Fit:
    """Build the model of a candidate and compare all tensors."""
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    model, options = _model(facts, naming, _shapes(naming, key, prefix, tensors))
    entries = names.entries(naming, model)
    differences = _contradictions(facts, naming, options)
    objects = facts.other_objects.get(key, {})
    for entry in entries:
        tensor = inside.get(entry.name)
        needs = f"{quote(prefix + entry.name)[1:-1]} {list(entry.shape)}"
        if tensor is None:
            kind = objects.get(prefix + entry.name)
            differences.append((needs, "missing" if kind is None else f"{quote(kind)[1:-1]}, not a plain tensor"))
        elif tensor.shape != entry.shape:
            differences.append((needs, str(list(tensor.shape))))
        elif tensor.dtype not in _FLOATS:
            differences.append((needs, f"{tensor.dtype}, not floating point"))
    expected = {entry.name for entry in entries}
    expected |= {entry.name.replace("running_var", names.COUNTER) for entry in entries if entry.path[-1] == "var"}
    unmatched = facts.unmatched.get(key, frozenset())
    for name, tensor in tensors.items():
        if name in unmatched or name.rpartition(".")[2] == _AVERAGED:
            continue
        suffix = name.removeprefix(prefix) if name.startswith(prefix) else None
        if suffix is None or not (suffix in expected or suffix.startswith(naming.ignored)):
            differences.append(("", f"{quote(name)[1:-1]} {list(tensor.shape)}"))
    return Fit(naming, model, key, prefix, entries, tensors, differences, options)


def _shapes(naming: names.Naming, key: str, prefix: str, tensors: Mapping[str, Tensor]) -> names.Shapes:
    """Return the shapes of the tensors with a prefix."""
    shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in tensors.items() if name.startswith(prefix)}
    return names.Shapes(naming, shapes)


def _contradictions(facts: ModelFacts, naming: names.Naming, options: names.Options) -> list[tuple[str, str]]:
    """Return the options in which the model's name contradicts the shapes, such as a ResNet-20 with 56 layers."""
    contradictions = []
    for option, values in (naming.options_of_name(facts.model) or {}).items():
        if options[option][0] not in values:
            contradictions.append(
                (f"{facts.model}: {option} {' or '.join(map(str, values))}", f"{option} {options[option][0]}")
            )
    return contradictions


def _model(facts: ModelFacts, naming: names.Naming, shapes: names.Shapes) -> tuple[Model, names.Options]:
    """Return the model with the width, image size and options that follow from the shapes, and its options."""
    net = registry.load("models", naming.model).Net
    usual = getattr(net, "width", None)
    first, channels = shapes.named[naming.first_weight][:2]
    other_width = usual is not None and first != usual and 1 <= first <= _WIDEST * usual  # else a shape mismatch
    head = shapes("head")
    outputs = head[0] if len(head) == (4 if "head" in naming.convolved else 2) else 2
    preprocessing, image_side = facts.input or Input(), naming.image_side(shapes)
    size = facts.size or (image_side or naming.side,) * 2
    if image_side and naming.side_is_fixed and size != (image_side, image_side) and not preprocessing.resize:
        preprocessing = replace(preprocessing, resize=image_side)  # the position embedding fits one size only
    shape = (*size, min(max(channels, 1), _MAX_CHANNELS))
    seen_size = (preprocessing.resize,) * 2 if preprocessing.resize else size
    options = dict(naming.options(shapes, seen_size))
    for option, value in facts.chosen.items():
        if option not in options:
            raise InputError(
                f"{option} {value} was asked for, and {naming.model} has no {option}; it has "
                f"{', '.join(options) or 'no options'}. Leave it away, or give another --model."
            )
        options[option] = (value, *(other for other in options[option] if other != value))
    variant = models.variant({name: values[0] for name, values in options.items() if values[0] != getattr(net, name)})
    model = models.create(
        naming.model,
        shape,
        facts.classes or max(2, outputs),
        width=first if other_width else None,
        input=None if preprocessing == Input() else preprocessing,
        variant=variant,
    )
    return model, options


def _mismatch_message(file: Path, fit: Fit) -> str:
    """Return the message with the differences in two columns."""
    heads = (f"{fit.model.name} needs", "the file has")
    rows = fit.differences[:_SHOWN]
    width = max(len(heads[0]), *(len(needs) for needs, _ in rows))
    lines = [f"{needs:{width}}  {has}".rstrip() for needs, has in (heads, *rows)]
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
