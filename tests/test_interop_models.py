"""Models from PyTorch compute what they computed there, and go back bit for bit. Fixtures: tests/fixtures/make.py."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import large_are_slow

from bdjax import interop, models
from bdjax.errors import InputError
from bdjax.interop import names, reader, writer
from bdjax.interop._tensors import DTYPES
from bdjax.io import checkpoint
from bdjax.models import Input

HERE = Path(__file__).parent / "fixtures" / "torch"
FIELD = json.loads((HERE / "cases.json").read_text())  # tests/test_interop_field.py has these
FILES = {
    path.stem: path
    for path in sorted(HERE.iterdir())
    if path.suffix not in (".npz", ".json") and path.stem not in FIELD
}
PUBLISHED = {  # numbers of parameters with 1,000 classes, as torchvision documents them
    "resnet18_imagenet": 11_689_512, "vgg16": 138_357_544, "vgg16_bn": 138_365_992, "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248, "mobilenet_v3_small": 2_542_856, "efficientnet_v2_s": 21_458_488,
    "densenet121": 7_978_856, "googlenet": 6_624_904, "vit_b_16": 86_567_656, "vit_b_32": 88_224_232,
}  # fmt: skip
OWNER = Input((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bgr", "cwh")
CIFAR = Input((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))


def model_of_case(case):
    if case.endswith("_result"):
        return None  # the file says it
    return "small_vgg" if case.startswith("small_vgg") else case


def stored(case):
    with np.load(HERE / f"{case}.npz") as arrays:
        return arrays["images"].astype(np.float32) / np.float32(255), arrays["logits"]


def imported(case, out, **options):
    size = stored(case)[0].shape[1:3]
    given = {"model": model_of_case(case), "size": size} | ({"input": OWNER} if case == "small_vgg_bgr" else {})
    return interop.import_model(FILES[case], out, **(given | options))


class Imported(dict):
    """Fixtures as model directories, imported when first asked for: case -> (directory, manifest)."""

    def __init__(self, root):
        self.root = root

    def __missing__(self, case):
        self[case] = self.root / case, imported(case, self.root / case)
        return self[case]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return Imported(tmp_path_factory.mktemp("imported"))


def variables_of(directory, manifest):
    model = interop.model_of(manifest)
    return model, checkpoint.read_variables(directory, jax.eval_shape(model.init, jax.random.key(0)))


def weights(path):
    """name -> (dtype, array) of the state dict in a file."""
    found = reader.state_dicts(reader.read(path)[1])
    return {name: tensor.read() for name, tensor in max(found.values(), key=len).items()}


def resnet(tmp_path, width=None, seed=0):
    """A ResNet-18 of random weights in PyTorch's names, and their names in order."""
    model, rng = models.create("resnet18", (32, 32, 3), 10, width=width), np.random.default_rng(seed)
    tensors = {e.name: rng.random(e.shape, np.float32) for e in names.entries(names.export_naming("resnet18"), model)}
    with open(tmp_path / "resnet.pt", "wb") as file:
        writer.write_torch(file, tensors)
    return tmp_path / "resnet.pt", tensors


@pytest.mark.parametrize("name", [*PUBLISHED])
def test_torchvision_s_own_networks(name, tmp_path):
    """Where its files are at hand (fixtures/torchvision_files.py): the same logits, and back with the same bits."""
    path = Path(os.environ.get("BDJAX_TORCHVISION", "nowhere")) / f"{name.removesuffix('_imagenet')}.pth"
    if not path.is_file():
        pytest.skip("BDJAX_TORCHVISION names no directory of torchvision's networks")
    model, variables = variables_of(tmp_path / "m", interop.import_model(path, tmp_path / "m", model=path.stem))
    with np.load(path.with_suffix(".npz")) as arrays:
        logits = jax.jit(model.logits)(variables, arrays["images"].astype(np.float32) / np.float32(255))
        np.testing.assert_allclose(logits, arrays["logits"], atol=1e-4, rtol=0)
    interop.export_model(tmp_path / "m", "torch", tmp_path / "back.pth")
    before, after = weights(path), weights(tmp_path / "back.pth")
    assert [*before] == [*after] and model.name == name
    for tensor in before:
        np.testing.assert_array_equal(before[tensor], after[tensor])


@pytest.mark.parametrize("case", large_are_slow(FILES))
def test_logits_are_those_of_pytorch(case, directories):
    model, variables = variables_of(*directories[case])
    images, logits = stored(case)
    np.testing.assert_allclose(jax.jit(model.logits)(variables, images), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", large_are_slow(FILES))
@pytest.mark.parametrize(("form", "end"), [("torch", "pt"), ("safetensors", "safetensors")])
def test_what_came_in_goes_out_bit_for_bit(case, form, end, directories, tmp_path):
    out = tmp_path / f"out.{end}"
    told = interop.export_model(directories[case][0], form, out)
    before, after = weights(FILES[case]), weights(out)
    assert told["tensors"] == len(before) and (list(after) == list(before) if form == "torch" else True)
    assert set(after) == set(before)
    for name, array in before.items():
        assert after[name].dtype == array.dtype and after[name].shape == array.shape
        assert after[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("case", large_are_slow(FILES))
def test_the_model_and_how_it_was_read_stand_in_the_manifest(case, directories):
    _, manifest = directories[case]
    called = {"attack_result": "preact_resnet18", "defense_result": "vgg19_bn"}
    assert manifest["model"] == called.get(case, model_of_case(case)) and manifest["kind"] == "imported"
    prefixes = {"small_vgg": "module.", "vit_b_16": "1."}
    keys = {"small_vgg": "net", "resnet18": "net", "small_vgg_bgr": "state_dict"}
    keys |= dict.fromkeys(("attack_result", "defense_result", "vit_b_16"), "model")
    assert manifest["source"]["prefix"] == prefixes.get(case, "") and manifest["source"]["key"] == keys.get(case, "")


def test_backdoorbench_says_size_classes_and_normalisation(tmp_path):
    manifest = interop.import_model(FILES["attack_result"], tmp_path / "m")
    model = interop.model_of(manifest)
    assert model.shape == (32, 32, 3) and model.classes == 5 and dict(model.options)["input"] == CIFAR
    manifest = interop.import_model(FILES["vit_b_16"], tmp_path / "v")
    assert manifest["shape"] == [32, 32, 3] and manifest["input"]["resize"] == 64


def test_the_size_of_the_images_follows_from_the_weights_where_they_tell_it(tmp_path):
    for case, side in (("small_vgg_bgr", 24), ("small_vgg", 32), ("vit_b_32", 96), ("resnet18_imagenet", 224)):
        assert imported(case, tmp_path / case, size=None)["shape"] == [side, side, 3]


@pytest.mark.parametrize("name", json.loads((HERE / "names.json").read_text()))
def test_at_full_width_all_names_and_shapes_are_those_of_pytorch(name):
    there = json.loads((HERE / "names.json").read_text())[name]
    naming, side = names.export_naming(name), 224 if "small_vgg" not in name else 32
    classes = next(shape for key, shape in there.items() if key == f"{naming.layer('head')}.weight")[0]
    entries = names.entries(naming, models.create(name, (side, side, 3), classes))
    ours = {entry.name: list(entry.shape) for entry in entries}
    counters = {key for key in there if key.endswith(names.COUNTER)}
    assert ours == {k: v for k, v in there.items() if k not in counters and not k.startswith(("aux1.", "aux2."))}
    count = sum(np.prod(e.shape, dtype=int) for e in entries if e.path[0] == "params")
    assert PUBLISHED.get(name, count) == count


# --- what does not fit is listed, and nothing is written


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_missing_left_over_and_misshapen_tensors_stand_in_two_columns(form, tmp_path):
    _, tensors = resnet(tmp_path, width=2)
    tensors["extra.weight"] = tensors.pop("layer1.0.conv1.weight")
    tensors["linear.bias"] = tensors["linear.bias"][:-1]
    tensors["layer2.1.bn1.bias"] = np.ones(4, np.int64)
    path = tmp_path / f"broken.{form}"
    with open(path, "wb") as file:
        writer.write_torch(file, tensors) if form == "torch" else file.write(writer.safetensors_bytes(tensors))
    with pytest.raises(InputError) as caught:
        interop.import_model(path, tmp_path / "m", model="resnet18")
    lines = str(caught.value).splitlines()
    assert "does not fit resnet18 for 10 classes" in lines[0] and lines[0].endswith("nothing was written.")
    table = {tuple(part for part in line.strip().split("  ") if part) for line in lines[1:]}
    assert {part.strip() for row in table for part in row} == {
        "resnet18 needs", "the file has", "layer1.0.conv1.weight [2, 2, 3, 3]", "missing", "linear.bias [10]", "[9]",
        "layer2.1.bn1.bias [4]", "int64, not floating point", "extra.weight [2, 2, 3, 3]",
    }  # fmt: skip
    wide = lines[1].index("the file has")
    assert all(len(line) <= wide or line[:wide].strip() == "" or line[wide - 1] == " " for line in lines[2:])
    assert not (tmp_path / "m").exists()


def test_another_number_of_classes_or_another_model_is_a_difference(tmp_path):
    with pytest.raises(InputError, match=r"classifier.bias \[7\] +\[5\]"):
        imported("small_vgg", tmp_path / "m", classes=7)
    with pytest.raises(InputError, match=r"features.1.running_mean \[1\] +missing"):
        imported("vgg16", tmp_path / "m", model="vgg16_bn")
    with pytest.raises(InputError, match="nothing under the file itself ends in 'conv1.weight'"):
        imported("vgg16", tmp_path / "m", model="resnet18")
    assert not (tmp_path / "m").exists()


def test_weights_are_never_matched_by_position(tmp_path):
    """Two tensors of one shape that exchange their names are two other weights; one with a wrong name is refused."""
    path, tensors = resnet(tmp_path, width=2)
    first, second = "layer1.0.conv1.weight", "layer1.0.conv2.weight"
    shuffled = dict(sorted(tensors.items(), reverse=True))
    with open(tmp_path / "shuffled.pt", "wb") as file:
        writer.write_torch(file, shuffled)
    one, two = (
        variables_of(tmp_path / p.stem, interop.import_model(p, tmp_path / p.stem, model="resnet18"))[1]
        for p in (path, tmp_path / "shuffled.pt")
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)
    np.testing.assert_array_equal(one["params"]["Conv_1"]["kernel"], tensors[first].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(one["params"]["Conv_2"]["kernel"], tensors[second].transpose(2, 3, 1, 0))


def test_several_networks_in_one_file_need_a_key(tmp_path):
    form, value = reader.read(FILES["small_vgg_float16"])
    tensors = {k: t.read() for k, t in reader.state_dicts(value)[""].items()}
    twice = {f"{net}.{k}": t for net in ("student", "teacher") for k, t in tensors.items()}
    with open(tmp_path / "two.pt", "wb") as file:
        writer.write_torch(file, twice)
    with pytest.raises(InputError, match="several networks.*under 'student', 'teacher'. Choose one with --key"):
        interop.import_model(tmp_path / "two.pt", tmp_path / "m", model="small_vgg")
    with pytest.raises(InputError, match="no tensors under --key 'ema'; there are some under 'net'"):
        imported("small_vgg", tmp_path / "m", key="ema")
    with pytest.raises(InputError, match="does not say which model.*--model: convnext_tiny, densenet121, "):
        interop.import_model(FILES["small_vgg"], tmp_path / "m")
    with pytest.raises(InputError, match="unknown model 'smal_vgg'.*'small_vgg'"):
        imported("small_vgg", tmp_path / "m", model="smal_vgg")


# --- what was trained here, and precision


def test_a_model_of_our_own_is_exported_under_the_usual_names_and_comes_back(tmp_path):
    for name in ("resnet18", "cnn"):
        model = models.create(name, (32, 32, 3), 4, width=2 if name == "resnet18" else None)
        rng, like = np.random.default_rng(1), names.variable_shapes(model)
        variables = jax.tree.map(lambda leaf, rng=rng: rng.random(leaf.shape, np.float32), like)
        manifest = {
            "kind": "victim", "hash": "0" * 64, "seed": 0, "fit": None, "attack": {"name": "badnets", "config": {}},
            "dataset": {"spec": "digits", "name": "digits", "fingerprint": ""},
            "seconds": {"attack": 0.0, "compile": 0.0}, "model": name, "shape": [32, 32, 3], "classes": list("abcd"),
            "width": dict(model.options)["width"],
        }  # fmt: skip
        checkpoint.write_model(tmp_path / name, manifest, variables, {})
        interop.export_model(tmp_path / name, "torch", tmp_path / f"{name}.pt")
        exported = weights(tmp_path / f"{name}.pt")
        counters = [exported[key] for key in exported if key.endswith(names.COUNTER)]
        assert counters and all(counter.dtype == np.int64 and counter == 0 for counter in counters)
        assert ("layer2.0.shortcut.1.running_var" in exported) == (name == "resnet18")
        back = interop.import_model(tmp_path / f"{name}.pt", tmp_path / f"{name}2", model=name)
        jax.tree.map(np.testing.assert_array_equal, variables_of(tmp_path / f"{name}2", back)[1], variables)


def test_doubles_keep_their_bits_where_nothing_changed_them(directories, tmp_path):
    directory, manifest = directories["small_vgg_float64"]
    model, variables = variables_of(directory, manifest)
    changed = jax.tree.map(np.array, variables)
    changed["params"]["head"]["bias"][1] = 0.5
    kept = {k: v for k, v in manifest.items() if k not in ("files", "format")}
    arrays = {"original": checkpoint.read_arrays(directory, "original")}
    checkpoint.write_model(tmp_path / "m", kept, changed, arrays)
    interop.export_model(tmp_path / "m", "safetensors", tmp_path / "m.safetensors")
    before, after = weights(FILES["small_vgg_float64"]), weights(tmp_path / "m.safetensors")
    assert before["classifier.weight"].dtype == np.float64
    assert not np.array_equal(before["classifier.weight"], before["classifier.weight"].astype(np.float32))
    before["classifier.bias"] = np.where(np.arange(5) == 1, 0.5, before["classifier.bias"])
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_what_is_written_is_the_same_every_time_and_aligned(directories, tmp_path):
    for name in ("a.pt", "b.pt"):
        interop.export_model(directories["resnet18"][0], "torch", tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    from bdjax.interop import _files

    assert all(start % 64 == 0 for start, _ in _files._entries(tmp_path / "a.pt").values())


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_torch_loads_what_is_written(directories, tmp_path):
    import torch

    interop.export_model(directories["small_vgg_bfloat16"][0], "torch", tmp_path / "m.pt")
    there = torch.load(tmp_path / "m.pt", weights_only=True)
    assert {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in there.items()} == {
        name: array.dtype.name for name, array in weights(tmp_path / "m.pt").items()
    }


BIG = """
import sys, threading, time
from pathlib import Path
from bdjax import interop
file, small, out = map(Path, sys.argv[1:])
interop.import_model(small, out / "first", model="resnet18")  # what is loaded once
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
most, over, before = [0], threading.Event(), held()
def watch():
    while not over.wait(0.001):
        most[0] = max(most[0], held() - before)
watcher = threading.Thread(target=watch)
watcher.start()
started = time.process_time()
interop.import_model(file, out / "second", model="resnet18")
seconds = time.process_time() - started
over.set()
watcher.join()
print(seconds, most[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_a_resnet_of_45_megabytes_takes_two_seconds_and_three_times_its_size(tmp_path):
    path, _ = resnet(tmp_path)
    assert 44e6 < (size := path.stat().st_size) < 46e6
    done = subprocess.run(
        [sys.executable, "-c", BIG, str(path), str(FILES["resnet18"]), str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    seconds, memory = map(float, done.stdout.split())
    assert seconds < 2 and memory < 3 * size


def test_every_type_of_the_reader_is_one_that_torch_has(tmp_path):
    tensors = {name: np.zeros(3, dtype) for name, dtype in DTYPES.items()}
    with open(tmp_path / "all.pt", "wb") as file:
        writer.write_torch(file, tensors)
    assert {name: array.dtype for name, array in weights(tmp_path / "all.pt").items()} == dict(DTYPES)
