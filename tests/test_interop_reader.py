"""What the readers understand: tensors laid out in any way, and all that torch.save puts around them."""

import struct

import numpy as np
import pytest
from hostile import archive, legacy, zipped
from hostile_pickles import call, number, program, state, storage, tensor, text, tuple_

from bdjax.errors import InputError
from bdjax.interop import reader, writer
from bdjax.interop._tensors import Tensor

NUMBERS = np.arange(12, dtype=np.float32)
WHOLE = storage(count=12)


def read(body, tmp_path):
    (tmp_path / "weights.bin").write_bytes(body)
    return reader.read(tmp_path / "weights.bin")


def one(pickled, tmp_path, numbers=NUMBERS):
    return read(zipped(pickled, [("0", numbers.tobytes())]), tmp_path)[1]["weight"].read()


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "wanted"),
    [
        ((3, 4), (4, 1), 0, NUMBERS.reshape(3, 4)),
        ((4, 3), (1, 4), 0, NUMBERS.reshape(3, 4).T),
        ((2, 3), (6, 2), 1, NUMBERS.reshape(2, 3, 2)[..., 1]),
        ((4,), (1,), 8, NUMBERS[8:]),
        ((), (), 7, NUMBERS[7]),
        ((0, 3), (3, 1), 12, np.zeros((0, 3), np.float32)),
        ((1, 1, 3), (99, 77, 1), 2, NUMBERS[2:5].reshape(1, 1, 3)),
        ((2, 1, 2, 3), (6, 1, 1, 2), 0, NUMBERS.reshape(2, 3, 2).transpose(0, 2, 1)[:, None]),  # channels last
    ],
)
def test_a_tensor_is_its_window_on_the_storage(shape, stride, offset, wanted, tmp_path):
    found = one(state(tensor(shape, stride, offset, WHOLE)), tmp_path)
    assert found.dtype == np.float32 and found.shape == shape
    np.testing.assert_array_equal(found, wanted)


def test_tensors_that_share_a_storage_share_its_elements(tmp_path):
    pairs = text("a") + tensor((4,), (1,), 0, WHOLE) + text("b") + tensor((10,), (1,), 2, WHOLE)
    value = read(zipped(program(b"}(" + pairs + b"u"), [("0", NUMBERS.tobytes())]), tmp_path)[1]
    np.testing.assert_array_equal(value["a"].read(), NUMBERS[:4])
    np.testing.assert_array_equal(value["b"].read(), NUMBERS[2:])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("DoubleStorage", ">f8"), ("FloatStorage", ">f4"), ("HalfStorage", ">f2"), ("LongStorage", ">i8")],
)
@pytest.mark.parametrize("old", [False, True])
def test_the_other_order_of_bytes_is_turned(kind, dtype, old, tmp_path):
    content = np.arange(4).astype(dtype).tobytes()
    pickled = state(tensor(inside=storage(kind)))
    if old:
        body = legacy(pickled, storages=((4, content),), system={"little_endian": False})
    else:
        body = zipped(pickled, [("0", content)], [("archive/byteorder", b"big")])
    found = read(body, tmp_path)[1]["weight"].read()
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(found, [[0, 1], [2, 3]])


def test_brain_floats_keep_their_bits_in_either_order(tmp_path):
    bits = np.array([0x3F80, 0x4049, 0xC2F7, 0x0001], np.uint16)
    for order, name in (("<", b"little"), (">", b"big")):
        content = bits.astype(f"{order}u2").tobytes()
        pickled = state(tensor(inside=storage("BFloat16Storage")))
        found = read(zipped(pickled, [("0", content)], [("archive/byteorder", name)]), tmp_path)[1]["weight"].read()
        assert found.dtype.name == "bfloat16" and found[0, 0] == 1
        np.testing.assert_array_equal(found.view(np.uint16).ravel(), bits)


def test_views_of_storages_as_old_versions_wrote_them(tmp_path):
    view = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(12)
    part = b"(" + view + tuple_(text("part"), number(5), number(4)) + b"tQ"
    body = legacy(state(tensor((2, 2), (2, 1), 0, part)), storages=((12, NUMBERS.tobytes()),))
    form, value = read(body, tmp_path)
    assert form == "torch before 1.6"
    np.testing.assert_array_equal(value["weight"].read(), NUMBERS[5:9].reshape(2, 2))


def test_what_surrounds_weights_is_understood_or_passed_over(tmp_path):
    parameter = call("torch._utils._rebuild_parameter", tensor(), b"\x88", call("collections.OrderedDict"))
    array = call("numpy.core.multiarray._reconstruct", b"cnumpy\nndarray\n", tuple_(number(0)), text("b"))
    array += tuple_(number(1), tuple_(number(3)), call("numpy.dtype", text("f8")), b"\x89", text("xyz")) + b"b"
    scalar = call("numpy._core.multiarray.scalar", call("numpy.dtype", text("i8")), call("_codecs.encode", text("x")))
    ordered = call("collections.OrderedDict") + b"(" + text("weight") + parameter + b"u"
    ordered += b"}" + text("_metadata") + call("collections.OrderedDict") + b"sb"
    pairs = (
        text("net") + ordered + text("epoch") + b"K\x07" + text("acc") + b"G" + struct.pack(">d", 0.5) + text("index")
        + array + text("size") + call("torch.Size", tuple_(number(3))) + text("type") + b"ctorch\nfloat32\n"
        + text("on") + b"\x88" + text("none") + b"N" + text("tuple") + tuple_(number(-5), number(2**40))
        + text("old") + call("collections.OrderedDict", b"](](" + text("k") + b"K\x01ee") + b"K\x03" + text("three")
        + scalar + text("by an array's number")
    )  # fmt: skip
    _, value = read(zipped(program(b"}(" + pairs + b"u")), tmp_path)
    assert (value["epoch"], value["acc"], value["on"], value["none"]) == (7, 0.5, True, None)
    assert value["tuple"] == (-5, 2**40) and value["old"] == {"k": 1} and value[3] == "three"
    assert isinstance(value["net"]["weight"], Tensor)
    assert {place: list(found) for place, found in reader.state_dicts(value).items()} == {"net": ["weight"]}


def test_state_dicts_are_found_at_any_depth_that_people_use(tmp_path):
    held = Tensor("float32", (), lambda: np.zeros((), np.float32))
    value = {"a": {"w": held}, "acc": held, "b": {"c": {"w": held, 5: held, "n": 3}}, "d": [held], "e": 7}
    value["b"]["again"] = value
    found = reader.state_dicts(value)
    assert {place: set(tensors) for place, tensors in found.items()} == {"": {"acc"}, "a": {"w"}, "b.c": {"w"}}
    assert reader.state_dicts([held]) == {} and reader.state_dicts(held) == {}


def test_protocol_4_is_read_too(tmp_path):
    import pickle
    from collections import OrderedDict

    plain = {"a": [1, 2.5, "three", b"four"], "b": OrderedDict(x=(None, True)), "long": 2**70}
    for protocol in (2, 3, 4, 5):
        value = read(zipped(pickle.dumps(plain, protocol)), tmp_path)[1]
        assert value == plain if protocol > 2 else value["b"] == plain["b"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (None, "does not exist. Give a weight file"),
        (b"", "neither a safetensors file nor one of torch.save"),
        (zipped(program(call("torch.nn.Linear"))), "'torch.nn.Linear', which is no tensor"),
        (archive([("archive/data.pkl", b"\x80\x02N.")]), None),
    ],
)
def test_what_is_no_weight_file_is_named(body, words, tmp_path):
    if words is None:
        assert read(body, tmp_path) == ("torch", None)
        return
    if body is not None:
        (tmp_path / "weights.bin").write_bytes(body)
    with pytest.raises(InputError, match=words) as caught:
        reader.read(tmp_path / "weights.bin")
    assert str(tmp_path / "weights.bin") in str(caught.value)
    with pytest.raises(InputError, match="is a directory"):
        reader.read(tmp_path)


def test_what_the_writer_writes_the_reader_reads(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.random((3, 4, 2), np.float32), "b": np.array(2**40), "c": np.zeros((0, 5), np.float16),
        "ü name with spaces": rng.random(7), "flag": np.array([True, False]), "turned": rng.random((4, 3)).T,
    }  # fmt: skip
    with open(tmp_path / "m.pt", "wb") as file:
        writer.write_torch(file, tensors)
    (tmp_path / "m.safetensors").write_bytes(writer.safetensors_bytes(tensors))
    for name, form in (("m.pt", "torch"), ("m.safetensors", "safetensors")):
        found, value = reader.read(tmp_path / name)
        assert found == form and set(value) == set(tensors)
        for key, array in tensors.items():
            again = value[key].read()
            assert again.dtype == array.dtype and again.shape == array.shape == value[key].shape
            np.testing.assert_array_equal(again, array)
