"""`bdjax gallery`: numbers worked out by hand, what is left out and why, victims beside names, the picture's pixels."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from bdjax import cli, registry
from bdjax.attacks import badnets
from bdjax.config import Experiment
from bdjax.engine import FitConfig
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines import gallery
from bdjax.pipelines.training import train

HEAD = '''"""An attack of one's own."""
from bdjax.attacks import PoisonConfig as Config
from bdjax.types import Backdoor
'''
BRIGHTER = "def trigger(config, images, key, arrays): return images * 0.5 + 0.5\n"
ARRAYS = "def trigger(config, images, key, arrays): return images + arrays['delta']\n"
NOISE = f"""import jax
def prepare(config, task, key): return {{'delta': jax.random.uniform(key, task.model.shape)[None]}}
{ARRAYS}"""
LEARNED = {
    "train": f"NEEDS_ARRAYS = True\ndef train(config, task, key): return None\n{ARRAYS}",
    "edit": f"NEEDS_ARRAYS = True\ndef edit(config, variables, task, key): return None\n{ARRAYS}",
    "fit": f"def prepare(config, task, key): return task.fit(task.images, task.labels, key)\n{ARRAYS}",
    "model": f"def prepare(config, task, key): return task.model.init(key)\n{ARRAYS}",
}


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """Test images of one value: 0.2 but for the last, which is white; 32x32x3, 9 of them. A data set spec."""
    path = tmp_path_factory.mktemp("data") / "flat.npz"
    images = np.full((9, 32, 32, 3), 51, np.uint8)
    images[-1] = 255
    labels = np.arange(9, dtype=np.int32) % 3
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return f"npz:{path}"


@pytest.fixture
def methods(tmp_path):
    """Paths of attacks in files: those of LEARNED by name, and `static`, whose `train` has no part in its trigger."""
    paths = {}
    sources = {**LEARNED, "static": f"def train(config, task, key): return None\n{BRIGHTER}"}
    for name, source in sources.items():
        (tmp_path / f"by_{name}.py").write_text(HEAD + source)
        paths[name] = str(tmp_path / f"by_{name}.py")
    return paths


def planted(directory, dataset, attack, config=None):
    fit = FitConfig(epochs=1, batch_size=8)
    return train(Experiment(attack, None, dataset, attack_config=config, fit=fit), directory)


def only(monkeypatch, *attacks):
    """Let the registry know these attacks alone."""
    names = registry.names
    monkeypatch.setattr(registry, "names", lambda kind: list(attacks) if kind == "attacks" else names(kind))


def bdjax(capsys, *argv):
    """What a command wrote, (stdout, stderr)."""
    cli.main([str(a) for a in argv])
    return capsys.readouterr()


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_numbers_of_a_white_square_on_flat_images(flat):
    """16 pixels of 3 channels go from 0.2 to 1 in 8 of 9 images: norms and PSNR are exact."""
    result, ((clean, triggered),) = gallery.gallery(("badnets",), dataset=flat, images=(0, 8))
    (row,) = result["rows"]
    l2 = (16 * 3 * 0.8**2) ** 0.5
    assert (result["n"], row["unchanged"], result["ssim_window"]) == (9, 1, 11)
    assert row["l2"] == pytest.approx(l2 * 8 / 9) and row["linf"] == pytest.approx(0.8 * 8 / 9)
    assert row["psnr"] == pytest.approx(-20 * np.log10(l2 / (32 * 32 * 3) ** 0.5), abs=1e-4)  # of the 8
    assert row["ssim"] < 1 and result["shown"] == [0, 8]
    assert clean.shape == triggered.shape == (2, 32, 32, 3)
    assert (triggered[0, 27:31, 27:31] == 1).all() and (triggered != clean).sum() == 48


def test_a_trigger_that_changes_nothing(flat, tmp_path, capsys):
    """PSNR is infinite: null in JSON, inf for a person."""
    (tmp_path / "nothing.py").write_text(HEAD + "def trigger(config, images, key, arrays): return images\n")
    argv = ("gallery", tmp_path / "nothing.py", "--dataset", flat, "--out", tmp_path / "x.png", "--json")
    lines = bdjax(capsys, *argv).out.splitlines()
    row = json.loads(lines[-1])["rows"][0]
    assert (row["psnr"], row["l2"], row["unchanged"]) == (None, 0, 9)
    assert next(line for line in lines if line.startswith("nothing")).split()[1] == "inf"


def test_no_argument_shows_all_that_need_no_training(flat, methods, tmp_path, capsys, monkeypatch):
    only(monkeypatch, "badnets", "lsb", *methods.values())
    out, err = bdjax(capsys, "gallery", "--dataset", flat, "--out", tmp_path / "x.png", "--json")
    result = json.loads(out.splitlines()[-1])
    assert [row["attack"] for row in result["rows"]] == ["badnets", "lsb", methods["static"]]
    assert list(result["left_out"]) == [methods[name] for name in LEARNED]
    assert err.count("left out") == 1 and all(methods[name] in err for name in LEARNED)
    assert "bdjax train" in err and "give DIR" in err
    assert "by_static" in out


def test_an_attack_that_does_not_fit_is_left_out_only_when_it_was_not_asked_for(blobs_npz, tmp_path, monkeypatch):
    """8x8 images do not hold a text of 40 letters."""
    source = HEAD + "from bdjax.attacks.lsb import Config as C, trigger as t\n"
    source += "def trigger(config, images, key, arrays): return t(C(text='a' * 40), images, key, arrays)\n"
    (tmp_path / "long.py").write_text(source)
    long = str(tmp_path / "long.py")
    only(monkeypatch, "badnets", long)
    result, pictures = gallery.gallery(dataset=blobs_npz, count=5)
    assert len(pictures) == 1 and result["ssim_window"] == 7 and "has 40 bytes" in result["left_out"][long]
    with pytest.raises(InputError, match="has 40 bytes"):
        gallery.gallery((long,), dataset=blobs_npz)


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_trigger_needs_a_victim(name, flat, methods):
    with pytest.raises(InputError, match=r"its trigger is learned\. Train a victim .*give DIR\.$"):
        gallery.gallery((methods[name],), dataset=flat)


@pytest.fixture(scope="module")
def victims(blobs_npz, tmp_path_factory):
    root = tmp_path_factory.mktemp("victims")
    (root / "noise.py").write_text(HEAD + NOISE)
    return {
        "noise": planted(root / "noise", blobs_npz, str(root / "noise.py")),
        "badnets": planted(root / "square", blobs_npz, "badnets", badnets.Config(target=1, size=3, quantise=False)),
    }


@pytest.mark.slow
def test_a_name_has_the_trigger_of_a_victim_of_the_same_seed(victims, blobs_npz):
    """Noise that `prepare` draws is drawn by the same key, whether it is planted or only shown."""
    path = str(victims["noise"].with_suffix(".py"))
    result, pictures = gallery.gallery((str(victims["noise"]), path))
    stored, made = result["rows"]
    assert (stored.pop("from"), made.pop("from")) == (str(victims["noise"]), None)
    assert stored == made and result["dataset"] == "blobs" and result["n"] == 40
    np.testing.assert_array_equal(*(pair.triggered for pair in pictures))
    other, _ = gallery.gallery((path,), dataset=blobs_npz, seed=1)
    assert other["rows"][0]["psnr"] != made["psnr"]


@pytest.mark.slow
def test_a_victim_is_shown_with_its_own_config(victims, tmp_path):
    """And so is the purified model in the directory of a run."""
    shutil.copytree(victims["badnets"], tmp_path / "run" / "purified")
    sources = ("badnets", str(victims["badnets"]), str(tmp_path / "run"))
    result, ((_, default), (clean, own), (_, purified)) = gallery.gallery(sources, images=(0,))
    assert (default != clean).sum() == 1 and (own != clean).sum() == 9
    np.testing.assert_array_equal(own, purified)
    assert [row["from"] for row in result["rows"]] == [None, *sources[1:]]
    assert result["rows"][1]["config"]["size"] == 3


def test_picture_shows_every_pixel_as_a_square(flat, victims, tmp_path, capsys):
    out = tmp_path / "x.png"
    bdjax(capsys, "gallery", "badnets", "lsb", "--dataset", flat, "--image", "0", "--out", out)
    picture = np.asarray(Image.open(out).convert("RGB"))
    _, pairs = gallery.gallery(("badnets", "lsb"), dataset=flat, images=(0,))
    for _, triggered in pairs:
        wanted = (triggered[0] * 255).round().astype(np.uint8).repeat(3, 0).repeat(3, 1)
        windows = np.lib.stride_tricks.sliding_window_view(picture, wanted.shape)[:, :, 0]
        first = (windows[:, :, 0, 0] == wanted[0, 0]).all(-1)
        assert any(np.array_equal(windows[y, x], wanted) for y, x in zip(*np.nonzero(first), strict=True))
    bdjax(capsys, "gallery", victims["noise"], "--image", "0,1,2,3,4,5", "--out", out)  # grey, 8x8; replaces it
    grey, narrow = np.asarray(Image.open(out).convert("RGB")), picture
    assert grey.shape[1] > narrow.shape[1] and (grey[..., 0] == grey[..., 2]).mean() > 0.99


def test_digits_by_the_command_line(tmp_path, capsys):
    argv = ("gallery", "--out", tmp_path / "x.png", "--count", "10", "--seed", "3", "badnets", "sig", "--json")
    out, err = bdjax(capsys, *argv)
    result = json.loads(out.splitlines()[-1])
    assert err == "" and (result["dataset"], result["n"], result["seed"]) == ("digits", 10, 3)
    assert "n = 10" in out and "an 11x11 window" in out and "PSNR dB" in out
    assert f"{result['rows'][1]['psnr']:.1f}" in out and len(result["shown"]) == 3
    again, _ = gallery.gallery(("badnets", "sig"), count=10, seed=3)
    assert again["rows"] == result["rows"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["badnet"], ["unknown attack 'badnet'", "Did you mean 'badnets'", "no directory of that name"]),
        (["./badnets"], ["badnets is not a directory", "bdjax train"]),
        (["gone.py"], ["no such file: gone.py"]),
        (["badnets", "--image", "9"], ["--image 9", "0 to 8"]),
        (["badnets", "--image=-1"], ["--image -1", "0 to 8"]),
        (["badnets", "--image", "one"], ["--image", "'one'", "0,1,2"]),
        (["badnets", "--image", "0,1,2,3,4,5,6"], ["1 to 6 images", "got 7"]),
        (["badnets", "--count", "0"], ["--count", "got 0"]),
        (["badnets", "--dataset", "npz:gone.npz"], ["gone.npz"]),
        (["badnets", "--out", "gone/x.png"], ["there is no directory gone", "--out"]),
        (["badnets", "--out", "x.jpg"], ["x.jpg does not end in .png"]),
        (["badnets", "--out", "folder.png"], ["folder.png is a directory"]),
    ],
)
def test_mistakes_are_named(argv, words, flat, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    defaults = [] if "--dataset" in argv else ["--dataset", flat]
    defaults += [] if "--out" in argv else ["--out", "x.png"]
    message = refused(capsys, "gallery", *argv, *defaults)
    for word in words:
        assert word in message
    assert not (tmp_path / "x.png").exists()


def test_a_folder_that_cannot_be_written(flat, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # a superuser may write anywhere
    assert "permission denied" in refused(capsys, "gallery", "badnets", "--dataset", flat, "--out", tmp_path / "x.png")


def test_victims_of_other_data(victims, flat, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(victims["badnets"], other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["dataset"]["spec"] = flat
    (other / "manifest.json").write_text(checkpoint.manifest_text(manifest))
    with pytest.raises(InputError, match=r"several data sets: .*--dataset"):
        gallery.gallery((str(other), str(victims["badnets"])))
    with pytest.raises(InputError, match=r"square has a trigger for \(8, 8, 1\) images; flat has \(32, 32, 3\)"):
        gallery.gallery((str(victims["badnets"]),), dataset=flat)
    (other / "trigger.npz").write_bytes(b"")
    with pytest.raises(InputError, match=r"trigger\.npz is damaged"):
        gallery.gallery((str(other),))


@pytest.mark.slow
def test_the_gallery_of_all_shows_or_leaves_out_every_attack_of_the_registry():
    result, pictures = gallery.gallery(count=2)
    shown = [row["attack"] for row in result["rows"]]
    assert sorted([*shown, *result["left_out"]]) == registry.names("attacks") and len(pictures) == len(shown)
    assert {"badnets", "wanet", "lsb"} <= set(shown)
    assert "no trigger" in result["left_out"]["retuning"] and "changes no image" in result["left_out"]["clean"]
