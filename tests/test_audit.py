"""`bdjax audit`: every method that can judge is asked, the verdict is theirs, evidence is written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import bdjax, refused
from conftest import perceptron

from bdjax import registry
from bdjax.defenses._pool import Pool
from bdjax.engine.callbacks import Recorder
from bdjax.errors import InputError
from bdjax.pipelines import audit
from bdjax.pipelines.audit import AuditSettings
from bdjax.pipelines.context import Context
from bdjax.pipelines.opening import open_recorded
from bdjax.reports import audit as report
from bdjax.types import DefenderView, Scores, Victim

DETECTORS = registry.names("detectors")


@pytest.fixture(scope="module")
def quick():
    """Configs that make the methods short."""
    short = {
        "neural_cleanse": {"epochs": 2}, "baeraser": {"iterations": 2, "hidden": 8, "noise_size": 8},
        "additive": {"steps": 4}, "mm_bd": {"steps": 4}, "patch": {"steps": 4},
        "synthetic": {"images": 8, "image_steps": 4, "steps": 4},
        "leaves": {"images": 8, "steps": 4},
    }  # fmt: skip
    return {name: registry.load("detectors", name).Config(**fields) for name, fields in short.items()}


@pytest.fixture(scope="module")
def audited(finished, quick):
    settings = AuditSettings(configs=quick)
    return audit.audit(finished[0] / "victim", DETECTORS, size=20, settings=settings, context=Context(1))


def test_every_method_that_detects_is_asked_and_the_victim_is_known_for_one(audited):
    result, arrays = audited
    assert list(result["methods"]) == DETECTORS and {"age", "neural_cleanse", "universal"} <= set(DETECTORS)
    assert result["n"] == 20 and result["truth"] == {"poisoned": True, "attack": "badnets"}
    for own in result["methods"].values():
        assert len(own["classes"]) == len(result["classes"]) and own["seconds"] > 0
    assert arrays["neural_cleanse/recovered"].shape[0] == len(result["classes"])
    assert arrays["universal/perturbation"].shape == (1, *arrays["clean"].shape[1:])
    json.dumps(result, allow_nan=False)


def test_a_method_that_takes_long_is_asked_only_by_name(finished, monkeypatch):
    asked = []

    def said(name):
        asked.append(name)
        return Scores(np.zeros(4, np.float32), 0, 0.0, False)

    for name in DETECTORS:
        monkeypatch.setattr(registry.load_module("detectors", name), "detect", lambda *_, name=name: said(name))
    audit.audit(finished[0] / "victim", size=20, context=Context(1))
    assert asked == ["additive", "patch"]
    assert {"age", "baeraser", "neural_cleanse", "universal"} <= set(DETECTORS) - set(asked)
    asked.clear()
    audit.audit(finished[0] / "victim", dataset="none", context=Context(1))
    assert asked == ["leaves", "mm_bd", "synthetic"]


def test_the_same_seed_gives_the_same_judgement_and_the_methods_are_those_chosen(audited, finished):
    again, _ = audit.audit(finished[0] / "victim", ["universal", "age"], size=20, context=Context(1))
    assert list(again["methods"]) == ["universal", "age"]
    for name, own in again["methods"].items():
        assert own["classes"] == audited[0]["methods"][name]["classes"]
    purified, _ = audit.audit(finished[0], ["age"], size=20, context=Context(1))
    assert purified["hash"] != again["hash"] and purified["truth"] is None


NOBODY = {"poisoned": False, "target": None, "targets": [], "accused_by": [], "p_value": None}


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ([], NOBODY),
        ([("a", False, 3), ("b", True, 1)], NOBODY),
        ([("a", True, 3), ("b", True, 1)], NOBODY),
        ([("a", False, 1), ("b", True, 1)], NOBODY),  # a names the class, but does not accuse
        ([("a", True, 3)], {"poisoned": True, "target": 3, "targets": [3], "accused_by": ["a"]}),
        (
            [("a", True, 3), ("b", True, 1), ("c", True, 1)],
            {"poisoned": True, "target": 1, "targets": [1], "accused_by": ["b", "c"]},
        ),
    ],
)
def test_two_accusers_of_one_class_are_needed_or_the_only_one_asked(says, expected):
    assert audit.combine({name: {"poisoned": p, "target": t} for name, p, t in says}) == {**NOBODY, **expected}


def finding(p_value, target, targets=None):
    poisoned = p_value is None or p_value <= 0.01
    return {"poisoned": poisoned, "target": target, "targets": targets or [], "p_value": p_value}


def test_p_values_are_corrected_for_the_number_of_detectors_and_decide_alone():
    weak = {"a": finding(0.02, 3), "b": finding(0.5, 1), "c": finding(0.9, 2)}  # 0.02 * 3 > 0.05
    assert audit.combine(weak) == {**NOBODY, "p_value": pytest.approx(0.06)}
    strong = {**weak, "a": finding(0.01, 3), "d": finding(None, 3), "e": finding(None, 1)}
    verdict = audit.combine(strong)
    assert (verdict["poisoned"], verdict["target"], verdict["targets"]) == (True, 3, [3])
    assert verdict["accused_by"] == ["a", "d"] and verdict["p_value"] == pytest.approx(0.03)
    assert not audit.combine({"a": finding(0.5, 3), "d": finding(None, 1), "e": finding(None, 1)})["poisoned"]
    assert not audit.combine(strong, 0.02)["poisoned"]


def test_several_targets_are_reported_the_surest_first():
    verdict = audit.combine({"a": finding(0.01, 3, [3, 5]), "b": finding(0.0001, 7, [7]), "c": finding(0.6, 0)})
    assert verdict["targets"] == [7, 3, 5] and verdict["target"] == 7 and verdict["accused_by"] == ["b"]


def test_the_budget_stops_before_the_next_detector_and_says_what_did_not_run(finished, quick):
    spoken = []
    settings = AuditSettings(configs=quick, budget=1e-3)
    result, _ = audit.audit(
        finished[0] / "victim", ["mm_bd", "additive", "patch"], size=20, settings=settings, context=Context(1),
        say=lambda name, found: spoken.append((name, found["target"])),
    )  # fmt: skip
    assert list(result["methods"]) == ["mm_bd"] and result["skipped"] == ["additive", "patch"]
    assert spoken == [("mm_bd", result["methods"]["mm_bd"]["target"])]
    assert "not run, because the budget was spent: additive, patch" in report.table(result)


def test_without_images_only_detectors_run_that_need_none(finished, quick, tmp_path):
    settings = AuditSettings(configs=quick)
    result, arrays = audit.audit(finished[0] / "victim", dataset="none", settings=settings, context=Context(1))
    assert (
        list(result["methods"]) == ["leaves", "mm_bd", "synthetic"]
        and result["n"] == 0
        and result["level"] == 0.03
        and "accuracy" not in result
    )
    assert "without clean images" in report.table(result)
    assert report.draw(result, arrays, tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(InputError, match="additive need clean images. Give some by --clean-data"):
        audit.audit(finished[0] / "victim", ["additive"], dataset="none")


def test_reference_models_replace_the_comparison_of_the_classes(finished, quick):
    """The model beside two copies of itself: nothing of it is unusual."""
    victim, settings = finished[0] / "victim", AuditSettings(configs=quick)
    twin = open_recorded(victim)
    copies = dataclasses.replace(settings, references=(twin, twin))
    alone, _ = audit.audit(victim, ["additive"], size=20, settings=settings, context=Context(1))
    beside, _ = audit.audit(victim, ["additive"], size=20, settings=copies, context=Context(1))
    assert beside["methods"]["additive"]["classes"] == alone["methods"]["additive"]["classes"]
    assert beside["references"] == [str(victim)] * 2 and alone["references"] == []
    assert beside["methods"]["additive"]["p_value"] == 1 and not beside["poisoned"]
    with pytest.raises(InputError, match="two clean reference models"):
        AuditSettings(references=(twin,))
    with pytest.raises(InputError, match="is the audited model itself"):
        audit.audit(victim, ["additive"], size=20, references=[victim], context=Context(1))
    for fields, message in (
        ({"level": 0.5}, r"level of an audit must be in \(0, 0.3\]"),
        ({"budget": 0}, "must be positive"),
    ):
        with pytest.raises(InputError, match=message):
            AuditSettings(**fields)


def test_the_columns_of_the_table_stand_under_their_heads():
    own = {"poisoned": True, "target": 1, "score": 0.5, "seconds": 2.0}
    methods = {"age": own, "targeted_unlearning": {**own, "poisoned": False, "score": None}, "m" * 30: own}
    result = {"directory": "d", "model": "m", "dataset": "s", "n": 3, "seed": 0, "classes": ["0", "cat"], **NOBODY}
    lines = report.table({**result, "methods": methods}).splitlines()
    rows = lines[2:6]
    for column, values in (("verdict", ("poisoned", "clean", "poisoned")), ("class", ("1 (cat)",) * 3)):
        ends = [row.index(word) + len(word) for row, word in zip(rows, (column, *values), strict=True)]
        assert len(set(ends)) == 1, column
    assert len({len(row) for row in rows}) == 1 and "p-value: probability" in lines[-1]


def test_table_and_picture_name_the_class_and_the_accusers(audited, tmp_path):
    result, arrays = audited
    accused = {**result, "poisoned": True, "target": 1, "accused_by": ["universal"]}
    assert "towards class 1" in report.table(accused).splitlines()[0] and "by universal" in report.verdict(accused)
    innocent = {**result, "poisoned": False, "target": None, "accused_by": []}
    assert "does not prove that the model is clean" in report.table(innocent)
    assert report.draw(accused, arrays, tmp_path / "a.png").stat().st_size > 5000


def test_the_command_writes_its_evidence_beside_the_model(finished, tmp_path, capsys):
    out = tmp_path / "evidence"
    said = bdjax(capsys, "audit", finished[0], "--methods", "age,universal", "--size", 20, "--out", out, "--json")
    result = json.loads(said.splitlines()[-1])
    assert (
        json.loads((out / "audit.json").read_text())["methods"].keys() == {"age", "universal"} == set(result["methods"])
    )
    assert (out / "audit.png").exists() and "universal" in said


def test_fields_of_the_named_detectors_are_flags(finished, tmp_path, capsys):
    flags = ("--methods", "additive", "--additive.sources", "each", "--additive.steps", 3)
    bdjax(capsys, "audit", finished[0], *flags, "--size", 20, "--out", tmp_path / "pairs")
    config = json.loads((tmp_path / "pairs" / "audit.json").read_text())["methods"]["additive"]["config"]
    assert config["sources"] == "each" and config["steps"] == 3
    assert "steps must be at least 1" in refused(
        capsys, "audit", finished[0], "--methods", "additive", "--additive.steps", 0
    )
    assert "--patch.steps" in refused(capsys, "audit", finished[0], *flags, "--patch.steps", 3)


def test_what_cannot_be_audited_is_refused(finished, tmp_path, capsys):
    with pytest.raises(InputError, match=r"ibau cannot audit. Choose from additive, age, "):
        audit.audit(finished[0], ["ibau"])
    with pytest.raises(InputError, match=r"--size must be from 1 to 40.* got 0"):
        audit.audit(finished[0], size=0)
    with pytest.raises(InputError, match=r"additive got 1 clean images; it needs two"):
        audit.audit(finished[0], ["additive"], size=1)
    assert "nowhere" in refused(capsys, "audit", tmp_path / "nowhere")
    assert "usage: bdjax audit" in refused(capsys, "audit")


def test_images_are_drawn_by_the_seed_without_repetition(finished):
    artifact = open_recorded(audit.checkpoint.model_directory(finished[0]))
    one, other = (audit._draw_images(artifact, 20, seed)[0] for seed in (0, 1))
    assert (one != other).any() and len(np.unique(one.reshape(20, -1), axis=0)) == 20


def test_baeraser_accuses_the_label_whose_triggers_survive(blobs, monkeypatch):
    module, model = registry.load_module("detectors", "baeraser"), perceptron()
    pool = Pool(
        jnp.zeros((8, 3, 3, 1)), jnp.array([0, 0, 1, 1, 2, 2, 3, 3], jnp.int32),
        jnp.array([0.1, 0.3, 0.8, 0.95, 0.2, 0.0, 0.4, 0.5]), jnp.arange(8) == 3,
    )  # fmt: skip
    seen = Recorder(lambda *_: None)
    monkeypatch.setattr(module, "recover", lambda *_: pool)
    victim = Victim(model, model.init(jax.random.key(0)))
    found = module.detect(module.Config(), victim, DefenderView(*blobs, seen), jax.random.key(0))
    np.testing.assert_allclose(found.classes, [0.3, 0.95, 0.2, 0.5], rtol=1e-6)
    assert (found.target, found.poisoned) == (1, True) and found.score == pytest.approx(0.95)
    assert seen.arrays["recovered"].shape == (1, 3, 3, 1) and seen.arrays["recovered_labels"].tolist() == [1]
    pool = pool._replace(accepted=jnp.zeros(8, bool))
    found = module.detect(module.Config(), victim, DefenderView(*blobs), jax.random.key(0))
    assert (found.target, found.poisoned) == (1, False)


def test_a_class_without_an_image_is_left_open_where_images_are_given(finished):
    artifact = open_recorded(audit.checkpoint.model_directory(finished[0]))
    images, labels = artifact.evaluation.images, artifact.evaluation.labels
    found, _ = audit.run_detectors(artifact, images[labels != 3], labels[labels != 3], ["age"], context=Context(1))
    scores = found["methods"]["age"]["classes"]
    assert scores[3] is None and None not in scores[:3] and found["methods"]["age"]["target"] != 3
    assert "age" in report.table(found)
