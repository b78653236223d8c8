"""Pairs from tables, folders and labelled sets; images without a caption and other bad input."""

import numpy as np
import pytest
from PIL import Image

from bdjax.errors import InputError
from bdjax.vision_language import pairs, prompts


@pytest.fixture
def folder(tmp_path):
    for index, color in enumerate(((255, 0, 0), (0, 255, 0))):
        Image.new("RGB", (12, 8), color).save(tmp_path / f"{index}.png")
    return tmp_path


def table(folder, text, name="t.csv"):
    (folder / name).write_text(text)
    return f"pairs:{folder / name}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'image,caption\n0.png,"a red, flat picture"\n1.png,green\n'),
        ("t.tsv", "caption\tfilepath\na red, flat picture\t0.png\ngreen\t1.png\n"),
    ],
)
def test_tables_of_text(folder, name, text):
    source = pairs.load(table(folder, text, name), (8, 8), ())
    assert source.pairs.captions == ("a red, flat picture", "green") and source.test is None
    assert source.pairs.images.shape == (2, 8, 8, 3)
    assert source.pairs.images[0].reshape(-1, 3).max(0).tolist() == [255, 0, 0]


def test_tables_of_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"path": ["1.png"], "text": ["green"]}), folder / "t.parquet")
    assert pairs.load(f"pairs:{folder / 't.parquet'}", None, ()).pairs.images.shape == (1, 8, 12, 3)
    (folder / "u.parquet").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"u.parquet is no Parquet table"):
        pairs.load(f"pairs:{folder / 'u.parquet'}", None, ())


def test_folders_with_text_files(folder):
    (folder / "0.txt").write_text("red\n")
    with pytest.raises(InputError, match=r"1.png has no caption: 1.txt is missing"):
        pairs.load(f"pairs:{folder}", (8, 8), ())
    (folder / "1.txt").write_text(" ")
    with pytest.raises(InputError, match=r"1.txt is an image without a caption"):
        pairs.load(f"pairs:{folder}", (8, 8), ())
    (folder / "1.txt").write_text("green")
    assert pairs.load(f"pairs:{folder}", (8, 8), ()).pairs.captions == ("red", "green")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,caption\n0.png,\n", "row 2 of .*t.csv is an image without a caption"),
        ("image,caption\n0.png\n", "row 2 of .*t.csv has 1 columns; its header has 2"),
        ("image,caption\nhttps://x.org/a.jpg,b\n", "row 2 of .*t.csv names an address"),
        ("a,b\n0.png,c\n", "has no column of pictures: its first row is 'a, b'"),
        ("image,label\n0.png,c\n", "has no column of captions"),
        ("image,caption\n9.png,c\n", "no such file: .*9.png"),
        ("image,caption\n", "holds no pair"),
    ],
)
def test_bad_tables(folder, text, words):
    with pytest.raises(InputError, match=words):
        pairs.load(table(folder, text), (8, 8), ())


def test_captions_of_a_labelled_set(blobs_npz):
    source = pairs.load(f"captions:{blobs_npz}", None, prompts.CIFAR, seed=1)
    again = pairs.load(f"captions:{blobs_npz}", None, prompts.CIFAR, seed=1)
    assert source.pairs.captions == again.pairs.captions and len(source.pairs.captions) == 160
    assert len(source.test.labels) == 40 and source.test.classes == ("0", "1", "2", "3")
    label = int(source.pairs.labels[0])
    assert source.pairs.captions[0] in {prompts.fill(template, str(label)) for template in prompts.CIFAR}
    assert np.array_equal(source.pairs.images, source.train.images)


@pytest.mark.parametrize("spec", ["captions:", "pairs:", "digits", "webdataset:x"])
def test_unknown_sources(spec):
    with pytest.raises(InputError, match="unknown pairs .* captions:DATASET"):
        pairs.load(spec, None, ())
