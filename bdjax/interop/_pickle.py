"""The meaning of a pickle, found without running it: tensors, dictionaries and plain values.

`pickletools` cuts the stream into opcodes, which checks lengths against what is there; a machine of this module's own
carries them out. It knows no imports and calls nothing: a global is its name, and the few that PyTorch writes around
tensors have a meaning here. Every other one is refused by name. Work and memory grow with the number of opcodes, of
which there may be `MOST`: what is nested is shared, keys of dictionaries are texts or small numbers.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from bdjax.interop._tensors import DTYPES, Refused, Storage, Tensor, shown

MOST = 2_000_000
_MARK = object()
_ENDED = Refused("the pickle takes more from its stack than is there: it is damaged")


class Global(str):
    """MODULE.NAME, which is never looked up."""


class Skipped:
    """A value that is no weight and is passed over: a NumPy array, a device, a dtype."""


_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in (
    ("Float", "float32"), ("Double", "float64"), ("Half", "float16"), ("BFloat16", "bfloat16"), ("Long", "int64"),
    ("Int", "int32"), ("Short", "int16"), ("Char", "int8"), ("Byte", "uint8"), ("Bool", "bool"),
)}  # fmt: skip
_SKIPPED = {
    "torch.Size", "torch.device", "_codecs.encode",
    *(f"torch.{name}" for name in DTYPES),
    *(f"numpy.{name}" for name in ("ndarray", "dtype", "core.multiarray._reconstruct", "core.multiarray.scalar",
                                   "_core.multiarray._reconstruct", "_core.multiarray.scalar")),
}  # fmt: skip


def load(stream: BinaryIO, persistent: Callable[[Any], Any]) -> Any:
    """The value of the pickle at the head of `stream`, which is left behind its end.

    Args: persistent: what stands for an outside reference, `persistent(reference) -> value`.
    Raises Refused for what is damaged, too much, or any global but those that belong to tensors and plain values.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        found: Any
        for count, found in enumerate(pickletools.genops(stream)):
            opcode, argument, _ = found
            if count >= MOST:
                raise Refused(f"the pickle has more than {MOST} opcodes, which no list of weights needs")
            name = opcode.name
            if name in _PUSHES:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _NEW:
                stack.append(_NEW[name]())
            elif name in _BUILDERS:
                _BUILDERS[name](stack)
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "GLOBAL":
                stack.append(_known(Global(argument.replace(" ", ".", 1))))
            elif name == "BINPERSID":
                stack.append(persistent(stack.pop()))
            elif name == "STOP":
                (value,) = stack
                return value
            elif name not in ("PROTO", "FRAME"):
                raise Refused(f"the pickle uses {name}, which torch.save does not write")
    except IndexError:
        raise _ENDED from None
    except (ValueError, KeyError, OverflowError, UnicodeError, TypeError) as error:
        raise Refused(f"the pickle is damaged ({type(error).__name__}: {shown(str(error))})") from None
    raise Refused("the pickle ends before its end mark: the file is cut off")


def _known(found: Global) -> Global:
    if found in _STORAGES or found in _SKIPPED or found in _CALLS:
        return found
    raise Refused(
        f"it asks to run {shown(str(found))}, which is no tensor and no plain value; nothing was run. If you trust it, "
        "load it where it comes from and save its weights alone: torch.save(model.state_dict(), FILE)"
    )


def storage(reference: Any, known: dict[str, Storage]) -> Storage:
    """The storage that torch's reference ("storage", type, key, device, elements, ...) names: one for each key."""
    if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
        raise Refused(f"it refers to {shown(reference)}, which is no storage of a tensor")
    kind, key, count = reference[1], reference[2], reference[4]
    if (
        not isinstance(kind, Global)
        or kind not in _STORAGES
        or type(key) is not str
        or type(count) is not int
        or not 0 <= count < 2**48
    ):
        raise Refused(f"a storage of {shown(kind)} with {shown(count)} elements is not one that can be read")
    found = known.setdefault(key, Storage(key, _STORAGES[kind], count))
    if (found.dtype, found.count) != (_STORAGES[kind], count):
        raise Refused(f"storage {shown(key)} is described in two ways")
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
        if not (isinstance(key, str | Skipped) or (type(key) is int and abs(key) < 2**31)):
            raise Refused(f"a dictionary has {shown(key)} as a key; texts and small numbers are read")
        target[key] = value


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


def _rebuilt(arguments: tuple[Any, ...]) -> Tensor:
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise Refused("a tensor is made of something else than a storage: it is damaged")
    return arguments[0].tensor(*arguments[1:4])


def _parameter(arguments: tuple[Any, ...]) -> Tensor:
    if not arguments or not isinstance(arguments[0], Tensor):
        raise Refused("a parameter is made of something else than a tensor: it is damaged")
    return arguments[0]


def _reduce(stack: list[Any]) -> None:
    arguments, function = stack.pop(), stack.pop()
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise Refused("the pickle calls what is no function: it is damaged")
    if function in _STORAGES:
        raise Refused(f"it asks to make a {function}, which torch.save does not write")
    stack.append(_CALLS[function](arguments) if function in _CALLS else Skipped())


def _build(stack: list[Any]) -> None:
    """State of an object: of a NumPy array, or what a state dict knows of its modules; neither is needed."""
    stack.pop()
    if not isinstance(stack[-1], dict | Skipped):
        raise Refused("the pickle gives a state to what has none: it is damaged")


def _global_from_stack(stack: list[Any]) -> None:
    name, module = stack.pop(), stack.pop()
    if type(name) is not str or type(module) is not str:
        raise Refused("the pickle names a global by what is no text: it is damaged")
    stack.append(_known(Global(f"{module}.{name}")))


def _appends(stack: list[Any]) -> None:
    items = _since_mark(stack)
    _into_list(stack, items)


def _setitems(stack: list[Any]) -> None:
    items = _since_mark(stack)
    _into_dict(stack, items)


def _append(stack: list[Any]) -> None:
    item = stack.pop()
    _into_list(stack, [item])


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _rebuilt,
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _dictionary,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_NEW: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_PUSHES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
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
    "REDUCE": _reduce,
    "BUILD": _build,
    "STACK_GLOBAL": _global_from_stack,
}
