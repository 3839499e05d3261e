"""Reads untrusted pickles without running code, in bounded time and memory."""

import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from crislit.errors import InputError, first_line
from crislit.io.libraries import is_damage

SAFE_OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS
    EMPTY_DICT DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE"""
"""Opcodes of plain data. The last three are needed for byte strings, and limited to them."""
MAX_CONTAINERS = 5_000_000
"""Lists, tuples and dictionaries per refs file; RefCOCO has half a million.

One byte of the file can create a container of 64 bytes in memory.
"""
MAX_PARTS = 1_000_000
"""Parts of a tuple, and of everything in a checkpoint except its tensors.

Parts are counted as often as they are reached: hashing, comparing or printing a tuple that contains
itself twice, nested 60 deep, would take years.
"""
REFUSAL = "but only plain containers, numbers and strings are read"
CONVERSIONS = {
    **dict.fromkeys(("numpy", "torch"), "lambda value: value.tolist()"),
    **dict.fromkeys(("collections", "builtins", "__builtin__"), "list"),
    **dict.fromkeys(("pathlib", "datetime", "pandas"), "str"),
    "decimal": "float",
}
"""Functions that make values of a module plain, for `json.dumps`."""
BUILTINS = ("set", "frozenset", "range")
"""Values of Python's own that `list` makes plain."""
SET_OPCODES = (pickle.EMPTY_SET[0], pickle.FROZENSET[0])
Handler = Callable[[Any], None]
"""A method of an unpickler that executes one opcode."""
_HANDLERS: dict[int, Handler] = {
    opcode: pickle._Unpickler.dispatch[opcode]
    for opcode in (getattr(pickle, name)[0] for name in SAFE_OPCODES.split())
}


class NotPlainError(pickle.UnpicklingError):
    """A value whose owner can save it as plain data, such as a number of NumPy."""

    def __init__(self, module: str, name: str) -> None:
        conversion = CONVERSIONS[module.partition(".")[0]]
        code = f"json.loads(json.dumps(refs, default={conversion}))"
        if (module, name) == ("pandas.core.frame", "DataFrame"):
            code = "refs.to_dict('records')"
        numbers = ", with ids as int(x)" if module.startswith(("numpy", "torch")) else ""
        super().__init__(
            f"it refers to {module}.{name}, {REFUSAL}. If it is your own, save it again{numbers}: "
            f"`refs = {code}` makes all of it plain"
        )


class _Dispatch(dict[int, Handler]):
    """Handlers by opcode. Looking up any other opcode is an error."""

    def __missing__(self, opcode: int) -> Handler:
        if opcode in SET_OPCODES:
            raise NotPlainError("builtins", "set")
        raise pickle.UnpicklingError(f"it contains the opcode {chr(opcode)!r}, {REFUSAL}")


def _counting_containers(handler: Handler) -> Handler:
    def count_and_load(unpickler: "_DataUnpickler") -> None:
        unpickler._count_container()
        handler(unpickler)

    return count_and_load


class _DataUnpickler(pickle._Unpickler):
    """Builds containers, numbers and strings, and nothing that runs code.

    Based on Python's unpickler in Python: the one in C reserves as much memory as the file claims.
    """

    dispatch = _Dispatch(_HANDLERS)
    stack: list[Any]

    def __init__(self, file: IO[bytes], size: int, max_containers: int) -> None:
        super().__init__(file, encoding="latin-1")
        self._bytes_left = size
        self._max_containers = self._containers_left = max_containers

    def find_class(self, module: str, name: str) -> Any:
        # Python 3 writes byte strings below protocol 3 as calls of these two.
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) == ("__builtin__", "bytes"):
            return self._empty_bytes
        package = module.partition(".")[0]
        if package in CONVERSIONS and ("builtin" not in package or name in BUILTINS):
            raise NotPlainError(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, {REFUSAL}")

    def _encode(self, text: str, encoding: str) -> bytes:
        if not isinstance(text, str):
            raise pickle.UnpicklingError("it makes a byte string of something that is not text")
        self._bytes_left -= len(text)
        if self._bytes_left < 0:
            raise pickle.UnpicklingError("its byte strings are longer than the file")
        return text.encode("latin-1")

    def _empty_bytes(self) -> bytes:
        return b""

    def _check_keys(self, keys: Iterable[Any]) -> None:
        for key in keys:
            if not isinstance(key, (str, bytes, int, float, type(None))):
                raise pickle.UnpicklingError("a dictionary key is neither a number nor a string")
            # All multiples of 2^61 - 1 have the same hash: inserting many would take forever.
            if isinstance(key, int) and abs(key) >= 2**64:
                raise pickle.UnpicklingError("a dictionary key is larger than 64 bits")

    def _count_container(self) -> None:
        self._containers_left -= 1
        if self._containers_left < 0:
            raise pickle.UnpicklingError(
                f"it has more than {self._max_containers:,} lists, tuples and dictionaries"
            )

    def load_reduce(self) -> None:
        # Check first: Python's own error message would print both values.
        if not callable(self.stack[-2]) or not isinstance(self.stack[-1], tuple):
            raise pickle.UnpicklingError("it calls something that is not a function")
        _HANDLERS[pickle.REDUCE[0]](self)

    def load_dict(self) -> None:
        self._count_container()
        self._check_keys(self.stack[::2])
        _HANDLERS[pickle.DICT[0]](self)

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        _HANDLERS[pickle.SETITEM[0]](self)

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        _HANDLERS[pickle.SETITEMS[0]](self)

    dispatch |= {
        opcode: _counting_containers(_HANDLERS[opcode]) for opcode in b"(])}lt\x85\x86\x87"
    }
    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def load_pickle(path: Path) -> Any:
    """Read a pickle of plain data, written by Python 2 or 3, without running code from it.

    Raises:
        InputError: If it is damaged, or holds more than containers, numbers and strings.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        return _DataUnpickler(io.BytesIO(content), len(content), MAX_CONTAINERS).load()
    except NotPlainError as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except Exception as error:
        if not is_damage(error, "pickle"):
            raise
        raise InputError(
            f"cannot read {path}: {first_line(error)}. Fetch it again, from a source that you trust"
        ) from error


# -- PyTorch checkpoints


def check_torch_pickle(path: Path, zipped: bool) -> None:
    """Check that PyTorch can read a file in reasonable time and memory.

    PyTorch's restricted reader checks which functions a pickle calls, but not what the calls cost.

    Raises:
        Exception: Any type if the file is damaged; UnpicklingError if reading it costs too much.
    """
    if zipped:
        content = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
        _check_part_count(_TorchPickleChecker(io.BytesIO(content), len(content)).load())
        return
    # Before PyTorch 1.6: magic number, version, system, content and tensor names, one by one.
    with path.open("rb") as file:
        size = path.stat().st_size
        for _ in range(5):
            _check_part_count(_TorchPickleChecker(file, size).load())


def _check_part_count(content: Any) -> None:
    parts_left, unvisited = MAX_PARTS, [content]
    while unvisited:
        part = unvisited.pop()
        inside: Sequence[Any] = part if isinstance(part, (list, tuple)) else ()
        if isinstance(part, dict):
            inside = [*part.keys(), *part.values()]
        parts_left -= 1 + len(inside)
        if parts_left < 0:
            raise pickle.UnpicklingError(f"it has more than {MAX_PARTS:,} parts")
        unvisited += [child for child in inside if isinstance(child, (dict, list, tuple))]


class _Placeholder:
    """Replaces what PyTorch's reader would build: a tensor, a type or a NumPy number."""


def _counting_tuple_parts(handler: Handler) -> Handler:
    def load_and_count(unpickler: "_TorchPickleChecker") -> None:
        handler(unpickler)
        unpickler._count_tuple_parts()

    return load_and_count


class _TorchPickleChecker(_DataUnpickler):
    """Reads a checkpoint's pickle like PyTorch, with placeholders for all but plain data."""

    dispatch = _Dispatch(_DataUnpickler.dispatch)

    def __init__(self, file: IO[bytes], size: int) -> None:
        # A training checkpoint of RN101 has 20,000 containers.
        super().__init__(file, size, MAX_CONTAINERS // 5)
        # Tuples and their number of parts by id; holding the tuples keeps the ids unique.
        self._tuples: dict[int, tuple[Any, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if name == "bytearray":  # a few bytes create one of any length
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, {REFUSAL}")
        if name in ("OrderedDict", "Counter", "defaultdict"):
            return self._make_dict
        if name in ("Tensor", "set", "frozenset"):
            return self._refuse_call
        return lambda *arguments: _Placeholder()  # PyTorch's reader decides what may be called

    def _make_dict(self, *arguments: Any) -> dict[Any, Any]:
        pairs = [pair for part in arguments if isinstance(part, list) for pair in part]
        self._check_keys(pair[0] for pair in pairs)
        return {pair[0]: pair[1] for pair in pairs}

    def _refuse_call(self, *arguments: Any) -> Any:
        raise pickle.UnpicklingError("it builds a tensor or a set unlike PyTorch saves them")

    def persistent_load(self, pid: Any) -> Any:
        return _Placeholder()

    def load_build(self) -> None:
        self.stack.pop()

    def load_newobj(self) -> None:
        self.stack[-2:] = [_Placeholder()]

    def _count_tuple_parts(self) -> None:
        new = self.stack[-1]
        parts = 1 + sum(self._tuples[id(x)][1] if id(x) in self._tuples else 1 for x in new)
        if parts > MAX_PARTS:
            raise pickle.UnpicklingError(f"it has a tuple of more than {MAX_PARTS:,} parts")
        if new:
            self._tuples[id(new)] = (new, parts)

    dispatch |= {
        opcode: _counting_tuple_parts(_DataUnpickler.dispatch[opcode])
        for opcode in b"t\x85\x86\x87"
    }
    dispatch |= {
        pickle.BINPERSID[0]: pickle._Unpickler.dispatch[pickle.BINPERSID[0]],
        pickle.BUILD[0]: load_build,
        pickle.NEWOBJ[0]: load_newobj,
    }
