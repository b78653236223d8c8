"""Weight files that nobody should trust, made by hand; and a process that tries to import each and watches itself.

`write(FOLDER)` writes them; `python tests/hostile.py FOLDER` reads each in a process of its own and prints one JSON
object: a list of {name, path, said, seconds}, the audit events that nothing but an attack causes, and by how many bytes
the memory grew.
"""

import encodings.cp437  # noqa: F401  (zipfile imports it for some names)
import io
import json
import pickle
import resource
import struct
import sys
import time
import zipfile
from pathlib import Path

from hostile_pickles import number, pickles, program, state, tensor, text, tuple_

HERE = Path(__file__).parent
GOOD = HERE / "fixtures" / "torch" / "small_vgg_float16.pt"
GOOD_LEGACY = HERE / "fixtures" / "torch" / "small_vgg_legacy.pt"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def archive(entries, compression=zipfile.ZIP_STORED, comment=b""):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in entries:
            file.writestr(zipfile.ZipInfo(name), content, compression)
        file.comment = comment
    return stream.getvalue()


def zipped(pickled, storages=(("0", bytes(16)),), more=()):
    data = [(f"archive/data/{key}", content) for key, content in storages]
    return archive([("archive/data.pkl", pickled), *data, ("archive/version", b"3\n"), *more])


def legacy(pickled, keys=("0",), storages=((4, bytes(16)),), magic=MAGIC, protocol=PROTOCOL, system=None):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}} if system is None else system
    head = b"".join(pickle.dumps(part, 2) for part in (magic, protocol, system))
    tail = pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2)
    return head + pickled + tail + b"".join(struct.pack("<q", count) + content for count, content in storages)


def safe(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def containers():
    good, old, fine = GOOD.read_bytes(), GOOD_LEGACY.read_bytes(), state(tensor())
    body = zipped(fine)
    end = body.rindex(b"PK\5\6")
    first = body.index(b"PK\1\2")
    bomb = archive([("archive/data.pkl", bytes(70_000_000))], zipfile.ZIP_DEFLATED)
    double = zipped(fine, more=[("archive/data.pkx", fine)]).replace(b"archive/data.pkx", b"archive/data.pkl")
    found = {f"a zip cut at {k}": good[: len(good) * k // 25] for k in range(1, 25)}
    found |= {f"a legacy file cut at {k}": old[: len(old) * k // 20] for k in range(1, 20)}
    found |= {
        "a bomb": bomb,
        "a compressed storage": archive([("a/data.pkl", fine), ("a/data/0", bytes(10**7))], zipfile.ZIP_DEFLATED),
        "an LZMA entry": archive([("a/data.pkl", fine)], zipfile.ZIP_LZMA),
        "names that climb": zipped(fine, more=[("archive/../../../tmp/x", b"x")]),
        "a name at the root": zipped(fine, more=[("/etc/passwd", b"x")]),
        "a name of Windows": zipped(fine, more=[("archive\\..\\x", b"x"), ("C:x", b"x")]),
        "a folder twice": archive([("a/data.pkl", fine), ("b/data.pkl", fine)]),
        "no pickle": archive([("archive/version", b"3")]),
        "a deep pickle": archive([("a/b/c/data.pkl", fine)]),
        "an empty zip": archive([]),
        "a TorchScript program": zipped(fine, more=[("archive/constants.pkl", b"x"), ("archive/code/x.py", b"x")]),
        "another byteorder": zipped(fine, more=[("archive/byteorder", b"middle")]),
        "a comment": archive([("archive/data.pkl", fine)], comment=b"x" * 99),
        "something behind": body + b"x",
        "many entries": archive([(f"a/{i}", b"") for i in range(30_000)]),
        "a directory of 4 GB": body[:-10] + struct.pack("<I", 2**32 - 1) + body[-6:],
        "a directory elsewhere": body[:-6] + struct.pack("<I", 2**31) + body[-2:],
        "a directory that is short": body[:-10] + struct.pack("<I", 10) + body[-6:],
        "a directory of nothing": body[:-10] + struct.pack("<I", 0) + body[-6:],
        "a larger directory that is not there": body[:end] + b"PK\6\7" + bytes(16) + body[end:],
        "an entry longer than the file": body[: first + 20] + struct.pack("<II", 2**31, 2**31) + body[first + 28 :],
        "an entry beyond the file": body[: first + 42] + struct.pack("<I", 2**31) + body[first + 46 :],
        "an encrypted entry": body[: first + 8] + b"\1\0" + body[first + 10 :],
        "an entry of another version": body[: first + 6] + b"\xff\0" + body[first + 8 :],
        "entries that overlap": _overlapping(body),
        "an entry twice": double,
        "a pickle of 70 MB": zipped(program(b"B" + struct.pack("<I", 7 * 10**7) + bytes(7 * 10**7))),
        "another magic number": legacy(fine, magic=7),
        "another protocol": legacy(fine, protocol=2),
        "no system": legacy(fine, system=[]),
        "keys that are none": legacy(fine, keys=7),
        "keys twice": legacy(fine, keys=("0", "0")),
        "a key that nobody wants": legacy(fine, keys=("9",)),
        "no keys": legacy(fine, keys=()),
        "a negative storage": legacy(fine, storages=((-4, bytes(16)),)),
        "a storage of 2 ** 62": legacy(fine, storages=((2**62, bytes(16)),)),
        "a short storage": legacy(fine, storages=((2, bytes(8)),)),
        "no storage": legacy(fine, storages=()),
        "a view outside": legacy(state(_view(100, 4))),
        "a view before": legacy(state(_view(-2, 4))),
        "a view of nothing": legacy(state(_view(0, 4, root="5"))),
        "a view that is none": legacy(state(_view(b"N", 4))),
        "a whole network": legacy(program(tuple_(text("module"), b"cos\nsystem\n", text("a.py"), text("x")) + b"Q")),
        "a network's program": legacy(program(tuple_(text("module"), text("Net"), text("a.py"), text("x")) + b"Q")),
        "a pickle and no more": pickle.dumps({"weight": [1.0, 2.0]}, 2),
        "a pickle that runs": pickle.dumps(eval, 2),
        "nothing": b"",
        "a text": b"dear all, the weights are attached\n",
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(99),
        "a program": b"\x7fELF" + bytes(99),
        "an archive of old": b"storages".ljust(257, b"\0") + b"ustar\0" + bytes(512),
    }
    return found


def _overlapping(body):
    """The directory's second entry lies where its first does."""
    first = body.index(b"PK\1\2")
    second = body.index(b"PK\1\2", first + 4)
    sizes = body[first + 16 : first + 28]
    moved = body[: second + 16] + sizes + body[second + 28 :]
    return moved[: second + 42] + body[first + 42 : first + 46] + moved[second + 46 :]


def _view(offset, count, root="0"):
    view = tuple_(text("view"), offset if isinstance(offset, bytes) else number(offset), number(count))
    inside = text("storage") + b"ctorch\nFloatStorage\n" + text(root) + text("cpu") + number(4) + view
    return tensor(inside=b"(" + inside + b"tQ")


def safetensors():
    def one(**changes):
        return {"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}

    good = safe(one(), bytes(16))
    many = {f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(40_000)}
    found = {f"cut at {k}": good[: len(good) * k // 12] for k in range(1, 12)}
    found |= {
        "a header of 16 EB": safe(one(), bytes(16), length=2**64 - 1),
        "a header of 1 TB": safe(one(), bytes(16), length=2**40),
        "a header longer than the file": safe(one(), bytes(16), length=len(good)),
        "a short header": safe(one(), bytes(16), length=9),
        "no JSON": safe(b"{not json}", bytes(16)),
        "no UTF-8": safe(b'{"\xff\xfe": 1}', bytes(16)),
        "an open bracket": safe(b'{"weight": {', bytes(16)),
        "deep JSON": safe(b'{"a":' * 100_000, bytes(16)),
        "a list": safe(b"{[]}", bytes(16)),
        "offsets beyond the file": safe(one(data_offsets=[0, 2**40], shape=[2**38]), bytes(16)),
        "offsets backwards": safe(one(data_offsets=[16, 0]), bytes(16)),
        "offsets that leave a gap": safe(one(data_offsets=[4, 20]), bytes(20)),
        "negative offsets": safe(one(data_offsets=[-16, 0]), bytes(16)),
        "offsets of texts": safe(one(data_offsets=["0", "16"]), bytes(16)),
        "one offset": safe(one(data_offsets=[0]), bytes(16)),
        "offsets that overlap": safe(one() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, bytes(16)),
        "another size than its shape": safe(one(shape=[3, 2]), bytes(16)),
        "a negative shape": safe(one(shape=[-2, -2]), bytes(16)),
        "a shape that overflows": safe(one(shape=[2**62, 2**62, 4]), bytes(16)),
        "a shape of floats": safe(one(shape=[2.0, 2.0]), bytes(16)),
        "an unknown type": safe(one(dtype="F33"), bytes(16)),
        "a type that is not read": safe(one(dtype="F8_E4M3", shape=[16]), bytes(16)),
        "no type": safe({"weight": {"shape": [2, 2], "data_offsets": [0, 16]}}, bytes(16)),
        "something behind": good + b"x",
        "nothing but a header": safe(one()),
        "metadata that is none": safe({"__metadata__": [1, 2], **one()}, bytes(16)),
        "many tensors": safe(many),
        "no tensors": safe({}),
    }
    return found


def values():
    """The good file with one value that is no number, in each format."""
    import jax.numpy as jnp
    import numpy as np

    from bdjax.interop import reader, writer

    tensors = {k: t.read().astype(np.float32) for k, t in reader.state_dicts(reader.read(GOOD)[1])[""].items()}
    odd = {
        "NaN": np.float32(np.nan), "infinity": np.float32(np.inf), "minus infinity": np.float32(-np.inf),
        "beyond float32": np.float64(1e300), "a half's NaN": np.float16(np.nan),
        "a brain float's NaN": np.dtype(jnp.bfloat16).type(np.nan),
    }  # fmt: skip
    found = {}
    for what, value in odd.items():
        for name in ("features.0.weight", "features.4.running_mean", "classifier.bias"):
            changed = {k: t.astype(value.dtype) if t.dtype == np.float32 else t for k, t in tensors.items()}
            changed[name].flat[0] = value
            stream = io.BytesIO()
            writer.write_torch(stream, changed)
            found[f"{what} in {name}, torch"] = stream.getvalue()
            found[f"{what} in {name}, safetensors"] = writer.safetensors_bytes(changed)
    negative = {k: -abs(t) - 1 if k == "features.1.running_var" else t for k, t in tensors.items()}
    return found | {"a negative variance": writer.safetensors_bytes(negative)}


def write(folder):
    """Write every hostile file, and their names; return how many there are."""
    bodies = {}
    for name, pickled in pickles().items():
        bodies[f"zip: {name}"] = zipped(pickled)
        bodies[f"legacy: {name}"] = legacy(pickled)
    bodies |= {f"container: {name}": body for name, body in containers().items()}
    bodies |= {f"safetensors: {name}": body for name, body in safetensors().items()}
    bodies |= {f"values: {name}": body for name, body in values().items()}
    for place, body in enumerate(bodies.values()):
        (folder / f"{place}.pt").write_bytes(body)
    (folder / "names.json").write_text(json.dumps(list(bodies)))
    return len(bodies)


_WATCHED = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "exec",
    "compile", "import", "pickle.find_class", "socket.", "shutil.", "os.remove", "os.rename", "os.mkdir", "os.rmdir",
    "os.chmod", "ctypes.dlopen", "os.putenv", "webbrowser.open",
)  # fmt: skip


def main(folder):
    from bdjax import interop
    from bdjax.errors import InputError

    interop.import_model(GOOD, folder / "good", model="small_vgg")  # imports what it needs
    names, events, watching = json.loads((folder / "names.json").read_text()), [], False

    def callback(event, arguments):
        written = event == "open" and (set(str(arguments[1] or "")) & set("wax+") or (arguments[2] or 0) & 3)
        if watching and (event.startswith(_WATCHED) or written):
            events.append([event, repr(arguments)[:200]])

    sys.addaudithook(callback)
    before, results, watching = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], True
    for place, name in enumerate(names):
        path, started = folder / f"{place}.pt", time.process_time()
        try:
            interop.import_model(path, folder / "out", model="small_vgg")
            said = None
        except InputError as error:
            said = str(error)
        except BaseException as error:
            said = f"{type(error).__name__} escaped: {error}"
        results.append({"name": name, "path": str(path), "said": said, "seconds": time.process_time() - started})
    watching = False
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"results": results, "events": events, "grown": grown}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
