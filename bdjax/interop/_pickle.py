"""Interpreter of the safe subset of pickle: tensors, dictionaries and plain values, without running any code.

`pickletools` reads the argument of each opcode and checks its length against the data; the interpreter in this module
executes the opcodes. It imports and calls nothing: a global is only its name, and the few globals that PyTorch and
NumPy write for tensors are interpreted here. Every other object becomes an inert placeholder (`_globals`). Time and
memory are proportional to the bytes and opcodes, at most `MAX_OPCODES`: nested objects are shared, and dictionary keys
other than strings and small integers become placeholders, because hashing them could take unbounded time.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from bdjax.interop import _arrays, _globals
from bdjax.interop._globals import STORAGES, Global, Skipped
from bdjax.interop._tensors import DTYPES, OTHER_STORAGES, Refused, Storage, Tensor, quote

MAX_OPCODES = 1_000_000
MAX_NAMES = 100_000  # references to classes and functions; torch.save writes each once
MAX_ENCODED = 96 << 20  # characters of bytes in Python 2's encoding, in total
_MARK = object()
_STACK_EMPTY = Refused("the pickle is damaged (its stack is empty)")


def load(stream: BinaryIO, persistent: Callable[[Any], Any]) -> Any:
    """Interpret the pickle at the start of a stream, which is then positioned at its end.

    Args:
      stream: the pickle.
      persistent: `persistent(reference) -> value` resolves persistent references.

    Returns:
      The value of the pickle.

    Raises:
      Refused: when the pickle is damaged, too large, or names code to run.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    encoded_count = name_count = 0
    try:
        for _ in range(MAX_OPCODES):
            code = stream.read(1)
            kind, reader, operand = _STEPS[code] if code in _STEPS else _refuse_opcode(code)
            argument: Any = reader(stream) if reader is not None else None
            if kind == "get":
                stack.append(memo[argument])
            elif kind == "put":
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif kind == "push":
                stack.append(argument)
            elif kind == "build":
                operand(stack)
            elif kind == "constant":
                stack.append(operand)
            elif kind == "new":
                stack.append(operand())
            elif kind == "reduce":
                encoded_count += _reduce(stack)
                if encoded_count > MAX_ENCODED:
                    raise Refused(f"the pickle encodes more than {MAX_ENCODED} characters, more than it can hold")
            elif kind == "global":
                name_count += 1
                if name_count > MAX_NAMES:
                    raise Refused(f"the pickle names more than {MAX_NAMES} classes, which no list of weights does")
                stack.append(
                    _globals.checked_global(_pop_name(stack) if argument is None else argument.replace(" ", ".", 1))
                )
            elif kind == "persistent":
                stack.append(persistent(stack.pop()))
            elif kind == "stop":
                (value,) = stack
                return value
    except IndexError:
        raise _STACK_EMPTY from None
    except (ValueError, KeyError, OverflowError, UnicodeError, TypeError) as error:
        raise Refused(f"the pickle is damaged ({type(error).__name__}: {quote(str(error))})") from None
    raise Refused(f"the pickle has more than {MAX_OPCODES} opcodes, which no list of weights needs")


def _refuse_opcode(code: bytes) -> Any:
    """Raise Refused for an opcode that is not interpreted."""
    name = next((opcode.name for opcode in pickletools.opcodes if opcode.code.encode("latin-1") == code), None)
    if not code:
        raise Refused("the pickle ends before its end mark: the file is cut off")
    if name is None:
        raise Refused(f"the pickle is damaged (there is no opcode {quote(code)})")
    raise Refused(f"the pickle uses {name}, which torch.save does not write")


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    """Pop the items above the last mark, and the mark."""
    for index in range(len(stack) - 1, -1, -1):
        if stack[index] is _MARK:
            items = stack[index + 1 :]
            del stack[index:]
            return items
    raise _STACK_EMPTY


def _tuple(count: int) -> Callable[[list[Any]], None]:
    """Return the operation that pops `count` items and pushes their tuple."""

    def build(stack: list[Any]) -> None:
        items = [stack.pop() for _ in range(count)][::-1]
        stack.append(tuple(items))

    return build


def _extend_list(stack: list[Any], items: list[Any]) -> None:
    """Extend the list at the top of the stack."""
    if isinstance(stack[-1], Skipped):
        return
    if not isinstance(stack[-1], list):
        raise Refused("the pickle is damaged (it appends to an object that is not a list)")
    stack[-1].extend(items)


def _update_dict(stack: list[Any], items: list[Any]) -> None:
    """Store alternating keys and values in the dictionary at the top of the stack."""
    target = stack[-1]
    if isinstance(target, Skipped):
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise Refused("the pickle is damaged (it stores items in an object that is not a dictionary)")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, list | dict | bytearray):
            raise Refused(f"a dictionary has {quote(key)} as a key, which no dictionary can have: it is damaged")
        is_hashable = type(key) is str or isinstance(key, Skipped) or (type(key) is int and abs(key) < 2**31)
        target[key if is_hashable else Skipped("a key", plain=True)] = value


def _setitem(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    _update_dict(stack, [key, value])


def _dictionary(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """Return the dictionary of OrderedDict(*arguments); Python 2 wrote the pairs as an argument."""
    dictionary: dict[Any, Any] = {}
    for pair in arguments[0] if arguments and isinstance(arguments[0], list) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Refused("the pickle is damaged (an ordered dictionary is built from items that are not pairs)")
        _update_dict([dictionary], list(pair))
    return dictionary


def _rebuild_tensor(arguments: tuple[Any, ...]) -> Tensor | Skipped:
    """Return the tensor of _rebuild_tensor(storage, offset, shape, stride, ...)."""
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise Refused("the pickle is damaged (a tensor is built without a storage)")
    if arguments[0].dtype in OTHER_STORAGES:
        return Skipped(f"a tensor of {arguments[0].dtype}")
    return arguments[0].tensor(*arguments[1:4])


def _rebuild_tensor_v3(arguments: tuple[Any, ...]) -> Tensor | Skipped:
    """Return the tensor of _rebuild_tensor_v3: a storage of bytes, and the element type as the last argument."""
    untyped = arguments[0] if len(arguments) > 6 else None
    if not isinstance(untyped, Storage) or not isinstance(arguments[6], Global):
        raise Refused("the pickle is damaged (a tensor is built without a storage and a type)")
    dtype = arguments[6].removeprefix("torch.")
    if dtype not in DTYPES:
        return Skipped(f"a tensor of {arguments[6]}")
    if untyped.itemsize != 1 or len(untyped.views) >= MAX_VIEWS:
        raise Refused(f"storage {quote(untyped.key)} is described in more ways than torch.save writes")
    view = Storage(untyped.key, dtype, untyped.count // DTYPES[dtype].itemsize)
    untyped.views.append(view)
    return view.tensor(*arguments[1:4])


def _rebuild_parameter(arguments: tuple[Any, ...]) -> Tensor | Skipped:
    """Return the tensor of a parameter."""
    if not arguments or not isinstance(arguments[0], Tensor | Skipped):
        raise Refused("the pickle is damaged (a parameter is built without a tensor)")
    return arguments[0]


def _rebuild_from_type(arguments: tuple[Any, ...]) -> Tensor | Skipped:
    """Return the tensor of _rebuild_from_type_v2(function, type, arguments, state), used for tensor subclasses."""
    if len(arguments) > 2 and arguments[1] in _TENSORS and arguments[0] in _REBUILDERS and type(arguments[2]) is tuple:
        return _REBUILDERS[arguments[0]](arguments[2])
    has_type = len(arguments) > 1 and isinstance(arguments[1], Global)
    return Skipped(f"a tensor of {arguments[1]}" if has_type else _FROM_TYPE)


def _reduce(stack: list[Any]) -> int:
    """Interpret a call on the stack, and return the number of characters that it encoded to bytes."""
    arguments, function = stack.pop(), stack.pop()
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise Refused("the pickle is damaged (it calls an object that is not a function)")
    if function in STORAGES:
        raise Refused(f"it asks to make a {function}, which torch.save does not write")
    if function == "_codecs.encode" and arguments[1:] == ("latin1",) and type(arguments[0]) is str:
        stack.append(arguments[0].encode("latin-1"))  # the form of bytes in protocol 2
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
    """Return the operation that replaces a class and its `count` arguments by a placeholder of an instance."""

    def build(stack: list[Any]) -> None:
        for _ in range(count):
            stack.pop()
        name = stack.pop()
        if not isinstance(name, Global):
            raise Refused("the pickle is damaged (it builds an instance of an object that is not a class)")
        stack.append(_dictionary(()) if name in _DICTIONARIES else Skipped(str(name)))

    return build


def _build(stack: list[Any]) -> None:
    """Set the state of an object: used for NumPy arrays, dropped for dictionaries and placeholders."""
    state, target = stack.pop(), stack[-1]
    if isinstance(target, _arrays.Array | _arrays.Dtype):
        target.build(state)
    elif isinstance(target, Skipped):
        target.network |= isinstance(state, dict) and "_modules" in state and "_parameters" in state
    elif not isinstance(target, dict):
        raise Refused("the pickle is damaged (it sets the state of an object that has none)")


def _additems(stack: list[Any]) -> None:
    _pop_to_mark(stack)
    if not isinstance(stack[-1], Skipped):
        raise Refused("the pickle is damaged (it adds to an object that is not a set)")


def _frozenset(stack: list[Any]) -> None:
    _pop_to_mark(stack)
    stack.append(Skipped("builtins.frozenset"))


def _pop_name(stack: list[Any]) -> str:
    """Pop a global's module and name, and return MODULE.NAME."""
    name, module = stack.pop(), stack.pop()
    if type(name) is not str or type(module) is not str:
        raise Refused("the pickle is damaged (the name of a global is not a string)")
    return f"{module}.{name}"


def _appends(stack: list[Any]) -> None:
    items = _pop_to_mark(stack)
    _extend_list(stack, items)


def _setitems(stack: list[Any]) -> None:
    items = _pop_to_mark(stack)
    _update_dict(stack, items)


def _append(stack: list[Any]) -> None:
    item = stack.pop()
    _extend_list(stack, [item])


MAX_VIEWS = 64  # views of one storage with other element types
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_TENSORS = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict")
_REBUILDERS: dict[str, Callable[[tuple[Any, ...]], Tensor | Skipped]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    **_REBUILDERS,
    _FROM_TYPE: _rebuild_from_type,
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
    "TUPLE": lambda stack: stack.append(tuple(_pop_to_mark(stack))),
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _setitem,
    "SETITEMS": _setitems,
    "ADDITEMS": _additems,
    "FROZENSET": _frozenset,
    "NEWOBJ": _new(1),
    "NEWOBJ_EX": _new(2),
    "POP": lambda stack: stack.pop(),
    "POP_MARK": lambda stack: _pop_to_mark(stack).clear(),
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
    "BINPERSID": ("persistent", None),
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
