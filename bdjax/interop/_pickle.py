"""The meaning of a pickle, found without running it: tensors, dictionaries and plain values.

The readers of `pickletools` take each opcode's argument, with its length checked against what is there; a machine of
this module's own carries the opcodes out. It knows no imports and calls nothing: a global is its name, and the few that
PyTorch and NumPy write around tensors have a meaning here. Every other object is an inert placeholder (`_globals`).
Work and memory grow with the bytes and the opcodes, of which there may be `MAX_OPCODES`: what is nested is shared, and keys of
dictionaries that are neither texts nor small numbers become placeholders, for hashing them could take forever.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from bdjax.interop import _arrays, _globals
from bdjax.interop._globals import STORAGES, Global, Skipped
from bdjax.interop._tensors import DTYPES, OTHER_STORAGES, Refused, Storage, Tensor, quote

MAX_OPCODES = 1_000_000
MAX_NAMES = 100_000  # of classes and functions; torch.save writes each once
MAX_ENCODED = 96 << 20  # characters that Python 2's way of writing bytes takes, in all
_MARK = object()
_ENDED = Refused("the pickle takes more from its stack than is there: it is damaged")


def load(stream: BinaryIO, persistent: Callable[[Any], Any]) -> Any:
    """The value of the pickle at the head of `stream`, which is left behind its end.

    Args: persistent: what stands for an outside reference, `persistent(reference) -> value`.
    Raises Refused for what is damaged, too much, or asks to run something.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    encoded = named = 0
    try:
        for _ in range(MAX_OPCODES):
            code = stream.read(1)
            kind, reader, own = _STEPS[code] if code in _STEPS else _unknown(code)
            argument: Any = reader(stream) if reader is not None else None
            if kind == "get":
                stack.append(memo[argument])
            elif kind == "put":
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif kind == "push":
                stack.append(argument)
            elif kind == "build":
                own(stack)
            elif kind == "constant":
                stack.append(own)
            elif kind == "new":
                stack.append(own())
            elif kind == "reduce":
                encoded += _reduce(stack)
                if encoded > MAX_ENCODED:
                    raise Refused(f"the pickle encodes more than {MAX_ENCODED} characters, more than it can hold")
            elif kind == "global":
                named += 1
                if named > MAX_NAMES:
                    raise Refused(f"the pickle names more than {MAX_NAMES} classes, which no list of weights does")
                stack.append(_globals.checked_global(_stacked(stack) if argument is None else argument.replace(" ", ".", 1)))
            elif kind == "outside":
                stack.append(persistent(stack.pop()))
            elif kind == "stop":
                (value,) = stack
                return value
    except IndexError:
        raise _ENDED from None
    except (ValueError, KeyError, OverflowError, UnicodeError, TypeError) as error:
        raise Refused(f"the pickle is damaged ({type(error).__name__}: {quote(str(error))})") from None
    raise Refused(f"the pickle has more than {MAX_OPCODES} opcodes, which no list of weights needs")


def _unknown(code: bytes) -> Any:
    name = next((opcode.name for opcode in pickletools.opcodes if opcode.code.encode("latin-1") == code), None)
    if not code:
        raise Refused("the pickle ends before its end mark: the file is cut off")
    if name is None:
        raise Refused(f"the pickle is damaged (there is no opcode {quote(code)})")
    raise Refused(f"the pickle uses {name}, which torch.save does not write")


def storage(reference: Any, known: dict[str, Storage]) -> Storage:
    """The storage that torch's reference ("storage", type, key, device, elements, ...) names: one for each key."""
    if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
        raise Refused(f"it refers to {quote(reference)}, which is no storage of a tensor")
    kind, key, count = reference[1], reference[2], reference[4]
    dtype = None
    if isinstance(kind, Global):
        dtype = STORAGES.get(kind, str(kind) if kind in OTHER_STORAGES else None)
    if dtype is None or type(key) is not str or type(count) is not int or not 0 <= count < 2**48:
        raise Refused(f"a storage of {quote(kind)} with {quote(count)} elements is not one that can be read")
    found = known.setdefault(key, Storage(key, dtype, count))
    if (found.dtype, found.count) != (dtype, count):
        raise Refused(f"storage {quote(key)} is described in two ways")
    return found


def _since_mark(stack: list[Any]) -> list[Any]:
    for place in range(len(stack) - 1, -1, -1):
        if stack[place] is _MARK:
            items = stack[place + 1 :]
            del stack[place:]
            return items
    raise _ENDED


def _tuple(count: int) -> Callable[[list[Any]], None]:
    def build(stack: list[Any]) -> None:
        items = [stack.pop() for _ in range(count)][::-1]
        stack.append(tuple(items))

    return build


def _into_list(stack: list[Any], items: list[Any]) -> None:
    if isinstance(stack[-1], Skipped):
        return
    if not isinstance(stack[-1], list):
        raise Refused("the pickle appends to what is no list: it is damaged")
    stack[-1].extend(items)


def _into_dict(stack: list[Any], items: list[Any]) -> None:
    target = stack[-1]
    if isinstance(target, Skipped):
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise Refused("the pickle stores pairs in what is no dictionary: it is damaged")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, list | dict | bytearray):
            raise Refused(f"a dictionary has {quote(key)} as a key, which no dictionary can have: it is damaged")
        known = type(key) is str or isinstance(key, Skipped) or (type(key) is int and abs(key) < 2**31)
        target[key if known else Skipped("a key", plain=True)] = value


def _pair(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    _into_dict(stack, [key, value])


def _dictionary(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """An ordered dictionary; Python 2 wrote its pairs as an argument."""
    made: dict[Any, Any] = {}
    for pair in arguments[0] if arguments and isinstance(arguments[0], list) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Refused("an ordered dictionary is made of what are no pairs: it is damaged")
        _into_dict([made], list(pair))
    return made


def _rebuilt(arguments: tuple[Any, ...]) -> Tensor | Skipped:
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise Refused("a tensor is made of something else than a storage: it is damaged")
    if arguments[0].dtype in OTHER_STORAGES:
        return Skipped(f"a tensor of {arguments[0].dtype}")
    return arguments[0].tensor(*arguments[1:4])


def _rebuilt_typed(arguments: tuple[Any, ...]) -> Tensor | Skipped:
    """_rebuild_tensor_v3: a storage of bytes, and the type of elements behind the rest."""
    whole = arguments[0] if len(arguments) > 6 else None
    if not isinstance(whole, Storage) or not isinstance(arguments[6], Global):
        raise Refused("a tensor is made of something else than a storage and a type: it is damaged")
    dtype = arguments[6].removeprefix("torch.")
    if dtype not in DTYPES:
        return Skipped(f"a tensor of {arguments[6]}")
    if whole.itemsize != 1 or len(whole.views) >= MAX_VIEWS:
        raise Refused(f"storage {quote(whole.key)} is described in more ways than torch.save writes")
    view = Storage(whole.key, dtype, whole.count // DTYPES[dtype].itemsize)
    whole.views.append(view)
    return view.tensor(*arguments[1:4])


def _parameter(arguments: tuple[Any, ...]) -> Tensor | Skipped:
    if not arguments or not isinstance(arguments[0], Tensor | Skipped):
        raise Refused("a parameter is made of something else than a tensor: it is damaged")
    return arguments[0]


def _of_type(arguments: tuple[Any, ...]) -> Tensor | Skipped:
    """_rebuild_from_type_v2(function, type, arguments, state): a tensor with attributes, or of a class of its own."""
    if len(arguments) > 2 and arguments[1] in _TENSORS and arguments[0] in _REBUILDERS and type(arguments[2]) is tuple:
        return _REBUILDERS[arguments[0]](arguments[2])
    named = len(arguments) > 1 and isinstance(arguments[1], Global)
    return Skipped(f"a tensor of {arguments[1]}" if named else _OF_TYPE)


def _reduce(stack: list[Any]) -> int:
    """A call, in the meaning that it has here. Returns how many characters it encoded."""
    arguments, function = stack.pop(), stack.pop()
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise Refused("the pickle calls what is no function: it is damaged")
    if function in STORAGES:
        raise Refused(f"it asks to make a {function}, which torch.save does not write")
    if function == "_codecs.encode" and arguments[1:] == ("latin1",) and type(arguments[0]) is str:
        stack.append(arguments[0].encode("latin-1"))  # how protocol 2 writes bytes
        return len(arguments[0])
    if function in _CALLS:
        stack.append(_CALLS[function](arguments))
    elif function == "builtins.bytes" and not arguments:
        stack.append(b"")
    elif function == "_codecs.encode":
        stack.append(Skipped("bytes", plain=True))
    else:
        stack.append(_globals.placeholder(function, arguments))
    return 0


def _new(count: int) -> Callable[[list[Any]], None]:
    """An instance of a class, made without its `__init__`: a placeholder. `count`: of what stands behind the class."""

    def build(stack: list[Any]) -> None:
        for _ in range(count):
            stack.pop()
        found = stack.pop()
        if not isinstance(found, Global):
            raise Refused("the pickle makes an instance of what is no class: it is damaged")
        stack.append(_dictionary(()) if found in _DICTIONARIES else Skipped(str(found)))

    return build


def _build(stack: list[Any]) -> None:
    """State of an object: of a NumPy array, what a state dict knows of its modules, or a placeholder's, which goes."""
    state, target = stack.pop(), stack[-1]
    if isinstance(target, _arrays.Array | _arrays.Dtype):
        target.build(state)
    elif isinstance(target, Skipped):
        target.network |= isinstance(state, dict) and "_modules" in state and "_parameters" in state
    elif not isinstance(target, dict):
        raise Refused("the pickle gives a state to what has none: it is damaged")


def _additems(stack: list[Any]) -> None:
    _since_mark(stack)
    if not isinstance(stack[-1], Skipped):
        raise Refused("the pickle adds to what is no set: it is damaged")


def _frozenset(stack: list[Any]) -> None:
    _since_mark(stack)
    stack.append(Skipped("builtins.frozenset"))


def _stacked(stack: list[Any]) -> str:
    name, module = stack.pop(), stack.pop()
    if type(name) is not str or type(module) is not str:
        raise Refused("the pickle names a global by what is no text: it is damaged")
    return f"{module}.{name}"


def _appends(stack: list[Any]) -> None:
    items = _since_mark(stack)
    _into_list(stack, items)


def _setitems(stack: list[Any]) -> None:
    items = _since_mark(stack)
    _into_dict(stack, items)


def _append(stack: list[Any]) -> None:
    item = stack.pop()
    _into_list(stack, [item])


MAX_VIEWS = 64  # types that one storage is seen as
_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
_TENSORS = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict")
_REBUILDERS: dict[str, Callable[[tuple[Any, ...]], Tensor | Skipped]] = {
    "torch._utils._rebuild_tensor": _rebuilt,
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_tensor_v3": _rebuilt_typed,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    **_REBUILDERS,
    _OF_TYPE: _of_type,
    **dict.fromkeys(_DICTIONARIES, _dictionary),
    "numpy.dtype": _arrays.Dtype,
    **dict.fromkeys(_arrays.RECONSTRUCT, lambda arguments: _arrays.Array()),
    **dict.fromkeys(_arrays.FROM_BUFFER, _arrays.from_buffer),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_NEW: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Skipped("builtins.set"),
}
_PUSHES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_BUILDERS: dict[str, Callable[[list[Any]], None]] = {
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda stack: stack.append(tuple(_since_mark(stack))),
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _pair,
    "SETITEMS": _setitems,
    "ADDITEMS": _additems,
    "FROZENSET": _frozenset,
    "NEWOBJ": _new(1),
    "NEWOBJ_EX": _new(2),
    "POP": lambda stack: stack.pop(),
    "POP_MARK": lambda stack: _since_mark(stack).clear(),
    "BUILD": _build,
}
_KINDS: dict[str, tuple[str, Any]] = {
    **{name: ("push", None) for name in _PUSHES},
    **{name: ("constant", value) for name, value in _CONSTANTS.items()},
    **{name: ("new", make) for name, make in _NEW.items()},
    **{name: ("build", build) for name, build in _BUILDERS.items()},
    **{name: ("put", None) for name in ("BINPUT", "LONG_BINPUT", "MEMOIZE")},
    **{name: ("get", None) for name in ("BINGET", "LONG_BINGET")},
    **{name: ("nothing", None) for name in ("PROTO", "FRAME")},
    "REDUCE": ("reduce", None),
    "GLOBAL": ("global", None),
    "STACK_GLOBAL": ("global", None),
    "BINPERSID": ("outside", None),
    "STOP": ("stop", None),
}
_STEPS: dict[bytes, tuple[str, Callable[[BinaryIO], Any] | None, Any]] = {
    opcode.code.encode("latin-1"): (
        _KINDS[opcode.name][0],
        None if opcode.arg is None else opcode.arg.reader,
        _KINDS[opcode.name][1],
    )
    for opcode in pickletools.opcodes
    if opcode.name in _KINDS
}
