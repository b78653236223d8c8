"""Weight files that are small and ask for much work: what they claim is counted, and refused before it is done."""

import time

import numpy as np
import pytest
from hostile import legacy, zipped
from hostile_pickles import number, program, text

from bdjax import models
from bdjax.errors import InputError
from bdjax.interop import _globals, _metadata, _pickle, import_model, matching, names, reader
from bdjax.interop._tensors import Refused, Tensor

SECONDS = 2  # of this process, in which nothing is compiled


def tensor(*shape):
    return Tensor("float32", shape, lambda: np.zeros(shape, np.float32))


@pytest.fixture(autouse=True)
def quick():
    """Each case is done in time; without its bound it would take minutes or hours."""
    begin = time.process_time()
    yield
    assert time.process_time() - begin < 3 * SECONDS  # three times, for machines that are busy


OPCODES = {
    "tuples": (b")", b"\x85"), "lists": (b"", b"]"), "marks": (b"", b"("), "sets": (b"](", b"\x8f"),
    "dictionaries": (b"", b"}"), "memo": (b")", b"\x94"), "texts": (b"", text("x" * 20)),
    "objects": (b"(cm\nA\nq\x01", b"h\x01)R0"), "pairs": (b"}(", b"K\x01N"), "parts": (b"]", b"(K\x01Ne"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPCODES)
@pytest.mark.parametrize("wrap", [zipped, legacy])
@pytest.mark.parametrize("most", [10**4, pytest.param(_pickle.MAX_OPCODES, marks=pytest.mark.slow)])
def test_a_pickle_of_very_many_opcodes_is_refused_at_the_bound(most, wrap, case, tmp_path, monkeypatch):
    assert _pickle.MAX_OPCODES <= 10**6
    monkeypatch.setattr(_pickle, "MAX_OPCODES", most)
    begin, again = OPCODES[case]
    (tmp_path / "x.pt").write_bytes(wrap(b"\x80\x04" + begin + again * most + b"."))
    with pytest.raises(InputError, match=f"more than {_pickle.MAX_OPCODES} opcodes"):
        reader.read(tmp_path / "x.pt")


def test_names_of_classes_are_bounded_in_number_and_length(tmp_path):
    many, stacked = b"cm\nA\n0", text("m") + text("A") + b"\x930"
    for body in (many * (_pickle.MAX_NAMES + 1), stacked * (_pickle.MAX_NAMES + 1)):
        (tmp_path / "x.pt").write_bytes(zipped(program(body + b"N")))
        with pytest.raises(InputError, match=f"more than {_pickle.MAX_NAMES} classes"):
            reader.read(tmp_path / "x.pt")
    for name in ("_" * 300_000, "_a" * 300_000, "A" * 300_000):
        (tmp_path / "x.pt").write_bytes(zipped(program(b"cm\n" + name.encode() + b"\n)R")))
        with pytest.raises(InputError, match=f"by {len(name) + 2} characters; at most"):
            reader.read(tmp_path / "x.pt")
    with pytest.raises(Refused, match="asks to run"):
        _globals.placeholder(_globals.checked_global("m." + "_" * (_globals._LONGEST - 2)), ())


def test_tensors_are_bounded_in_number_and_in_the_length_of_their_names(tmp_path):
    held = tensor(1)
    many = dict.fromkeys(map(str, range(reader._MAX_TENSORS + 1)), held)
    parts = {f"d{part}": dict.fromkeys([f"{part}.{place}" for place in range(9000)], held) for part in range(12)}
    for value in (many, {"net": many}, list(many.items()), parts):
        with pytest.raises(Refused, match="tensors by name; at most 20000 in one dictionary and 100000 in all"):
            reader.state_dicts(value)
    with pytest.raises(Refused, match="names a tensor by 501 characters"):
        reader.state_dicts({"net": {"x" * 501: held}})
    stored = b"".join(text("x" * 9000 + str(place)) + b"h\x07" for place in range(200))
    body = b"}(ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0")
    body += text("cpu") + number(4) + b"tQK\x00K\x04\x85K\x01\x85\x89}tRq\x070" + stored + b"u"
    (tmp_path / "x.pt").write_bytes(zipped(program(body)))
    with pytest.raises(InputError, match="x.pt is not read: it names a tensor by 9001 characters"):
        import_model(tmp_path / "x.pt", tmp_path / "m", model="resnet18")


def test_as_many_first_layers_as_tensors_are_sorted_in_linear_time():
    """Each prefix was compared with each other one."""
    prefixes = [f"{place:x}." for place in range(reader._MAX_TENSORS)]
    assert matching._outermost(prefixes) == prefixes
    assert matching._outermost(["b.a.", "a.", "a.b.", "b.", "ab.", "a.b.c."]) == ["a.", "b.", "ab."]
    assert matching._outermost(["", "a.", "b."]) == [""] and matching._outermost([]) == []


def test_normalisation_layers_are_looked_for_in_linear_time():
    tensors = {f"{place}.mean": tensor(3) for place in range(reader._MAX_TENSORS)}
    assert _metadata.normalisation("f", dict.fromkeys(map(str, range(9)), tensors), None) == ({}, {})


def claimed(blocks, convolutions=2):
    """The first convolution of each block of a ResNet, and no more."""
    found = {"conv1.weight": tensor(64, 3, 3, 3), "linear.weight": tensor(10, 512)}
    for stage, count in enumerate(blocks, 1):
        found |= {f"layer{stage}.{block}.conv1.weight": tensor(1) for block in range(count)}
    found |= {f"layer1.0.conv{layer}.weight": tensor(64, 64, 3, 3) for layer in range(1, convolutions + 1)}
    return found


@pytest.mark.parametrize("convolutions", [2, 3])
def test_a_network_of_more_blocks_than_any_is_not_built(convolutions, monkeypatch):
    monkeypatch.setattr(names, "variable_shapes", lambda model: pytest.fail("a model was built"))
    wanted = matching.ModelFacts("resnet", None, None, None)
    with pytest.raises(InputError, match="at most 128 together, got .64, 64, 64, 64."):
        matching.best_fit("x", {"": claimed((64,) * 4, convolutions)}, wanted, None)
    for name, options in (("resnet_cifar", {"blocks": (64, 64, 1)}), ("wide_resnet", {"blocks": 41})):
        with pytest.raises(InputError, match="blocks of model"):
            models.create(name, (32, 32, 3), 10, variant=models.variant(options))
    for name, options in (("resnet", {"blocks": (3, 30, 48, 8)}), ("resnet_cifar", {"blocks": (18, 18, 18)})):
        models.create(name, (32, 32, 3), 10, variant=models.variant(options))


@pytest.mark.slow
def test_different_networks_are_built_until_a_bound_on_all_of_them(monkeypatch):
    """Four networks that differ in a block, each with as many as one may have."""
    different = {f"d{place}": claimed((32, 32, 32, 28 + place)) for place in range(4)}
    built, like = set(), names.variable_shapes
    monkeypatch.setattr(names, "variable_shapes", lambda model: built.add(model) or like(model))
    wanted = matching.ModelFacts("resnet", None, None, None)
    with pytest.raises(InputError, match="several different networks that might be resnet.*--key.*'d0', 'd1'"):
        matching.best_fit("x", different, wanted, None)
    assert len(built) == 1
    alike = dict.fromkeys(("a", "b", "c", "d"), different["d0"])
    with pytest.raises(InputError, match="does not fit resnet"):  # they are one model, built once
        matching.best_fit("x", alike, wanted, None)
