"""The field's networks from PyTorch: other names and depths, and what no file tells. See tests/fixtures/make.py."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import bdjax, refused

from bdjax import interop, models
from bdjax.errors import InputError
from bdjax.interop import names, reader, writer
from bdjax.io import checkpoint
from bdjax.models import Input

HERE = Path(__file__).parent / "fixtures" / "torch"
CASES = json.loads((HERE / "cases.json").read_text())
QUICK = ("resnet8_dxy", "badnets_pytorch", "vgg11_backdoorbox")
"""Few layers each; the others take seconds to compile."""


def cases(quick=QUICK):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


def imported(case, out, **options):
    """The manifest of a case's file, imported as the field's user would."""
    given = {**CASES[case]["given"], **options}
    if given.get("input"):
        given["input"] = Input(**{name: tuple(values) for name, values in given["input"].items()})
    given["size"] = given["size"] and tuple(given["size"])
    given["model"] = names.family(given["model"])
    return interop.import_model(HERE / CASES[case]["file"], out, **given)


def stored(case):
    with np.load(HERE / f"{case}.npz") as arrays:
        return arrays["images"].astype(np.float32) / np.float32(255), arrays["logits"]


def weights(path):
    found = reader.state_dicts(reader.read(path)[1])
    return {name: tensor.read() for name, tensor in max(found.values(), key=len).items()}


def logits_of(directory, images):
    model = interop.model_of(checkpoint.read_manifest(directory))
    variables = checkpoint.read_variables(directory, jax.eval_shape(model.init, jax.random.key(0)))
    return np.asarray(jax.jit(model.logits)(variables, images))


def written(tmp_path, tensors, name="w.pt"):
    with open(tmp_path / name, "wb") as file:
        writer.write_torch(file, tensors)
    return tmp_path / name


def tensors_of(model, naming, seed=0):
    """Random weights of one of our models under the names of a table."""
    rng = np.random.default_rng(seed)
    return {entry.name: rng.random(entry.shape, np.float32) for entry in names.entries(naming, model)}


# --- parity


@pytest.mark.parametrize("path", sorted(HERE.glob("*.npz")), ids=lambda path: path.stem)
def test_the_logits_of_a_fixture_depend_on_its_images(path):
    """By five hundred times the tolerance at least; else a network that ignores them would pass."""
    with np.load(path) as arrays:
        logits = arrays["logits"]
    assert min(np.abs(a - b).max() for i, a in enumerate(logits) for b in logits[:i]) > 500 * 1e-4


@pytest.mark.parametrize("case", cases())
def test_logits_are_those_of_pytorch_and_the_file_goes_back_bit_for_bit(case, tmp_path):
    manifest, wanted = imported(case, tmp_path / "m"), CASES[case]
    said = {"model": manifest["model"], "names": manifest["source"]["names"], "variant": manifest["variant"]}
    assert said == {name: wanted[name] for name in said}
    assert sorted(manifest["assumed"]) == wanted["assumed"]
    images, logits = stored(case)
    assert tuple(manifest["shape"]) == images.shape[1:]
    np.testing.assert_allclose(logits_of(tmp_path / "m", images), logits, atol=1e-4, rtol=0)
    before = weights(HERE / wanted["file"])
    for form, end in (("torch", "pt"), ("safetensors", "safetensors")):
        interop.export_model(tmp_path / "m", form, tmp_path / f"out.{end}")
        after = weights(tmp_path / f"out.{end}")
        assert set(after) == set(before) and (form == "safetensors" or [*after] == [*before])
        for name, array in before.items():
            assert (after[name].dtype, after[name].tobytes()) == (array.dtype, array.tobytes())


def test_every_table_has_a_case():
    """A table of names that no PyTorch network was compared under could be wrong unseen."""
    tested = {(case["model"], case["names"]) for case in CASES.values()}
    assert {
        "kuangliu",
        "chenyaofo",
        "weiaicunzai",
        "backdoor-toolbox",
        "TrojanZoo",
        "xternalz",
        "meliketoy",
        "timm",
    } <= {names for _, names in tested}


PUBLISHED = {  # parameters, as their papers or projects give them
    ("resnet_cifar", 10, (("blocks", (3, 3, 3)),)): 269_722,
    ("resnet_cifar", 10, (("blocks", (9, 9, 9)),)): 853_018,
    ("resnet_cifar", 10, (("blocks", (18, 18, 18)),)): 1_727_962,
    ("resnet_cifar", 10, (("blocks", (3, 3, 3)), ("shortcut", "b"))): 272_474,
    ("resnet", 1000, (("kernel", 7), ("stem", "stride2-max"))): 21_797_672,
    ("resnet", 1000, (("bottleneck", True), ("kernel", 7))): 25_557_032,
    ("resnet", 1000, (("bottleneck", True), ("inner", 128), ("kernel", 7))): 68_883_240,
    ("resnet", 1000, (("bottleneck", True), ("groups", 32), ("inner", 128), ("kernel", 7))): 25_028_904,
    ("wide_resnet", 10, (("blocks", 4), ("widen", 10))): 36_479_194,
    ("vgg_cifar", 10, ()): 14_728_266,
    ("mobilenet_v2", 1000, ()): 3_504_872,
    ("mobilenet_v3_large", 1000, ()): 5_483_032,
    ("senet18", 10, ()): 11_260_354,
    ("efficientnet_b3", 1000, ()): 12_233_232,
    ("convnext_tiny", 1000, ()): 28_589_128,
    ("mnist_cnn", 10, ()): 281_034,
}


@pytest.mark.slow
@pytest.mark.parametrize("key", PUBLISHED, ids=str)
def test_at_full_width_a_network_has_the_published_number_of_parameters(key):
    name, classes, variant = key
    model = models.create(name, (28, 28, 1) if name == "mnist_cnn" else (32, 32, 3), classes, variant=variant)
    params = names.variable_shapes(model)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PUBLISHED[key]


TIMM = {  # of each sort of block one, as timm's definitions name them
    "efficientnet_v2_s": (
        "conv_stem", "bn1", "blocks.0.1.conv", "blocks.0.1.bn1", "blocks.1.0.conv_exp", "blocks.1.0.bn1",
        "blocks.2.3.conv_pwl", "blocks.2.3.bn2", "blocks.3.0.conv_pw", "blocks.3.5.conv_dw",
        "blocks.4.8.se.conv_reduce",
        "blocks.5.14.se.conv_expand", "blocks.5.14.conv_pwl", "blocks.5.14.bn3", "conv_head", "bn2",
        "classifier",
    ),
    "efficientnet_b3": (
        "conv_stem", "blocks.0.0.conv_dw", "blocks.0.0.bn1", "blocks.0.1.se.conv_expand", "blocks.0.1.conv_pw",
        "blocks.0.1.bn2", "blocks.1.0.conv_pw", "blocks.6.1.conv_pwl", "blocks.6.1.bn3", "conv_head", "classifier",
    ),
    "mobilenet_v3_large": (
        "conv_stem", "blocks.0.0.conv_dw", "blocks.0.0.conv_pw", "blocks.2.2.se.conv_reduce", "blocks.5.2.conv_pwl",
        "blocks.6.0.conv", "blocks.6.0.bn1", "conv_head", "classifier",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", TIMM)
def test_blocks_have_timm_s_names_in_timm_s_table(model):
    naming = next(naming for naming in names.namings_of_model(model) if naming.label == "timm")
    entries = names.entries(naming, models.create(model, (64, 64, 3), 5, width=4))
    layers = {entry.name.rpartition(".")[0] for entry in entries}
    assert {*TIMM[model]} <= layers and not any("features" in layer or ".block." in layer for layer in layers)
    assert len({entry.name for entry in entries}) == len(entries)


# --- a name says what the file must be


@pytest.mark.parametrize(
    ("called", "asked"),
    [
        ("resnet20", {"blocks": ((3, 3, 3),), "bottleneck": (False,)}), ("ResNet-56", {"blocks": ((9, 9, 9),)}),
        ("cifar10_resnet32", {"blocks": ((5, 5, 5),)}), ("resnet110", {"blocks": ((18, 18, 18),)}),
        ("resnet50", {"bottleneck": (True,)}), ("wide_resnet50_2", {"bottleneck": (True,)}),
        ("wrn_28_10", {"blocks": (4,), "widen": (10,)}), ("WRN-16-1", {"blocks": (2,), "widen": (1,)}),
        ("wideresnet40x2", {"blocks": (6,), "widen": (2,)}), ("vgg13_bn", {"normed": (True,)}), ("mobilenetv2", {}),
        ("deit_small_patch16_224", {}), ("mobilenetv3_large_100", {}), ("senet18", {}),
    ],
)  # fmt: skip
def test_what_a_network_is_called_says_its_depth(called, asked):
    name = names.family(called)
    said = [naming.options_of_name(name) for naming in names.namings(name)]
    assert any(one is not None and one.items() >= asked.items() for one in said)


@pytest.mark.parametrize("called", ["resnet31", "vgg12", "wrn_17_2", "resnet", "densenet", "vit_base_patch8_224"])
def test_other_names_are_not_taken_for_one_of_these(called):
    if called == "resnet":
        assert {naming.model for naming in names.namings("resnet")} == {"resnet"}
        return
    with pytest.raises(InputError, match="unknown model"):
        names.namings(called)


def test_a_file_of_another_depth_than_its_name_says_is_refused(tmp_path):
    model = models.create("resnet_cifar", (32, 32, 3), 5, width=2, variant=(("blocks", (2, 2, 2)),))
    path = written(tmp_path, tensors_of(model, names.namings_of_model("resnet_cifar")[0]))
    with pytest.raises(InputError, match=r"resnet20: blocks \(3, 3, 3\) +blocks \(2, 2, 2\)"):
        interop.import_model(path, tmp_path / "m", model="resnet20")
    assert interop.import_model(path, tmp_path / "m", model="resnet14")["variant"] == {"blocks": [2, 2, 2]}


# --- what no file tells


def test_what_is_assumed_stands_in_the_output_and_in_the_manifest(tmp_path, capsys):
    argv = ["import", HERE / CASES["badnets_pytorch"]["file"], "--model", "mnist_cnn"]
    said = bdjax(capsys, *argv, "--out", tmp_path / "a")
    assert "--pool mean (assumed; the file would fit --pool max, too)" in said and "softmax" in said
    given = bdjax(capsys, *argv, "--pool", "max", "--out", tmp_path / "b")
    assert "--pool max (as given" in given
    one, two = (checkpoint.read_manifest(tmp_path / name) for name in "ab")
    assert one["assumed"] == {"pool": {"value": "mean", "instead_of": ["max"], "by": "default"}}
    assert two["assumed"]["pool"]["by"] == "flag" and two["variant"]["pool"] == "max" and one["hash"] != two["hash"]
    images = stored("badnets_pytorch")[0]
    assert np.abs(logits_of(tmp_path / "a", images) - logits_of(tmp_path / "b", images)).max() > 0.01


def test_with_clean_images_every_network_that_fits_is_measured_and_the_best_one_taken(tmp_path, capsys):
    """Labels are what the network with max-pooling says: it is right on all of them, and the assumed one is not."""
    bdjax(capsys, "import", HERE / CASES["badnets_pytorch"]["file"], "--model", "mnist_cnn", "--pool", "max",
          "--out", tmp_path / "max")  # fmt: skip
    coarse = np.random.default_rng(0).integers(0, 256, (400, 7, 7, 1)).astype(np.uint8)
    images = (
        coarse.repeat(4, 1).repeat(4, 2) // 3 * np.arange(1, 4, dtype=np.uint8)[np.arange(400) % 3, None, None, None]
    )
    labels = logits_of(tmp_path / "max", images.astype(np.float32) / np.float32(255)).argmax(-1).astype(np.int32)
    labels[:5] = np.arange(5)
    np.savez(tmp_path / "d.npz", x_train=images[:5], y_train=labels[:5], x_test=images[5:], y_test=labels[5:])
    out = bdjax(capsys, "import", HERE / CASES["badnets_pytorch"]["file"], "--model", "mnist_cnn", "--clean-data",
                f"npz:{tmp_path / 'd.npz'}", "--out", tmp_path / "m", "--json")  # fmt: skip
    told = json.loads(out.splitlines()[-1])
    tried = {one["options"]["pool"]: one["acc"] for one in told["tried"]}
    assert set(tried) == {"mean", "max"} and tried["max"] > 0.99 and tried["max"] > tried["mean"]
    assert told["variant"]["pool"] == "max" and told["assumed"]["pool"]["by"] == "accuracy"
    assert f"tried --pool mean: accuracy {tried['mean']:.4f}" in out and "tried --pool max: accuracy 1.0000" in out


def test_images_of_another_shape_are_refused_before_anything_is_written(tmp_path, capsys):
    images, labels = np.zeros((8, 24, 24, 3), np.uint8), np.arange(8, dtype=np.int32) % 5
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    said = refused(capsys, "import", HERE / CASES["badnets_pytorch"]["file"], "--model", "mnist_cnn", "--size", "28",
                   "--clean-data", f"npz:{tmp_path / 'd.npz'}", "--out", tmp_path / "m")  # fmt: skip
    assert "(28, 28, 1)" in said and "(24, 24, 3)" in said and not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "mnist_cnn", "--stem", "max"], ["stem max", "mnist_cnn has no stem", "pool"]),
        (["--model", "mnist_cnn", "--pool", "4"], ["pool of model 'mnist_cnn'", "mean, max", "got 4"]),
        (["--model", "mnist_cnn", "--transform-input"], ["transform_input", "has no transform_input"]),
        (["--model", "mnist_cnn", "--network", "heads"], ["--network", "NAME=VALUE", "'heads'"]),
        (["--model", "mnist_cnn", "--network", "units=9"], ["units of model 'mnist_cnn'", "got 9"]),
    ],
)
def test_a_choice_that_a_network_does_not_have_is_refused(argv, words, capsys, tmp_path):
    message = refused(capsys, "import", HERE / CASES["badnets_pytorch"]["file"], *argv, "--out", tmp_path / "m")
    for word in words:
        assert word in message
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "variant",
    [
        {"blocks": [10**9] * 3}, {"blocks": [3] * 99}, {"blocks": "3"}, {"blocks": [[3]]}, {"blocks": True},
        {"depth": 3}, ["blocks"], {"shortcut": "c"}, {"pool": -1}, {"pool": 1.5}, {"bottleneck": 1}, {"stem": ["max"]},
        {"inner": {"a": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_variant_that_cannot_be_is_refused_in_a_manifest(variant):
    manifest = {"model": "resnet_cifar", "shape": [32, 32, 3], "classes": ["0", "1"], "variant": variant}
    with pytest.raises(InputError, match="of model 'resnet_cifar'|model 'resnet_cifar' has no option|of a model must"):
        interop.model_of(manifest)
