"""Hostile pickles: refs files and checkpoints that claim sizes, take years or run code."""

import os
import pickle
from typing import Any

from tests.io.hostile.case import MANY, MILLION
from tests.io.test_pickles import Runs
from tests.refer_data import one_ref, python2_pickle

VALID_REF = [["val", ["a square"], 36]]
"""Split, sentences and pixels of the valid ref."""
NESTED_TUPLE = b")" + b"2\x86" * 60
"""A tuple that contains itself twice, nested 60 deep: hashing or printing it takes years."""


def opcodes(content: bytes, protocol: int = 2) -> bytes:
    """Return a pickle of these opcodes."""
    return (bytes([0x80, protocol]) if protocol >= 2 else b"") + content + b"."


def with_number(code: bytes, number: int, width: int = 4) -> bytes:
    """Return an opcode with a number, the length of its data or an index."""
    return code + number.to_bytes(width, "little")


def text(content: bytes) -> bytes:
    """Return the opcode of a string."""
    return with_number(b"X", len(content)) + content


def refused_pickles() -> dict[str, bytes]:
    """Return refs files that must be refused."""
    valid, code = one_ref()[0], Runs(os.system, "touch mark")
    pickles = {
        "memo index of 4 GB for a string": opcodes(b"U\x01a" + with_number(b"r", 2**32 - 1)),
        "negative memo index": b"(lp-1\n.",
        "memo index that is not a number": b"(lpx\n.",
        "unset memo index": opcodes(b"h\x07"),
        "string of claimed 4 GB": opcodes(with_number(b"X", 2**32 - 1) + b"abc"),
        "byte string of claimed 4 GB": opcodes(with_number(b"B", 2**32 - 1) + b"abc", 3),
        "string of claimed 2^60 bytes": opcodes(with_number(b"\x8d", 2**60, 8) + b"abc", 4),
        "string of claimed 2^64 - 1 bytes": opcodes(with_number(b"\x8d", 2**64 - 1, 8) + b"abc", 4),
        "byte string of claimed 2^60 bytes": opcodes(with_number(b"\x8e", 2**60, 8) + b"abc", 4),
        "bytearray of claimed 2^36 bytes": opcodes(with_number(b"\x96", 2**36, 8) + b"abc", 5),
        "Python 2 string of negative length": opcodes(with_number(b"T", 2**32 - 1) + b"abc"),
        "truncated frame of claimed 2^62 bytes": (
            opcodes(with_number(b"\x95", 2**62, 8) + b"]", 4)[:-1]
        ),
        "integer of claimed 2 GB": opcodes(with_number(b"\x8b", 2**31 - 1) + b"abc"),
        "integer of negative length": opcodes(with_number(b"\x8b", 2**32 - 1) + b"abc"),
        "integer of a million digits": b"I" + b"9" * MILLION + b"\n.",
        "unknown protocol": b"\x80\xff].",
        "out-of-band buffer": opcodes(b"\x97", 5),
        "100,000 sets": opcodes(b"\x8f" * MANY, 4),
        "100,000 marks": opcodes(b"(" * MANY),
        "100,000 pops": opcodes(b"0" * MANY),
        "lists nested 100,000 deep": opcodes(b"]" * MANY + b"a" * (MANY - 1)),
        "tuples nested 100,000 deep": opcodes(b")" + b"\x85" * MANY),
        "dictionaries nested 100,000 deep": opcodes(b"}" + b"K\x00}" * MANY + b"s" * MANY),
        "nested tuple": opcodes(NESTED_TUPLE),
        "nested tuple as a key": opcodes(b"}" + NESTED_TUPLE + b"K\x01s"),
        "nested tuple among keys": opcodes(b"}(" + NESTED_TUPLE + b"K\x01u"),
        "dictionary with a nested tuple as a key": opcodes(b"(" + NESTED_TUPLE + b"K\x01d"),
        "call of a nested tuple": opcodes(NESTED_TUPLE + b"K\x01R"),
        "nested tuple for a ref": opcodes(b"](" + NESTED_TUPLE + b"e"),
        "string encoded ten thousand times": opcodes(
            b"c_codecs\nencode\nq\x00"
            + text(b"a" * MILLION)
            + b"U\x06latin1\x86q\x01"
            + b"h\x00h\x01R" * 10**4
        ),
        "empty file": b"",
        "single full stop": b".",
        "zeros": bytes(1000),
        "web page": b"<!DOCTYPE html><html>404</html>",
        "pickled pickle": pickle.dumps(pickle.dumps(valid, 2)),
        "code by GLOBAL": b"cos\nsystem\n(S'touch mark'\ntR.",
        "code by INST": b"(S'touch mark'\nios\nsystem\n.",
        "code by OBJ": b"(cos\nsystem\nS'touch mark'\no.",
        "code by STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0atouch mark\x85R.",
        "code by NEWOBJ": b"\x80\x02csubprocess\nPopen\n(U\x05touchU\x04markl\x85\x81.",
        "code by NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n(U\x05touchU\x04markl\x85}\x92.",
        "code by BUILD": b"\x80\x02]N}U\x03osos\x86b.",
        "code by an extension": b"\x80\x02\x82\x01.",
        "code by a persistent id": b"Pos.system\n.",
        "code by the allowed function": b"c_codecs\nencode\n(S'touch mark'\nS'rot13'\ntR(tR.",
    }
    for protocol in range(6):
        pickles[f"code, protocol {protocol}"] = pickle.dumps([code], protocol)
        pickles[f"code after a valid ref, protocol {protocol}"] = pickle.dumps(
            [*valid, code], protocol
        )
        pickles[f"truncated, protocol {protocol}"] = pickle.dumps(valid, protocol)[:-20]
        pickles[f"string instead of a list, protocol {protocol}"] = pickle.dumps("refs", protocol)
    return pickles


def valid_pickles() -> dict[str, tuple[bytes, Any]]:
    """Return unusual refs files that must be read, and their content."""
    valid = one_ref()[0]
    frame = with_number(b"\x95", 2**62, 8)
    appended = b"cos\nsystem\n(S'touch mark'\ntR."
    pickles: dict[str, tuple[bytes, Any]] = {
        "100,000 lists of which the last counts": (opcodes(b"]" * MANY), []),
        "100,000 copies": (opcodes(b"]" + b"2" * MANY), []),
        "memo index of 2 GB": (opcodes(b"]" + with_number(b"r", 2**31 - 1)), []),
        "memo index of 4 GB": (opcodes(b"]" + with_number(b"r", 2**32 - 1)), []),
        "memo index as text": (b"(lp9999999999\n.", []),
        "memo index as text beyond 64 bits": (b"(lp" + b"9" * 30 + b"\n.", []),
        "frame of claimed 2^62 bytes": (opcodes(frame + b"]", 4), []),
        "no refs": (pickle.dumps([]), []),
        "code after the end": (pickle.dumps(valid) + appended, VALID_REF),
    }
    for protocol in range(6):
        pickles[f"valid, protocol {protocol}"] = (pickle.dumps(valid, protocol), VALID_REF)
    sentence = "caf\xe9 \xff\x80"
    latin_1 = {**valid[0], "sentences": [{"sent": sentence, "sent_id": 5}]}
    for protocol in (0, 2):
        content = python2_pickle([latin_1], protocol)
        name = f"Latin-1 of Python 2, protocol {protocol}"
        pickles[name] = (content, [["val", [sentence], 36]])
    return pickles


def costly_checkpoints(small: bool = False) -> dict[str, bytes]:
    """Return short pickles that PyTorch's reader allows, but that take years or all memory."""
    many = 100 if small else MILLION
    nested = b")q\x09" + b"h\x09h\x09\x86q\x09" * 60
    long_text = text(b"a" * many) + b"q\x02" + text(b"latin1")
    encode = b"c_codecs\nencode\nq\x00" + long_text + b"\x86q\x01"
    bytearrays = (
        b"](cbuiltins\nbytearray\nq\x00\x8a\x05"
        + (2**28).to_bytes(5, "little")
        + b"\x85Rq\x01"
        + b"h\x00h\x01\x85R" * 8
        + b"e"
    )
    huge_key = b"\x8a\x0a" + (10 * (2**61 - 1)).to_bytes(10, "little")
    return {
        "nested tuple as a key": opcodes(b"}" + nested + b"K\x01s"),
        "nested tuple as a weight's name": opcodes(
            b"}" + text(b"state_dict") + b"}" + nested + b"K\x01ss"
        ),
        "nested tuple as a key of an ordered dictionary": opcodes(
            b"ccollections\nOrderedDict\n](](" + nested + b"K\x01ee\x85R"
        ),
        "nested tuple in a counter": opcodes(b"ccollections\nCounter\n](" + nested + b"e\x85R"),
        "nested tuple": opcodes(nested),
        "nested lists": opcodes(b"]q\x09" + b"](h\x09h\x09eq\x09" * 60),
        "number as a key that takes years to hash": opcodes(b"}(" + huge_key + b"Nu"),
        "bytes of 256 MB eight times": opcodes(bytearrays),
        "string encoded two thousand times": opcodes(b"](" + encode + b"h\x00h\x01R" * 2000 + b"e"),
        "tensor of 2^35 numbers": opcodes(
            b"ctorch\nTensor\n\x8a\x05" + (2**35).to_bytes(5, "little") + b"\x85R"
        ),
        "twenty million lists": opcodes(b"](" + b"]" * 20 * many + b"e"),
    }
