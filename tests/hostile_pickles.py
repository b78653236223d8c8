"""Pickles that nobody should trust, made opcode by opcode, and the parts that they are made of."""

import struct

CANARY = b"echo ran > /tmp/bdjax-hostile-canary"
CALLED = [
    "os.system", "posix.system", "nt.system", "builtins.eval", "builtins.exec", "builtins.compile",
    "builtins.__import__", "builtins.getattr", "builtins.open", "builtins.print", "__builtin__.eval",
    "subprocess.Popen", "subprocess.check_output", "runpy.run_path", "importlib.import_module",
    "operator.attrgetter", "operator.methodcaller", "functools.partial", "types.FunctionType", "types.CodeType",
    "pickle.loads", "_pickle.loads", "cloudpickle.loads", "torch.load", "torch.hub.load", "torch.jit.load",
    "numpy.load", "numpy.testing._private.utils.runstring", "ctypes.CDLL", "socket.socket", "shutil.rmtree",
    "os.remove", "pathlib.Path", "webbrowser.open", "code.interact", "timeit.timeit", "pdb.run",
    "copyreg._reconstructor", "torch.nn.modules.conv.Conv2d", "models.resnet.ResNet", "__main__.Net",
    "argparse.Namespace", "PIL.Image.Image", "collections.Counter", "bdjax.cli.main",
    "torch._utils._rebuild_sparse_tensor", "torch._tensor._rebuild_from_type_v2", "torch.ComplexFloatStorage",
    "torch.storage.UntypedStorage", "torch.FloatStorage.__reduce__", "numpy.ndarray.tofile",
    "collections.OrderedDict.__init__",
]  # fmt: skip


ACTING = [
    "os.system", "posix.system", "builtins.eval", "builtins.exec", "subprocess.Popen", "runpy.run_path",
    "shutil.rmtree", "importlib.import_module", "socket.socket", "ctypes.CDLL", "pickle.loads", "torch.load",
    "torch.hub.load", "webbrowser.open", "operator.attrgetter", "bdjax.cli.main", "__builtin__.getattr",
    "os.path.join", "numpy.load", "collections.OrderedDict.__init__", "somewhere.helper", "pip.main",
    "types.FunctionType",
]  # fmt: skip
"""What nobody needs to put weights together: refused by name even beside good weights."""


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value):
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def call(name, *arguments):
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def tuple_(*parts):
    return b"(" + b"".join(parts) + b"t"


def program(body):
    return b"\x80\x02" + body + b"."


def storage(kind="FloatStorage", key="0", count=4, module="torch"):
    body = text("storage") + f"c{module}\n{kind}\n".encode() + text(key) + text("cpu") + number(count)
    return b"(" + body + b"tQ"


def tensor(shape=(2, 2), stride=(2, 1), offset=0, inside=None):
    sizes = [tuple_(*(part if isinstance(part, bytes) else number(part) for part in each)) for each in (shape, stride)]
    begin = offset if isinstance(offset, bytes) else number(offset)
    return call("torch._utils._rebuild_tensor_v2", inside or storage(), begin, *sizes, b"\x89", b"}")


def _array(code, count, raw):
    dtype = call("numpy.dtype", text(code))
    array = call("numpy.core.multiarray._reconstruct", b"cnumpy\nndarray\n", tuple_(number(0)), text("b"))
    return array + tuple_(number(1), tuple_(number(count)), dtype, b"\x89", b"C" + bytes([len(raw)]) + raw) + b"b"


def state(body):
    return program(b"}" + text("weight") + body + b"s")


def pickles():
    """Name -> a pickle that must be refused, whatever it is wrapped in."""
    touch = text(CANARY)
    found = {f"calls {name}": program(call(name, touch)) for name in CALLED}
    for name in CALLED[:6]:
        module, _, attribute = name.rpartition(".")
        found |= {
            f"{name} by STACK_GLOBAL": b"\x80\x04" + text(module) + text(attribute) + b"\x93" + touch + b"\x85R.",
            f"{name} by INST": program(b"(" + touch + f"i{module}\n{attribute}\n".encode()),
            f"{name} by OBJ": program(b"(" + f"c{module}\n{attribute}\n".encode() + touch + b"o"),
            f"{name} by NEWOBJ": program(f"c{module}\n{attribute}\n".encode() + touch + b"\x85\x81"),
            f"{name} inside a tensor": state(tensor(inside=call(name, touch))),
            f"{name} as a key": program(b"}" + call(name, touch) + b"Ns"),
            f"{name} in an OrderedDict's arguments": program(call("collections.OrderedDict", call(name, touch))),
        }
    deep = b"(" * 3 + b"]" * 100_000 + b"a" * 99_999 + b"t"
    shared = b")q\x00" + b"h\x00\x86q\x00" * 60  # 2 ** 60 leaves
    found |= {
        "EXT1": program(b"\x82\x01"),
        "an instance built with a state": program(b"ccollections\nOrderedDict\n)RN\x85R}b"),
        "a storage called": program(call("torch.FloatStorage", number(8))),
        "a result called": program(call("collections.OrderedDict") + b")R"),
        "a text called": program(text("eval") + b")R"),
        "arguments that are no tuple": program(b"ccollections\nOrderedDict\n]R"),
        "pairs that are no pairs": program(call("collections.OrderedDict", b"](K\x01K\x02e")),
        "a list as a key": program(b"}]Ns"),
        "a shared tuple as a key": program(b"}" + shared + b"Ns"),
        "a shared tuple as a storage": program(shared + b"Q"),
        "a shared tuple as a kind": program(b"(" + text("storage") + shared + text("0") + text("cpu") + b"K\x04tQ"),
        "a shared tuple as a shape": state(
            call("torch._utils._rebuild_tensor_v2", storage(), b"K\x00", shared, shared)
        ),
        "lists in lists": program(deep),
        "tuples in tuples": program(b")" + b"\x85" * 500_000 + b"Q"),
        "no end": b"\x80\x02" + b"N0" * 1000,
        "endless": program(b"]q\x00" + b"h\x00" * 2_100_000),
        "many marks": program(b"(" * 500_000),
        "a far memo": program(b"Nr\xff\xff\xff\x7fj\xff\xff\xff\x7e"),
        "a memo that is not there": program(b"h\x07"),
        "a text of 8 EB": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b"x.",
        "bytes of 4 GB": b"\x80\x03B" + struct.pack("<I", 2**32 - 1) + b"x.",
        "a long of 2 GB": program(b"\x8b" + struct.pack("<i", 2**31 - 1)),
        "a negative length": program(b"\x8b" + struct.pack("<i", -5)),
        "a number of a million digits": program(b"I" + b"9" * 1_000_000 + b"\n"),
        "text that is no UTF-8": program(b"X\x02\x00\x00\x00\xff\xfe"),
        "an unknown opcode": program(b"\xff"),
        "two values": program(b"NN"),
        "no value": program(b""),
        "nothing": b"",
        "a list appended to None": program(b"NNa"),
        "pairs in a list": program(b"]NNs"),
        "half a pair": program(b"}(Nu"),
        **{f"an empty stack for {op!r}": program(op) for op in b"t \x85 \x86 a s e R Q q\x00".split()},
    }  # fmt: skip
    odd = {
        "a negative size": {"shape": (-2, 2)},
        "a negative stride": {"stride": (2, -1)},
        "a shape of texts": {"shape": (text("2"), text("2"))},
        "a shape of truths": {"shape": (b"\x88", b"\x88"), "stride": (b"\x88", b"\x88")},
        "a huge shape": {"shape": (2**40, 2**40), "stride": (2**40, 1)},
        "a huge shape of stride zero": {"shape": (2**40, 2**7), "stride": (0, 0)},
        "a shape beyond its storage": {"shape": (3, 2)},
        "an offset beyond its storage": {"offset": 1},
        "a huge offset": {"offset": 2**62},
        "a negative offset": {"offset": -1},
        "an offset that is none": {"offset": b"N"},
        "an overlap": {"shape": (2, 2), "stride": (1, 1)},
        "fewer strides": {"stride": (1,)},
        "a thousand axes": {"shape": (1,) * 1000, "stride": (1,) * 1000},
        "a storage that is text": {"inside": text("storage")},
        "a storage that is a tensor": {"inside": tensor()},
        "a storage that claims more": {"inside": storage(count=2**30)},
        "a storage that claims all": {"inside": storage(count=2**62)},
        "a storage of negative size": {"inside": storage(count=-4)},
        "a storage that is not there": {"inside": storage(key="7")},
        "a storage elsewhere": {"inside": storage(key="../../../../etc/passwd")},
        "a storage at a root": {"inside": storage(key="/etc/passwd")},
        "a storage of another kind": {"inside": storage(kind="QInt8Storage")},
        "a storage of another module": {"inside": storage(kind="system", module="os")},
    }
    found |= {name: state(tensor(**options)) for name, options in odd.items()}
    found["a storage described twice"] = program(
        b"}" + text("a") + tensor() + b"s" + text("b") + tensor((1,), (1,), inside=storage("DoubleStorage")) + b"s"
    )
    whole = text("weight") + tensor((4,), (1,))
    found |= {
        f"{name} beside weights": program(b"}(" + whole + text("x") + call(name, touch) + b"u") for name in ACTING
    }
    found |= {
        f"{name} named beside weights": program(
            b"}(" + whole + text("x") + "c{}\n{}\n".format(*name.rsplit(".", 1)).encode() + b"u"
        )
        for name in ACTING[:5]
    }
    long = text(b"k" * 1_000_000)
    found |= {
        "places of a terabyte": program(b"}" + long + b"q\x00" + b"(" + b"".join(
            text(str(place)) + b"}" + b"h\x00" + b"}" + text("w") + tensor() + b"ss" for place in range(3_000)
        ) + b"us"),
        "a text encoded again and again": program(b"c_codecs\nencode\nq\x00" + text("\xff" * 5_000_000) + text("latin1")
                                                  + b"\x86q\x010" + b"h\x00h\x01R" * 100_000),
        "one storage seen in a thousand ways": program(b"}(" + b"".join(
            text(str(place)) + call("torch._utils._rebuild_tensor_v3",
                storage("UntypedStorage", module="torch.storage"), b"K\x00",
                tuple_(number(1)), tuple_(number(1)), b"\x89", b"}", b"ctorch\nfloat32\n")
            for place in range(1_000)) + b"u"),
        "an array that is longer than its bytes": state(_array(b"f4", 2**40, b"1234")),
        "an array of objects": state(_array(b"O8", 1, b"12345678")),
        "an array of texts": state(_array(b"U4", 1, b"1234567890123456")),
        "an array of negative size": state(_array(b"f4", -1, b"1234")),
        "a sparse tensor as a weight": state(call("torch._utils._rebuild_sparse_tensor", b"N", tuple_(tensor()))),
        "a counter as a weight": state(call("collections.Counter", b"}")),
        "a complex tensor as a weight": state(tensor((2,), (1,), inside=storage("ComplexFloatStorage", count=2))),
        "a set that holds itself": program(b"\x8fq\x00(h\x00\x90"),
        "a set of shared tuples": program(b"\x8f(" + shared + b"\x90"),
        "a list added to as a set": program(b"](N\x90"),
        "an instance of a text": program(text("os.system") + touch + b"\x85\x81"),
        "getattr of a private name": program(call("builtins.getattr", b"cx\nThing\n", text("__class__"))),
        "getattr of getattr": program(call("builtins.getattr", call("builtins.getattr", b"cx\nThing\n", text("a")),
                                           text("b"))),
        "numbers that are no keys": program(b"}(" + b"".join(
            number(k * (2**61 - 1)) + b"N" for k in range(1, 60_000)) + b"u"),
    }  # fmt: skip
    found["a parameter of nothing"] = state(call("torch._utils._rebuild_parameter", b"N", b"\x88", b"}"))
    found["another outside reference"] = program(tuple_(text("module"), text("os"), text("x"), text("y"), b"N") + b"Q")
    return found
