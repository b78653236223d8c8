"""The published numbers of a run: those that its cell selects, or those whose names are the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from bdjax.reports import papers

_OTHER_NAMES = {
    "neuralcleanse": "nc",
    "deepinspect": "di",
    "dpsgd": "dp",
    "finetune": "basicft",
    "smallvgg": "simplifiedvgg",
    "vitb32": "vitb32clip",
}
"""Names of bdjax and those of the papers, both as :func:`_plain` writes them, where they are not the same."""


def published(names: Sequence[str], query: Mapping[str, Any] | None, tables: Sequence[dict[str, str]]) -> str:
    """The published ACC and ASR after a defense, as text.

    Args:
      names: attack, data set, model and defense.
      query: filter of the run's cell; None: the rows with the same names are taken.
      tables: rows of the papers' tables; empty: there are none.

    Returns:
      "PAPER, table T: ACC / ASR" in percent, several with semicolons; a ~ before those that were found by their names,
      whose settings may be others.

    Raises:
      InputError: the filter selects no value or several.
    """
    if not tables:
        return ""
    if query:
        values = papers.published_values(query, list(tables))
        return _shown(query.get("paper", ""), query.get("table", ""), values["acc_after"][0], values["asr_after"][0])
    return "; ".join(f"~ {text}" for text in _of_same_names(names, tables))


def _of_same_names(names: Sequence[str], tables: Sequence[dict[str, str]]) -> list[str]:
    """The numbers of each table that has exactly one setting with these names."""
    wanted = tuple(_OTHER_NAMES.get(name, name) for name in map(_plain, names))
    settings: dict[tuple[str, str], dict[tuple[str, str], dict[str, str]]] = {}
    for row in tables:
        if row["metric"] not in ("ACC", "ASR"):
            continue
        if tuple(_plain(row[name]) for name in ("attack", "dataset", "model", "defense")) == wanted:
            of_table = settings.setdefault((row["paper"], row["table"]), {})
            of_table.setdefault((row["attack_setting"], row["defense_setting"]), {})[row["metric"]] = row["value"]
    return [
        _shown(paper, table, values.get("ACC", ""), values.get("ASR", ""))
        for (paper, table), by_setting in settings.items()
        if len(by_setting) == 1
        for values in by_setting.values()
    ]


def _plain(name: str) -> str:
    """The letters and digits of a name, in lower case."""
    return "".join(character for character in name.lower() if character.isalnum())


def _shown(paper: str, table: str, acc: str, asr: str) -> str:
    return f"{paper}, table {table}: {acc or '–'} / {asr or '–'}"
