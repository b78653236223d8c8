"""What stands beside weights in a file: objects of any sort are listed and never built."""

import argparse
import collections
import datetime
import decimal
import enum
import io
import pathlib
import pickle
import sys
import types
import uuid

import numpy as np
import pytest
from hostile import archive, legacy, zipped
from hostile_pickles import call, number, program, state, storage, tensor, text, tuple_

from bdjax.errors import InputError
from bdjax.interop import reader

FOUR = np.arange(4, dtype=np.float32)


class Colour(enum.Enum):
    RED = 1


class Settings(dict):
    """A dictionary of one's own."""


class Slotted:
    __slots__ = ("a",)


def slotted():
    made = Slotted()
    made.a = 1
    return made


OBJECTS = {
    "Counter": collections.Counter([1, 1]), "Namespace": argparse.Namespace(lr=0.1, nested=argparse.Namespace(a={1})),
    "set": {1, 2}, "frozenset": frozenset([1]), "complex": 1j, "range": range(3), "slice": slice(1, 2),
    "bytearray": bytearray(b"xy"), "deque": collections.deque([1]), "PosixPath": pathlib.PosixPath("/x"),
    "datetime": datetime.datetime(2020, 1, 1), "timedelta": datetime.timedelta(1), "Decimal": decimal.Decimal("1.5"),
    "UUID": uuid.UUID(int=7), "Colour": Colour.RED, "Settings": Settings(a=1), "Slotted": slotted(),
    "SimpleNamespace": types.SimpleNamespace(a=1), "Ellipsis": ..., "type": type(None),
    "ndarray": np.array(["a", "b"]), "Random": np.random.RandomState(0), "Generator": np.random.default_rng(0),
    "Exception": ValueError("x"), "ndarray of objects": np.array([{1: 2}], object),
}  # fmt: skip


class Held:
    """What is pickled as a tensor of four numbers, 0 to 3."""

    def __init__(self, shape=(2, 2), function="_rebuild_tensor_v2"):
        self.shape, self.function = shape, function


class _Storage:
    pass


@pytest.fixture
def saved(monkeypatch):
    """`saved(value, protocol) -> bytes`: a pickle as torch.save makes one, by Python's own pickler."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    kind = type("FloatStorage", (), {"__module__": "torch"})
    modules["torch"].FloatStorage = kind
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state"):
        function = types.FunctionType((lambda *_: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(modules["torch._utils"], name, function)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    utils = modules["torch._utils"]

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", kind, "0", "cpu", 4) if isinstance(value, _Storage) else None

        def reducer_override(self, value):
            if not isinstance(value, Held):
                return NotImplemented
            if value.function != "_rebuild_tensor_v2":
                more = (collections.OrderedDict(), {"tag": {1}}) if value.function.endswith("state") else ()
                return getattr(utils, value.function), (Held(value.shape), True, *more)
            stride = tuple(int(np.prod(value.shape[axis + 1 :])) for axis in range(len(value.shape)))
            return utils._rebuild_tensor_v2, (_Storage(), 0, value.shape, stride, False, collections.OrderedDict())

    def save(value, protocol=2):
        stream = io.BytesIO()
        Pickler(stream, protocol).dump(value)
        return stream.getvalue()

    return save


def read(body, tmp_path, numbers=FOUR):
    (tmp_path / "weights.ckpt").write_bytes(body)
    return reader.read(tmp_path / "weights.ckpt")[1]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_beside_weights_is_listed_and_not_built(name, protocol, saved, tmp_path):
    pickled = saved({"net": {"weight": Held()}, "beside": OBJECTS[name]}, protocol)
    for body in (zipped(pickled, [("0", FOUR.tobytes())]), legacy(pickled, storages=((4, FOUR.tobytes()),))):
        value = read(body, tmp_path)
        assert {place: list(held) for place, held in reader.state_dicts(value).items()} == {"net": ["weight"]}
        np.testing.assert_array_equal(value["net"]["weight"].read(), FOUR.reshape(2, 2))
        listed = " ".join(f"{place} {what}" for place, what in reader.skipped_objects(value).items())
        assert "beside" in listed and (name.split()[0].lower() in listed.lower() or name == "Exception")
        assert type(value["beside"]) not in (collections.Counter, argparse.Namespace, set, frozenset, complex, range)


@pytest.mark.parametrize(
    "key", [1.5, (1, 2), True, None, 2**31, 2**40, -(2**63), 2**70, b"x", frozenset([1]), Colour.RED]
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_any_key_of_a_dictionary_beside_weights_will_do(key, protocol, saved, tmp_path):
    moments = {"step": 3, "exp_avg": Held()}
    value = read(zipped(saved({"net": {"weight": Held()}, "optimizer": {key: moments}}, protocol)), tmp_path)
    assert "net" in reader.state_dicts(value) and len(value["optimizer"]) == 1


def test_weights_of_optimizers_before_1_6_are_keyed_by_addresses(saved, tmp_path):
    state = {140_000_000_000_000 + 72 * place: {"step": place, "momentum": Held()} for place in range(5)}
    body = {"state_dict": {"weight": Held()}, "optimizer": {"state": state, "param_groups": [{"params": list(state)}]}}
    pickled = saved(body)
    value = read(legacy(pickled, storages=((4, FOUR.tobytes()),)), tmp_path)
    assert "state_dict" in reader.state_dicts(value) and not reader.skipped_objects(value)


@pytest.mark.parametrize("function", ["_rebuild_parameter", "_rebuild_parameter_with_state"])
def test_a_parameter_is_its_tensor(function, saved, tmp_path):
    value = read(zipped(saved({"weight": Held(function=function)}), [("0", FOUR.tobytes())]), tmp_path)
    np.testing.assert_array_equal(value["weight"].read(), FOUR.reshape(2, 2))


def _bytes_seen_as(dtype):
    inside = storage("UntypedStorage", count=16, module="torch.storage")
    sizes = (tuple_(number(2), number(2)), tuple_(number(2), number(1)))
    return call(
        "torch._utils._rebuild_tensor_v3", inside, b"K\x00", *sizes, b"\x89", b"}", f"ctorch\n{dtype}\n".encode()
    )


def test_a_tensor_of_version_3_is_read_as_its_type(tmp_path):
    value = read(zipped(state(_bytes_seen_as("float32")), [("0", FOUR.tobytes())]), tmp_path)
    np.testing.assert_array_equal(value["weight"].read(), FOUR.reshape(2, 2))


OTHER_TENSORS = {
    "sparse": call("torch._utils._rebuild_sparse_tensor",
                   call("torch.serialization._get_layout", text("torch.sparse_coo")),
                   tuple_(tensor(), tensor(), call("torch.Size", tuple_(number(2))), b"\x88")),
    "quantised": call("torch._utils._rebuild_qtensor", storage("QInt8Storage", key="1"), b"K\x00", tuple_(number(4)),
                      tuple_(number(1)), tuple_(b"ctorch\nper_tensor_affine\n", b"K\x01", b"K\x00"), b"\x89", b"}"),
    "complex": tensor((4,), (1,), inside=storage("ComplexFloatStorage", key="1")),
    "meta": call("torch._utils._rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n", tuple_(number(4)),
                 tuple_(number(1)), b"\x89"),
    "float8": _bytes_seen_as("float8_e4m3fn").replace(text("0"), text("1")),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_TENSORS)
def test_tensors_of_other_sorts_are_passed_over_beside_the_weights_and_refused_among_them(name, tmp_path):
    other = OTHER_TENSORS[name]
    beside = program(b"}(" + text("net") + b"}" + text("weight") + tensor() + b"s" + text("other") + other + b"u")
    files = [("0", FOUR.tobytes()), ("1", bytes(32))]
    value = read(zipped(beside, files), tmp_path)
    assert list(reader.state_dicts(value)) == ["net"] and list(reader.skipped_objects(value)) == ["other"]
    among = program(b"}(" + text("weight") + tensor() + text("other") + other + b"u")
    assert list(reader.other_objects(read(zipped(among, files), tmp_path))[""]) == ["other"]
    with pytest.raises(InputError, match="holds no tensors by name: it asks to run"):
        value = read(zipped(program(b"}" + text("weight") + other + b"s"), files), tmp_path)
        reader.check_has_tensors(tmp_path / "weights.ckpt", value, reader.skipped_objects(value))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f8", "f2", "i8", "u1", "?"])
def test_weights_as_numpy_arrays(protocol, dtype, saved, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    value = read(
        zipped(saved({"net": {"a": array, "b": array.T, "n": np.float64(3), "e": array[:0]}}, protocol)), tmp_path
    )
    found = reader.state_dicts(value)["net"]
    assert list(found) == ["a", "b", "e"]
    for name, wanted in (("a", array), ("b", array.T), ("e", array[:0])):
        again = found[name].read()
        assert again.dtype == np.dtype(dtype).newbyteorder("=") and found[name].shape == wanted.shape
        np.testing.assert_array_equal(again, wanted)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (lambda held: (held, 7), "0"),
        (lambda held: [None, {"model": held}], "1.model"),
        (lambda held: {"a": {"b": {"c": {"d": held}}}}, "a.b.c.d"),
        (lambda held: {"a": [{"b": ({"c": held},)}]}, "a.0.b.0.c"),
        (lambda held: {"weights": list(held.items())}, "weights"),
        (lambda held: collections.defaultdict(dict, net=held), "net"),
    ],
)
def test_weights_are_found_in_tuples_lists_and_deep(value, place, saved, tmp_path):
    assert reader.state_dicts(read(zipped(saved(value({"w": Held()}))), tmp_path)).keys() == {place}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (archive([("m/data.pkl", b"\x80\x02N."), ("m/constants.pkl", b"x")], 8), "a TorchScript program"),
        (archive([("m/archive_format", b"pt2"), ("m/models/model.json", b"{}")], 8), "a program of torch.export"),
        (archive([("w.npy", b"x")], 8), "an .npz of NumPy's"),
        *((bytes(before) + b"\x89HDF\r\n\x1a\n" + bytes(600), "HDF5.*safetensors") for before in (0, 512, 1024, 2048)),
        (archive([("metadata.json", b"{}"), ("model.weights.h5", b"x")], 8), ".keras file.*safetensors"),
        (bytes(4) + b"TFL3" + bytes(600), "TensorFlow Lite"),
        (b"(\xb5/\xfd" + bytes(600), "unzstd"),
        (b"\x1f\x8b" + bytes(600), "gunzip"),
        (bytes(257) + b"ustar\0" + bytes(600), "a tar archive"),
    ],
)
def test_files_of_other_kinds_get_their_remedy(body, words, tmp_path):
    with pytest.raises(InputError, match=words):
        read(body, tmp_path)


@pytest.mark.parametrize("place", ["", "net"])
def test_a_whole_network_gets_its_remedy(place, tmp_path):
    built = b"cmodels.mine\nNet\n)\x81}(" + text("_parameters") + b"}" + text("_modules") + b"}ub"
    body = zipped(program(b"}" + text(place) + built + b"s" if place else built))
    with pytest.raises(InputError, match="'models.mine.Net'.*whole network.*state_dict"):
        value = read(body, tmp_path)
        reader.check_has_tensors(tmp_path / "weights.ckpt", value, reader.skipped_objects(value))
