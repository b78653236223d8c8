"""`bdjax purify` on a file with things beside its weights: they are listed, and class names bring labels into order."""

import json

import numpy as np
import pytest
from commands import bdjax, refused
from test_purify import CNN, QUICK

from bdjax.io import checkpoint


@pytest.mark.slow
def test_class_names_of_the_file_order_the_data_up_to_the_cleaned_model(finished, blobs, capsys, tmp_path):
    images, labels = blobs
    names = np.array(["d", "c", "b", "a"])  # of classes 0 to 3, which the data number the other way round
    parts = {"x_train": images[:60], "x_test": images[160:], "y_train": 3 - labels[:60], "y_test": 3 - labels[160:]}
    np.savez(tmp_path / "mine.npz", **parts, classes=names[::-1])
    file = tmp_path / "net.ckpt"
    bdjax(capsys, "export", finished[0] / "victim", "--format", "torch", "--out", file)
    bdjax(capsys, "import", file, *CNN, "--out", tmp_path / "plain")
    manifest = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    del manifest["files"], manifest["seal"]
    variables = checkpoint.read_variables(tmp_path / "plain", _like(manifest))
    arrays = {"original": checkpoint.read_arrays(tmp_path / "plain", "original")}
    checkpoint.write_model(tmp_path / "named", {**manifest, "classes": names.tolist()}, variables, arrays)
    spec = f"npz:{tmp_path}/mine.npz"
    alone = json.loads(bdjax(capsys, "evaluate", tmp_path / "named", "--dataset", spec, "--json").splitlines()[-1])
    assert alone["acc"] > 0.8 and "permuted into the order" in " ".join(alone["data"]) and not alone["warnings"]
    wrong = json.loads(bdjax(capsys, "evaluate", tmp_path / "plain", "--dataset", spec, "--json").splitlines()[-1])
    assert wrong["acc"] < 0.3 and "classes in another order it would be" in wrong["warnings"][0]
    out = tmp_path / "out"
    said = bdjax(capsys, "purify", tmp_path / "named", "--clean-data", spec, *QUICK, "--out", out)
    assert "attack success rate: not measured: no trigger given" in said
    assert "permuted into the order" in said
    result = json.loads((out / "result.json").read_text())
    assert result["classes"] == names.tolist() and result["accuracy"]["before"]["rate"] > 0.8 and result["asr"] is None
    again = json.loads(bdjax(capsys, "evaluate", out / "purified", "--json").splitlines()[-1])
    assert again["acc"] == pytest.approx(result["accuracy"]["after"]["rate"]) and again["asr"] is None


def _like(manifest):
    import jax

    from bdjax import interop

    return jax.eval_shape(interop.model_of(manifest).init, jax.random.key(0))


def test_a_path_that_no_report_could_name_is_refused_first(capsys, tmp_path):
    import os

    file = tmp_path / os.fsdecode(b"net\xff.pt")
    file.write_bytes(b"")
    assert "is not UTF-8" in refused(capsys, "purify", file, "--clean-data", "digits", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()
