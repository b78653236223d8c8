"""Files that claim more than they hold, or hold more than can be: refused by their headers, in one line."""

import io
import os
import struct
import tracemalloc
import zipfile
import zlib

import hostile
import numpy as np
import pytest
from commands import refused

from bdjax import datasets, models
from bdjax.datasets._files import read_array
from bdjax.errors import InputError
from bdjax.interop import matching, names, reader, writer
from bdjax.interop._tensors import Tensor
from bdjax.io import arrays, files


def says(read, *given):
    """The message of a refusal that is one line and takes no memory to speak of."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            read(*given)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    return str(caught.value)


def png(path, width, height):
    """A PNG of black pixels whose rows are a few bytes each when they are packed."""

    def part(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(bytes(1 + width)) for _ in range(height)) + packed.flush()
    head = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + part(b"IDAT", rows) + part(b"IEND", b""))
    return path


@pytest.mark.parametrize(("width", "height"), [(13_000, 13_000), (20_000, 20_000), (1, 1 << 24 | 1), (2**31 - 1, 2)])
def test_a_picture_is_refused_by_its_header(width, height, tmp_path):
    """Below and above Pillow's own bounds, whose warning must not be a second line."""
    path = png(tmp_path / "x.png", 3, 3)
    body = path.read_bytes()
    head = b"IHDR" + struct.pack(">II", width, height) + body[24:29]
    path.write_bytes(body[:12] + head + struct.pack(">I", zlib.crc32(head)) + body[33:])
    for label in ("a", "b"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for place in range(2):
            os.link(path, tmp_path / "set" / label / f"{place}.png")
    for said in (says(read_array, path), says(datasets.load, f"folder:{tmp_path}/set")):
        assert "16777216 pixels" in said and ".png" in said


def test_many_pictures_of_an_allowed_size_are_bounded_together(tmp_path):
    """Forty of 4096 x 4096 are 40 kB each and 2 GB when they are unpacked."""
    first = png(tmp_path / "set" / "a" / "0.png", 4096, 4096)
    (tmp_path / "set" / "b").mkdir()
    for place in range(1, 40):
        os.link(first, tmp_path / "set" / ("a" if place % 2 else "b") / f"{place}.png")
    said = says(datasets.load, f"folder:{tmp_path}/set")
    assert "take 2013265920 bytes; the limit is 536870912 bytes (512 MiB)" in said


@pytest.mark.parametrize(
    "body", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"", b"\x89PNG\r\n\x1a\n", b"x"]
)
def test_what_is_no_picture(body, tmp_path):
    """EPS among it, for which Pillow would start a program."""
    (tmp_path / "x.png").write_bytes(body)
    assert "is not a readable picture" in says(read_array, tmp_path / "x.png")


def npz(path, entries, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, body in entries.items():
            archive.writestr(name, body)
    return path


def npy(shape, dtype="|u1", body=b""):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


WHOLE = {"x_train": (2, 8, 8), "y_train": (2,), "x_test": (2, 8, 8), "y_test": (2,)}


def entries(**changes):
    whole = {name: npy(shape, "|u1", bytes(int(np.prod(shape)))) for name, shape in WHOLE.items()}
    return {f"{name}.npy": body for name, body in (whole | changes).items()}


CLAIMS = {
    "terabytes": npy((1 << 40,), "|u1", bytes(9)),
    "overflow": npy((1 << 62, 1 << 62), "<f8", bytes(9)),
    "no bytes each": npy((1 << 60,), "|V0"),
    "a negative side": npy((-1, 4), "|u1", bytes(9)),
    "more than it says": npy((2,), "|u1", bytes(99)),
    "an object": npy((2,), "|O", b"\x80\x04N."),
    "a huge text": npy((1,), "<U999999999", bytes(9)),
    "a deep header": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000,
    "a header of 4 GB": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{",
    "another version": b"\x93NUMPY\x09\x00" + bytes(99),
    "no header": b"x",
    "nothing": b"",
}


@pytest.mark.parametrize("case", CLAIMS)
def test_an_array_that_claims_what_is_not_there(case, tmp_path):
    body = CLAIMS[case]
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        npz(tmp_path / "x.npz", entries(x_train=body), compression)
        said = says(datasets.load, f"npz:{tmp_path}/x.npz")
        assert "x_train of" in said and "x.npz" in said
    (tmp_path / "x.npy").write_bytes(body)
    assert "x.npy" in says(read_array, tmp_path / "x.npy")


def test_an_npz_that_unpacks_to_too_much_is_refused_before_it_is(tmp_path):
    body = bytearray(npz(tmp_path / "x.npz", entries(x_train=npy((600 << 20,)))).read_bytes())
    first = body.index(b"PK\1\2")
    body[first + 24 : first + 28] = struct.pack("<I", 600 << 20)  # what the directory says of it
    (tmp_path / "x.npz").write_bytes(body)
    said = says(datasets.load, f"npz:{tmp_path}/x.npz")
    assert "claims to unpack to" in said and "at most 536870912 (512 MiB)" in said


def test_an_npz_is_bounded_in_its_entries_and_compared_with_its_checksums(tmp_path):
    npz(tmp_path / "x.npz", {f"{place}.npy": b"" for place in range(arrays._MAX_ENTRIES + 1)})
    assert "entries" in says(datasets.load, f"npz:{tmp_path}/x.npz")
    npz(tmp_path / "x.npz", entries(), zipfile.ZIP_STORED)
    body = bytearray((tmp_path / "x.npz").read_bytes())
    body[body.index(b"\n", 40) + 5] ^= 1  # a pixel
    (tmp_path / "x.npz").write_bytes(body)
    assert "CRC" in says(datasets.load, f"npz:{tmp_path}/x.npz")


@pytest.mark.parametrize("suffix", ["npz", "npy", "png", "pt"])
@pytest.mark.parametrize("sort", ["pipe", "device", "folder", "huge"])
def test_only_regular_files_of_a_bounded_size_are_opened(suffix, sort, tmp_path):
    path = tmp_path / f"x.{suffix}"
    if sort == "pipe":
        os.mkfifo(path)
    elif sort == "device":
        path.symlink_to("/dev/zero")
    elif sort == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 42)
    read = {"npz": lambda p: datasets.load(f"npz:{p}"), "pt": reader.read}.get(suffix, read_array)
    said = says(read, path)
    assert str(path) in said and ("at most" in said or sort != "huge")


def test_a_picture_that_is_a_pipe_in_a_folder_does_not_hang(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for place in range(2):
            os.mkfifo(tmp_path / label / f"{place}.png")
    assert "is a pipe" in says(datasets.load, f"folder:{tmp_path}")


def test_a_data_set_of_tfds_that_asks_for_other_modules_is_not_opened(tmp_path):
    (tmp_path / "mine" / "1.0.0").mkdir(parents=True)
    for text in ('{"pythonClassName": "evil.Feature"}', '{"a": [{"type": "evil.sub.Feature"}]}', "[" * 99_999):
        (tmp_path / "mine" / "1.0.0" / "features.json").write_text(text)
        assert "features.json" in says(datasets.load, f"tfds:mine@{tmp_path}")
    assert "is not a TFDS name" in says(datasets.load, "tfds:huggingface:mnist")


# --- weight files


def test_a_flipped_byte_in_a_tensor_is_found_by_its_checksum(tmp_path, capsys):
    body = bytearray(hostile.GOOD.read_bytes())
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    body[entry.header_offset + 200] ^= 1
    (tmp_path / "x.pt").write_bytes(body)
    said = refused(capsys, "import", tmp_path / "x.pt", "--model", "small_vgg", "--out", tmp_path / "m")
    assert "Bad CRC-32" in said and said.count("\n") == 1 and not (tmp_path / "m").exists()


def test_a_file_without_checksums_is_read(tmp_path):
    from bdjax.interop import _crc

    stream = io.BytesIO()
    writer.write_torch(stream, {"a": np.arange(4, dtype=np.float32)})
    body = bytearray(stream.getvalue())
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        for entry in archive.infolist():
            body = body.replace(struct.pack("<I", entry.CRC), bytes(4)) if entry.CRC else body
    (tmp_path / "x.pt").write_bytes(body)
    _crc.check(tmp_path / "x.pt")


@pytest.mark.slow
def test_of_many_dictionaries_few_have_a_model_built_for_them(monkeypatch):
    """The one that fits is found among hundreds that nearly do."""
    good = reader.state_dicts(reader.read(hostile.GOOD)[1])[""]
    near = {f"d{place}": dict(list(good.items())[: 3 + place % 7]) for place in range(400)}
    built, fit = [], matching._fit
    monkeypatch.setattr(matching, "_fit", lambda *given: built.append(given) or fit(*given))
    wanted = matching.ModelFacts("small_vgg", None, None, None)
    assert matching.best_fit("x", {**near, "right": good}, wanted, None).key == "right"
    assert len(built) <= matching._MAX_TRIED
    with pytest.raises(InputError, match="does not fit small_vgg"):
        matching.best_fit("x", near, wanted, None)


@pytest.mark.slow
def test_a_deeper_network_than_usual_is_found_among_many():
    """Its names are more than the usual ones, and the others' are fewer."""
    naming = names.namings_of_model("resnet_cifar")[0]
    deep = models.create("resnet_cifar", (32, 32, 3), 10, variant=models.variant({"blocks": (18, 18, 18)}))
    whole = {entry.name: Tensor("float32", entry.shape, lambda: None) for entry in names.entries(naming, deep)}
    near = {f"d{place}": dict(list(whole.items())[: 3 + place % 7]) for place in range(50)}
    near = {place: {**one, **dict(list(whole.items())[-2:])} for place, one in near.items()}
    wanted = matching.ModelFacts("resnet_cifar", None, None, None)
    assert matching.best_fit("x", {**near, "right": whole}, wanted, None).key == "right"


def test_the_bounds_of_readers_are_said(tmp_path):
    (tmp_path / "x").write_bytes(bytes(99))
    said = says(files.read_bytes, tmp_path / "x", 10, "a record")
    assert "has 99 bytes; a record has at most 10" in said
