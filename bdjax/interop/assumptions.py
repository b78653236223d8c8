"""Options of a network that a weight file does not determine: defaults, alternatives, and their accuracies."""

from collections.abc import Callable, Mapping
from typing import Any

from bdjax.errors import InputError
from bdjax.interop import matching
from bdjax.types import Model, Variables

Measure = Callable[[Model, Variables], float]
"""Accuracy of a model on clean images, as a fraction."""


def best_variant(
    fit: matching.Fit, facts: matching.ModelFacts, refit: Callable[[matching.ModelFacts], matching.Fit],
    variables: Variables, measure: Measure,
) -> tuple[matching.Fit, list[dict[str, Any]]]:  # fmt: skip
    """Select the network with the highest accuracy, the earliest among equals.

    One option after the other is varied, with the best values of the options before it, so a network is built for each
    value and not for each combination.

    Args:
      fit: the fit with the default options.
      facts: what is known of the model.
      refit: `refit(facts) -> fit` with other options and the same weights.
      variables: the weights.
      measure: accuracy of a model on clean images.

    Returns:
      (the best fit, a list of {"options", "acc"}); "acc" is None where the images do not fit a network. Exceptions of
      `measure` on the default network are passed on.
    """
    open_options = {
        name: values for name, values in fit.options.items() if len(values) > 1 and name not in facts.chosen
    }
    tried: list[dict[str, Any]] = []
    first = {name: values[0] for name, values in open_options.items()}
    best = (float(measure(fit.model, variables)), first, fit)
    tried.append({"options": first, "acc": best[0]})

    def attempt(options: dict[str, Any]) -> tuple[float, dict[str, Any], matching.Fit] | None:
        try:
            variant = refit(matching.with_options(facts, options))
            acc = float(measure(variant.model, variables))
        except InputError:
            tried.append({"options": options, "acc": None})
            return None
        tried.append({"options": options, "acc": acc})
        return acc, options, variant

    for name, values in open_options.items():
        attempts = [attempt({**best[1], name: value}) for value in values[1:]]
        best = max([best, *(result for result in attempts if result is not None)], key=lambda result: result[0])
    return best[2], tried


def assumption_record(fit: matching.Fit, stated: Mapping[str, Any], tried: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the manifest's record of the options.

    Args:
      fit: the chosen fit.
      stated: options that the user stated.
      tried: result of :func:`best_variant`.

    Returns:
      option -> {"value", "instead_of": alternatives, "by": "default", "flag" or "accuracy"}.
    """
    measured = {option for attempt in tried for option in attempt["options"]}
    record: dict[str, Any] = {}
    for option, values in fit.options.items():
        if len(values) > 1 or option in stated:
            by = "flag" if option in stated else "accuracy" if option in measured else "default"
            record[option] = {"value": values[0], "instead_of": list(values[1:]), "by": by}
    return record


def option_flag(option: str, value: Any) -> str:
    """Return the command-line flag of an option, such as `--stem max`."""
    if option == "pool" and value == 0:
        value = "global"
    if option == "transform_input":
        return "--transform-input" if value else "no --transform-input"
    return f"--{option} {value}" if option in ("stem", "pool") else f"--network {option}={value}"


def describe(assumed: Mapping[str, Any], tried: list[dict[str, Any]], note: str = "") -> list[str]:
    """Describe the chosen and the tried options for the user.

    Args:
      assumed: result of :func:`assumption_record`.
      tried: result of :func:`best_variant`.
      note: further line, "" for none.

    Returns:
      The lines.
    """
    lines = []
    for option, record in assumed.items():
        others = " or ".join(option_flag(option, value) for value in record["instead_of"])
        reason = {"default": "assumed", "flag": "as given", "accuracy": "the most accurate"}[record["by"]]
        alternatives = f"; the file would fit {others}, too" if others else ""
        lines.append(f"{option_flag(option, record['value'])} ({reason}{alternatives})")
    for attempt in tried:
        options = ", ".join(option_flag(option, value) for option, value in attempt["options"].items())
        acc = "these images do not fit it" if attempt["acc"] is None else f"accuracy {attempt['acc']:.4f}"
        lines.append(f"tried {options or 'the one that fits'}: {acc}")
    return [*lines, *([note] if note else [])]
