"""`bdjax inspect`: its numbers against plain computations, the anchors of BEC, what it refuses, table and picture."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import bdjax, refused

from bdjax.attacks import badnets
from bdjax.config import Experiment
from bdjax.engine import FitConfig
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines import inspection
from bdjax.pipelines.evaluate import evaluate
from bdjax.pipelines.opening import EvaluationSource, open_recorded
from bdjax.pipelines.training import train
from bdjax.reports import inspection as report


def inspect(victim, purified, clean=None, **options):
    return inspection.inspect(inspection.InspectionRequest(victim, purified, clean, **options))


def trained(directory, dataset, attack, config=None, seed=1, **options):
    fit = FitConfig(epochs=2, batch_size=40)
    return train(Experiment(attack, None, dataset, seed=seed, attack_config=config, fit=fit), directory)


@pytest.fixture(scope="module")
def places(finished, blobs_npz, tmp_path_factory):
    root = tmp_path_factory.mktemp("inspection")
    return {
        "victim": finished[0] / "victim",
        "purified": finished[0] / "purified",
        "clean": trained(root / "clean", blobs_npz, "clean"),
        "other": trained(root / "other", blobs_npz, "badnets", badnets.Config(labels="all_to_all"), 0),
    }


@pytest.fixture(scope="module")
def result(places):
    return inspect(places["victim"], places["purified"], places["clean"])


def altered(source, target, **changes):
    """A copy of a model directory with other entries in its manifest."""
    shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(checkpoint.manifest_text({**manifest, **changes}))
    return target


def test_rates_are_those_of_evaluate_and_of_the_run(result, finished, places):
    found = evaluate(places["purified"])
    assert result["rates"]["purified"] == {name: found[name] for name in ("acc", "asr", "asr_with_target", "ctca")}
    assert result["rates"]["victim"] == finished[1]["before"] and result["rates"]["purified"] == finished[1]["after"]
    assert (result["n_test"], result["n_asr"]) == (found["n_test"], found["n_asr"]) == (20, finished[1]["n_asr"])
    weights = np.array(result["class_n"]) / 20
    for name in ("victim", "purified", "clean"):
        assert np.dot(weights, result["class_accuracy"][name]) == pytest.approx(result["rates"][name]["acc"])


def test_layers_by_hand(result, places):
    """TAC of every channel, the victim's largest, and CKA of exactly these on the eligible triggered images."""
    artifacts = {name: open_recorded(places[name]) for name in ("victim", "purified", "clean")}
    evaluation = artifacts["purified"].evaluation
    pairs = [images[evaluation.labels != 1] for images in (evaluation.images, evaluation.triggered)]
    assert result["n_triggered"] == len(pairs[0]) and result["n_clean"] == 20
    seen = {
        name: [s.victim.model.apply(s.victim.variables, jnp.asarray(x / 255, jnp.float32))[1] for x in pairs]
        for name, s in artifacts.items()
    }
    assert [row["name"] for row in result["layers"]] == ["block1", "block2", "block3"]
    for row, count in zip(result["layers"], (2, 3, 6), strict=True):
        name = row["name"]
        tac = {
            model: np.sqrt((np.asarray(after[name] - before[name], float) ** 2).sum((1, 2))).mean(0)
            for model, (before, after) in seen.items()
        }
        top = np.argsort(-tac["victim"])[:count]
        assert row["top"]["0.1"]["channels"] == top.tolist() and row["shape"] == [*seen["victim"][0][name].shape[1:]]
        assert row["tac"]["max"] == pytest.approx(tac["victim"].max(), rel=1e-4)
        assert row["tac"]["median"] == pytest.approx(np.median(tac["victim"]), rel=1e-4)
        for model, values in tac.items():
            assert row["tac"]["top"][model] == pytest.approx(values[top].mean(), rel=1e-4)
        inside = {
            m: np.asarray(after[name][..., top], float).reshape(len(pairs[0]), -1) for m, (_, after) in seen.items()
        }
        inside = {model: x - x.mean(0) for model, x in inside.items()}
        alike = {
            m: np.linalg.norm(inside["victim"].T @ x) ** 2
            / np.linalg.norm(x.T @ x) / np.linalg.norm(inside["victim"].T @ inside["victim"])
            for m, x in inside.items()
        }  # fmt: skip
        found = row["top"]["0.1"]
        assert found["cka_purified"] == pytest.approx(alike["purified"], abs=1e-4)
        assert found["cka_clean"] == pytest.approx(alike["clean"], abs=1e-4)
        by_hand = (alike["purified"] - alike["clean"]) / max(1 - alike["clean"], 1e-3)
        assert found["bec"] == pytest.approx(by_hand, abs=5e-3)


def test_means(result, places):
    mean, rows = result["means"]["0.2"], [row["top"]["0.2"] for row in result["layers"]]
    assert mean["bec"] == pytest.approx(np.mean([row["bec"] for row in rows]))
    assert mean["bec_sigmoid"] == pytest.approx(1 / (1 + np.exp(-10 * (mean["bec"] - 0.5))), rel=1e-4)
    some = inspect(places["victim"], places["purified"], places["clean"], share=0.5)
    assert some["counted"] == ["block2", "block3"] and len(some["layers"]) == 3
    assert some["means"]["0.2"]["cka_clean"] == pytest.approx(np.mean([row["cka_clean"] for row in rows[1:]]))


@pytest.mark.slow
def test_bec_is_one_for_the_victim_and_zero_for_the_clean_model(places):
    same = inspect(places["victim"], places["victim"], places["clean"])
    none = inspect(places["victim"], places["clean"], places["clean"])
    assert same["n_test"] == none["n_test"] == 40  # no defender, so nothing is held back
    for one, zero in zip(same["layers"], none["layers"], strict=True):
        assert one["top"]["0.1"]["cka_purified"] == pytest.approx(1, abs=1e-5) and not one["top"]["0.1"]["clipped"]
        assert one["top"]["0.1"]["bec"] == pytest.approx(1, abs=1e-3)
        assert zero["top"]["0.1"]["bec"] == 0
    assert same["rates"]["purified"] == same["rates"]["victim"]
    assert same["silhouette"]["before"] == same["silhouette"]["after"]
    assert same["tsne"]["before"] == same["tsne"]["after"] != none["tsne"]["after"]


def test_tsne_has_a_point_for_each_image(result, places):
    tsne = result["tsne"]
    labels, triggered = np.array(tsne["labels"]), np.array(tsne["triggered"])
    assert triggered.sum() == result["n_triggered"] and (labels[triggered] != 1).all() and (labels == 1).any()
    assert np.array(tsne["before"]).shape == np.array(tsne["after"]).shape == (len(labels), 2)
    artifact = open_recorded(places["purified"])
    clean, stamped = artifact.evaluation.predictions(open_recorded(places["victim"]).victim.variables)
    own = artifact.evaluation.labels == 1
    before = result["silhouette"]["before"]
    assert (before["n_clean"], before["n_triggered"]) == ((clean[own] == 1).sum(), (stamped[~own] == 1).sum())
    again = inspect(places["victim"], places["purified"], count=12, seed=5)
    other = inspect(places["victim"], places["purified"], count=12, seed=6)
    assert again["n_clean"] == 12 and again["tsne"]["before"] != other["tsne"]["before"]
    assert again == inspect(places["victim"], places["purified"], count=12, seed=5)


def test_without_a_clean_model_there_is_cka_only(result, places):
    found = inspect(places["victim"].parent, places["purified"].parent)  # the directory of a run
    assert found["rates"]["clean"] is found["models"]["clean"] is found["means"]["0.1"]["bec"] is None
    for with_, without in zip(result["layers"], found["layers"], strict=True):
        assert without["top"]["0.1"]["cka_purified"] == with_["top"]["0.1"]["cka_purified"]
        assert without["top"]["0.1"]["bec"] is without["tac"]["top"]["clean"] is None
    assert "so there is no BEC, only CKA" in report.table(found)


@pytest.mark.slow
def test_all_to_all_has_no_cluster_of_a_target(places, tmp_path):
    found = inspect(places["other"], places["clean"])
    assert found["target"] is None and found["n_triggered"] == found["n_clean"] == 40
    assert found["silhouette"]["before"]["target_cluster"] is None
    assert "cluster of the target" not in report.table(found) and "another model" in report.table(found)
    assert report.draw(found, tmp_path / "x.png").stat().st_size > 10_000


def test_a_clean_model_of_another_start_or_recipe_is_noted(result, places, tmp_path):
    assert result["clean_differs"] == ["seed"] and "another --seed" not in report.table(result)
    fit = json.loads((places["clean"] / "manifest.json").read_text())["fit"]
    twin = altered(places["clean"], tmp_path / "twin", seed=0, fit={**fit, "epochs": 9})
    text = " ".join(report.table(inspect(places["victim"], places["purified"], twin)).split())
    assert "Train it with another --seed" in text and "other settings than the victim: epochs." in text


@pytest.mark.parametrize(
    ("role", "changes", "words"),
    [
        ("purified", {"model": "small_vgg"}, "differ in their model: cnn and small_vgg"),
        ("clean", {"model": "small_vgg"}, "differ in their model: cnn and small_vgg"),
        ("purified", {"shape": [8, 8, 3]}, "differ in their image shape: 8x8x1 and 8x8x3"),
        ("clean", {"classes": ["a", "b"]}, "differ in their number of classes: 4 and 2"),
        ("clean", {"dataset": {"name": "x", "fingerprint": "00", "spec": "digits"}}, "data set .*blobs .* and x 00"),
        ("purified", {"victim_hash": "0" * 64}, "was made of another victim than"),
    ],
)
def test_models_that_do_not_belong_together(role, changes, words, places, tmp_path):
    given = {**{name: places[name] for name in ("victim", "purified", "clean")}}
    given[role] = altered(places[role], tmp_path / "changed", **changes)
    with pytest.raises(InputError, match=words):
        inspect(*given.values())


def test_models_in_the_wrong_place(places, tmp_path):
    with pytest.raises(InputError, match="holds a purified model. The victim comes first"):
        inspect(places["purified"], places["victim"])
    with pytest.raises(InputError, match=r"no clean model but a victim one \(badnets\).*bdjax train clean"):
        inspect(places["victim"], places["purified"], places["other"])
    with pytest.raises(InputError, match="has no trigger to look for: clean leaves the images"):
        inspect(places["clean"], places["clean"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 21}, "count must be from 10 to 20, .*got 21"),
        ({"count": 9}, "count must be from 10 to 20, .*got 9"),
        ({"share": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"source": EvaluationSource("digits")}, "fingerprint differs"),
    ],
)
def test_numbers_out_of_range_and_other_data(options, words, places):
    with pytest.raises(InputError, match=words):
        inspect(places["victim"], places["purified"], **options)


def test_a_missing_trigger_and_a_broken_model(places, tmp_path):
    files = json.loads((places["purified"] / "manifest.json").read_text())["files"]
    gone = altered(places["purified"], tmp_path / "gone", files={k: v for k, v in files.items() if k != "trigger.npz"})
    (gone / "trigger.npz").unlink()
    with pytest.raises(InputError, match=r"gone holds no trigger: trigger\.npz is missing"):
        inspect(places["victim"], gone)
    artifact = open_recorded(places["purified"])
    nothing = jax.tree.map(lambda x: x * jnp.nan, artifact.victim.variables)
    arrays = {name: checkpoint.read_arrays(places["purified"], name) for name in ("trigger", "split")}
    checkpoint.write_model(tmp_path / "broken", artifact.manifest, nothing, arrays)
    with pytest.raises(InputError, match="broken: layer block1 has values that are not finite"):
        inspect(places["victim"], tmp_path / "broken")


def test_command_writes_table_picture_and_json(result, places, tmp_path, capsys):
    argv = [
        "inspect",
        places["victim"],
        places["purified"],
        "--clean-model",
        places["clean"],
        "--out",
        tmp_path / "a" / "b",
        "--json",
    ]
    lines = bdjax(capsys, *argv).splitlines()
    assert json.loads(lines[-1])["layers"] == json.loads(json.dumps(result["layers"]))
    assert json.loads((tmp_path / "a/b/inspection.json").read_text()) == json.loads(lines[-1])
    assert (tmp_path / "a/b/inspection.png").read_bytes()[:4] == b"\x89PNG"
    row = next(line for line in lines if line.startswith("block3"))
    assert f"{result['layers'][2]['top']['0.1']['bec']:.3f}" in row and "6 of 64" in row
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, *argv[:3], "--out", tmp_path / "file" / "x")
    assert "nowhere is not a directory" in refused(capsys, "inspect", "nowhere", "nowhere", "--out", tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_picture_of_many_classes_and_of_values_far_below(result, tmp_path):
    wide, rng = copy.deepcopy(result), np.random.default_rng(0)
    wide["classes"] = [f"a sign that limits $speed$ to {i}" for i in range(43)]
    wide["class_accuracy"] = {m: [None, *rng.random(42).tolist()] for m in ("victim", "purified", "clean")}
    wide["tsne"]["labels"] = rng.integers(0, 43, len(wide["tsne"]["labels"])).tolist()
    wide["layers"] *= 3
    wide["layers"][0]["top"]["0.1"] |= {"bec": -170.0, "clipped": True}
    assert report.draw(wide, tmp_path / "x.png").stat().st_size > 10_000
    text = report.table(wide)
    assert "-170.000 *" in text and "class a sign that limits $speed$ to 1" in text
    assert "raised to 0.001" in " ".join(text.split())
