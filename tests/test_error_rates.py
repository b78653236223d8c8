"""The error rates of audits: which models there are, how they are counted, and one pair from training to table."""

import json

import numpy as np
import pytest

from experiments.audit import error_rates
from experiments.audit.error_rates import FAMILIES, HALVES, Options, population


def test_the_halves_share_no_model_and_every_backdoored_one_has_a_clean_one_beside_it():
    entries = {half: population(Options(half=half)) for half in HALVES}
    seeds = [{(row["family"], row["seed"]) for row in rows} for rows in entries.values()]
    assert not seeds[0] & seeds[1]
    for rows in entries.values():
        assert {row["family"] for row in rows} <= set(FAMILIES) and len({row["name"] for row in rows}) == len(rows)
        for backdoored, clean in zip(rows[::2], rows[1::2], strict=True):
            assert clean["kind"] == "clean" != backdoored["kind"] and clean["target"] is None
            assert (clean["family"], clean["seed"]) == (backdoored["family"], backdoored["seed"])
    assert len(entries["held_out"]) == 82


def row(kind, target, asr, accused, p_value, none=False):
    method = {"additive": {"p_value": p_value, "target": 3, "classes": [0], "seconds": 2.0, "compile": 1.0}}
    audit = {"poisoned": accused, "target": 3 if accused else None, "targets": [3], "p_value": p_value, "level": 0.05}
    without = {**audit, "poisoned": none, "methods": {"mm_bd": method["additive"]}, "level": 0.03}
    return {
        "family": "digits", "kind": kind, "seed": 0, "target": target, "name": f"digits-{kind}-0", "asr": asr,
        "images": {**audit, "methods": method}, "none": without,
    }  # fmt: skip


def test_the_table_counts_by_hand():
    """Three clean (one accused), three planted (one right, one wrong class, one missed), one not planted."""
    rows = [
        row("clean", None, None, True, 0.01), row("clean", None, None, False, 0.5),
        row("clean", None, None, False, 0.9),
        row("badnets", 3, 0.99, True, 0.001), row("blended", 4, 0.95, True, 0.02), row("sig", 3, 0.9, False, 0.6, True),
        row("wanet", 3, 0.5, True, 0.001),
    ]  # fmt: skip
    text = error_rates.table(rows)
    assert "3 clean and 3 backdoored models" in text
    assert "| 100 clean images | 0.05 | 1 of 3 [1, 91 %] | 1 of 3 [1, 91 %] | 1 |" in text
    assert "| no images | 0.03 | 0 of 3 [0, 71 %] | 0 of 3 [0, 71 %] | 1 |" in text  # it names class None, not 3
    assert "| additive | 1 of 3" in text and "| badnets |  | 1 of 1 (0) |" in text
    assert "digits-wanet-0 (50 %)" in text
    assert error_rates._area([0.5, 0.9], [0.1, 0.5]) == pytest.approx(3.5 / 4)


def test_references_are_the_clean_models_of_the_family():
    """A class that is near in every clean model, too, accuses nobody; another one does."""
    near = [0.0, 0.05, -0.05, 1.0, 0.0]
    development = []
    for shift in (0.02, -0.02, 0.01):
        reference = row("clean", None, None, False, 0.5)
        reference["images"]["methods"]["additive"]["classes"] = [value + shift * i for i, value in enumerate(near)]
        development.append(reference)
    audited = row("badnets", 1, 0.99, True, 0.01)
    audited["images"]["methods"]["additive"]["classes"] = near
    assert not error_rates.with_references(audited, development, "images")["poisoned"]
    audited["images"]["methods"]["additive"]["classes"] = [0.0, 0.9, -0.05, 1.0, 0.0]
    verdict = error_rates.with_references(audited, development, "images")
    assert verdict["poisoned"] and verdict["target"] == 1
    assert error_rates.with_references({**audited, "family": "mnist"}, development, "images") is None


def test_images_are_drawn_evenly_over_the_classes():
    labels = np.repeat(np.arange(4), [50, 5, 50, 50])
    drawn = error_rates.stratified(labels, 20)
    assert len(set(drawn.tolist())) == 20 and np.bincount(labels[drawn], minlength=4).tolist() == [5, 5, 5, 5]


@pytest.mark.slow
def test_a_pair_of_models_from_training_to_the_table(blobs_npz, tmp_path, monkeypatch):
    path = blobs_npz.removeprefix("npz:")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "blobs.npz").symlink_to(path)
    monkeypatch.setitem(error_rates.FAMILIES, "blobs", error_rates.Family("blobs", "cnn", 2))
    monkeypatch.setitem(error_rates.HALVES, "development", {"blobs": (3, ("badnets",))})
    monkeypatch.setitem(error_rates.KINDS, "badnets", ("badnets", {"size": 2}))
    monkeypatch.setattr(error_rates, "population", lambda options: [
        {"family": "blobs", "kind": kind, "seed": 3, "target": target, "name": f"blobs-{kind}-3"}
        for kind, target in (("badnets", 1), ("clean", None))
    ])  # fmt: skip
    options = Options(tmp_path / "data", tmp_path / "out", "development", ("blobs",), images=16)
    error_rates.main(options)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows-development.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["badnets", "clean"] and rows[0]["images"]["n"] == 16
    assert set(rows[0]["none"]["methods"]) == {"leaves", "mm_bd", "synthetic"}
    assert "1 clean and" in (tmp_path / "out" / "table-development.md").read_text()
    error_rates.main(options)  # nothing is measured twice
    assert len((tmp_path / "out" / "rows-development.jsonl").read_text().splitlines()) == 2
