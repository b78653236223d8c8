"""`bdjax import` and `bdjax export`, and what can be done with an imported model."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import bdjax, refused
from PIL import Image

from bdjax.interop import reader, writer
from bdjax.io import checkpoint

HERE = Path(__file__).parent / "fixtures" / "torch"
SMALL = HERE / "small_vgg_bgr.pt"
DEFEND = ["naive_at", "--defense.rounds", "1", "--defense.batch-size", "5", "--devices", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of the small network's shape: 24x24x3, 5 classes."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 24, 24, 3)).astype(np.uint8), np.arange(40, dtype=np.int32) % 5
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    np.savez(path, x_train=images[:20], y_train=labels[:20], x_test=images[20:], y_test=labels[20:])
    return f"npz:{path}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from bdjax import cli

    out = tmp_path_factory.mktemp("model") / "m"
    argv = ["import", SMALL, "--model", "small_vgg", "--out", out, "--input-mean", "0.4,0.5,0.6", "--channels", "bgr"]
    cli.main([*map(str, argv), "--input-std", "0.2,0.25,0.3", "--layout", "cwh"])
    return out


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("trigger") / "t.png"
    array = np.zeros((24, 24, 4), np.uint8)
    array[18:, 18:] = 255
    Image.fromarray(array).save(path)
    return ["--attack", "image_trigger", "--attack.trigger", str(path), "--attack.mode", "replace"]


def answered(capsys, *argv):
    return json.loads(bdjax(capsys, *argv, "--json").splitlines()[-1])


def test_import_says_what_it_found_and_keeps_the_owners_preprocessing(model, capsys, tmp_path):
    told = answered(capsys, "import", HERE / "attack_result.pt", "--out", tmp_path / "bb")
    assert (told["model"], told["classes"], told["shape"], told["key"]) == ("preact_resnet18", 5, [32, 32, 3], "model")
    assert told["input"]["mean"] == [0.4914, 0.4822, 0.4465]
    manifest = checkpoint.read_manifest(model)
    wanted = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "channels": "bgr", "layout": "cwh", "resize": 0}
    assert manifest["input"] == wanted and manifest["shape"] == [24, 24, 3] and manifest["kind"] == "imported"
    assert len(manifest["source"]["sha256"]) == 64 and manifest["env"]["jax"]


def test_evaluate_measures_accuracy_alone_or_with_a_trigger(model, data, picture, capsys):
    import jax

    from bdjax import interop
    from bdjax.datasets import load

    alone = answered(capsys, "evaluate", model, "--dataset", data)
    assert alone["n_test"] == 20 and alone["asr"] is None and alone["asr_with_target"] is None
    tried = answered(capsys, "evaluate", model, "--dataset", data, *picture, "--attack.target", "2")
    assert tried["attack"] == "image_trigger" and tried["n_asr"] == 16 and tried["acc"] == alone["acc"]
    images, labels = load(data).x_test.copy(), load(data).y_test
    net = interop.model_of(checkpoint.read_manifest(model))
    variables = checkpoint.read_variables(model, jax.eval_shape(net.init, jax.random.key(0)))

    def said(x):
        return np.asarray(net.logits(variables, x.astype(np.float32) / np.float32(255))).argmax(-1)

    assert alone["acc"] == pytest.approx((said(images) == labels).mean())
    images[:, 18:, 18:] = 255
    assert tried["asr"] == pytest.approx((said(images) == 2)[labels != 2].mean())


@pytest.mark.slow
def test_defend_cleans_it_and_what_comes_out_is_a_model_like_any_other(model, data, picture, capsys, tmp_path):
    argv = ["defend", model, *DEFEND, "--dataset", data, *picture, "--attack.target", "2", "--out", tmp_path / "d"]
    result = answered(capsys, *argv)
    assert (result["attack"], result["model"], result["n_defender"]) == ("image_trigger", "small_vgg", 10)
    again = answered(capsys, "evaluate", tmp_path / "d")
    assert {k: again[k] for k in ("acc", "asr")} == {k: result["after"][k] for k in ("acc", "asr")}
    assert answered(capsys, *argv) == result  # finished already
    out = tmp_path / "d.pt"
    told = answered(capsys, "export", tmp_path / "d", "--format", "torch", "--out", out)
    before, after = (reader.state_dicts(reader.read(path)[1]) for path in (SMALL, out))
    before, after = before["state_dict"], after[""]
    assert list(after) == list(before) and told["tensors"] == len(before) and told["input"]["channels"] == "bgr"
    changed = [name for name in before if not np.array_equal(before[name].read(), after[name].read())]
    assert "classifier.0.weight" in changed and not [name for name in changed if "num_batches" in name]


@pytest.mark.slow
def test_without_a_trigger_no_rate_of_success_is_printed_or_stored(model, data, capsys, tmp_path):
    out = bdjax(capsys, "defend", model, *DEFEND, "--dataset", data, "--out", tmp_path / "d", "--json")
    assert "No trigger is put on images" in out and "clean -> naive_at" in out
    result = json.loads(out.splitlines()[-1])
    assert [result[phase]["asr"] for phase in ("before", "after")] == [None, None] and result["n_asr"] == 0
    assert all(row["asr"] is None for row in result["rounds"]) and (tmp_path / "d" / "figure.png").exists()
    assert any("clean accuracy" in warning for warning in result["warnings"]) and "warning: the clean" in out
    again = bdjax(capsys, "evaluate", tmp_path / "d")
    report = bdjax(capsys, "report", tmp_path / "d")
    for text in (out, again, report):
        assert "not measured: no trigger given" in text
    for form in ("--markdown", "--csv"):
        table = bdjax(capsys, "report", tmp_path / "d", form)
        assert ("not measured" in table) == (form == "--markdown")


def test_evaluate_says_what_the_data_are_and_that_the_accuracy_cannot_be(model, data, capsys):
    out = bdjax(capsys, "evaluate", model, "--dataset", data)
    assert "asr              not measured: no trigger given" in out and "noise: 5 classes, images 24x24x3." in out
    assert "20 test images, 4 a class: 0 4, 1 4" in out and "warning: the clean accuracy is" in out


@pytest.mark.parametrize("command", ["import", "purify", "evaluate", "audit", "export"])
def test_help_without_a_file_lists_all_flags(command, capsys):
    out = bdjax(capsys, command, "--help")
    flags = {"import": "--input-mean --size --ignore --key --force",
             "purify": "--clean-data --held-out --input-mean --defense.",
             "evaluate": "--dataset --json", "audit": "--methods --size", "export": "--format"}  # fmt: skip
    assert f"usage: bdjax {command} " in out and all(flag in out for flag in flags[command].split())
    assert bdjax(capsys, command, "-h") == out


def altered(tmp_path, name, change):
    """The small network's weights after `change(names and arrays)`, as a file of torch's."""
    state = {key: one.read() for key, one in reader.state_dicts(reader.read(SMALL)[1])["state_dict"].items()}
    with open(tmp_path / name, "wb") as file:
        writer.write_torch(file, change(state))
    return tmp_path / name


def test_a_normalisation_layer_is_exported_again_with_its_bits(tmp_path, capsys):
    numbers = {"0.mean": np.float32([[[0.4]], [[0.5]], [[0.6]]]), "0.std": np.float32([[[0.2]], [[0.25]], [[0.3]]])}
    file = altered(tmp_path, "m.tar", lambda s: {**numbers, **{f"1.{k}": v for k, v in s.items()}})
    told = answered(capsys, "import", file, "--model", "small_vgg", "--out", tmp_path / "m")
    assert told["input"]["mean"] == [0.4, 0.5, 0.6] and told["normalised"] == ["0.mean", "0.std"]
    bdjax(capsys, "export", tmp_path / "m", "--format", "torch", "--out", tmp_path / "again.th")
    before, after = (reader.read(path)[1] for path in (file, tmp_path / "again.th"))
    assert list(before) == list(after)
    for name in before:
        np.testing.assert_array_equal(before[name].read(), after[name].read())


def test_left_overs_are_refused_or_waived_by_name(tmp_path, capsys):
    def masked(state):
        return {**state, "features.0.neuron_mask": np.ones(2, np.float32)}

    file = altered(tmp_path, "m.ckpt", masked)
    argv = ["import", file, "--model", "small_vgg", "--out", tmp_path / "m"]
    said = refused(capsys, *argv)
    assert "features.0.neuron_mask [2]" in said and "--ignore NAME" in said
    assert "no tensor that --ignore 'mask' names" in refused(capsys, *argv, "--ignore", "mask")
    assert answered(capsys, *argv, "--ignore", "neuron_mask")["ignored"] == ["features.0.neuron_mask"]
    bdjax(capsys, "export", tmp_path / "m", "--format", "torch", "--out", tmp_path / "m.bin")
    assert "features.0.neuron_mask" in reader.read(tmp_path / "m.bin")[1]


def test_pruned_weights_come_in_as_their_product(tmp_path, capsys):
    def pruned(state):
        found = {k: v for k, v in state.items() if k != "features.0.weight"}
        whole = state["features.0.weight"]
        return {"features.0.weight_orig": whole, "features.0.weight_mask": np.zeros_like(whole), **found}

    file = altered(tmp_path, "m.pt", pruned)
    bdjax(capsys, "import", file, "--model", "small_vgg", "--out", tmp_path / "m", "--ignore", "weight_mask")
    bdjax(capsys, "export", tmp_path / "m", "--format", "torch", "--out", tmp_path / "again.pt")
    again = reader.read(tmp_path / "again.pt")[1]
    assert not again["features.0.weight"].read().any() and "features.0.weight_mask" not in again


@pytest.mark.parametrize(
    ("change", "key", "left"),
    [
        (lambda s: {"n_averaged": np.array(3), **{f"module.{k}": v for k, v in s.items()}}, None, False),
        (lambda s: {f"{which}.{k}": v for which in ("model", "ema_model") for k, v in s.items()}, "ema_model", True),
    ],
)
def test_averaged_weights_are_a_choice(change, key, left, tmp_path, capsys):
    file = altered(tmp_path, "m.pt", change)
    argv = ["import", file, "--model", "small_vgg", "--out", tmp_path / "m"]
    if left:
        assert "several networks" in refused(capsys, *argv) and "--key" in refused(capsys, *argv)
    told = answered(capsys, *argv, *(["--key", key] if key else []))
    assert told["model"] == "small_vgg" and told["key"] == (key or "")


def test_a_normalisation_layer_of_the_part_that_is_chosen_is_the_inputs(tmp_path, capsys):
    def averaged(state):
        layer = {"mean": np.float32([0.25, 0.5, 0.75]), "std": np.float32([0.5, 0.5, 0.25])}
        return {f"{which}.{name}": value for which in ("model", "ema") for name, value in {**layer, **state}.items()}

    file = altered(tmp_path, "m.pt", averaged)
    argv = ["import", file, "--model", "small_vgg", "--key", "ema", "--out", tmp_path / "m"]
    told = answered(capsys, *argv)
    assert told["input"]["mean"] == [0.25, 0.5, 0.75] and told["normalised"] == ["ema.mean", "ema.std"]
    said = refused(capsys, *argv, "--input-mean", "0.1,0.2,0.3", "--force")
    assert "normalisation layer ('ema.mean'" in said


def test_what_stands_beside_weights_and_is_not_used_is_said(tmp_path, capsys):
    layer = {"mean": np.float32([0.25, 0.5, 0.75]), "std": np.float32([0.5, 1e-30, 0.25])}
    file = altered(tmp_path, "m.pt", lambda state: {**layer, **state})
    argv = ["import", file, "--model", "small_vgg", "--out", tmp_path / "m"]
    assert "that is not for images in [0, 1]" in refused(capsys, *argv)
    told = answered(capsys, *argv, "--ignore", "mean,std", "--input-mean", "0.5")
    assert told["input"]["mean"] == [0.5] and told["normalised"] == [] and told["ignored"] == ["mean", "std"]


def test_of_a_part_that_is_chosen_the_options_are_measured(data, tmp_path, capsys):
    file = altered(tmp_path, "m.pt", lambda s: {f"{which}.{k}": v for which in ("net", "ema") for k, v in s.items()})
    argv = ["import", file, "--model", "small_vgg", "--key", "ema", "--clean-data", data, "--out", tmp_path / "m"]
    assert answered(capsys, *argv)["tried"]


def test_a_defense_has_its_own_place_by_what_it_is_measured_with(model, data, picture):
    from bdjax.config import SplitConfig, config_of
    from bdjax.pipelines.defend import DefenseRequest, resolve_defense
    from bdjax.pipelines.opening import EvaluationSource

    def place(**options):
        config, split = config_of("defenses", "ibau")(), SplitConfig()
        source = EvaluationSource(data, **options)
        return resolve_defense(DefenseRequest(model, "ibau", config, split, source=source)).directory_in(Path("runs"))

    badnets = config_of("attacks", "badnets")
    places = [place(), *(place(attack="badnets", attack_config=badnets(target=target)) for target in (0, 1))]
    assert len(set(places)) == 3 and place() == places[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["import"], ["FILE", "usage"]),
        (["import", "nowhere.pt", "--out", "m"], ["nowhere.pt does not exist"]),
        (["import", SMALL, "--out", "m"], ["does not say which model", "--model"]),
        (["import", SMALL, "--model", "vgg", "--out", "m"], ["'vgg'", "vgg16"]),
        (["import", SMALL, "--model", "small_vgg", "--classes", "1", "--out", "m"], ["--classes", "got 1"]),
        (
            ["import", SMALL, "--model", "small_vgg", "--classes", "9", "--out", "m"],
            ["[9]", "[5]", "nothing was written"],
        ),
        (["import", SMALL, "--model", "small_vgg", "--size", "32", "--out", "m"], ["[5, 128]", "[5, 72]"]),
        (["import", SMALL, "--model", "small_vgg", "--size", "big", "--out", "m"], ["--size", "'big'"]),
        (["import", SMALL, "--model", "small_vgg", "--size", "1,2,3", "--out", "m"], ["--size", "1,2,3"]),
        (["import", SMALL, "--model", "small_vgg", "--input-mean", "a", "--out", "m"], ["--input-mean", "'a'"]),
        (["import", SMALL, "--model", "small_vgg", "--input-std", "0,1,1", "--out", "m"], ["--input-std", "positive"]),
        *(
            (
                ["import", SMALL, "--model", "small_vgg", f"--input-{name}={value}", "--out", "m"],
                [f"--input-{name}", why],
            )
            for name, value, why in (
                ("std", "1e-30", "at least 1e-05"),
                ("std", "0.2,1e-6,0.2", "at least 1e-05"),
                ("std", "10", "[0, 1]"),
                ("mean", "-1e30", "at least -10"),
                ("mean", "1.5", "[0, 1]"),
                ("std", "1e30", "[0, 1]"),
            )
        ),
        (["import", SMALL, "--model", "small_vgg", "--input-mean", "1,2", "--out", "m"], ["2 numbers", "3 channels"]),
        (["import", SMALL, "--model", "small_vgg", "--layout", "nchw", "--out", "m"], ["layout", "nchw"]),
        (["export", "nowhere", "--format", "torch", "--out", "m.pt"], ["nowhere"]),
        (["export", "nowhere", "--format", "torch", "--out", "m.safetensors"], [".pt or .pth"]),
        (["export", "nowhere", "--format", "onnx", "--out", "m.pt"], ["onnx"]),
        (["evaluate", "MODEL"], ["imported", "--dataset"]),
        (["evaluate", "MODEL", "--dataset", "digits"], ["(24, 24, 3)", "(32, 32, 1)"]),
        (["evaluate", "MODEL", "--dataset", "DATA", "--attack"], ["--attack needs the name"]),
        (["evaluate", "MODEL", "--dataset", "DATA", "--attack", "badnet"], ["'badnet'", "'badnets'"]),
        (
            ["evaluate", "MODEL", "--dataset", "DATA", "--attack", "badnets", "--attack.target", "7"],
            ["attack.target=7"],
        ),
        (["evaluate", "MODEL", "--dataset", "DATA", "--attack", "iad"], ["iad is learned", "image_trigger"]),
        (["evaluate", "MODEL", "--dataset", "DATA", "--attack", "retuning"], ["retuning", "no trigger"]),
        (["defend", "MODEL", "ibau", "--out", "d"], ["imported", "--dataset"]),
        (["poisoned", "MODEL", "--out", "x.npz"], ["small_vgg_bgr.pt was imported"]),
        (["gallery", "MODEL", "--dataset", "DATA", "--out", "x.png"], ["small_vgg_bgr.pt was imported"]),
        (["reactivate", "MODEL", "retuning"], ["imported"]),
    ],
    ids=lambda value: " ".join(str(part) for part in value)[-60:].replace("/", "_"),
)
def test_what_cannot_work_is_refused(argv, words, model, data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [{"MODEL": model, "DATA": data}.get(part, part) for part in argv]
    message = " ".join(refused(capsys, *argv).split())
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_attack_of_its_own_is_not_exchanged_for_another(finished, capsys):
    said = refused(capsys, "evaluate", finished[0], "--attack", "blended")
    assert "records its own attack (badnets)" in said


def test_what_stands_there_is_replaced_only_by_force(model, capsys, tmp_path):
    argv = ["import", SMALL, "--model", "small_vgg", "--out", tmp_path / "m"]
    bdjax(capsys, *argv)
    first = checkpoint.read_manifest(tmp_path / "m")["hash"]
    assert "exists already" in refused(capsys, *argv)
    bdjax(capsys, *argv, "--input-mean", "0.5", "--force")
    assert checkpoint.read_manifest(tmp_path / "m")["hash"] != first


@pytest.mark.slow
def test_a_model_that_was_trained_here_is_exported(finished, capsys, tmp_path):
    told = answered(capsys, "export", finished[0], "--format", "safetensors", "--out", tmp_path / "m.safetensors")
    assert told["names"] == "bdjax" and told["input"] is None
    assert "head.weight" in reader.read(tmp_path / "m.safetensors")[1]
