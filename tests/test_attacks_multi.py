"""Several attacks in one model: what is poisoned, what is measured, and that a run of it ends as any other."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import perceptron, untrained_task
from PIL import Image

from bdjax import attacks, cli, datasets, registry
from bdjax.attacks import multi_target
from bdjax.config import Experiment, attack_record, from_json, to_json
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines import training
from bdjax.pipelines.evaluate import evaluate
from bdjax.pipelines.evaluation import Evaluation
from bdjax.pipelines.poisoned_set import poisoned_set
from bdjax.reports import figure, table
from bdjax.types import Data, Model

KEY = jax.random.key(7)
PARTS = ("badnets:0", "blended:3:strength=0.3", "l0_inv:1:ratio=0.1")
FLAGS = ["--fit.epochs", "2", "--fit.batch-size", "40", "--devices", "1"]


def config_of(*parts, **fields):
    return multi_target.Config(parts=parts or PARTS, **fields)


def task_of(blobs):
    return untrained_task(*blobs, perceptron())


def test_parts_are_the_attacks_with_their_targets_and_fields():
    found = multi_target.parts(
        config_of(
            "badnets:2:position=top_left:size=3:colour=0.5,0,1", "badnets:1:size=None", "blended:3:form=convex",
            "badnets:0:exclude_target=False:ratio=0.5", "adaptive_blend:1:cover=0", "refool:1:weight=0.2,0.3",
            "lsb:1:text=hello", ratio=0.3, quantise=False,
        )
    )  # fmt: skip
    assert [part.label for part in found] == [
        "badnets", "badnets_2", "blended", "badnets_3", "adaptive_blend", "refool", "lsb"
    ]  # fmt: skip
    configs = [part.config for part in found]
    assert [c.target for c in configs] == [2, 1, 3, 0, 1, 1, 1] and not any(c.quantise for c in configs)
    assert [c.ratio for c in configs] == [0.3, 0.3, 0.3, 0.5, 0.3, 0.3, 0.3]
    assert [c.exclude_target for c in configs] == [True, True, True, False, True, True, True]
    assert (configs[0].position, configs[0].size, configs[0].colour) == ("top_left", 3, (0.5, 0.0, 1.0))
    assert configs[1].size is None and configs[2].form == "convex" and configs[4].cover == 0.0
    assert configs[5].weight == (0.2, 0.3) and configs[6].text == "hello"


def test_defaults_are_the_papers_seven():
    config = multi_target.Config()
    named = [multi_target._read(text)[:2] for text in config.parts]
    assert dict(named) == {
        "trojan_wm": 9, "trojan_sq": 2, "badnets": 0, "smooth": 1, "blended": 3, "l0_inv": 4, "l2_inv": 5,
    }  # fmt: skip
    assert config.ratio == 0.2 and from_json(multi_target.Config, to_json(config)) == config


def test_each_part_poisons_its_own_copy(blobs):
    images, labels = blobs
    config, task = config_of(), task_of(blobs)
    planted = attacks.plant("multi_target", config, task, KEY)
    poison = planted.poison
    assert poison.copies == 3 and (np.diff(poison.indices) > 0).all() and poison.indices.dtype == np.int32
    copy = poison.indices // 200
    assert np.bincount(copy).tolist() == [40, 40, 20]
    assert sorted(planted.arrays) == ["blended/picture"]
    for i, (part, target) in enumerate(zip(multi_target.parts(config), (0, 3, 1), strict=True)):
        own = poison.indices[copy == i] - 200 * i
        assert (poison.labels[copy == i] == target).all() and (labels[own] != target).all()
        arrays = {"picture": planted.arrays["blended/picture"]} if part.attack == "blended" else {}
        stamp = attacks.trigger_of(part.attack, part.config, arrays)
        expected = np.round(np.asarray(stamp(jnp.asarray(images[own] / np.float32(255)), KEY)) * 255)
        np.testing.assert_array_equal(poison.images[copy == i], expected)
    x, y = attacks.poisoned_set(poison, images, labels)
    assert len(x) == len(y) == 600
    clean = np.setdiff1d(np.arange(600), poison.indices)
    np.testing.assert_array_equal(x[clean], images[clean % 200])
    np.testing.assert_array_equal(y[clean], labels[clean % 200])
    twins = attacks.plant("multi_target", config_of("badnets:0", "badnets:0"), task, KEY).poison.indices
    assert set(twins[:40]) != set(twins[40:] - 200)  # drawn apart


def test_a_batch_carries_the_triggers_in_turn(blobs):
    config, images = config_of(), jnp.asarray(blobs[0][:7] / np.float32(255))
    arrays = multi_target.prepare(config, task_of(blobs), KEY)
    out = attacks.trigger_of("multi_target", config, arrays)(images, KEY)
    for i, (part, own) in enumerate(attacks.parts_of("multi_target", config, arrays)):
        stamp = attacks.trigger_of(part.attack, part.config, own)
        np.testing.assert_allclose(out[i::3], stamp(images[i::3], KEY), atol=1e-6)
    two = attacks.trigger_of("multi_target", config, arrays)(images[:2], KEY)
    np.testing.assert_allclose(two, out[:2], atol=1e-6)


def answering(variables, images, train=False, keys=None, axis_name=None):
    """What the pixels say: a white corner beside a grey pixel is L0's trigger, alone it is BadNets'."""
    grey, corner, first = images[:, 7, 6, 0], images[:, 7, 7, 0], images[:, 0, 0, 0]
    own = jnp.round(first * 255 / 50).astype(jnp.int32)
    l0 = (corner > 0.99) & (jnp.abs(grey - 1 / 3) < 0.01)
    said = jnp.where(l0, jnp.where(own == 2, 1, own), jnp.where(corner > 0.99, 0, own))
    return jax.nn.one_hot(said, 4), {}, {}


@pytest.fixture(scope="module")
def coded():
    """40 test images whose brightness, 50 times the class, is the class: L0 fools class 2 only, BadNets all."""
    labels = np.array([0, 1, 2, 3, 2, 2, 1, 0] * 5, np.int32)
    images = np.broadcast_to((50 * labels)[:, None, None, None], (40, 8, 8, 1)).astype(np.uint8)
    return Data("coded", images, labels, images, labels, tuple("abcd"))


def evaluation_of(data, *parts):
    experiment = Experiment("multi_target", attack_config=config_of(*parts))
    model = Model("answering", (8, 8, 1), 4, lambda key: {}, answering)
    return Evaluation(model, data, experiment, {}, held_out=False), experiment


def test_asr_by_trigger_is_exact(coded):
    evaluation, _ = evaluation_of(coded, "badnets:0", "l0_inv:1", "badnets:3")
    found = evaluation.measure({"params": {}, "batch_stats": {}})
    # L0 called 1: of 40 images 10 are of class 1; the 15 of class 2 of the other 30 are fooled. badnets:3: said 0.
    assert found["asr_by_trigger"] == pytest.approx({"badnets": 1.0, "l0_inv": 0.5, "badnets_2": 0.0})
    assert found["asr"] == pytest.approx(0.5) and found["acc"] == 1.0
    assert found["asr_with_target"] == pytest.approx((1 + 25 / 40 + 0) / 3)  # class 1 stays 1
    assert int(evaluation.eligible.sum()) == 30 + 30 + 35
    evaluation.shorten(8)
    found = evaluation.measure({"params": {}, "batch_stats": {}})
    assert found["asr_by_trigger"] == pytest.approx({"badnets": 1.0, "l0_inv": 0.5, "badnets_2": 0.0})
    assert len(evaluation.labels) == 8 and len(evaluation.triggered) == 24
    one, _ = evaluation_of(coded, "l0_inv:1")
    assert one.measure({})["asr_by_trigger"] == pytest.approx({"l0_inv": 0.5})


def test_pictures_show_every_trigger(coded):
    evaluation, _ = evaluation_of(coded, "badnets:0", "l0_inv:1")
    shown = evaluation.pictures(4)
    np.testing.assert_array_equal(shown["labels"], [1, 0, 2, 2])  # BadNets', L0's, BadNets', L0's eligible ones
    np.testing.assert_array_equal(shown["clean"][:, 0, 0, 0], [50, 0, 100, 100])
    np.testing.assert_array_equal(shown["triggered"][:, 7, 6, 0], [50, 85, 100, 85])
    assert len(evaluation_of(coded, *(["badnets:0"] * 9))[0].pictures(4)["labels"]) == 9
    few, _ = evaluation_of(coded, "badnets:0", "l0_inv:1")
    few.shorten(1)  # of class 0: BadNets has no eligible image
    assert few.pictures(4)["labels"].tolist() == [0]


@pytest.mark.slow
def test_a_run_ends_as_any_other(blobs_npz, tmp_path, capsys):
    out = tmp_path / "r"
    argv = [
        "run", "multi_target", "ibau", "--dataset", blobs_npz, *FLAGS, "--out", str(out), "--attack.parts", *PARTS,
        "--defense.rounds", "1", "--defense.batch-size", "10",
    ]  # fmt: skip
    cli.main(argv)
    shown = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    names = ["badnets", "blended", "l0_inv"]
    for rates in (result["before"], result["after"], result["rounds"][0]):
        assert list(rates["asr_by_trigger"]) == names
        assert rates["asr"] == pytest.approx(np.mean(list(rates["asr_by_trigger"].values())))
    defenders = checkpoint.read_arrays(out, "arrays")["clean_indices"]
    held = np.delete(datasets.load(blobs_npz).y_test, defenders)
    assert result["n_test"] == 20 and result["n_asr"] == sum((held != target).sum() for target in (0, 3, 1))
    assert result["attack_config"]["parts"] == list(PARTS)
    assert all(f"\n  {name} " in shown for name in names) and "multi_target" in table.report(tmp_path, "markdown")
    with Image.open(out / "figure.png") as picture:
        assert picture.size[0] > 800
    arrays = checkpoint.read_arrays(out / "victim", "trigger")
    assert set(arrays) == {"blended/picture", *(f"on_{c}_{name}" for c in ("black", "white") for name in names)}
    assert (arrays["on_black_badnets"] > 0).sum() == 1 and arrays["on_black_blended"].min() >= 0
    before = evaluate(out / "victim")
    assert before["n_asr"] == 90 and list(before["asr_by_trigger"]) == names
    cli.main(["evaluate", str(out)])
    assert f"asr l0_inv       {result['after']['asr_by_trigger']['l0_inv']:.4f}" in capsys.readouterr().out

    data, images, labels, indices = poisoned_set(out / "victim")  # compares sha256 with the manifest's
    assert len(images) == len(labels) == 480 and len(indices) == 32 + 32 + 16
    stored = checkpoint.read_arrays(out / "victim", "poison")
    np.testing.assert_array_equal(stored["indices"], indices)
    np.testing.assert_array_equal(stored["labels_after"], labels[indices])
    np.testing.assert_array_equal(stored["labels_before"], data.y_train[indices % 160])
    assert (images[indices] != data.x_train[indices % 160]).any(axis=(1, 2, 3)).all()
    assert figure.draw(result, checkpoint.read_arrays(out, "arrays"), tmp_path / "f.png").exists()


OWN = '''
"""One's own."""
from dataclasses import dataclass
import jax
from bdjax.attacks import PoisonConfig
from bdjax.types import ArrayFile

@dataclass(frozen=True)
class Config(PoisonConfig):
    """Own."""
    file: ArrayFile = ArrayFile("")
    """File."""

def prepare(config, task, key):
    return {"body": task.fit(task.images, task.labels, key, stage="surrogate")["params"]["body"]}

def trigger(config, images, key, arrays):
    return images.at[:, 0, 0].set(arrays["body"].reshape(-1)[0])
'''


def test_parts_have_stages_arrays_and_files_of_their_own(blobs, blobs_npz, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    path, stages = str(tmp_path / "own.py"), []

    def fit(images, labels, key, *, stage="training"):
        stages.append(stage)
        return perceptron().init(key)

    config = config_of(f"{path}:0", f"{path}:1:file={tmp_path}/p.png")
    task = dataclasses.replace(task_of(blobs), fit=fit)
    arrays = attacks.plant("multi_target", config, task, KEY).arrays
    assert stages == ["surrogate of own", "surrogate of own_2", "training"]
    assert set(arrays) == {"own/body", "own_2/body"}
    assert not np.array_equal(arrays["own/body"], arrays["own_2/body"])
    experiment, records = Experiment("multi_target", attack_config=config), []
    for content in (b"a", b"b"):
        (tmp_path / "p.png").write_bytes(content)
        records.append(attack_record(experiment, "f"))
    (tmp_path / "own.py").write_text(OWN + "# other\n")
    records.append(attack_record(experiment, "f"))
    assert len({json.dumps(record) for record in records}) == 3
    assert "parts" not in attack_record(Experiment("badnets"), "f")["attack"]


@pytest.mark.slow
def test_a_clean_model_is_trained_once_for_all_parts(blobs_npz, tmp_path, monkeypatch):
    seen, trains = [], 'task.fit(task.images, task.labels, key, stage="surrogate")["params"]["body"]'
    (tmp_path / "own.py").write_text(OWN.replace(trains, 'task.clean()["params"]["head"]["kernel"]'))
    real = training.fit_with_hook
    monkeypatch.setattr(training, "fit_with_hook", lambda *a, **k: (seen.append(k["stage"]), real(*a, **k))[1])
    own = f"{tmp_path}/own.py"
    cli.main(["train", "multi_target", "--dataset", blobs_npz, *FLAGS, "--attack.parts", f"{own}:0", f"{own}:1",
              "--out", str(tmp_path / "v")])  # fmt: skip
    assert seen == ["clean model", "training"] and (tmp_path / "v").is_dir()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("badnets",), "must be NAME:TARGET.*got 'badnets'"),
        ((":0",), "must be NAME:TARGET.*got ':0'"),
        (("badnets:x",), "must be NAME:TARGET.*got 'badnets:x'"),
        (("badnets:-1",), "must be NAME:TARGET.*got 'badnets:-1'"),
        (("badnets:0:size",), "must be NAME:TARGET.*got 'badnets:0:size'"),
        (("badnets:0:target=1",), "target cannot be a field of one part"),
        (("badnets:0:quantise=False",), "quantise cannot be a field of one part"),
        (("badnet:0",), "'badnet'.*Did you mean 'badnets'"),
        (("badnets:0:sise=3",), "no field 'sise'. Known: .*size"),
        (("badnets:0:size=big",), "'big' is no value for size, got 'badnets:0:size=big'"),
        (("badnets:0:position=middle",), "'middle' is no value for position"),
        (("badnets:0:exclude_target=no",), "'no' is no value for exclude_target"),
        (("refool:0:weight=0.1",), "'0.1' is no value for weight"),
        (("badnets:0:size=0",), "attack.size must be at least 1 pixel, got 0"),
        (("clean:0",), "clean does not poison a training set"),
        (("imc:0",), "imc does not poison a training set"),
        (("multi_target:0",), "multi_target does not poison a training set"),
        (("badnets:0", "badnets:4"), "attack.target=4, but the labels go from 0 to 3"),
        (("adaptive_blend:0:coupling=1",), "adaptive_blend as configured controls training"),
    ],
)
def test_what_cannot_be_a_part_is_named(parts, words, blobs):
    with pytest.raises(InputError, match=words):
        attacks.plant("multi_target", config_of(*parts), task_of(blobs), KEY)


def test_labels_and_emptiness_are_refused():
    with pytest.raises(InputError, match="attack.labels must be all_to_one, got clean. Give it to a part"):
        config_of(labels="clean")
    with pytest.raises(InputError, match="attack.parts must name at least one"):
        multi_target.Config(parts=())
    assert multi_target.parts(config_of("sig:3:labels=clean"))[0].config.labels == "clean"
    assert registry.load_module("attacks", "multi_target") is multi_target
