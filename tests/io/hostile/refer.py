"""Hostile data sets in the REFER layout, and seeds for the fuzzer, which loads no PyTorch."""

import json
import math
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crislit.data.refer_cache import IndexArrays
from crislit.data.refer_index import ReferIndex
from tests.io.hostile.case import MANY, MILLION, Case, Cases
from tests.io.hostile.pickles import (
    NESTED_TUPLE,
    VALID_REF,
    costly_checkpoints,
    opcodes,
    refused_pickles,
    text,
    valid_pickles,
    with_number,
)
from tests.refer_data import HEIGHT, SQUARE, WIDTH, one_ref, python2_opcodes, write_set

REFS = r"refs\(unc\)\.p"


def read_set(
    folder: Path, refs: bytes | None = None, instances: bytes | None = None
) -> list[list[Any]]:
    """Read a set of these files; those not given are valid."""
    root = write_set(folder / "data", refs, instances)
    return read_all(ReferIndex.open(root, "refcoco", "refs(unc).p"))


def read_all(index: ReferIndex) -> list[list[Any]]:
    """Return split, sentences and number of mask pixels of each ref."""
    splits = {int(ref): split for split in index.splits for ref in index.split_refs(split)}
    return [
        [
            splits[ref],
            [index.sentence(row) for row in index.sentence_rows(ref)],
            int(index.mask(ref).sum()),
        ]
        for ref in range(len(index))
    ]


# -- Refs files


def refs_files() -> Cases:
    """Yield hostile pickles."""
    for name, content in refused_pickles().items():
        yield Case(f"refs, {name}", partial(read_set, refs=content), error=REFS)
    for name, (content, value) in valid_pickles().items():
        yield Case(f"refs, {name}", partial(read_set, refs=content), value=value)


def with_ref(**changes: Any) -> bytes:
    """Return a refs file with the valid ref changed."""
    return pickle.dumps([one_ref()[0][0] | changes], 2)


def with_field(name: str, value: bytes) -> bytes:
    """Return a refs file with a field of the valid ref given as opcodes."""
    ref = {key: field for key, field in one_ref()[0][0].items() if key != name}
    field = b"U" + bytes([len(name)]) + name.encode() + value
    return opcodes(b"](" + python2_opcodes(ref, 2) + field + b"se")


def with_sentence(sentence: str) -> bytes:
    """Return a refs file with another sentence."""
    return with_ref(sentences=[{"sent": sentence, "sent_id": 5}])


def shared_sentence() -> bytes:
    """Return 3,000 refs that share a sentence of a million letters: 1 MB that expands to 3 GB."""
    sentences = b"](}(U\x04sent" + text(b"a" * MILLION) + b"U\x07sent_idK\x01ueq\x000"
    fields = (
        b"U\x06ann_idK\x01U\x08image_idK\x07U\x0bcategory_idK\x02"
        b"U\x05splitU\x03valU\tsentencesh\x00"
    )
    refs = (b"}(U\x06ref_id" + with_number(b"J", i) + fields + b"u" for i in range(3000))
    return opcodes(sentences + b"](" + b"".join(refs) + b"e")


SENTENCES = {
    "nothing": "",
    "white space": " \t\n ",
    "control characters": "\x00\x01\x02 dog \x1b[31m\x7f\x08",
    "emoji": "the 🐕 on the left 👩‍👩‍👧‍👦 🏳️‍🌈",
    "Hebrew": "הכלב משמאל",
    "Arabic with direction marks": "\u202e\u202dالكلب\u202c dog",
    "CLIP's end token": "<|endoftext|> dog",
    "open_clip's end token": "dog <end_of_text> cat",
    "open_clip's start token": "<start_of_text>",
    "markup": "<script>alert(1)</script> &lt;end_of_text&gt; &amp;amp;",
    "combining characters": "e" + "\u0301" * 200,
    "format strings": "%s %n {0} {ref.__class__} ${jndi:ldap://x}",
}


def refs_contents() -> Cases:
    """Yield refs files of plain data that are not valid refs."""
    for field in ("image_id", "ann_id", "ref_id", "split", "sentences"):
        act = partial(read_set, refs=with_field(field, NESTED_TUPLE))
        yield Case(f"refs, nested tuple as {field}", act, error=f"{REFS}: ref ")
    act = partial(read_set, refs=with_field("category_id", NESTED_TUPLE))
    yield Case("refs, nested tuple as category_id, which is not used", act, value=VALID_REF)
    invalid: dict[str, tuple[bytes, str]] = {
        "duplicate ref_id": (pickle.dumps(one_ref()[0] * 2), "ref 3: its ref_id occurs twice"),
        "missing image": (with_ref(image_id=8), "ref 3 .*KeyError 8"),
        "missing annotation": (with_ref(ann_id=8), "ref 3 .*KeyError 8"),
        "id of five thousand digits": (with_ref(ref_id=10**5000), "ref with int for ref_id"),
        "id of a million letters": (
            with_ref(ref_id="x" * MILLION),
            r"ref x{40}: ref_id 'x{59} is not a whole",
        ),
        "image_id of a million letters": (with_ref(image_id="x" * MILLION), "ref 3 or"),
        "split that is None": (with_ref(split=None), "ref 3 .*expected a string, found NoneType"),
        "lone surrogate": (with_sentence("\ud800"), "ref 3 .*UnicodeEncodeError"),
        "sentences that are a number": (with_ref(sentences=7), "ref 3 .*TypeError"),
        "no sentences": (with_ref(sentences=[]), "ref 3: it has no sentence"),
        "ref that is a string": (pickle.dumps(["ref"]), "ref of type str"),
    }
    for name, (content, error) in invalid.items():
        yield Case(f"refs, {name}", partial(read_set, refs=content), error=f"{REFS}: {error}")
    yield Case(
        "refs, long sentence shared by many refs",
        lambda folder: read_set(folder, shared_sentence()),
        error="ref [0-9]+: up to it",
    )
    refs = pickle.dumps([one_ref()[0][0] | {"ref_id": i, "split": str(i)} for i in range(300)])
    yield Case("refs, 300 splits", lambda folder: len(read_set(folder, refs)), value=300)
    long = " ".join(f"word{i}" for i in range(10**4))
    for name, sentence in {**SENTENCES, "ten thousand words": long}.items():
        act = partial(read_set, refs=with_sentence(sentence))
        yield Case(f"refs, sentence of {name}", act, value=[["val", [sentence], 36]])


# -- Annotations


def with_annotation(segmentation: Any = None, **image: Any) -> bytes:
    """Return the valid instances.json with another segmentation and changes to its image."""
    instances = one_ref()[1]
    instances["images"][0].update(image)
    if segmentation is not None:
        instances["annotations"][0]["segmentation"] = segmentation
    return json.dumps(instances).encode()


def with_duplicate(kind: str, **changes: Any) -> bytes:
    """Return the valid instances.json with its image or annotation repeated with changes."""
    instances = one_ref()[1]
    instances[kind].append(instances[kind][0] | changes)
    return json.dumps(instances).encode()


def instances_files() -> Cases:
    """Yield invalid and unusual instances.json files."""
    plain = json.dumps(one_ref()[1])
    invalid = {
        "empty file": b"",
        "lists nested 100,000 deep": b"[" * 10**5,
        "objects nested 100,000 deep": b'{"a":' * 10**5,
        "number of a million digits": b"9" * MILLION,
        "100,000 lists": b"[" + b"[]," * MANY + b"[]]",
        "NaN": b"NaN",
        "UTF-16 truncated within a character": plain.encode("utf-16")[:-1],
        "Latin-1": plain.replace("seven", "s\xe9ven").encode("latin-1"),
        "pickle": pickle.dumps(one_ref()[1]),
        "images without ids": b'{"images": [{}], "annotations": []}',
        "images that are a string": b'{"images": "seven", "annotations": []}',
        "id that is a list": b'{"images": [{"id": [7]}], "annotations": []}',
    }
    for name, content in invalid.items():
        act = partial(read_set, instances=content)
        yield Case(f"instances, {name}", act, error=r"instances\.json")
    for tenth in range(10):
        act = partial(read_set, instances=plain[: len(plain) * tenth // 10].encode())
        name = f"instances, truncated at {tenth} tenths"
        yield Case(name, act, error=r"cannot read .*instances\.json")
    for encoding, name in {"utf-8-sig": "byte order mark", "utf-16": "UTF-16"}.items():
        act = partial(read_set, instances=plain.encode(encoding))
        yield Case(f"instances, {name}", act, value=VALID_REF)
    for kind in ("images", "annotations"):
        changed = with_duplicate(kind, file_name="other.jpg", segmentation=[])
        error = rf"instances\.json: the id [17] occurs twice among the {kind}"
        act = partial(read_set, instances=changed)
        yield Case(f"instances, duplicate id among {kind}", act, error=error)
        act = partial(read_set, instances=with_duplicate(kind))
        yield Case(f"instances, identical duplicate among {kind}", act, value=VALID_REF)
    heights = {
        "NaN": math.nan,
        "infinity": math.inf,
        "0": 0,
        "-1": -1,
        "2^15 + 1": 2**15 + 1,
        "10^300": 10**300,
        "words": "tall",
    }
    for name, height in heights.items():
        act = partial(read_set, instances=with_annotation(height=height))
        yield Case(f"instances, height of {name}", act, error=f"{REFS}: ref 3")
    file_names: list[Any] = [
        *("../../etc/passwd", "/etc/passwd", "..", ".", "", "a/seven.jpg", "seven.jpg\0.png"),
        *("x" * 300, "../" * 2000, None, 7),
    ]
    for number, file_name in enumerate(file_names):
        act = partial(read_set, instances=with_annotation(file_name=file_name))
        name = f"instances, file name {number}: {str(file_name)[:20]!r}"
        yield Case(name, act, error=f"{REFS}: ref 3")


BOW_TIE = [2, 2, 8, 8, 8, 2, 2, 8]
STAR = [10, 0, 14, 12, 2, 4, 18, 4, 6, 12]
SIZE = {"size": [HEIGHT, WIDTH]}


def segmentations() -> Cases:
    """Yield unusual and invalid polygons and run lengths."""
    valid: dict[str, tuple[Any, int]] = {
        "polygon partly outside the image": ([[-3, -3, 4, -3, 4, 4, -3, 4]], 16),
        "polygon outside the image": ([[30, 2, 35, 2, 35, 8, 30, 8]], 0),
        "polygon around the image": ([[-50, -50, 70, -50, 70, 62, -50, 62]], HEIGHT * WIDTH),
        "no polygon": ([], 0),
        "empty polygons": ([[], [], []], 0),
        "polygon of two points": ([[2, 2, 8, 8]], 0),
        "polygon of one repeated point": ([[5, 5, 5, 5, 5, 5]], 0),
        "polygon that is a line": ([[2, 2, 8, 2, 2, 2]], 0),
        "polygon of an odd number of values": ([[*SQUARE, 3]], 0),
        "bow tie": ([BOW_TIE], 18),
        "star": ([STAR], 44),
        "duplicate polygon": ([SQUARE, SQUARE], 36),
        "reversed polygon": ([[2, 2, 2, 8, 8, 8, 8, 2]], 36),
        "polygon of strings": ([[str(number) for number in SQUARE]], 36),
        "ten thousand points": ([[1, 1]] * 10**4, 0),
        "polygon of a hundred thousand points": ([[*SQUARE, *[2, 5] * 10**5]], 36),
        "runs that fill the image": (SIZE | {"counts": [0, HEIGHT * WIDTH]}, HEIGHT * WIDTH),
        "empty runs": (SIZE | {"counts": [10, 0, 0, 5, 225]}, 5),
    }
    for name, (segmentation, pixels) in valid.items():
        act = partial(read_set, instances=with_annotation(segmentation))
        yield Case(f"segmentation, {name}", act, value=[["val", ["a square"], pixels]])
    bad_numbers = (math.nan, math.inf, -math.inf, 1e308, 1e9, -(10**18), 10**300)
    invalid: dict[str, Any] = {
        **{f"polygon with {bad}": [[*SQUARE[:5], bad, *SQUARE[6:]]] for bad in bad_numbers},
        "zigzag that needs gigabytes": [[0, 0, *[-100, -100, 100, 100] * 50_000]],
        "many zigzags": [[0, 0, *[200, 200, -200, -200] * 2]] * 900,
        "forty thousand triangles": [[2, 2, 5, 2, 2, 5]] * 40_000,
        "polygon of words": [["a"] * 6],
        "polygon of pairs": [[[1, 1], [5, 1], [5, 5]]],
        "polygon of lists": [[[]] * 6],
        "polygon of None": [[None] * 6],
        "number": 7,
        "string": "1 2 3 4 5 6",
        "runs without a size": {"counts": [240]},
        "runs without counts": SIZE,
        "runs that are None": SIZE | {"counts": None},
        "runs of fractions": SIZE | {"counts": [10.5, 5.5, 224]},
        "runs of words": SIZE | {"counts": ["a", "b"]},
        "runs of NaN": SIZE | {"counts": [math.nan, 240]},
        "runs of too few pixels": SIZE | {"counts": [239]},
        "runs of too many pixels": SIZE | {"counts": [0, 241]},
        "runs of 2^60": SIZE | {"counts": [0, 2**60]},
        "runs of 10^300": SIZE | {"counts": [0, 10**300]},
        "negative runs": SIZE | {"counts": [0, 300, -60]},
        "runs for a rotated image": {"size": [WIDTH, HEIGHT], "counts": [240]},
        "runs for 2^31 x 2^31": {"size": [2**31, 2**31], "counts": [2**62]},
        "compressed runs truncated within a number": SIZE | {"counts": "o"},
        "endless compressed runs": SIZE | {"counts": "o" * MILLION},
        "compressed runs of 2^39": SIZE | {"counts": "PPPPPPP7"},
        "compressed runs of invalid letters": SIZE | {"counts": "\u20ac~\x00"},
        "compressed runs of a lone surrogate": SIZE | {"counts": "\ud800"},
    }
    for name, segmentation in invalid.items():
        act = partial(read_set, instances=with_annotation(segmentation))
        yield Case(f"segmentation, {name}", act, error=f"{REFS}: ref 3")
    triangles = [[2, 2, 8, 2, 8, 8], [3, 3, 9, 3, 9, 9]]
    huge = with_annotation(triangles, height=2**15, width=2**15)
    yield Case(
        "segmentation, image of 2^30 pixels, too large to draw a mask",
        partial(read_set, instances=huge),
        error=f"{REFS}: ref 3: its image is listed with 32768 x 32768 pixels",
    )


# -- For the fuzzer


def reader_seeds() -> Iterator[bytes]:
    """Return the seeds of scripts/fuzz_reader.py: a letter for the kind of input, and an input."""
    checkpoint = opcodes(b"}" + text(b"state_dict") + b"ccollections\nOrderedDict\n)Rs")
    rle = SIZE | {"counts": [100, 40, 100]}
    compressed_rle = SIZE | {"counts": "T5V1"}
    instances = json.dumps(one_ref()[1]).encode()
    duplicates = with_duplicate("images", file_name="x"), with_duplicate("annotations")
    outlines = [SQUARE], [BOW_TIE, STAR], [[1, 1]], rle, compressed_rle
    inputs = [
        *((b"p", content) for content in refused_pickles().values()),
        *((b"p", content) for content, _ in valid_pickles().values()),
        *((b"j", content) for content in (instances, *duplicates)),
        *((b"s", json.dumps(outline).encode()) for outline in outlines),
        *((b"r", content) for content in (b"T5V1", b"o7", b"`71N1", b"PPPPPPP7")),
        *((b"c", content) for content in costly_checkpoints(small=True).values()),
        (b"c", 5 * checkpoint),
    ]
    return (kind + content for kind, content in inputs if len(content) < 4000)


def draw_all(arrays: IndexArrays) -> None:
    """Use every ref of an index, but do not draw masks of large images, which are allowed."""
    index = ReferIndex(arrays, Path("images"), None)
    for ref in range(len(index)):
        assert all(isinstance(index.sentence(row), str) for row in index.sentence_rows(ref))
        assert index.image_path(ref).parent == Path("images")
        if math.prod(index.image_size(ref)) < 2**22:
            mask = index.mask(ref)
            assert mask.shape == index.image_size(ref)
            assert mask.dtype == np.uint8
            assert mask.max() <= 1
