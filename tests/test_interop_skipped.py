"""Objects among the tensors of the state dict itself: listed as skipped, or named where the network needs a tensor."""

import argparse
import collections
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from commands import bdjax, refused
from hostile import GOOD, zipped
from hostile_pickles import call, number, text, tuple_

from bdjax.interop import import_model, reader
from bdjax.io import checkpoint

BESIDE = {
    "args": argparse.Namespace(lr=0.1), "config": collections.Counter("a"), "features.0._extra_state": {1, 2},
    "names": np.array(["a", "b"]), "epoch": 3, "history": [0.5, {"acc": 1j}],
}  # fmt: skip


def weights():
    """Of a small network, as NumPy arrays, which Python's own pickler writes."""
    return {name: tensor.read() for name, tensor in reader.state_dicts(reader.read(GOOD)[1])[""].items()}


def written(tmp_path, value):
    path = tmp_path / "m.pt"
    path.write_bytes(zipped(pickle.dumps(value, 2), storages=()))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "net", "both.ema"])
def test_objects_beside_the_tensors_are_listed_as_skipped(key, tmp_path):
    value = {**weights(), **BESIDE}
    if key == "net":
        value = {"net": value}
    elif key:
        value = {"both": {f"{part}.{name}": held for part in ("ema", "raw") for name, held in value.items()}}
    manifest = import_model(written(tmp_path, value), tmp_path / "m", model="small_vgg", key=key)
    listed = " ".join(manifest["source"]["skipped"])
    assert all(name in listed for name in ("args", "config", "features.0._extra_state", "names"))
    assert len(manifest["source"]["tensors"]) == len(weights()) and checkpoint.read_manifest(tmp_path / "m")


def test_the_command_needs_no_flag_for_them(tmp_path, capsys):
    file = written(tmp_path, {**weights(), **BESIDE})
    said = bdjax(capsys, "import", file, "--model", "small_vgg", "--out", tmp_path / "m")
    assert "skipped" in said and "args (argparse.Namespace)" in said
    bdjax(capsys, "import", file, "--model", "small_vgg", "--out", tmp_path / "n", "--ignore", "args")  # may be said


@pytest.mark.parametrize(
    "stands", [argparse.Namespace(), *(pytest.param(one, marks=pytest.mark.slow) for one in ({1}, np.array([None]), 7))]
)
def test_what_stands_where_the_network_needs_a_tensor_is_named(stands, tmp_path, capsys):
    changed = {**weights(), "features.1.weight": stands}
    name = type(stands).__name__
    said = refused(capsys, "import", written(tmp_path, changed), "--model", "small_vgg", "--out", tmp_path / "m")
    line = next(line for line in said.splitlines() if "features.1.weight" in line)
    assert line.endswith("missing" if name == "int" else f"{name}, not a plain tensor")
    assert not (tmp_path / "m").exists()


SPARSE = call("torch._utils._rebuild_sparse_tensor", call("torch.serialization._get_layout", text("torch.sparse_coo")))
META = call(
    "torch._utils._rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n", tuple_(number(4)), tuple_(number(1)), b"\x89"
)
TYPED = call(
    "torch._tensor._rebuild_from_type_v2", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cmine\nTensor\n", tuple_(), b"N"
)


@pytest.mark.slow
@pytest.mark.parametrize("body", [SPARSE, META, TYPED], ids=["sparse", "meta", "typed"])
def test_a_tensor_of_another_sort_among_the_weights_is_refused_and_can_be_waived(body, tmp_path, capsys):
    """It has a part in what the network computes; which one is not known."""
    good = pickle.dumps(weights(), 2)
    assert good.endswith(b"u.")
    pickled = good[:-1] + text("mask.extra") + body + b"s."
    (tmp_path / "m.pt").write_bytes(zipped(pickled, storages=()))
    argv = ["import", tmp_path / "m.pt", "--model", "small_vgg", "--out", tmp_path / "m"]
    said = refused(capsys, *argv)
    assert "'mask.extra' (" in said and "not plain tensors" in said and "--ignore mask.extra" in said
    bdjax(capsys, *argv, "--ignore", "mask")


def test_the_guides_lines_turn_arrays_of_keras_into_weights(tmp_path):
    """docs/your-model.md, word for word."""
    guide = (Path(__file__).parent.parent / "docs" / "your-model.md").read_text()
    lines: dict = {}
    exec(guide.split("<!-- example: keras -->")[1].split("```python\n")[1].split("```")[0], lines)
    named, layers = weights(), collections.defaultdict(dict)
    theirs = {"bias": "bias", "running_mean": "moving_mean", "running_var": "moving_variance"}
    for name, array in named.items():
        layer, _, leaf = name.rpartition(".")
        if array.ndim > 1:
            layers[layer]["kernel"] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        elif leaf in ("weight", *theirs):
            layers[layer]["beta" if leaf == "bias" and "gamma" in layers[layer] else theirs.get(leaf, "gamma")] = array
    kept = {name for name in named if "num_batches" not in name}
    arrays = lines["from_keras"](list(layers.items()), kept)
    safetensors.numpy.save_file(arrays, tmp_path / "weights.safetensors")
    import_model(tmp_path / "weights.safetensors", tmp_path / "m", model="small_vgg")
    for name in kept:
        np.testing.assert_array_equal(arrays[name], named[name].astype(np.float32))
    with pytest.raises(ValueError, match="missing"):
        lines["from_keras"](list(layers.items())[1:], kept)


@pytest.mark.slow
def test_class_names_of_a_file_stay_on_their_line(tmp_path, capsys):
    names = ["a\x1b[31m", "b\u202e", "c\nresult: /tmp/elsewhere", "d\x00", "e"]
    file = written(tmp_path, {"net": weights(), "classes": names})
    said = bdjax(capsys, "import", file, "--model", "small_vgg", "--out", tmp_path / "m")
    assert sum(line.startswith("result:") for line in said.splitlines()) == 1 and "c\\x0aresult" in said
    assert all(name.isprintable() for name in checkpoint.read_manifest(tmp_path / "m")["classes"])


@pytest.mark.parametrize("bad", ["a\0b", os.fsdecode(b"\xff")])
def test_an_argument_that_no_report_could_hold_is_refused_before_any_work(bad, tmp_path, capsys):
    for argv in (["import", GOOD, "--out", bad], ["import", bad], ["purify", GOOD, "--clean-data", f"folder:{bad}"]):
        said = refused(capsys, *argv)
        assert "is not UTF-8, or contains a null byte" in said and said.strip().isprintable()
