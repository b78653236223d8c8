"""Records of finished runs: their fields are those that are declared, and older ones are completed when read."""

import json
from typing import get_type_hints

import pytest

from bdjax.errors import InputError
from bdjax.pipelines.results import SCHEMA, Rates, RunResult, read_result


def test_a_run_records_the_declared_fields(finished):
    result = finished[1]
    declared = set(get_type_hints(RunResult))
    assert set(result) <= declared and declared - set(result) <= {"cell"}
    assert result["schema"] == SCHEMA and set(result["before"]) <= set(get_type_hints(Rates))


def test_a_record_of_an_earlier_version_is_completed(finished, tmp_path):
    earlier = {k: v for k, v in finished[1].items() if k not in ("schema", "estimate", "detection", "data", "warnings")}
    (tmp_path / "result.json").write_text(json.dumps(earlier))
    result = read_result(tmp_path)
    assert result["schema"] == SCHEMA and result["estimate"] is None and result["warnings"] == []
    assert result["after"] == finished[1]["after"]


def test_a_record_of_a_later_version_is_refused(finished, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({**finished[1], "schema": SCHEMA + 1}))
    with pytest.raises(InputError, match=f"schema {SCHEMA + 1}.*reads up to {SCHEMA}. Update bdjax"):
        read_result(tmp_path)
    assert read_result(tmp_path / "nowhere") is None
