"""Files that attack their reader: nothing runs, nothing takes long or much, each is answered in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile
import hostile_pickles
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bdjax.errors import InputError
from bdjax.interop import reader

ROOT = Path(__file__).parent.parent
CANARY = Path(hostile_pickles.CANARY.split()[-1].decode())
GOOD = {
    suffix: (hostile.HERE / "fixtures" / "torch" / name).read_bytes()
    for suffix, name in (
        ("zip", hostile.GOOD.name),
        ("legacy", hostile.GOOD_LEGACY.name),
        ("safetensors", "vit_b_32.safetensors"),
    )
}
FUZZ = settings(
    max_examples=150, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """What became of every hostile file, in a process of its own."""
    folder = tmp_path_factory.mktemp("hostile")
    count = hostile.write(folder)
    CANARY.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "hostile.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found["results"]) == count >= 500
    return folder, found


def test_nothing_runs_and_nothing_is_written(tried):
    folder, found = tried
    assert found["events"] == [] and not CANARY.exists()
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"good"}


def test_each_is_answered_in_one_line_that_names_the_file(tried):
    wrong = [
        one
        for one in tried[1]["results"]
        if one["said"] is None
        or "\n" in one["said"]
        or not one["said"].startswith(one["path"])
        or len(one["said"]) > 500
    ]
    assert not wrong


def test_none_takes_two_seconds_or_a_gigabyte(tried):
    assert max(one["seconds"] for one in tried[1]["results"]) < 2
    assert tried[1]["grown"] < 1e9


@pytest.mark.parametrize("name", hostile_pickles.CALLED)
def test_what_a_file_asks_to_run_is_named(name, tried):
    said = {one["name"]: one["said"] for one in tried[1]["results"]}
    for form in ("zip", "legacy"):
        assert f"asks to run {name!r}" in said[f"{form}: calls {name}"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("zip: a shared tuple as a key", "holds no tensors by name"),
        ("zip: a list as a key", "has [] as a key"),
        ("zip: os.system beside weights", "asks to run 'os.system'"),
        ("zip: somewhere.helper beside weights", "asks to run 'somewhere.helper'"),
        ("legacy: __builtin__.getattr beside weights", "asks to run 'builtins.getattr'"),
        ("zip: a sparse tensor as a weight", "'torch._utils._rebuild_sparse_tensor'"),
        ("zip: a text encoded again and again", "encodes more than"),
        ("zip: one storage seen in a thousand ways", "described in more ways"),
        ("zip: an array that is longer than its bytes", "holds no tensors by name"),
        ("zip: a huge shape", "does not fit into its storage of 4 elements"),
        ("zip: a huge shape of stride zero", "does not fit into its storage"),
        ("zip: a negative stride", "stride is [2, -1]"),
        ("zip: an overlap", "overlaps itself"),
        ("zip: a storage elsewhere", "'../../../../etc/passwd', which is not in it"),
        ("zip: endless", "more than 1000000 opcodes"),
        ("container: a bomb", "it is not unpacked"),
        ("container: names that climb", "points outside of it"),
        ("container: entries that overlap", "overlap"),
        ("container: an entry twice", "occurs twice"),
        ("container: a directory of 4 GB", "its directory claims 4294967295 bytes"),
        ("container: a zip cut at 20", "cut off"),
        ("container: a legacy file cut at 15", "cut off"),
        ("container: a view outside", "cut off"),
        ("container: a network's program", "a whole network with its program"),
        ("safetensors: a header of 16 EB", "claims a header of 18446744073709551615 bytes"),
        ("safetensors: offsets that overlap", "invalid offset"),
        ("values: NaN in classifier.bias, torch", "'classifier.bias' contains NaN or Inf in float32"),
        ("values: a negative variance", "'features.1.running_var' is a variance and holds negative values"),
    ],
)
def test_the_line_says_what_is_wrong(case, words, tried):
    said = {one["name"]: one["said"] for one in tried[1]["results"]}
    assert words in said[case]


# --- fuzzing: whatever the bytes are, there is a value or an InputError


def answer(path, body):
    path.write_bytes(body)
    try:
        _, value = reader.read(path)
    except InputError as error:
        assert "\n" not in str(error)
        return
    for tensors in reader.state_dicts(value).values():
        for tensor in tensors.values():
            assert tensor.read().shape == tensor.shape


@FUZZ
@given(st.sampled_from([b"", b"PK\3\4", b"\x80\x02", b"\x80\x04", b"\x20\0\0\0\0\0\0\0{"]), st.binary(max_size=300))
def test_any_bytes(tmp_path, head, body):
    answer(tmp_path / "x", head + body)


EDIT = st.tuples(st.floats(0, 1), st.sampled_from(["flip", "cut", "insert", "drop", "repeat"]), st.binary(max_size=12))


@FUZZ
@given(st.sampled_from(sorted(GOOD)), st.lists(EDIT, min_size=1, max_size=4), st.booleans())
@example("zip", [(0.5, "cut", b"")], True)
def test_a_good_file_damaged(tmp_path, form, edits, early):
    body = bytearray(GOOD[form])
    for where, what, fresh in edits:
        at = int(where * (min(len(body), 4000) if early else len(body) - 1))
        at = at if form != "zip" or early else len(body) - 1 - at // 8  # where its directory is
        if what == "flip" and body:
            body[min(at, len(body) - 1)] ^= (fresh or b"\1")[0] or 1
        elif what == "cut":
            del body[at:]
        elif what == "insert":
            body[at:at] = fresh
        elif what == "drop":
            del body[at : at + 1 + len(fresh)]
        else:
            body[at:at] = body[at : at + 40]
    answer(tmp_path / "x", bytes(body))


OPCODES = st.one_of(
    st.sampled_from([b"(", b")", b"]", b"}", b"N", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"R", b"Q",
                     b"b", b"\x88", b"\x89", b"q\x00", b"h\x00", b"\x94", b"0", b"2", b"1", b"o", b"\x81", b"\x93"]),
    st.integers(-(2**70), 2**70).map(hostile_pickles.number),
    st.text(max_size=6).map(lambda text: hostile_pickles.text(text.encode("utf-8", "surrogatepass"))),
    st.sampled_from(["collections\nOrderedDict", "torch\nFloatStorage", "torch._utils\n_rebuild_tensor_v2",
                     "os\nsystem", "numpy\nndarray", "torch._utils\n_rebuild_parameter"]).map(
        lambda name: f"c{name}\n".encode()
    ),
    st.sampled_from([hostile_pickles.storage(), hostile_pickles.tensor(), hostile_pickles.tensor((4,), (1,))]),
)  # fmt: skip


@FUZZ
@given(st.lists(OPCODES, max_size=40), st.booleans())
def test_any_program(tmp_path, opcodes, old):
    body = hostile_pickles.program(b"".join(opcodes))
    answer(tmp_path / "x", hostile.legacy(body) if old else hostile.zipped(body))


@FUZZ
@given(
    shape=st.lists(st.integers(-1, 5), max_size=4), stride=st.lists(st.integers(-1, 30), max_size=4),
    offset=st.integers(-1, 40), count=st.integers(0, 40),
)  # fmt: skip
def test_any_view_of_a_storage_reads_its_own_elements_or_is_refused(tmp_path, shape, stride, offset, count):
    import numpy as np

    numbers = np.arange(count, dtype=np.float32)
    body = hostile_pickles.state(hostile_pickles.tensor(shape, stride, offset, hostile_pickles.storage(count=count)))
    (tmp_path / "x").write_bytes(hostile.zipped(body, [("0", numbers.tobytes())]))
    try:
        tensor = reader.read(tmp_path / "x")[1]["weight"]
    except InputError:
        return
    places = offset + sum(i * s for i, s in zip(np.indices(shape), stride, strict=True)) if shape else offset
    if np.prod(shape, dtype=int):
        assert np.max(places) < count
        np.testing.assert_array_equal(tensor.read(), np.float32(places))
