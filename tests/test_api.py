"""The public Python API: objects, configs as dictionaries, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest

import bdjax
from bdjax.errors import InputError

FIT = {"epochs": 2, "batch_size": 20}


@pytest.fixture(scope="module")
def victim(blobs_npz, tmp_path_factory):
    root = tmp_path_factory.mktemp("api")
    return bdjax.train("badnets", blobs_npz, attack_config={"target": 1, "ratio": 0.3}, fit=FIT, root=root, devices=1)


def test_import_is_light_and_lists_the_api():
    code = "import sys, bdjax; assert 'jax' not in sys.modules; assert {'train', 'defend'} <= set(dir(bdjax))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(hasattr(bdjax, name) for name in bdjax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bdjax.nothing


def test_a_trained_model_is_callable(victim, blobs_npz):
    data = bdjax.load_dataset(blobs_npz)
    logits, predicted = victim(data.x_test[:5]), victim.predict(data.x_test)
    assert logits.shape == (5, len(data.classes)) and victim.classes == tuple(data.classes)
    np.testing.assert_array_equal(np.asarray(logits).argmax(1), predicted[:5])
    assert bdjax.load_model(victim.directory).manifest["hash"] == victim.manifest["hash"]
    assert victim.manifest["attack"]["config"]["target"] == 1 and victim.manifest["fit"]["epochs"] == 2


def test_defend_evaluate_and_print(victim, tmp_path):
    how = {"config": {"epochs": 1}, "split": {"size": 20}, "estimate": False, "devices": 1}
    cleaned = bdjax.defend(victim, "finetune", root=tmp_path, **how)
    assert cleaned.directory.parent == tmp_path and cleaned.result["n_defender"] == 20
    measured = bdjax.evaluate(cleaned)
    assert (measured["acc"], measured["asr"]) == (cleaned.after["acc"], cleaned.after["asr"])
    assert bdjax.evaluate(victim)["kind"] == "victim" and cleaned.before["asr"] is not None
    assert "finetune" in str(cleaned) and cleaned.figure.read_bytes() == cleaned._repr_png_()
    assert cleaned.model.manifest["kind"] == "purified"
    again = bdjax.defend(victim, "finetune", root=tmp_path, **how)
    assert again.result == cleaned.result


def test_audit(victim, tmp_path):
    audit = bdjax.audit(victim, ["universal"], size=20, configs={"universal": {"passes": 1, "scales": 2}}, devices=1)
    assert audit.poisoned == audit.result["methods"]["universal"]["poisoned"] and "universal" in str(audit)
    assert audit.draw(tmp_path / "audit.png").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: bdjax.train("badnts"), "Did you mean 'badnets'"),
        (lambda v: bdjax.train("badnets", attack_config={"goal": 1}), "has no field goal. Known: target"),
        (lambda v: bdjax.defend(v, "ibau", config=3), "or a dictionary of its fields is needed, got 3"),
        (lambda v: bdjax.load_model("nowhere.pth"), "nowhere.pth does not exist"),
        (lambda v: bdjax.audit(v, ["ibau"]), "ibau cannot audit"),
    ],
)
def test_refusals(victim, call, message):
    with pytest.raises(InputError, match=message):
        call(victim)
