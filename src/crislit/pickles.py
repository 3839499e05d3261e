"""Pickles that strangers wrote, read without running code, and without the time and memory that a few bytes may ask for."""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from crislit.errors import InputError

PLAIN = """PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS
    GLOBAL STACK_GLOBAL REDUCE"""
"""Opcodes of which pickles of plain data consist; the last three for byte strings alone."""

MOST_CONTAINERS = 5_000_000
"""Lists, tuples and dictionaries of a refs file; RefCOCO's has half a million. One of a byte takes 64 in memory."""

REFUSAL = "and only plain containers, numbers and strings are read"

MOST_PARTS = 1_000_000
"""Of a tuple, or of what a checkpoint holds beside its tensors, each counted as often as it is met: a tuple of itself twice,
sixty deep, takes years to hash, compare or print."""

_READ: dict[int, Any] = {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, n)[0] for n in PLAIN.split())}
"""What Python does at each."""


class _Opcodes(dict[int, Any]):
    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"it has the opcode {chr(code)!r}, {REFUSAL}")


def _counted(load: Any) -> Any:
    def counting(self: "_DataUnpickler") -> None:
        self._count()
        load(self)

    return counting


class _DataUnpickler(pickle._Unpickler):
    """Builds containers, numbers and strings, and nothing that would run code.

    It is Python's own in Python: the one in C reserves whatever memory a few bytes ask for.
    """

    dispatch = _Opcodes(_READ)
    stack: list[Any]

    def __init__(self, file: IO[bytes], size: int, containers: int) -> None:
        super().__init__(file, encoding="latin-1")
        self._room = size  # for byte strings
        self._most = self._containers = containers

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes byte strings below protocol 3
            return self._encode
        if (module, name) == ("__builtin__", "bytes"):  # and an empty one
            return self._no_bytes
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, {REFUSAL}")

    def _encode(self, text: str, encoding: str) -> bytes:
        self._room -= len(text)
        if self._room < 0:
            raise pickle.UnpicklingError("its byte strings are longer than the file")
        return text.encode("latin-1")

    def _no_bytes(self) -> bytes:
        return b""

    def _check_keys(self, keys: Sequence[Any]) -> None:
        for key in keys:
            if not isinstance(key, (str, bytes, int, float, type(None))):
                raise pickle.UnpicklingError("a dictionary's key is neither number nor string")
            if isinstance(key, int) and abs(key) >= 2**64:  # multiples of 2**61 - 1 all have one hash
                raise pickle.UnpicklingError("a dictionary's key is a number that does not fit 64 bits")

    def load_reduce(self) -> None:
        if not callable(self.stack[-2]) or not isinstance(self.stack[-1], tuple):  # Python's own error would print both
            raise pickle.UnpicklingError("it calls what is no function")
        _READ[pickle.REDUCE[0]](self)

    def load_dict(self) -> None:
        self._count()
        self._check_keys(self.stack[::2])
        _READ[pickle.DICT[0]](self)

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        _READ[pickle.SETITEM[0]](self)

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        _READ[pickle.SETITEMS[0]](self)

    def _count(self) -> None:
        self._containers -= 1
        if self._containers < 0:
            raise pickle.UnpicklingError(f"it has more than {self._most:,} lists, tuples and dictionaries")

    dispatch |= {code: _counted(_READ[code]) for code in b"(])}lt\x85\x86\x87"}
    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def load_pickle(path: Path) -> Any:
    """Read a pickle of plain data, written by Python 2 or 3, without ever running code from it.

    Raises:
        InputError: If it is damaged, or holds anything but built-in containers, numbers and strings.
    """
    try:
        content = path.read_bytes()
        return _DataUnpickler(io.BytesIO(content), len(content), MOST_CONTAINERS).load()
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise InputError(f"cannot read {path}: {told(error)}. Fetch it again, from a source that you trust") from error


def told(error: Exception) -> str:
    """Return what an error says, in one line that is not as long as what it is about."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 200 else f"{said[:200]}..."


# -- PyTorch's ----------------------------------------------------------------------------------------------------------------


class _Opaque:
    """Stands for what PyTorch's reader would make: a tensor, a type, a number of NumPy's."""


def _weighed(load: Any) -> Any:
    def weighing(self: "_Rehearsal") -> None:
        load(self)
        self._weigh()

    return weighing


class _Rehearsal(_DataUnpickler):
    """Goes through a checkpoint's pickle as PyTorch's reader will, and makes nothing but plain containers and strings."""

    dispatch = _Opcodes(_DataUnpickler.dispatch)

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(file, size, MOST_CONTAINERS // 5)  # RN101's training has twenty thousand
        self._parts: dict[int, tuple[Any, int]] = {}  # of tuples by their identity, which they keep while they are here

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if name == "bytearray":  # of any length, from a few bytes
            raise pickle.UnpicklingError(f"it holds {module}.{name}, {REFUSAL}")
        if name in ("OrderedDict", "Counter", "defaultdict"):
            return self._dictionary
        if name in ("Tensor", "set", "frozenset"):
            return self._not_called
        return lambda *parts: _Opaque()  # PyTorch's reader decides what may be called

    def _dictionary(self, *parts: Any) -> dict[Any, Any]:
        pairs = [pair for part in parts if isinstance(part, list) for pair in part]
        self._check_keys([pair[0] for pair in pairs])
        return {pair[0]: pair[1] for pair in pairs}

    def _not_called(self, *parts: Any) -> Any:
        raise pickle.UnpicklingError("it makes a tensor or a set in a way in which PyTorch does not save them")

    def persistent_load(self, pid: Any) -> Any:
        return _Opaque()

    def load_build(self) -> None:
        self.stack.pop()

    def load_newobj(self) -> None:
        self.stack[-2:] = [_Opaque()]

    def _weigh(self) -> None:
        made = self.stack[-1]
        parts = 1 + sum(self._parts[id(part)][1] if id(part) in self._parts else 1 for part in made)
        if parts > MOST_PARTS:
            raise pickle.UnpicklingError(f"it has a tuple of more than {MOST_PARTS:,} parts")
        if made:
            self._parts[id(made)] = (made, parts)

    dispatch |= {code: _weighed(_DataUnpickler.dispatch[code]) for code in b"t\x85\x86\x87"}
    dispatch |= {
        pickle.BINPERSID[0]: pickle._Unpickler.dispatch[pickle.BINPERSID[0]],
        pickle.BUILD[0]: load_build,
        pickle.NEWOBJ[0]: load_newobj,
    }


def rehearse_torch(path: Path, zipped: bool) -> None:
    """Go through what PyTorch saved before its reader does, which looks at what is called, and not at how much that takes.

    Raises:
        Exception: Whatever damaged bytes lead to; an UnpicklingError if reading it would take years or all memory.
    """
    if zipped:
        import torch

        content = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
        check_parts(_Rehearsal(io.BytesIO(content), len(content)).load())
        return
    with path.open("rb") as file:  # as before PyTorch 1.6: number, version, system, content and its tensors' names in turn
        size = path.stat().st_size
        for _ in range(5):
            check_parts(_Rehearsal(file, size).load())


def check_parts(content: Any) -> None:
    """Raise an UnpicklingError if there are so many parts in plain containers that nobody can visit them all."""
    room, left = MOST_PARTS, [content]
    while left:
        part = left.pop()
        inside: Sequence[Any] = ()
        if isinstance(part, dict):
            inside = [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple)):
            inside = part
        room -= 1 + len(inside)
        if room < 0:
            raise pickle.UnpicklingError(f"it has more than {MOST_PARTS:,} parts")
        left += [one for one in inside if isinstance(one, (dict, list, tuple))]
