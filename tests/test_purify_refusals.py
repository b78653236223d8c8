"""What `bdjax purify` cannot do is said in one line, and nothing is left behind."""

from pathlib import Path

import numpy as np
import pytest
from commands import refused

FIXTURE = Path(__file__).parent / "fixtures" / "torch" / "small_vgg_bgr.pt"
VGG = ["--model", "small_vgg"]
FITS = ["FIXTURE", *VGG, "--clean-data", "FITS"]


@pytest.fixture(scope="module")
def data(blobs, tmp_path_factory):
    """Data sets by what is wrong with them, as specs."""
    folder, (images, labels) = tmp_path_factory.mktemp("data"), blobs
    few = {"x_train": images[:10], "y_train": labels[:10], "x_test": images[10:19], "y_test": labels[10:19]}
    small = {"x_train": images[:90], "y_train": labels[:90], "x_test": images[90:100], "y_test": labels[90:100]}
    one = {name: np.zeros_like(value) if name[0] == "y" else value for name, value in small.items()}
    one["classes"] = np.array(["a", "b"])
    for name, arrays in {"few": few, "small": small, "one": one}.items():
        np.savez(folder / f"{name}.npz", **arrays)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 24, 24, 3)).astype(np.uint8)
    kinds = np.arange(40, dtype=np.int32) % 5
    np.savez(folder / "fits.npz", x_train=noise[:20], y_train=kinds[:20], x_test=noise[20:], y_test=kinds[20:])
    return {name: f"npz:{folder / name}.npz" for name in ("few", "small", "one", "fits")}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["usage: bdjax purify FILE|DIR"]),
        (["nowhere.pt", *VGG, "--clean-data", "FITS"], ["nowhere.pt does not exist", "weight file"]),
        (["FIXTURE", "--clean-data", "FITS"], ["does not say which model", "--model"]),
        (["FIXTURE", *VGG], ["no data set of its own", "--clean-data"]),
        (["FIXTURE", *VGG, "--clean-data", "npz:gone.npz"], ["gone.npz does not exist"]),
        (["FIXTURE", *VGG, "--clean-data", "SMALL"], ["(24, 24, 3)", "(8, 8, 1)", "small"]),
        (["FIXTURE", *VGG, "--clean-data", "FEW"], ["few has 19 clean images", "20", "10 to clean with"]),
        (["FIXTURE", *VGG, "--clean-data", "SMALL", "--images", "test"], ["10 clean images", "takes all 100"]),
        (["FIXTURE", *VGG, "--clean-data", "ONE"], ["100 clean images of 1 classes"]),
        (["FIXTURE", *VGG, "--clean-data", "SMALL", "--held-out", "95"], ["from 10 to 90", "got 95"]),
        ([*FITS, "--defense", "ibu"], ["true trigger", "ibau", "finetune"]),
        (
            [*FITS, "--defense", "age", "--defense.backdoor-knowledge"],
            ["age is given the true trigger"],
        ),
        ([*FITS, "--defense", "ibua"], ["'ibua'", "Did you mean"]),
        ([*FITS, "--defense"], ["--defense needs the name"]),
        ([*FITS, "--defense", "universal"], ["detects backdoors and removes none"]),
        ([*FITS, "--methods", "age,ibau"], ["ibau cannot audit"]),
        ([*FITS, "--classes", "9"], ["[9]", "[5]", "nothing was written"]),
        ([*FITS, "--input-std", "0"], ["--input-std must be positive"]),
        (["VICTIM", "--model", "small_vgg"], ["--model small_vgg", "holds a cnn"]),
        (["VICTIM", "--input-mean", "0.5"], ["cannot be changed here", "input"]),
        (["VICTIM", "--clean-data", "SMALL"], ["not the data set that", "fingerprint"]),
        (["DATA", "--clean-data", "FITS"], ["manifest.json is missing"]),
    ],
    ids=lambda value: " ".join(str(part) for part in value)[-60:].replace("/", "_"),
)  # fmt: skip
def test_what_cannot_work_is_refused_and_leaves_nothing(argv, words, data, finished, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"FIXTURE": FIXTURE, "VICTIM": finished[0] / "victim", "DATA": Path(data["few"][4:]).parent}
    places |= {name.upper(): spec for name, spec in data.items()}
    argv = argv if argv[-1:] in ([], ["--defense"]) else [*argv, "--out", "o"]
    said = " ".join(refused(capsys, "purify", *(places.get(part, part) for part in argv)).split())
    for word in words:
        assert word in said
    assert not list(tmp_path.iterdir())


def test_what_stands_in_out_is_left_alone(data, capsys, tmp_path):
    argv = ["purify", FIXTURE, *VGG, "--clean-data", data["fits"], "--out", tmp_path / "o"]
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("mine")
    assert "is not empty and holds no bdjax run" in refused(capsys, *argv)
    assert [path.name for path in tmp_path.rglob("*")] == ["o", "thesis.txt"]
    assert "o/thesis.txt is a file" in refused(capsys, *argv[:-1], tmp_path / "o" / "thesis.txt")
    assert (tmp_path / "o" / "thesis.txt").read_text() == "mine"


def test_another_run_is_left_alone(finished, data, capsys):
    before = {path: path.read_bytes() for path in finished[0].rglob("*") if path.is_file()}
    said = refused(capsys, "purify", FIXTURE, *VGG, "--clean-data", data["fits"], "--out", finished[0])
    assert "another configuration" in said
    assert {path: path.read_bytes() for path in finished[0].rglob("*") if path.is_file()} == before
