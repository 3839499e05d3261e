"""A corpus of hostile input, and a process to try it in.

Each case writes something that a stranger might have made into a folder of its own, has crislit read it, and says how that must
end: in a value, or in an error whose text it knows. ``python -m tests.io.hostile`` tries the cases whose numbers it is sent, with
little memory, and watches over the files that are opened for writing and the programs that are started.
"""

# mypy: disable-error-code="misc"
# Lambdas hold a loop's values by their defaults, whose types mypy does not infer.

import ctypes
import functools
import io
import json
import logging
import math
import os
import pickle
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crislit.data.refer_cache import IndexArrays
from crislit.data.refer_index import ReferIndex
from crislit.errors import InputError
from tests.io.test_pickles import Runs
from tests.refer_data import (
    HEIGHT,
    SQUARE,
    WIDTH,
    one_ref,
    python2_opcodes,
    python2_pickle,
    write_set,
)

Act = Callable[[Path], Any]
ANY: Any = "any value"


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        name: What it is.
        act: Writes it below a folder and reads it; returns what can be written as JSON.
        error: A pattern of the one InputError that it must end in; None if in a value.
        value: What it must return where there is no error.
        file: Whether the error must name a file of the folder.
    """

    name: str
    act: Act
    error: str | None = None
    value: Any = ANY
    file: bool = True


Cases = Iterator[Case]

# -- Refs files ---------------------------------------------------------------------------------------------------------------

REFS = r"refs\(unc\)\.p"
SOUND = [["val", ["a square"], 36]]
"""What the sound set of one ref holds: split, sentences and pixels."""


def read_set(refs: bytes | None = None, instances: bytes | None = None) -> Act:
    """Return what opens a set of these bytes, the sound ones where none are given, and reads all of it."""

    return lambda folder: everything(
        ReferIndex.open(write_set(folder / "data", refs, instances), "refcoco", "refs(unc).p")
    )


def everything(index: ReferIndex) -> list[Any]:
    """Return what an index says of each ref: its split, sentences and pixels."""

    splits = {int(ref): split for split in index.splits for ref in index.split_refs(split)}
    return [
        [
            splits[ref],
            [index.sentence(row) for row in index.sentence_rows(ref)],
            int(index.mask(ref).sum()),
        ]
        for ref in range(len(index))
    ]


def opcodes(content: bytes, protocol: int = 2) -> bytes:
    """Make a pickle of its inside."""
    return (bytes([0x80, protocol]) if protocol >= 2 else b"") + content + b"."


def counted(code: bytes, size: int, width: int = 4) -> bytes:
    """An opcode with a number that says how much is to follow, or where something is kept."""
    return code + size.to_bytes(width, "little")


def text(content: bytes) -> bytes:
    """The opcode of a text."""
    return counted(b"X", len(content)) + content


MANY, MILLION = 10**5, 10**6
YEARS = b")" + b"2\x86" * 60
"""A tuple of itself twice, sixty deep: it takes years to hash, compare or print."""


def refused_pickles() -> dict[str, bytes]:
    """Refs files that are to be refused."""

    found = {
        "a memo index of 4 GB, and a text": opcodes(b"U\x01a" + counted(b"r", 2**32 - 1)),
        "a negative memo index": b"(lp-1\n.",
        "a memo index that is no number": b"(lpx\n.",
        "a memo that was never filled": opcodes(b"h\x07"),
        "a string said to have 4 GB": opcodes(counted(b"X", 2**32 - 1) + b"abc"),
        "a byte string said to have 4 GB": opcodes(counted(b"B", 2**32 - 1) + b"abc", 3),
        "a string said to have 2^60 bytes": opcodes(counted(b"\x8d", 2**60, 8) + b"abc", 4),
        "a string said to have 2^64 - 1 bytes": opcodes(counted(b"\x8d", 2**64 - 1, 8) + b"abc", 4),
        "a byte string said to have 2^60 bytes": opcodes(counted(b"\x8e", 2**60, 8) + b"abc", 4),
        "an array said to have 2^36 bytes": opcodes(counted(b"\x96", 2**36, 8) + b"abc", 5),
        "a Python 2 string of negative length": opcodes(counted(b"T", 2**32 - 1) + b"abc"),
        "a frame said to have 2^62 bytes, cut off": opcodes(counted(b"\x95", 2**62, 8) + b"]", 4)[
            :-1
        ],
        "a number said to have 2 GB": opcodes(counted(b"\x8b", 2**31 - 1) + b"abc"),
        "a number of negative length": opcodes(counted(b"\x8b", 2**32 - 1) + b"abc"),
        "a number of a million digits": b"I" + b"9" * MILLION + b"\n.",
        "a protocol of the future": b"\x80\xff].",
        "a buffer from outside": opcodes(b"\x97", 5),
        "a flood of sets": opcodes(b"\x8f" * MANY, 4),
        "a flood of marks": opcodes(b"(" * MANY),
        "a flood of pops": opcodes(b"0" * MANY),
        "lists a hundred thousand deep": opcodes(b"]" * MANY + b"a" * (MANY - 1)),
        "tuples a hundred thousand deep": opcodes(b")" + b"\x85" * MANY),
        "dictionaries a hundred thousand deep": opcodes(b"}" + b"K\x00}" * MANY + b"s" * MANY),
        "a tuple that takes years to visit": opcodes(YEARS),
        "a key that takes years to hash": opcodes(b"}" + YEARS + b"K\x01s"),
        "keys that take years to hash": opcodes(b"}(" + YEARS + b"K\x01u"),
        "a dictionary whose keys take years to hash": opcodes(b"(" + YEARS + b"K\x01d"),
        "a call of what takes years to print": opcodes(YEARS + b"K\x01R"),
        "a ref that takes years to print": opcodes(b"](" + YEARS + b"e"),
        "a text made into bytes ten thousand times": opcodes(
            b"c_codecs\nencode\nq\x00"
            + text(b"a" * MILLION)
            + b"U\x06latin1\x86q\x01"
            + b"h\x00h\x01R" * 10**4
        ),
        "nothing": b"",
        "a full stop": b".",
        "zeros": bytes(1000),
        "a web page": b"<!DOCTYPE html><html>404</html>",
        "a pickle within a pickle": pickle.dumps(pickle.dumps(one_ref()[0], 2)),
        "code by GLOBAL": b"cos\nsystem\n(S'touch mark'\ntR.",
        "code by INST": b"(S'touch mark'\nios\nsystem\n.",
        "code by OBJ": b"(cos\nsystem\nS'touch mark'\no.",
        "code by STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0atouch mark\x85R.",
        "code by NEWOBJ": b"\x80\x02csubprocess\nPopen\n(U\x05touchU\x04markl\x85\x81.",
        "code by NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n(U\x05touchU\x04markl\x85}\x92.",
        "code by BUILD": b"\x80\x02]N}U\x03osos\x86b.",
        "code by an extension": b"\x80\x02\x82\x01.",
        "code by a persistent id": b"Pos.system\n.",
        "code by the function that is admitted": b"c_codecs\nencode\n(S'touch mark'\nS'rot13'\ntR(tR.",
    }
    for protocol in range(6):
        found[f"code, protocol {protocol}"] = pickle.dumps(
            [Runs(os.system, "touch mark")], protocol
        )
        found[f"code after a sound ref, protocol {protocol}"] = pickle.dumps(
            [*one_ref()[0], Runs(os.system, "touch mark")], protocol
        )
        found[f"cut off, protocol {protocol}"] = pickle.dumps(one_ref()[0], protocol)[:-20]
        found[f"a text for the list, protocol {protocol}"] = pickle.dumps("refs", protocol)
    return found


def sound_pickles() -> dict[str, tuple[bytes, Any]]:
    """Refs files that look odd and are sound, and what they hold."""

    latin = {**one_ref()[0][0], "sentences": [{"sent": "caf\xe9 \xff\x80", "sent_id": 5}]}
    found: dict[str, tuple[bytes, Any]] = {
        "a flood of lists, the last of which counts": (opcodes(b"]" * MANY), []),
        "a flood of copies": (opcodes(b"]" + b"2" * MANY), []),
        "a memo index of 2 GB": (opcodes(b"]" + counted(b"r", 2**31 - 1)), []),
        "a memo index of 4 GB": (opcodes(b"]" + counted(b"r", 2**32 - 1)), []),
        "a memo index as text": (b"(lp9999999999\n.", []),
        "a memo index as text, beyond 64 bits": (b"(lp" + b"9" * 30 + b"\n.", []),
        "a frame said to have 2^62 bytes": (opcodes(counted(b"\x95", 2**62, 8) + b"]", 4), []),
        "no ref": (pickle.dumps([]), []),
        "something after the end": (
            pickle.dumps(one_ref()[0]) + b"cos\nsystem\n(S'touch mark'\ntR.",
            SOUND,
        ),
    }
    for protocol in range(6):
        found[f"sound, protocol {protocol}"] = (pickle.dumps(one_ref()[0], protocol), SOUND)
    for protocol in (0, 2):
        content = python2_pickle([latin], protocol)
        found[f"latin-1 of Python 2, protocol {protocol}"] = (
            content,
            [["val", ["caf\xe9 \xff\x80"], 36]],
        )
    return found


def refs_files() -> Cases:
    """Pickles of strangers."""
    for name, content in refused_pickles().items():
        yield Case(f"refs, {name}", read_set(content), error=REFS)
    for name, (content, value) in sound_pickles().items():
        yield Case(f"refs, {name}", read_set(content), value=value)


def with_ref(**changes: Any) -> bytes:
    """Pickle the sound ref with changes."""

    return pickle.dumps([one_ref()[0][0] | changes], 2)


def with_field(name: str, value: bytes) -> bytes:
    """Pickle the sound ref with one field given as opcodes."""

    ref = {key: field for key, field in one_ref()[0][0].items() if key != name}
    return opcodes(
        b"](" + python2_opcodes(ref, 2) + b"U" + bytes([len(name)]) + name.encode() + value + b"se"
    )


def long_text_many_times() -> bytes:
    """Three thousand refs that share a sentence of a million letters: 1 MB that asks for 3 GB."""
    said = b"](}(U\x04sent" + text(b"a" * MILLION) + b"U\x07sent_idK\x01ueq\x000"
    ref = b"}(U\x06ref_id%sU\x06ann_idK\x01U\x08image_idK\x07U\x0bcategory_idK\x02U\x05splitU\x03valU\tsentencesh\x00u"
    refs = (ref.replace(b"%s", counted(b"J", number)) for number in range(3000))
    return opcodes(said + b"](" + b"".join(refs) + b"e")


def refs_contents() -> Cases:
    """Refs that are plain data and no refs."""

    for field in ("image_id", "ann_id", "ref_id", "category_id", "split", "sentences"):
        yield Case(
            f"refs, {field} takes years to visit",
            read_set(with_field(field, YEARS)),
            error=f"{REFS}: ref ",
        )
    broken: dict[str, tuple[bytes, str]] = {
        "a ref_id twice": (pickle.dumps(one_ref()[0] * 2), "ref 3: its ref_id occurs twice"),
        "an image that is not there": (with_ref(image_id=8), "ref 3 .*KeyError 8"),
        "an annotation that is not there": (with_ref(ann_id=8), "ref 3 .*KeyError 8"),
        "an id of five thousand digits": (with_ref(ref_id=10**5000), "ref with int for ref_id"),
        "an id of a million letters": (with_ref(ref_id="x" * MILLION), "ref x{40} or"),
        "an image_id of a million letters": (with_ref(image_id="x" * MILLION), "ref 3 or"),
        "a split that is nothing": (
            with_ref(split=None),
            "ref 3 .*expected a string, found NoneType",
        ),
        "half a character": (
            with_ref(sentences=[{"sent": "\ud800", "sent_id": 5}]),
            "ref 3 .*UnicodeEncodeError",
        ),
        "sentences that are a number": (with_ref(sentences=7), "ref 3 .*TypeError"),
        "no sentence": (with_ref(sentences=[]), "ref 3: it has no sentence"),
        "a ref that is a text": (pickle.dumps(["ref"]), "ref of type str"),
    }
    for name, (content, error) in broken.items():
        yield Case(f"refs, {name}", read_set(content), error=f"{REFS}: {error}")
    yield Case(
        "refs, a long text many times",
        lambda folder: read_set(long_text_many_times())(folder),
        error="ref [0-9]+: up to it",
    )
    splits = [one_ref()[0][0] | {"ref_id": i, "split": str(i)} for i in range(300)]
    yield Case(
        "refs, three hundred splits",
        lambda folder: len(read_set(pickle.dumps(splits))(folder)),
        value=300,
    )
    said = " ".join(f"word{i}" for i in range(10**4))
    for name, sentence in {**SENTENCES, "ten thousand words": said}.items():
        content = with_ref(sentences=[{"sent": sentence, "sent_id": 5}])
        yield Case(
            f"refs, a sentence of {name}", read_set(content), value=[["val", [sentence], 36]]
        )


SENTENCES = {
    "nothing": "",
    "spaces": " \t\n ",
    "control characters": "\x00\x01\x02 dog \x1b[31m\x7f\x08",
    "emoji": "the 🐕 on the left 👩‍👩‍👧‍👦 🏳️‍🌈",
    "Hebrew": "הכלב משמאל",
    "Arabic among marks of direction": "\u202e\u202dالكلب\u202c dog",
    "what CLIP ends sentences with": "<|endoftext|> dog",
    "what open_clip ends sentences with": "dog <end_of_text> cat",
    "what open_clip begins sentences with": "<start_of_text>",
    "markup": "<script>alert(1)</script> &lt;end_of_text&gt; &amp;amp;",
    "letters that combine": "e" + "\u0301" * 200,
    "a format": "%s %n {0} {ref.__class__} ${jndi:ldap://x}",
}

# -- Annotations --------------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any], dict[str, Any]], object]


def with_annotation(segmentation: Any = None, **image: Any) -> bytes:
    """Return the sound instances.json with another segmentation and changes of its image."""

    instances = one_ref()[1]
    instances["images"][0].update(image)
    if segmentation is not None:
        instances["annotations"][0]["segmentation"] = segmentation
    return json.dumps(instances).encode()


def twice(kind: str, **changes: Any) -> bytes:
    """Return the sound instances.json with its first image or annotation twice, the second time changed."""

    instances = one_ref()[1]
    instances[kind].append(instances[kind][0] | changes)
    return json.dumps(instances).encode()


def instances_files() -> Cases:
    """What instances.json may hold instead of images and annotations."""

    plain = json.dumps(one_ref()[1])
    broken = {
        "nothing": b"",
        "lists a hundred thousand deep": b"[" * 10**5,
        "objects a hundred thousand deep": b'{"a":' * 10**5,
        "a number of a million digits": b"9" * MILLION,
        "a flood of lists": b"[" + b"[]," * MANY + b"[]]",
        "not a number": b"NaN",
        "UTF-16 cut in a character": plain.encode("utf-16")[:-1],
        "latin-1": plain.replace("seven", "s\xe9ven").encode("latin-1"),
        "a pickle": pickle.dumps(one_ref()[1]),
        "images without ids": b'{"images": [{}], "annotations": []}',
        "images that are a text": b'{"images": "seven", "annotations": []}',
        "an id that is a list": b'{"images": [{"id": [7]}], "annotations": []}',
    }
    for name, content in broken.items():
        yield Case(f"instances, {name}", read_set(instances=content), error=r"instances\.json")
    for tenth in range(10):
        content = plain[: len(plain) * tenth // 10].encode()
        yield Case(
            f"instances, cut off at {tenth} tenths",
            read_set(instances=content),
            error=r"cannot read .*instances\.json",
        )
    yield Case(
        "instances, with a byte order mark",
        read_set(instances=plain.encode("utf-8-sig")),
        value=SOUND,
    )
    yield Case("instances, in UTF-16", read_set(instances=plain.encode("utf-16")), value=SOUND)
    for kind in ("images", "annotations"):
        changed = twice(kind, file_name="other.jpg", segmentation=[])
        complaint = rf"instances\.json: the id [17] occurs twice among the {kind}"
        yield Case(
            f"instances, an id twice among {kind}", read_set(instances=changed), error=complaint
        )
        yield Case(
            f"instances, the very same twice among {kind}",
            read_set(instances=twice(kind)),
            value=SOUND,
        )
    sizes = {
        "NaN": math.nan,
        "infinity": math.inf,
        "0": 0,
        "-1": -1,
        "2^15 + 1": 2**15 + 1,
        "10^5000": 10**300,
        "words": "tall",
    }
    for name, height in sizes.items():
        yield Case(
            f"instances, a height of {name}",
            read_set(instances=with_annotation(height=height)),
            error=f"{REFS}: ref 3",
        )
    names: list[Any] = [
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/seven.jpg",
        "seven.jpg\0.png",
        "x" * 300,
        "../" * 2000,
        None,
        7,
    ]
    for number, name in enumerate(names):
        content = with_annotation(file_name=name)
        yield Case(
            f"instances, file name {number}: {str(name)[:20]!r}",
            read_set(instances=content),
            error=f"{REFS}: ref 3",
        )


BOW = [2, 2, 8, 8, 8, 2, 2, 8]
STAR = [10, 0, 14, 12, 2, 4, 18, 4, 6, 12]


def outlines() -> Cases:
    """Polygons and run lengths of strangers."""

    sound: dict[str, tuple[Any, int]] = {
        "partly outside": ([[-3, -3, 4, -3, 4, 4, -3, 4]], 16),
        "all outside": ([[30, 2, 35, 2, 35, 8, 30, 8]], 0),
        "around the picture": ([[-50, -50, 70, -50, 70, 62, -50, 62]], HEIGHT * WIDTH),
        "none": ([], 0),
        "empty ones": ([[], [], []], 0),
        "of two points": ([[2, 2, 8, 8]], 0),
        "of one point thrice": ([[5, 5, 5, 5, 5, 5]], 0),
        "a line": ([[2, 2, 8, 2, 2, 2]], 0),
        "of seven numbers": ([[*SQUARE, 3]], 0),
        "a bow tie": ([BOW], 18),
        "a star": ([STAR], 44),
        "one twice": ([SQUARE, SQUARE], 36),
        "turned the other way": ([[2, 2, 2, 8, 8, 8, 8, 2]], 36),
        "numbers as text": ([[str(number) for number in SQUARE]], 36),
        "ten thousand of one point": ([[1, 1]] * 10**4, 0),
        "of a hundred thousand points": ([[*SQUARE, *[2, 5] * 10**5]], 36),
        "runs that fill the picture": (
            {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]},
            HEIGHT * WIDTH,
        ),
        "runs of nothing between": ({"size": [HEIGHT, WIDTH], "counts": [10, 0, 0, 5, 225]}, 5),
    }
    for name, (segmentation, pixels) in sound.items():
        yield Case(
            f"outline, {name}",
            read_set(instances=with_annotation(segmentation)),
            value=[["val", ["a square"], pixels]],
        )
    zigzag = [0, 0, *[-100, -100, 100, 100] * 50_000]
    whole = {"size": [HEIGHT, WIDTH]}
    broken: dict[str, Any] = {
        **{
            f"with {bad}": [[*SQUARE[:5], bad, *SQUARE[6:]]]
            for bad in (math.nan, math.inf, -math.inf, 1e308, 1e9, -(10**18), 10**300)
        },
        "of a zigzag that would take gigabytes": [zigzag],
        "many zigzags": [[0, 0, *[200, 200, -200, -200] * 2]] * 900,
        "forty thousand triangles": [[2, 2, 5, 2, 2, 5]] * 40_000,
        "runs of a half": whole | {"counts": [10.5, 5.5, 224]},
        "of words": [["a"] * 6],
        "of pairs": [[[1, 1], [5, 1], [5, 5]]],
        "of lists": [[[]] * 6],
        "of nothing": [[None] * 6],
        "a number": 7,
        "a text": "1 2 3 4 5 6",
        "runs of no size": {"counts": [240]},
        "runs without counts": whole,
        "runs that are nothing": whole | {"counts": None},
        "runs of words": whole | {"counts": ["a", "b"]},
        "runs of NaN": whole | {"counts": [math.nan, 240]},
        "runs too few": whole | {"counts": [239]},
        "runs too many": whole | {"counts": [0, 241]},
        "runs of 2^60": whole | {"counts": [0, 2**60]},
        "runs of 10^300": whole | {"counts": [0, 10**300]},
        "negative runs": whole | {"counts": [0, 300, -60]},
        "runs for a picture turned": {"size": [WIDTH, HEIGHT], "counts": [240]},
        "runs for 2^31 x 2^31": {"size": [2**31, 2**31], "counts": [2**62]},
        "compressed runs cut in a number": whole | {"counts": "o"},
        "compressed runs without end": whole | {"counts": "o" * MILLION},
        "compressed runs of 2^39": whole | {"counts": "PPPPPPP7"},
        "compressed runs of other letters": whole | {"counts": "\u20ac~\x00"},
        "compressed runs of half a character": whole | {"counts": "\ud800"},
    }
    for name, segmentation in broken.items():
        yield Case(
            f"outline, {name}",
            read_set(instances=with_annotation(segmentation)),
            error=f"{REFS}: ref 3",
        )
    yield Case(
        "outline, in a picture of 2^30 pixels, which the rasteriser has no memory for",
        read_set(
            instances=with_annotation(
                [[2, 2, 8, 2, 8, 8], [3, 3, 9, 3, 9, 9]], height=2**15, width=2**15
            )
        ),
        error=f"{REFS}: ref 3: its image is said to have 32768 x 32768 pixels",
    )


# -- For the fuzzer -----------------------------------------------------------------------------------------------------------


def reader_seeds() -> Iterator[bytes]:
    """Return what ``scripts/fuzz_reader.py`` begins with: a letter for the kind, and a short input of it."""

    inputs = [(b"p", content) for content in refused_pickles().values()]
    inputs += [(b"p", content) for content, _ in sound_pickles().values()]
    inputs += [
        (b"j", json.dumps(one_ref()[1]).encode()),
        (b"j", twice("images", file_name="x")),
        (b"j", twice("annotations")),
    ]
    rle = {"size": [HEIGHT, WIDTH], "counts": [100, 40, 100]}
    inputs += [
        (b"s", json.dumps(outline).encode())
        for outline in ([SQUARE], [BOW, STAR], [[1, 1]], rle, {**rle, "counts": "T5V1"})
    ]
    inputs += [(b"r", content) for content in (b"T5V1", b"o7", b"`71N1", b"PPPPPPP7")]
    inputs += [(b"c", content) for content in costly_checkpoints(small=True).values()]
    inputs += [(b"c", 5 * opcodes(b"}" + text(b"state_dict") + b"ccollections\nOrderedDict\n)Rs"))]
    return (kind + content for kind, content in inputs if len(content) < 4000)


def draw_all(arrays: IndexArrays) -> None:
    """Use every ref of an index; the masks of pictures that are merely large are left out."""

    index = ReferIndex(arrays, Path("images"), None)
    for ref in range(len(index)):
        assert all(isinstance(index.sentence(row), str) for row in index.sentence_rows(ref))
        assert index.image_path(ref).parent == Path("images")
        if math.prod(index.image_size(ref)) < 2**22:
            mask = index.mask(ref)
            assert mask.shape == index.image_size(ref)
            assert mask.dtype == np.uint8
            assert mask.max() <= 1


# -- Pictures -----------------------------------------------------------------------------------------------------------------
# What follows imports PyTorch only where a case runs: the fuzzing has no use for it.


def photo() -> Any:
    """Return a picture of 300 x 200 soft colours."""
    import PIL.Image

    coarse = PIL.Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    )
    return coarse.resize((300, 200), PIL.Image.Resampling.BICUBIC)


def saved(picture: Any, kind: str = "JPEG", **options: Any) -> bytes:
    """Return a picture's file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def patched(content: bytes, place: int, value: bytes) -> bytes:
    """Return a file with other bytes at a place."""
    return content[:place] + value + content[place + len(value) :]


def bombs() -> dict[str, bytes]:
    """Files of a few bytes that say that they have a billion pixels."""
    import PIL.Image

    small = PIL.Image.new("RGB", (8, 8))
    png = patched(saved(small, "PNG"), 16, struct.pack(">II", 40_000, 40_000))
    jpeg = saved(small)
    frame = jpeg.index(b"\xff\xc0") + 5
    return {
        "PNG": patched(png, 29, struct.pack(">I", zlib.crc32(png[12:29]))),
        "GIF": patched(saved(small, "GIF"), 6, struct.pack("<HH", 65535, 65535)),
        "WebP": patched(saved(small, "WEBP"), 26, struct.pack("<HH", 16383, 16383)),
        "BMP": patched(saved(small, "BMP"), 18, struct.pack("<ii", 2**30, 2**30)),
        "TGA": patched(saved(small, "TGA"), 12, struct.pack("<HH", 65535, 65535)),
        "PPM": b"P6 99999 99999 255\n" + bytes(100),
        "JPEG": patched(jpeg, frame, struct.pack(">HH", 65535, 65535)),
        "TIFF": saved(small, "TIFF").replace(
            struct.pack("<HHII", 256, 4, 1, 8), struct.pack("<HHII", 256, 4, 1, 2**31)
        ),
    }


def inflating_text() -> bytes:
    """Return a PNG with a comment of 20 MB, in 20 kB."""
    content = saved(photo(), "PNG")
    text = b"Comment\0\0" + zlib.compress(bytes(2 * 10**7))
    chunk = (
        struct.pack(">I", len(text))
        + b"zTXt"
        + text
        + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    )
    return content[:33] + chunk + content[33:]


def many_scans() -> bytes:
    """Return a JPEG whose last scan, of 60 bytes, is there two thousand times."""
    content = saved(photo().resize((3000, 2000)).convert("L"), progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * 2000 + content[-2:]


def wordy_gif(text: bytes) -> bytes:
    """Return a GIF with a text before its picture."""
    content = saved(photo(), "GIF")
    place = 13 + 3 * 256
    return content[:place] + text + content[place:]


def xmp() -> bytes:
    """Return a GIF's XMP, a text that stands in it as it is, followed by what leads readers of parts to its end."""
    text = b"<x:xmpmeta>" + b"<a>Photoshop</a>" * 12_500 + b"</x:xmpmeta>"
    return b"!\xff\x0bXMP DataXMP" + text + b"\x01" + bytes(range(255, -1, -1)) + b"\0"


def greedy_exif(size: int, entries: int) -> bytes:
    """Return EXIF, or a TIFF, of which every entry says that it is all of it."""
    head = struct.pack("<2sHIH", b"II", 42, 8, entries)
    listed = b"".join(struct.pack("<HHII", 1000 + i, 7, size - 16, 8) for i in range(entries))
    return (head + listed + bytes(4)).ljust(size, b"\0")


def comment(size: int) -> bytes:
    """Return a GIF's comment."""
    return b"!\xfe" + (b"\xff" + b"a" * 255) * (size // 255) + b"\0"


def of_data(folder: Path, name: str, content: bytes, size: tuple[int, int]) -> list[int]:
    """Read a data set's picture."""

    from crislit.io.images import decode_image

    (folder / name).write_bytes(content)
    return [*decode_image(folder / name, size).shape]


def clear(width: int, opacity: int = 254, height: int | None = None) -> bytes:
    """Return a PNG of transparent pixels, as high as wide if nothing else is said; a few hundred kB."""
    import PIL.Image

    return saved(
        PIL.Image.new("RGBA", (width, height or width), (9, 9, 9, opacity)), "PNG", compress_level=1
    )


def white() -> bytes:
    """Return a PNG of 13300 x 13300 pixels, a few kB."""
    import PIL.Image

    return saved(PIL.Image.new("1", (13300, 13300), 1), "PNG")


def size_of(folder: Path, content: bytes) -> list[int]:
    """Return the size of a picture of one's own data."""

    from crislit.io.images import read_upright_size

    (folder / "seven.png").write_bytes(content)
    return [*read_upright_size(folder / "seven.png")]


def of_user(folder: Path, name: str, content: bytes) -> list[int]:
    """Read a user's picture."""

    from crislit.io.images import open_image

    (folder / name).write_bytes(content)
    return [*open_image(folder / name).shape]


def both(
    name: str,
    content: Callable[[], bytes],
    size: tuple[int, int] = (200, 300),
    error: str | None = None,
) -> Cases:
    """A file as a picture of a data set, which knows its size, and as a user's."""
    shape = [*size, 3]
    yield Case(
        f"picture of data, {name}",
        lambda folder: of_data(folder, "seven.jpg", content(), size),
        error,
        shape,
    )
    yield Case(
        f"picture of a user, {name}",
        lambda folder: of_user(folder, "seven.jpg", content()),
        error,
        shape,
    )


UNREADABLE = r"seven\.jpg is (damaged|cut off|too large|no picture|no file)"
"""What is told of a picture that cannot be read."""


def pictures() -> Cases:
    """Files that pose as pictures, or as other ones."""
    jpeg = functools.partial(saved, photo())
    for tenth in range(10):
        yield from both(
            f"cut off at {tenth} tenths",
            lambda tenth=tenth: jpeg()[: len(jpeg()) * tenth // 10],
            error=UNREADABLE,
        )
        progressive = functools.partial(saved, photo(), progressive=True)
        if tenth in (5, 9):
            cut = f"progressive, cut off at {tenth} tenths"
            yield from both(
                cut,
                lambda make=progressive, tenth=tenth: make()[: len(make()) * tenth // 10],
                error=UNREADABLE,
            )
    yield from both("a PNG called JPEG", lambda: saved(photo(), "PNG"))
    yield from both("a WebP called JPEG", lambda: saved(photo(), "WEBP"))
    yield from both("in printers' colours", lambda: saved(photo().convert("CMYK")))
    yield from both("grey", lambda: saved(photo().convert("L")))
    yield from both("grey of 16 bits", lambda: saved(photo().convert("L").convert("I;16"), "PNG"))
    yield from both(
        "a JPEG with bytes after its end", lambda: jpeg() + b"<html>" * 100 + b"\xff\xda"
    )
    thumbnail = b"Exif\0\0MM" + saved(photo().resize((16, 16)))
    yield from both("a JPEG with another in its head", lambda: jpeg(exif=thumbnail))
    yield from both(
        "a JPEG with another in its head, cut off",
        lambda: jpeg(exif=thumbnail)[: len(jpeg())],
        error=UNREADABLE,
    )
    odd = functools.partial(saved, photo(), exif=b"Exif\0\0MM" + b"\xff" * 50)
    yield Case(
        "picture of data, nonsense for EXIF",
        lambda folder: of_data(folder, "seven.jpg", odd(), (200, 300)),
        value=[200, 300, 3],
    )
    yield from both("30,000 pixels wide", lambda: saved(photo().resize((30_000, 20))), (20, 30_000))
    yield from both("30,000 pixels high", lambda: saved(photo().resize((20, 30_000))), (30_000, 20))
    one = functools.partial(saved, photo().resize((1, 1)), "PNG")
    yield Case(
        "picture of data, 1 x 1",
        lambda folder: of_data(folder, "seven.jpg", one(), (1, 1)),
        value=[1, 1, 3],
    )
    yield Case(
        "picture of a user, 1 x 1",
        lambda folder: of_user(folder, "seven.jpg", one()),
        error="at least 8",
    )
    for kind in ("PNG", "GIF", "WebP", "BMP", "TGA", "PPM", "JPEG", "TIFF"):
        yield from both(f"a bomb, {kind}", lambda kind=kind: bombs()[kind], error=UNREADABLE)
    large = functools.partial(saved, photo().resize((4000, 4000)).convert("1"), "PNG")
    yield Case(
        "picture of data, larger than annotated",
        lambda f: of_data(f, "seven.jpg", large(), (200, 300)),
        error="4000",
    )
    yield from both("a PNG whose comment inflates", inflating_text, error=UNREADABLE)
    yield from both("a JPEG of two thousand scans", many_scans, (2000, 3000), error=UNREADABLE)
    yield from both("a JPEG of many scans", lambda: saved(photo(), progressive=True))
    yield from both("a GIF with two comments", lambda: wordy_gif(comment(1000) * 2))
    yield from both(
        "a GIF of a million comments", lambda: wordy_gif(b"!\xfe\1a\0" * 10**6), error=UNREADABLE
    )
    yield from both(
        "a GIF whose comment has 50 MB", lambda: wordy_gif(comment(5 * 10**7)), error=UNREADABLE
    )
    yield from both(
        "a GIF whose comments come late",
        lambda: wordy_gif(b"\0" + comment(5 * 10**7)),
        error=UNREADABLE,
    )
    hidden = b"!\1\0\1,\0" + comment(
        5 * 10**7
    )  # PIL does not end an extension whose first part is empty
    yield from both("a GIF whose comment is hidden", lambda: wordy_gif(hidden), error=UNREADABLE)
    yield from both("a GIF with 200 kB of XMP", lambda: wordy_gif(xmp()))
    yield from both(
        "twelve progressive JPEGs in one file", lambda: 12 * saved(photo(), progressive=True)
    )
    yield from both(
        "a PNG whose EXIF takes gigabytes",
        lambda: saved(photo(), "PNG", exif=greedy_exif(10**6, 2000)),
    )
    greedy = lambda: jpeg(exif=b"Exif\0\0" + greedy_exif(60_000, 4900))  # noqa: E731
    yield from both("a JPEG whose EXIF takes megabytes", greedy)
    yield from both(
        "a TIFF whose entries take gigabytes", lambda: greedy_exif(10**6, 2000), error=UNREADABLE
    )
    for name, made in {
        "JPEG": greedy,
        "PNG": lambda: saved(photo(), "PNG", exif=greedy_exif(10**6, 2000)),
    }.items():
        yield Case(
            f"picture of own data, a {name} whose EXIF takes gigabytes",
            lambda folder, made=made: size_of(folder, made()),
            error="seven.png is no picture that can be read",
        )
    segments = b"\xff\xe1\0\x0cExif\0\0aaaa" * 10**6
    yield from both(
        "a JPEG of a million notes", lambda: jpeg()[:2] + segments + jpeg()[2:], error=UNREADABLE
    )
    yield Case(
        "picture of a user, 36 million transparent pixels",
        lambda folder: of_user(folder, "seven.png", clear(6000)),
        value=[6000, 6000, 3],
    )
    yield Case(
        "picture of a user, 30 million transparent pixels in a strip",
        lambda folder: of_user(folder, "seven.png", clear(30_000, height=1000)),
        value=[1000, 30_000, 3],
    )
    yield from both(
        "177 million white pixels",
        white,
        (13300, 13300),
        error="seven.jpg is (damaged|too large: .* 89,478,485)",
    )
    yield Case(
        "picture of own data, 36 million opaque pixels",
        lambda folder: size_of(folder, clear(6000, 255)),
        value=[6000, 6000],
    )
    other = {
        "nothing": b"",
        "a web page": b"<!DOCTYPE html><html>404</html>",
        "a program": b"\x7fELF" + bytes(500),
        "PostScript that runs a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 200\n(%pipe%touch mark) (w) file\n",
        "a drawing that fetches a file": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "a pickle that runs code": b"cos\nsystem\n(S'touch mark'\ntR.",
        "zeros": bytes(10_000),
    }
    for name, content in other.items():
        yield from both(name, lambda content=content: content, error=UNREADABLE)
    for name, make in {"a folder": Path.mkdir, "a pipe": os.mkfifo}.items():
        yield Case(
            f"picture of data, {name}",
            lambda folder, make=make: special(folder, make, True),
            error=UNREADABLE,
        )
        yield Case(
            f"picture of a user, {name}",
            lambda folder, make=make: special(folder, make, False),
            error=UNREADABLE,
        )


def special(folder: Path, make: Callable[[Path], object], data: bool) -> Any:
    """Read what is no file."""

    from crislit.io.images import decode_image, open_image

    make(folder / "seven.jpg")
    return decode_image(folder / "seven.jpg", (8, 8)) if data else open_image(folder / "seven.jpg")


# -- Sentences ----------------------------------------------------------------------------------------------------------------


@functools.cache
def segmenter() -> Any:
    """Return a small network that marks something."""

    from crislit.inference.segmenter import Segmenter
    from crislit.models.build import build_cris
    from crislit.models.config import CRISConfig
    from tests.inference.test_segmenter import CLIP

    return Segmenter(
        build_cris(CRISConfig(clip=CLIP, neck=(16, 64, 32), decoder_layers=1, decoder_heads=4, decoder_ffn=64)),
        image_size=64,
    )


def segment(sentence: Any) -> list[Any]:
    """Return a mask's shape, whether it is of numbers, and how many short warnings there were."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        (found,) = segmenter()(photo(), sentence)
    brackets = [int((segmenter_tokens(sentence) == token).sum()) for token in (49406, 49407)]
    return [
        [*found.mask.shape],
        bool(np.isfinite(found.probability).all()),
        brackets,
        all(len(str(w.message)) < 1000 for w in told),
    ]


def segmenter_tokens(sentence: str) -> Any:
    """Return a sentence's tokens."""

    from crislit.transforms.tokenizer import tokenize

    return tokenize([sentence], 17)


def sentences() -> Cases:
    """What users and data may say."""
    letters = np.random.default_rng(0).choice([*"abcdefghijklmnopqrstuvwxyz"], MANY)
    said = SENTENCES | {
        "ten thousand words": " ".join(f"word{i}" for i in range(10**4)),
        "one word of a hundred thousand letters": "".join(letters),
        "a hundred thousand emoji": "🐕" * MANY,
        "a hundred thousand signs": "!" * MANY,
        "a hundred thousand lines": "\n" * MANY + "dog",
        "entities of entities": "&amp;" * 10**4,
        "half a character": "\ud800 dog",
        "a million spaces": " " * MILLION,
    }
    for name, sentence in said.items():
        empty = not sentence.strip()
        yield Case(
            f"sentence, {name}",
            lambda folder, sentence=sentence: segment(sentence),
            error="a sentence is empty" if empty else None,
            value=[[200, 300], True, [1, 1], True],
            file=False,
        )
    zeros = bytes(MILLION)
    for name, odd in {
        "None": None,
        "a number": 7,
        "a million zeros": zeros,
        "bytes": b"dog",
        "a list in a list": [["dog"]],
    }.items():
        yield Case(
            f"sentence, {name}",
            lambda folder, odd=odd: segmenter()(photo(), [odd]),
            error="must be a string",
            file=False,
        )


# -- One's own data -----------------------------------------------------------------------------------------------------------


def own(folder: Path, line: Any) -> list[Any]:
    """Read a line of one's own data: a sound one with changes, or text, or bytes."""

    from crislit.data.datamodule import ReferDataModule

    (folder / "a.png").write_bytes(saved(photo(), "PNG"))
    sound = {"image": "a.png", "sentence": "dog", "polygons": [[10, 5, 30, 5, 30, 25, 10, 25]]}
    text = (
        json.dumps({name: value for name, value in (sound | line).items() if value is not None})
        if isinstance(line, dict)
        else line
    )
    (folder / "mine.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return everything(ReferDataModule(root=folder, file=str(folder / "mine.jsonl")).index)


def own_coco(folder: Path, ann_id: str, **annotation: Any) -> list[Any]:
    """Read a COCO file of one annotation with its table."""

    from crislit.data.datamodule import ReferDataModule

    (folder / "a.png").write_bytes(saved(photo(), "PNG"))
    image = {"id": annotation.pop("picture", 7), "file_name": annotation.pop("file_name", "a.png")}
    sound = {"id": 5, "image_id": 7, "segmentation": [[10, 5, 30, 5, 30, 25, 10, 25]]}
    (folder / "instances.json").write_text(
        json.dumps({"images": [image], "annotations": [sound | annotation]})
    )
    (folder / "said.csv").write_text(f"ann_id,sentence\n{ann_id},dog\n")
    module = ReferDataModule(
        root=folder, file=str(folder / "instances.json"), sentences=str(folder / "said.csv")
    )
    return everything(module.index)


def own_data() -> Cases:
    """Lines and tables of strangers; paths in them may lead anywhere, and only pictures are read."""
    names = [
        "../../../../../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "/dev/full",
        "/proc/self/environ",
        ".",
        "..",
        "/",
        "a\0.png",
    ]
    for name in [
        *names,
        "x" * 5000,
        "\ud800.png",
        "~/.bashrc",
        "http://example.com/a.png",
        "a.png/../../b.png",
    ]:
        short = ascii(name[:30])
        yield Case(
            f"own data, picture {short}",
            lambda folder, name=name: own(folder, {"image": name}),
            error=r"mine\.jsonl .*(no picture that can be read|there is no .*|x{90})",
        )
        mask = {"polygons": None, "mask": name}
        yield Case(
            f"own data, mask {short}",
            lambda folder, mask=mask: own(folder, mask),
            error=r"mine\.jsonl .*(no mask that can be read|there is no .*|x{90})",
        )
    whole = {"size": [200, 300], "counts": [60_000]}
    lines: dict[str, Any] = {
        "lists a hundred thousand deep": "[" * MANY,
        "a number of a million digits": "9" * MILLION,
        "a zero byte": "\0",
        "half a character in a sentence": {"sentence": "\ud800"},
        "half a character in a split": {"split": "\ud800"},
        "a polygon of NaN": {"polygons": [[math.nan] * 6]},
        "a polygon of 10^300": {"polygons": [[10**300] * 6]},
        "a zigzag that would take gigabytes": {
            "polygons": [[0, 0, *[-2000, -2000, 2000, 2000] * 5000]]
        },
        "polygons that are true": {"polygons": [[True] * 6]},
        "runs for another picture": {"polygons": None, "rle": whole | {"size": [300, 200]}},
        "runs of 2^62 pixels": {
            "polygons": None,
            "rle": {"size": [2**31, 2**31], "counts": [2**62]},
        },
        "runs of nothing": {"polygons": None, "rle": whole},
        "a key of Python's": {"__class__": "os.system"},
        "a sentence that is an object": {"sentence": {"a": 1}},
    }
    for name, line in lines.items():
        yield Case(
            f"own data, {name}", lambda folder, line=line: own(folder, line), error="mine.jsonl"
        )
    sound = [["train", ["dog"], 400]]
    mark = (
        b"\xef\xbb\xbf"
        + json.dumps(
            {"image": "a.png", "sentence": "dog", "polygons": [[10, 5, 30, 5, 30, 25, 10, 25]]}
        ).encode()
    )
    yield Case("own data, a byte order mark", lambda folder: own(folder, mark), value=sound)
    yield Case(
        "own data, a picture by a way around",
        lambda folder: own(folder, {"image": "./../case/a.png"}),
        value=ANY,
    )
    yield Case("own table, sound", lambda folder: own_coco(folder, "5"), value=sound)
    yield Case(
        "own table, in Arabic digits", lambda folder: own_coco(folder, "\u0665"), value=sound
    )
    yield Case(
        "own table, an id of five thousand digits",
        lambda folder: own_coco(folder, "9" * 5000),
        error="said.csv",
    )
    yield Case(
        "own table, infinity for an id",
        lambda folder: own_coco(folder, "5", id=math.inf),
        error="instances.json",
    )
    yield Case(
        "own table, an image that is not there",
        lambda folder: own_coco(folder, "5", image_id=8),
        error="said.csv",
    )
    yield Case(
        "own table, a picture elsewhere",
        lambda folder: own_coco(folder, "5", file_name="../../etc/passwd"),
        error="said.csv",
    )
    yield Case(
        "own table, a field without end",
        lambda folder: own_coco(folder, "5" * MILLION),
        error="said.csv",
    )


# -- Networks -----------------------------------------------------------------------------------------------------------------


@functools.cache
def network() -> Any:
    """Return a tiny network."""

    from crislit.models.build import build_cris
    from crislit.models.config import CRISConfig
    from tests.checkpoints.test_released import SIZES, filled

    text = SIZES["clip"]["text_cfg"] | {"vocab_size": 49408}
    return filled(build_cris(CRISConfig(**SIZES | {"clip": SIZES["clip"] | {"text_cfg": text}})))


def loads(source: Path) -> list[Any]:
    """Load a network, use it, and return its sizes."""
    import torch

    import crislit

    found = crislit.load(source, device="cpu")
    assert isinstance(found.model, torch.nn.Module)
    (marked,) = found(photo(), "the dog")
    assert np.isfinite(marked.probability).all()
    return [found.image_size, len(found.model.state_dict())]


def shared(
    folder: Path, weights: Callable[[dict[str, Any]], object] | None = None, **config: Any
) -> list[Any]:
    """Load a shared folder after changes of its weights and its configuration."""

    from crislit.checkpoints.checkpoint import Checkpoint, write_folder

    state = {name: value.clone() for name, value in network().state_dict().items()}
    if weights:
        weights(state)
    write_folder(Checkpoint(network().config, state, 64, 0.4, "random"), folder / "net")
    path = folder / "net/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return loads(folder / "net")


def tensors(
    folder: Path, header: Any, data: bytes = bytes(16), length: int | None = None
) -> list[Any]:
    """Load a shared folder whose weights have another header."""

    from crislit.checkpoints.checkpoint import Checkpoint, write_folder

    write_folder(
        Checkpoint(network().config, dict(network().state_dict()), 64, 0.4, "random"),
        folder / "net",
    )
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(head) if length is None else length
    (folder / "net/model.safetensors").write_bytes(struct.pack("<Q", size) + head + data)
    return loads(folder / "net")


def run_checkpoint(
    folder: Path, change: Callable[[dict[str, Any]], object], zipped: bool = True
) -> list[Any]:
    """Load a run's checkpoint after a change."""

    import torch

    from tests.commands.test_convert import lightning

    content = lightning(network())
    change(content)
    torch.save(content, folder / "best.ckpt", _use_new_zipfile_serialization=zipped)
    return loads(folder / "best.ckpt")


ODD: dict[str, Callable[[Any, Any], Any]] = {
    "of 8 bits": lambda torch, x: x.to(torch.float8_e4m3fn),
    "of complex numbers": lambda torch, x: x.to(torch.complex64),
    "of truths": lambda torch, x: x > 0,
    "of whole numbers": lambda torch, x: x.long(),
    "quantised": lambda torch, x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "sparse": lambda torch, x: x.to_sparse(),
    "nested": lambda torch, x: torch.nested.nested_tensor([x]),
    "without content": lambda torch, x: x.to("meta"),
}
"""Ways in which a tensor is not what a network computes with."""


def odd(state: dict[str, Any], change: Callable[[Any, Any], Any]) -> None:
    """Change a weight's kind."""
    import torch

    state[first(state)] = change(torch, state[first(state)])


def fifty(state: dict[str, Any]) -> None:
    """Leave fifty tokens."""
    words = next(name for name in state if name.endswith("token_embedding.weight"))
    state[words] = state[words][:50].clone()


def beside(folder: Path, make: Callable[[Path], object]) -> list[Any]:
    """Load a run's checkpoint beside results that are none."""

    import torch

    from tests.commands.test_convert import lightning

    (folder / "run/checkpoints").mkdir(parents=True)
    make(folder / "run/results.json")
    torch.save(lightning(network()), folder / "run/checkpoints/best.ckpt")
    return loads(folder / "run/checkpoints/best.ckpt")


def first(state: dict[str, Any]) -> str:
    """Return the name of a weight."""
    return next(name for name, value in state.items() if value.ndim == 4)


def first_tensor(content: dict[str, Any]) -> Any:
    """Return one of a checkpoint's weights."""
    return next(iter(content["state_dict"].values())).clone()


def put(state: dict[str, Any], value: float) -> None:
    """Put a number into a weight."""
    state[first(state)][0, 0, 0, 0] = value


def posing(state: dict[str, Any]) -> None:
    """Let one number pose as all of every weight."""
    import torch

    state.update(
        {
            name: torch.zeros((), dtype=value.dtype).expand(value.shape)
            for name, value in state.items()
        }
    )


def repacked(
    folder: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], object]
) -> list[Any]:
    """Load a run's checkpoint whose archive's parts were packed by another hand."""

    import torch

    from tests.commands.test_convert import lightning

    torch.save(lightning(network()), folder / "sound.ckpt")
    with (
        zipfile.ZipFile(folder / "sound.ckpt") as source,
        zipfile.ZipFile(folder / "best.ckpt", "w") as target,
    ):
        for part in source.infolist():
            change(target, part, source.read(part))
    return loads(folder / "best.ckpt")


def pickled(folder: Path, content: bytes) -> list[Any]:
    """Load a checkpoint of this pickle."""

    def other(target: zipfile.ZipFile, part: zipfile.ZipInfo, before: bytes) -> None:
        target.writestr(part, content if part.filename.endswith("data.pkl") else before)

    return repacked(folder, other)


def costly_checkpoints(small: bool = False) -> dict[str, bytes]:
    """Pickles, of opcodes that PyTorch's reader knows, of which a few bytes take years or all memory."""
    many = 100 if small else MILLION
    years = b")q\x09" + b"h\x09h\x09\x86q\x09" * 60
    encode = (
        b"c_codecs\nencode\nq\x00" + text(b"a" * many) + b"q\x02" + text(b"latin1") + b"\x86q\x01"
    )
    gigabytes = (2**28).to_bytes(5, "little")
    return {
        "a key that takes years to hash": opcodes(b"}" + years + b"K\x01s"),
        "weights that take years to hash": opcodes(
            b"}" + text(b"state_dict") + b"}" + years + b"K\x01ss"
        ),
        "a dictionary of pairs that takes years to hash": opcodes(
            b"ccollections\nOrderedDict\n](](" + years + b"K\x01ee\x85R"
        ),
        "a count that takes years": opcodes(b"ccollections\nCounter\n](" + years + b"e\x85R"),
        "a tuple that takes years to print": opcodes(years),
        "lists that take years to print": opcodes(b"]q\x09" + b"](h\x09h\x09eq\x09" * 60),
        "a number that takes years to hash": opcodes(
            b"}(" + b"\x8a\x0a" + (10 * (2**61 - 1)).to_bytes(10, "little") + b"Nu"
        ),
        "bytes of 256 MB eight times": opcodes(
            b"](cbuiltins\nbytearray\nq\x00\x8a\x05"
            + gigabytes
            + b"\x85Rq\x01"
            + b"h\x00h\x01\x85R" * 8
            + b"e"
        ),
        "a text made into bytes two thousand times": opcodes(
            b"](" + encode + b"h\x00h\x01R" * 2000 + b"e"
        ),
        "a tensor of 2^35 numbers": opcodes(
            b"ctorch\nTensor\n\x8a\x05" + (2**35).to_bytes(5, "little") + b"\x85R"
        ),
        "twenty million lists": opcodes(b"](" + b"]" * 20 * many + b"e"),
    }


def inflating(target: zipfile.ZipFile, part: zipfile.ZipInfo, content: bytes) -> None:
    """Write a part, that of the pickle as 64 MB of zeros in 64 kB."""
    main = part.filename.endswith("data.pkl")
    target.writestr(part, bytes(2**26) if main else content, zipfile.ZIP_DEFLATED if main else None)


NO_NETWORK = "does not describe a network|are not the network's that|lacks a part of crislit's|must be (at|a )|larger than what it holds"
"""What is told of settings and weights that make none."""


def networks() -> Cases:
    """Checkpoints and shared folders of strangers."""

    nan, inf = math.nan, math.inf
    yield Case("network, sound", shared, value=ANY)
    for name, number in {"NaN": nan, "infinity": inf}.items():
        yield Case(
            f"network, a weight of {name}",
            lambda f, n=number: shared(f, lambda s: put(s, n)),
            error="NaN or infinite",
        )
        spoilt = lambda c, n=number: put(c["state_dict"], n)  # noqa: E731
        yield Case(
            f"checkpoint, a weight of {name}",
            lambda f, c=spoilt: run_checkpoint(f, c),
            error="NaN or infinite",
        )
    shape: dict[str, Callable[[dict[str, Any]], object]] = {
        "a weight of another shape": lambda s: s.update({first(s): s[first(s)][:1].clone()}),
        "a weight too many": lambda s: s.update(extra=s[first(s)].clone()),
        "a weight too few": lambda s: s.pop(first(s)),
        "no weight": lambda s: s.clear(),
    }
    for name, change in shape.items():
        yield Case(
            f"network, {name}",
            lambda f, c=change: shared(f, c),
            error="(not the network's|layers, 0 tensors)",
        )
        prefixed = lambda c, change=change: change(c["state_dict"])  # noqa: E731
        if name != "a weight too many":
            yield Case(
                f"checkpoint, {name}", lambda f, c=prefixed: run_checkpoint(f, c), error=NO_NETWORK
            )
    settings: dict[str, dict[str, Any]] = {
        "a billion layers of the decoder": {"decoder_layers": 10**9},
        "a negative number of layers": {"decoder_layers": -1},
        "a head of 2^40": {"kernel_size": 2**40},
        "a width of 2^62": {"neck": [2**62, 32, 24]},
        "a width of 10^300": {"neck": [10**300, 32, 24]},
        "NaN for a rate": {"decoder_dropout": nan},
        "another's model": {"clip": "hf-hub:somebody/model"},
        "a path for a model": {"clip": "../../etc/passwd"},
        "a key of Python's": {"__class__": "os.system"},
        "lists a hundred deep": {"clip": json.loads("[" * 100 + "]" * 100)},
    }
    for name, given in settings.items():
        yield Case(
            f"network, {name}",
            lambda f, c=given: shared(f, network=network().config | c),
            error=NO_NETWORK,
        )
        changed = lambda c, s=given: c["crislit"]["settings"].update(s)  # noqa: E731
        yield Case(
            f"checkpoint, {name}", lambda f, c=changed: run_checkpoint(f, c), error=NO_NETWORK
        )
    towers = {
        "a billion blocks of a tower": ("vision_cfg", "layers", [10**9, 1, 1, 1]),
        "a billion layers of text": ("text_cfg", "layers", 10**9),
        "a vocabulary of 2^50": ("text_cfg", "vocab_size", 2**50),
        "a context of 2^40": ("text_cfg", "context_length", 2**40),
        "text from elsewhere": ("text_cfg", "hf_model_name", "somebody/model"),
        "pictures of 2^40": ("vision_cfg", "image_size", 2**40),
    }
    for name, (tower, key, value) in towers.items():
        yield Case(
            f"network, {name}",
            lambda f, t=tower, k=key, v=value: shared(f, network=with_tower(t, k, v)),
            error=NO_NETWORK,
        )
    config: dict[str, dict[str, Any]] = {
        "pictures of 32 billion pixels": {"image_size": 32 * 10**9},
        "pictures of 10^300 pixels": {"image_size": 10**300},
        "pictures of 65 pixels": {"image_size": 65},
        "infinity for a size": {"image_size": inf},
        "NaN for a threshold": {"threshold": nan},
        "a list for the training": {"training": [1]},
        "a text for the results": {"results": "x"},
        "nothing for the network": {"network": None},
    }
    for name, given in config.items():
        yield Case(f"network, {name}", lambda f, c=given: shared(f, **c), error=NO_NETWORK)
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    headers: dict[str, tuple[Any, bytes, int | None]] = {
        "a header said to have 2^63 bytes": ({}, b"", 2**63),
        "a header said to have 2^40 bytes": ({}, b"", 2**40),
        "a header that is longer than the file": ({"a": one}, b"", 10**6),
        "a header of no JSON": (b"\xff" * 100, b"", None),
        "a header of lists a hundred thousand deep": (b'{"a":' + b"[" * MANY, b"", None),
        "a tensor beyond the file": (
            {"a": one | {"shape": [2**40], "data_offsets": [0, 2**42]}},
            bytes(16),
            None,
        ),
        "a tensor larger than its bytes": ({"a": one | {"shape": [2**40]}}, bytes(16), None),
        "a shape that overflows": ({"a": one | {"shape": [2**62, 2**62]}}, bytes(16), None),
        "a negative shape": ({"a": one | {"shape": [-4]}}, bytes(16), None),
        "tensors that overlap": ({"a": one, "b": one}, bytes(16), None),
        "an unknown kind of number": ({"a": one | {"dtype": "F7"}}, bytes(16), None),
        "no tensor": ({}, b"", None),
    }
    for name, (header, data, length) in headers.items():
        yield Case(
            f"safetensors, {name}",
            lambda f, h=header, d=data, n=length: tensors(f, h, d, n),
            error="model.safetensors: it is damaged|/net does not describe a network of crislit: 10 layers",
        )
    code = lambda c: c.update(epoch=Runs(os.system, "touch mark"))  # noqa: E731
    more = lambda c: c.update(extra=[1, "x", None], loops={})  # noqa: E731
    for zipped in (True, False):
        kind = "" if zipped else ", in the old format"
        yield Case(
            f"checkpoint, code inside{kind}",
            lambda f, z=zipped: run_checkpoint(f, code, z),
            error=r"best\.ckpt: .*it holds posix\.system",
        )
        yield Case(
            f"checkpoint, entries too many{kind}",
            lambda f, z=zipped: run_checkpoint(f, more, z),
            value=ANY,
        )
    entries: dict[str, Callable[[dict[str, Any]], object]] = {
        "one number that poses as all weights": lambda c: posing(c["state_dict"]),
        "a text for the weights": lambda c: c.update(state_dict="x"),
        "numbers for names": lambda c: c.update(state_dict={1: 2}),
        "a text for the configuration": lambda c: c["crislit"].update(config="x"),
        "a list for the settings": lambda c: c["crislit"].update(settings=[]),
        "10^300 steps": lambda c: c.update(global_step=inf),
    }
    for name, change in entries.items():
        yield Case(
            f"checkpoint, {name}", lambda f, c=change: run_checkpoint(f, c), error=NO_NETWORK
        )
    yield Case(
        "checkpoint, an archive that inflates",
        lambda f: repacked(f, inflating),
        error="best.ckpt: .*it is compressed",
    )
    for name, content in costly_checkpoints().items():
        yield Case(
            f"checkpoint, {name}",
            lambda f, c=content: pickled(f, c),
            error="cannot read .*best.ckpt: it is damaged",
        )
    endless: Any = ()
    for _ in range(60):
        endless = (endless, endless)
    parts: dict[str, Callable[[dict[str, Any]], object]] = {
        "a source that takes years to print": lambda c: c["crislit"].update(
            initial_weights=endless
        ),
        "a setting that takes years to print": lambda c: c["crislit"]["settings"].update(
            clip=endless
        ),
    }
    for name, change in parts.items():
        for zipped in (True, False):
            kind = "" if zipped else ", in the old format"
            act = lambda f, c=change, z=zipped: run_checkpoint(f, c, z)  # noqa: E731
            yield Case(
                f"checkpoint, {name}{kind}", act, error="cannot read .*best.ckpt: it is damaged"
            )
    yield Case(
        "checkpoint, an entry's name of 10 MB",
        lambda f: run_checkpoint(
            f, lambda c: c["state_dict"].update({"model." + "k" * 10**7: first_tensor(c)})
        ),
        error="best.ckpt.*kkk",
    )


def odd_networks() -> Cases:
    """Checkpoints and shared folders whose names and shapes fit."""
    for name, change in ODD.items():
        told = "not the plain numbers|not the network's"
        if name in (
            "of 8 bits",
            "of truths",
            "of whole numbers",
        ):  # the others safetensors has not, or not in all versions
            yield Case(
                f"network, a weight {name}",
                lambda f, c=change: shared(f, lambda s: odd(s, c)),
                error=told,
            )
        yield Case(
            f"checkpoint, a weight {name}",
            lambda f, c=change: run_checkpoint(f, lambda content: odd(content["state_dict"], c)),
            error=told,
        )
    large = lambda s: [value.fill_(1e38) for value in s.values() if value.ndim == 4]  # noqa: E731
    yield Case(
        "network, weights of 10^38",
        lambda f: shared(f, large),
        error="computes NaN or infinity",
        file=False,
    )
    yield Case(
        "network, fifty tokens",
        lambda f: shared(f, fifty, network=with_tower("text_cfg", "vocab_size", 50)),
        error="knows 50 tokens",
        file=False,
    )
    results: dict[str, Callable[[Path], object]] = {
        "of lists a hundred thousand deep": lambda path: path.write_text("[" * MANY),
        "that is a pipe": os.mkfifo,
        "that is a folder": Path.mkdir,
        "of another kind": lambda path: path.write_text("[1]"),
    }
    for name, make in results.items():
        yield Case(f"checkpoint, results beside it {name}", lambda f, m=make: beside(f, m))
    for group in ("dataset", "trainer", "recipe"):
        for value in ([1], "x", 7):
            name = f"{value!r} for {group}"
            config = {group: value}
            told = f"its configuration has {type(value).__name__} for {group}"
            yield Case(
                f"checkpoint, {name}",
                lambda f, c=config: run_checkpoint(
                    f, lambda content: content["crislit"]["config"].update(c)
                ),
                error=f"best.ckpt lacks a part of .*{told}",
            )
            yield Case(
                f"network, {name}",
                lambda f, c=config: shared(f, training=c),
                error=f"config.json does not .*{told}",
            )


def with_tower(tower: str, key: str, value: Any) -> dict[str, Any]:
    """Return the tiny network's settings with another value in one of CLIP's towers."""
    settings: dict[str, Any] = json.loads(json.dumps(network().config))
    settings["clip"][tower][key] = value
    return settings


SECTIONS = (
    refs_files,
    refs_contents,
    instances_files,
    outlines,
    pictures,
    sentences,
    own_data,
    networks,
    odd_networks,
)
CASES = {case.name: case for section in SECTIONS for case in section()}


# -- The process that tries them ----------------------------------------------------------------------------------------------

MEMORY = 2**30
"""Bytes that it may take beyond what it has when it starts."""


def hang(_: Path) -> None:
    """Wait for nothing."""
    time.sleep(10**6)


def compute(_: Path) -> None:
    """Use the processor for a while, and wait for a while."""
    start = time.process_time()
    while time.process_time() < start + 0.6:
        pass
    time.sleep(0.6)


WITNESSES: dict[str, Act] = {
    "writes outside": lambda folder: (folder.parent / "elsewhere").write_text("x"),
    "makes a folder outside": lambda folder: (folder.parent / "folder").mkdir(),
    "starts a program": lambda folder: subprocess.run(["true"], check=True).returncode,
    "takes memory": lambda folder: len(b"x" * (700 * 2**20)),
    "takes more memory than there is": lambda folder: len(b"x" * 2**32),
    "computes": compute,
    "ends the process": lambda folder: os._exit(3),
    "fails": lambda folder: 1 / 0,
    "hangs": hang,
}
"""What the tests try the process itself with."""

outside: list[str] = []
started: list[str] = []
CHANGING = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
}
STARTING = {
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "socket.connect",
}


def watch(allowed: list[Path], event: str, arguments: tuple[Any, ...]) -> None:
    """Take down which programs are started, and which files are written that are in none of the folders."""
    if event in STARTING:
        started.append(f"{event} {arguments!r:.200}")
    writes = (
        event == "open"
        and isinstance(arguments[2], int)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    for path in arguments[:2] if event in CHANGING else arguments[:1] if writes else ():
        if isinstance(path, (str, bytes, os.PathLike)):
            place = Path(os.fsdecode(path)).absolute()
            if place != Path(os.devnull) and not any(
                place.is_relative_to(folder) for folder in allowed
            ):
                outside.append(str(place))


def attempt(act: Act, folder: Path) -> dict[str, Any]:
    """Run a case in a folder of its own, and return how it ended and what it cost."""

    folder.mkdir()
    os.chdir(folder)
    before, start, computed = now_and_forget_the_peak(), time.monotonic(), time.process_time()
    outside.clear()
    started.clear()
    end: dict[str, Any]
    try:
        end = {"value": act(folder)}
    except InputError as error:
        end = {"error": str(error)}
    except BaseException:
        end = {"crash": traceback.format_exc().rstrip()[-3000:]}
    spent = {"elapsed": time.monotonic() - start, "seconds": time.process_time() - computed}
    cost = {**spent, "megabytes": (status("VmHWM") - before) // 2**10}
    return end | cost | {"outside": list(outside), "started": list(started)}


def now_and_forget_the_peak() -> int:
    """Return the memory that the process has, in kilobytes, and let Linux count the most that it will have from here."""
    ctypes.CDLL(None).malloc_trim(0)  # what input before left
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """Return a number that Linux keeps about this process."""
    return next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name)
    )


def main() -> None:
    """Try the inputs whose names and folders come in, one a line, and answer each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    logging.disable(logging.CRITICAL)
    from crislit.data import datamodule  # noqa: F401 - what takes memory whatever comes

    segmenter()
    network()
    allowed = [Path(tempfile.gettempdir())]
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    sys.addaudithook(lambda event, arguments: watch(allowed, event, arguments))
    for line in sys.stdin:
        name, place = json.loads(line)
        allowed[1:] = [Path(place)]
        print(
            json.dumps(attempt(CASES[name].act if name in CASES else WITNESSES[name], Path(place))),
            file=answers,
            flush=True,
        )


if __name__ == "__main__":
    main()
