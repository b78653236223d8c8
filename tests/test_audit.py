"""`bdjax audit`: every method that can judge is asked, the verdict is theirs, evidence is written."""

import json

import numpy as np
import pytest
from commands import bdjax, refused

from bdjax import audit, registry
from bdjax.errors import InputError
from bdjax.report import audit as report
from bdjax.victim import Context


@pytest.fixture(scope="module")
def quick():
    """Configs that make the methods short."""
    return {"neural_cleanse": registry.load("defenses", "neural_cleanse").Config(epochs=2)}


@pytest.fixture(scope="module")
def audited(finished, quick):
    return audit.audit(finished[0] / "victim", configs=quick, size=20, context=Context(1))


def test_every_method_that_detects_is_asked_and_the_victim_is_known_for_one(audited):
    result, arrays = audited
    assert list(result["methods"]) == audit.methods() and {"age", "neural_cleanse", "universal"} <= set(audit.methods())
    assert result["n"] == 20 and result["truth"] == {"poisoned": True, "attack": "badnets"}
    for own in result["methods"].values():
        assert len(own["classes"]) == len(result["classes"]) and own["seconds"] > 0
    assert arrays["neural_cleanse/recovered"].shape[0] == len(result["classes"])
    assert arrays["universal/perturbation"].shape == (1, *arrays["clean"].shape[1:])
    json.dumps(result, allow_nan=False)


def test_the_same_seed_gives_the_same_judgement_and_the_methods_are_those_chosen(audited, finished):
    again, _ = audit.audit(finished[0] / "victim", names=["universal", "age"], size=20, context=Context(1))
    assert list(again["methods"]) == ["universal", "age"]
    for name, own in again["methods"].items():
        assert own["classes"] == audited[0]["methods"][name]["classes"]
    purified, _ = audit.audit(finished[0], names=["age"], size=20, context=Context(1))
    assert purified["hash"] != again["hash"] and purified["truth"] is None


NOBODY = {"poisoned": False, "target": None, "accused_by": []}


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ([], NOBODY),
        ([("a", False, 3), ("b", True, 1)], NOBODY),
        ([("a", True, 3), ("b", True, 1)], NOBODY),
        ([("a", False, 1), ("b", True, 1)], NOBODY),  # a names the class, but does not accuse
        ([("a", True, 3)], {"poisoned": True, "target": 3, "accused_by": ["a"]}),
        ([("a", True, 3), ("b", True, 1), ("c", True, 1)], {"poisoned": True, "target": 1, "accused_by": ["b", "c"]}),
    ],
)
def test_two_accusers_of_one_class_are_needed_or_the_only_one_asked(says, expected):
    assert audit.verdict({name: {"poisoned": p, "target": t} for name, p, t in says}) == expected


def test_table_and_picture_name_the_class_and_the_accusers(audited, tmp_path):
    result, arrays = audited
    accused = {**result, "poisoned": True, "target": 1, "accused_by": ["universal"]}
    assert "towards class 1" in report.table(accused).splitlines()[0] and "by universal" in report.verdict(accused)
    innocent = {**result, "poisoned": False, "target": None, "accused_by": []}
    assert "no agreed sign of a backdoor" in report.table(innocent)
    assert report.draw(accused, arrays, tmp_path / "a.png").stat().st_size > 5000


def test_the_command_writes_its_evidence_beside_the_model(finished, tmp_path, capsys):
    out = tmp_path / "evidence"
    said = bdjax(capsys, "audit", finished[0], "--methods", "age,universal", "--size", 20, "--out", out, "--json")
    result = json.loads(said.splitlines()[-1])
    assert (
        json.loads((out / "audit.json").read_text())["methods"].keys() == {"age", "universal"} == set(result["methods"])
    )
    assert (out / "audit.png").exists() and "universal" in said


def test_what_cannot_be_audited_is_refused(finished, tmp_path, capsys):
    with pytest.raises(InputError, match=r"ibau cannot audit. Choose from age, "):
        audit.audit(finished[0], names=["ibau"])
    with pytest.raises(InputError, match=r"--size must be from 1 to 40.* got 0"):
        audit.audit(finished[0], size=0)
    with pytest.raises(InputError, match=r"no clean image of class"):
        audit.audit(finished[0], size=1)
    assert "nowhere" in refused(capsys, "audit", tmp_path / "nowhere")
    assert "usage: bdjax audit" in refused(capsys, "audit")


def test_images_are_drawn_by_the_seed_without_repetition(finished):
    suspect = audit.read_recorded(audit.checkpoint.model_directory(finished[0]))
    one, other = (audit._chosen(suspect, 20, seed)[0] for seed in (0, 1))
    assert (one != other).any() and len(np.unique(one.reshape(20, -1), axis=0)) == 20


def test_a_class_without_an_image_is_left_open_where_images_are_given(finished):
    suspect = audit.read_recorded(audit.checkpoint.model_directory(finished[0]))
    images, labels = suspect.evaluation.images, suspect.evaluation.labels
    found, _ = audit.judge(suspect, images[labels != 3], labels[labels != 3], ["age"], context=Context(1))
    scores = found["methods"]["age"]["classes"]
    assert scores[3] is None and None not in scores[:3] and found["methods"]["age"]["target"] != 3
    assert "age" in report.table(found)
