"""benchmarks/compare.py: workers that fail or take too long, ratios of pairs, and the page that is written."""

import argparse
import json
import statistics
import sys
from pathlib import Path

import pytest

from bdjax import registry

HERE = Path(__file__).parents[1] / "benchmarks"
FAKE = """
import json, os, sys, time
side = sys.argv[sys.argv.index("--worker") + 1]
turns = 0
for line in sys.stdin:
    request = json.loads(line)
    name = request.get("prepare", "")
    if name == "dies":
        sys.exit(3)
    if name == "lasts" or name == "compiles" and side == "torch" and request["compiled"]:
        time.sleep(60)
    print("a library says something")
    turns += 1
    found = {"seconds": (1.0 if side == "bdjax" else 4.0) * turns, "version": side, "check": None}
    found["note"] = os.environ["GLIBC_TUNABLES"]
    if name == "differs":
        found["check"] = ord(side[0])
    print("@ " + json.dumps({"refused": "has no such workload"} if name == "none" else found), flush=True)
"""


@pytest.fixture
def compare(monkeypatch, tmp_path):
    module = registry.load_file(HERE / "compare.py")
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "fake.py"))
    return module


def compared(compare, name, tmp_path, repeats=3, limit=30.0, pages="large", compile_limit=0):
    options = argparse.Namespace(
        jax_python=sys.executable, torch_python=sys.executable, threads=1, limit=limit, repeats=repeats, pages=pages,
        cache=None, compile_limit=compile_limit,
    )  # fmt: skip
    return compare._compared({"prepare": name, "sizes": {}}, options, str(tmp_path))


def test_both_sides_run_in_turn_and_each_pair_has_its_ratio(compare, tmp_path, capfd):
    row = compared(compare, "works", tmp_path)
    assert row["bdjax"] == [2, 3, 4] and row["torch"] == [8, 12, 16]  # the first run does not count
    assert row["ratios"] == [0.25] * 3 and row["ratio"] == 0.25
    assert "a library says something" in capfd.readouterr().err


@pytest.mark.parametrize(("pages", "told"), [("large", "glibc.malloc.hugetlb=1"), ("small", "glibc.malloc.hugetlb=0")])
def test_both_sides_get_the_same_pages_of_memory(compare, tmp_path, pages, told):
    row = compared(compare, "works", tmp_path, repeats=1, pages=pages)
    assert row["bdjax_note"] == row["torch_note"] == told


@pytest.mark.parametrize(
    ("name", "limit", "words"),
    [
        ("dies", 30, "bdjax: ended early"),
        ("lasts", 0.5, "bdjax: longer than 0.5 s"),
        ("none", 30, "bdjax: has no such workload"),
        ("differs", 30, "do not compute the same: 98 and 116"),
    ],
)
def test_a_side_that_fails_is_named(compare, name, limit, words, tmp_path):
    with pytest.raises(compare.Gone, match=words):
        compared(compare, name, tmp_path, limit=limit)


def test_pytorch_is_started_again_without_compiling_where_that_takes_too_long(compare, tmp_path):
    assert compared(compare, "compiles", tmp_path, repeats=1, compile_limit=0.5)["ratios"] == [0.25]
    with pytest.raises(compare.Gone, match=r"torch: longer than 0.5 s"):
        compared(compare, "compiles", tmp_path, limit=0.5)


def test_fields_of_the_defense_are_values(compare):
    assert compare._fields(["schedule=release", "rounds=3", "clamp=true", "outer_lr=2e-3"]) == {
        "schedule": "release", "rounds": 3, "clamp": True, "outer_lr": 0.002,
    }  # fmt: skip
    with pytest.raises(SystemExit, match="FIELD=VALUE"):
        compare._fields(["fast"])


def test_the_page(compare):
    found = {"seconds": 3.0, "rounds": 2, "reached": True, "before": (0.9, 1.0), "after": (0.88, 0.05)}
    row = {
        "name": "until/v", "bdjax": [1.0, 3.0, 2.0], "torch": [4.0, 4.0, 8.0], "ratios": [0.25, 0.75, 0.25],
        "ratio": 0.25, "torch_note": "channels-last", "bdjax_version": "jax 1", "torch_version": "torch 2",
        "bdjax_found": [found] * 3, "torch_found": [{**found, "reached": False}] * 3,
    }  # fmt: skip
    facts = {
        "cores": 2,
        "threads": 2,
        "pages": "large",
        "small": True,
        "xla_flags": "",
        "date": "2026-01-01",
        "command": "python c.py",
    }
    page = compare.markdown({**facts, "rows": [row, {"name": "age", "failed": "torch: longer than 5 s"}]})
    assert "| until/v | 0.25 (0.25 to 0.75) | 2 (1 to 3) | 4 (4 to 8) | 3 | channels-last |" in page
    assert "| until/v | bdjax | 2 (1 to 3) | 2 | 3 of 3 | 90.00 → 88.00 | 100.00 → 5.00 |" in page
    assert "| until/v | torch | 4 (4 to 8) | 2 | 0 of 3 |" in page
    assert "- age: not compared (torch: longer than 5 s)" in page and "mean nothing" in page
    assert compare.line(row).startswith("until/v ") and statistics.median(row["ratios"]) == 0.25
    json.dumps(row)
