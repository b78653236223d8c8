"""Weights of CLIP from PyTorch: the embeddings that PyTorch computes, names of three kinds, and what is refused."""

import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bdjax import models
from bdjax.errors import InputError
from bdjax.interop import clip, reader, writer
from bdjax.interop.clip import FileFacts

HERE = Path(__file__).parent / "fixtures" / "clip"
CASES = {
    "clip_vit": ("clip_vit.safetensors", FileFacts(vision_heads=4, text_heads=3), "openai"),
    "clip_vit_gelu": ("clip_vit_gelu.pt", FileFacts("gelu", 4, 3), "open_clip"),
    "clip_resnet": ("clip_resnet.pt", FileFacts(vision_heads=4, text_heads=3), "openai"),
    "clip_hugging_face": ("clip_hugging_face.safetensors", FileFacts(vision_heads=4, text_heads=3), "hugging_face"),
}


def imported(case):
    file, facts, _ = CASES[case]
    return clip.import_clip(HERE / file, facts)


def embeddings(config, variables, stored):
    encoder = models.dual_encoder(config)
    images = jnp.asarray(stored["images"], jnp.float32) / 255
    return jax.jit(encoder.encode_image)(variables, images), jax.jit(encoder.encode_text)(variables, stored["tokens"])


def same(tree, other):
    equal = jax.tree.map(lambda a, b: np.array_equal(a, b), tree, other)
    return jax.tree.all(equal)


@pytest.mark.parametrize("case", CASES)
def test_both_towers_give_the_embeddings_that_pytorch_computes(case):
    config, variables, source = imported(case)
    assert source["names"] == CASES[case][2] and config.context == 9 and config.vocabulary == 40
    stored = np.load(HERE / f"{case}.npz")
    for computed, published in zip(
        embeddings(config, variables, stored), (stored["image"], stored["text"]), strict=True
    ):
        assert np.abs(computed - published).max() < 1e-4
        assert np.abs(published[0] - published[1]).max() > 0.1  # or nothing would be compared


@pytest.mark.parametrize("form", clip.NAMES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_export_and_import_return_the_same_weights_under_all_names(form, suffix, tmp_path):
    config, variables, _ = imported("clip_vit")
    clip.export_clip(config, variables, tmp_path / f"w{suffix}", form)
    again = clip.import_clip(tmp_path / f"w{suffix}", CASES["clip_vit"][1])
    assert again.config == config and same(again.variables, variables)


def test_the_names_that_are_written_are_those_of_the_implementation(tmp_path):
    config, variables, _ = imported("clip_hugging_face")
    clip.export_clip(config, variables, tmp_path / "w.safetensors", "hugging_face")
    theirs = load_file(HERE / "clip_hugging_face.safetensors")
    ours = load_file(tmp_path / "w.safetensors")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items() if "position_ids" not in k}
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_statistics_and_counters_of_the_resnet_survive(tmp_path):
    config, variables, _ = imported("clip_resnet")
    clip.export_clip(config, variables, tmp_path / "w.pt")
    names = set(reader.state_dicts(reader.read(tmp_path / "w.pt")[1])[""])
    published = reader.state_dicts(reader.read(HERE / "clip_resnet.pt")[1])["state_dict"]
    assert {f"module.{name}" for name in names} == set(published)
    assert same(clip.import_clip(tmp_path / "w.pt", CASES["clip_resnet"][1]).variables, variables)
    with pytest.raises(InputError, match="no CLIP with a ResNet"):
        clip.export_clip(config, variables, tmp_path / "x.pt", "hugging_face")


def changed(tmp_path, change):
    tensors = load_file(HERE / "clip_vit.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("text_projection"), "'text_projection' is missing"),
        (lambda t: t.pop("ln_final.bias"), r"'ln_final.bias': needs \[24\], has nothing"),
        (lambda t: t.update(stray=np.zeros(2, np.float32)), r"'stray': needs nothing, has \[2\]"),
        (lambda t: t.pop("visual.conv1.weight"), "holds no CLIP"),
        (lambda t: t["ln_final.bias"].__setitem__(0, np.nan), "contains NaN"),
        (lambda t: t.update({"a.visual.conv1.weight": t["visual.conv1.weight"]}), "several CLIPs"),
    ],
    ids=["projection", "bias", "stray", "other", "nan", "two"],
)  # fmt: skip
def test_other_files_are_refused_with_the_name_of_the_tensor(change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        clip.import_clip(changed(tmp_path, change), CASES["clip_vit"][1])


def test_the_number_of_heads_must_be_stated_where_it_does_not_follow():
    with pytest.raises(InputError, match="attention heads of its text encoder .* Give --text-heads"):
        clip.import_clip(HERE / "clip_vit.safetensors")


def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path):
    with open(tmp_path / "w.pt", "wb") as file:
        writer.write_torch(file, load_file(HERE / "clip_vit.safetensors"))
    with zipfile.ZipFile(tmp_path / "w.pt") as old, zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info, old.read(info))
        new.writestr("archive/constants.pkl", b"\x80\x02).")
    with pytest.raises(InputError, match=r"TorchScript program.*torch.jit.load\(FILE\).state_dict\(\)"):
        clip.import_clip(tmp_path / "ViT-B-32.pt")


def test_half_precision_is_read_exactly(tmp_path):
    tensors = {name: array.astype(np.float16) for name, array in load_file(HERE / "clip_vit.safetensors").items()}
    save_file(tensors, tmp_path / "half.safetensors")
    variables = clip.import_clip(tmp_path / "half.safetensors", CASES["clip_vit"][1]).variables
    assert np.array_equal(variables["params"]["visual"]["proj"], tensors["visual.proj"].astype(np.float32))
