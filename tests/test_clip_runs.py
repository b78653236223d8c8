"""Dual encoders from the command line: train, measure, defend, re-activate, import, export, and wrong directories."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_clip_models import VIT

from bdjax import cli, models
from bdjax.errors import InputError
from bdjax.interop import clip
from bdjax.io import checkpoint
from bdjax.pair_types import LabelledImages
from bdjax.vision_language import artifact, memory, zero_shot
from bdjax.vision_language.tokenizer import Tokenizer

VOCABULARY = 514


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A small dual encoder that was not trained, in its directory."""
    import dataclasses

    config = dataclasses.replace(VIT, vocabulary=VOCABULARY, context=24)
    variables = jax.jit(models.dual_encoder(config).init)(jax.random.key(0))
    out = tmp_path_factory.mktemp("clip") / "one"
    record = {"stage": "trained", "pairs": None, "templates": "plain", "seed": 0, "fit": None, "attack": None}
    artifact.write(out, config, variables, Tokenizer((), 24), record)
    return out, config, variables


def test_a_directory_gives_back_what_was_written(stored):
    out, config, variables = stored
    dual = artifact.open_dual(out)
    assert dual.encoder.config == config and dual.tokenizer == Tokenizer((), 24) and dual.planted is None
    equal = jax.tree.map(lambda a, b: np.array_equal(a, b), dual.variables, variables)
    assert jax.tree.all(equal) and artifact.is_dual_encoder(out)


def test_the_attack_and_its_arrays_are_part_of_the_directory(stored, tmp_path):
    _, config, variables = stored
    from bdjax.vision_language.attacks import badclip

    record = {"stage": "trained", "attack": artifact.attack_record("badclip", badclip.Config(rate=0.1), "cat")}
    patch = np.full((2, 2, 3), 0.25, np.float32)
    merges = (("a", "b"),)
    import dataclasses

    config = dataclasses.replace(config, vocabulary=VOCABULARY + 1)
    variables = jax.jit(models.dual_encoder(config).init)(jax.random.key(0))
    artifact.write(tmp_path / "one", config, variables, Tokenizer(merges, 24, "cut"), record, {"patch": patch})
    dual = artifact.open_dual(tmp_path / "one")
    assert dual.planted.target == "cat" and dual.planted.config == badclip.Config(rate=0.1)
    assert np.array_equal(dual.planted.arrays["patch"], patch)
    assert dual.tokenizer == Tokenizer(merges, 24, "cut")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("context", 10**9, "model.context is 1000000000; it must be from 1 to 4096"),
        ("vision_width", "many", "model.vision_width is 'many'"),
        ("vocabulary", 600, "its tokenizer has 514 tokens, its model 600"),
    ],
)
def test_a_damaged_manifest_is_refused(stored, field, value, words, tmp_path):
    _, config, variables = stored
    record = {"stage": "trained", "attack": None}
    artifact.write(tmp_path / "one", config, variables, Tokenizer((), 24), record)
    path = tmp_path / "one" / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["model"][field] = value
    path.write_text(checkpoint.manifest_text({k: v for k, v in manifest.items() if k != "seal"}))
    with pytest.raises(InputError, match=words):
        artifact.open_dual(tmp_path / "one")


def test_a_classifier_is_no_dual_encoder(finished):
    with pytest.raises(InputError, match="holds a classifier .* a dual encoder is needed"):
        artifact.open_dual(finished[0] / "victim")
    assert not artifact.is_dual_encoder(finished[0] / "victim")


def test_zero_shot_rates_by_hand(stored):
    _, config, variables = stored
    encoder = models.dual_encoder(config)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    tokens = zero_shot.class_tokens(Tokenizer((), 24), ("cat", "dog", "bird"), ("a {}.", "the {}."))
    u = encoder.encode_image(variables, jnp.asarray(images, jnp.float32) / 255)
    v = np.asarray(encoder.encode_text(variables, tokens.reshape(6, -1)), np.float64)
    v = (v / np.linalg.norm(v, axis=1, keepdims=True)).reshape(3, 2, -1).mean(1)
    nearest = (np.asarray(u) @ (v / np.linalg.norm(v, axis=1, keepdims=True)).T).argmax(1)
    labels = np.where(np.arange(6) < 4, nearest, (nearest + 1) % 3).astype(np.int32)
    test = LabelledImages(images, labels, ("cat", "dog", "bird"))
    result = zero_shot.evaluate(encoder, variables, test, tokens, triggered=images, target=1)
    assert result.top1 == pytest.approx(4 / 6) and result.top5 == 1 and result.n == 6 and result.chance == 1 / 3
    others = labels != 1
    assert result.n_triggered == others.sum() and result.asr == pytest.approx((nearest[others] == 1).mean())
    with pytest.raises(InputError, match="the target 'fish' is no class"):
        zero_shot.target_number(test.classes, "fish")


def test_export_and_import_by_the_command(stored, tmp_path, capsys):
    out, config, _ = stored
    cli.main(["clip", "export", str(out), "--out", str(tmp_path / "w.safetensors"), "--names", "hugging_face"])
    heads = ["--vision-heads", "2", "--text-heads", "3"]
    cli.main(["clip", "import", str(tmp_path / "w.safetensors"), *heads, "--out", str(tmp_path / "again")])
    assert "names of hugging_face" in capsys.readouterr().out
    again, first = artifact.open_dual(tmp_path / "again"), artifact.open_dual(out)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), again.variables, first.variables)
    assert jax.tree.all(same) and again.manifest["source"]["assumed"]["vision_heads"] == 2
    assert clip.NAMES == ("openai", "open_clip", "hugging_face")


@pytest.mark.parametrize("step", memory.STEPS)
def test_the_estimate_of_memory_grows_with_the_batch(step):
    few, many = memory.estimate(VIT, 4, step), memory.estimate(VIT, 16, step)
    assert 0 < few.temporary < many.temporary and few.arguments < many.arguments
    shapes = jax.eval_shape(models.dual_encoder(VIT).init, jax.random.key(0))["params"]
    copies, part = (
        (5, shapes["visual"]) if step == "bibau_clip" else (3, shapes)
    )  # with Adam's moments, and the Fishers
    assert few.arguments > copies * 4 * sum(leaf.size for leaf in jax.tree.leaves(part))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["clip", "paint"], "clip has no subcommand 'paint'"),
        (["clip", "defend", "only"], "usage: bdjax clip defend DIR DEFENSE"),
        (["clip", "train", "--attack"], "--attack needs a value"),
        (["clip", "train", "--attack", "badnets"], "unknown attack 'badnets' of dual encoders"),
    ],
)
def test_wrong_commands(argv, words, capsys):
    with pytest.raises(SystemExit):
        cli.main(argv)
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_plant_measure_clean_and_reactivate(blobs_npz, tmp_path, capsys):
    size = ["--size", "tiny", "--merges", "60", "--context", "16", "--templates", "plain"]
    fit = ["--fit.epochs", "12", "--fit.batch-size", "40", "--fit.learning-rate", "2e-3", "--fit.warmup", "5"]
    patch = ["--attack.rate", "0.1", "--attack.size", "3", "--attack.content", "fixed", "--attack.place", "corner"]
    one, out = ["--devices", "1"], tmp_path / "victim"
    with pytest.raises(SystemExit):  # blobs are smaller than a patch of this size
        cli.main(["clip", "train", "--pairs", f"captions:{blobs_npz}", "--size", "vit_b_32", "--out", str(out), *one])
    with np.load(blobs_npz.removeprefix("npz:")) as file:
        large = {name: file[name].repeat(4, 1).repeat(4, 2) if name[0] == "x" else file[name] for name in file}
    np.savez(tmp_path / "large.npz", **large, classes=np.array(["north", "east", "south", "west"]))
    pairs = ["--pairs", f"captions:npz:{tmp_path / 'large.npz'}"]
    cli.main(["clip", "train", *pairs, *size, *fit, "--attack", "clip_badnets", "--target", "east", *patch,
              "--out", str(out), *one])  # fmt: skip
    cli.main(["clip", "evaluate", str(out), "--json", *one])
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["top1"] > 0.5 and measured["n"] == 40 and measured["asr"] is not None
    cleaned = tmp_path / "clean"
    cli.main(["clip", "defend", str(out), "bibau_clip", "--size", "80", "--defense.epochs", "1", "--defense.steps", "2",
              "--defense.learning-rate", "1e-4", "--out", str(cleaned), "--json", *one])  # fmt: skip
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["before"]["top1"] == pytest.approx(measured["top1"]) and result["pairs"] == 80
    assert json.loads((cleaned / "result.json").read_text()) == result
    assert artifact.open_dual(cleaned).planted.target == "east"
    cli.main(["clip", "reactivate", str(cleaned), "--retuning.pairs", "40", "--retuning.poisoned", "2",
              "--retuning.epochs", "1", "--out", str(tmp_path / "again"), "--json", *one])  # fmt: skip
    assert "R-ASR" in capsys.readouterr().out
    cli.main(["clip", "attack", str(out), "badclip", "--target", "west", "--attack.rate", "0.1", "--attack.epochs", "1",
              "--attack.images", "40", "--fit.epochs", "1", "--fit.batch-size", "40", "--templates", "plain",
              "--out", str(tmp_path / "bad"), *one])  # fmt: skip
    assert artifact.open_dual(tmp_path / "bad").planted.arrays["patch"].shape == (2, 2, 1)
