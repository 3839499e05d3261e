"""Hostile custom data. Its paths may lead anywhere, but only images are read."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from crislit.data.sources import CustomSource
from tests.io.hostile.case import MANY, MILLION, Case, Cases
from tests.io.hostile.images import png
from tests.io.hostile.refer import read_all

POLYGONS = [[10, 5, 30, 5, 30, 25, 10, 25]]
LINE = {"image": "a.png", "sentence": "dog", "polygons": POLYGONS}
VALID = [["train", ["dog"], 400]]


def read_line(folder: Path, line: dict[str, Any] | str | bytes) -> list[list[Any]]:
    """Read custom data of one line: the valid one with changes (None removes a key), or a text."""
    if isinstance(line, dict):
        line = json.dumps({key: value for key, value in (LINE | line).items() if value is not None})
    (folder / "a.png").write_bytes(png())
    (folder / "mine.jsonl").write_bytes(line if isinstance(line, bytes) else line.encode())
    return read_all(CustomSource(str(folder / "mine.jsonl")).open())


def read_coco(
    folder: Path, ann_id: str = "5", file_name: str = "a.png", **annotation: Any
) -> list[list[Any]]:
    """Read COCO annotations of one image with a CSV of one sentence."""
    (folder / "a.png").write_bytes(png())
    image = {"id": 7, "file_name": file_name}
    annotation = {"id": 5, "image_id": 7, "segmentation": POLYGONS} | annotation
    instances, sentences = folder / "instances.json", folder / "sentences.csv"
    instances.write_text(json.dumps({"images": [image], "annotations": [annotation]}))
    sentences.write_text(f"ann_id,sentence\n{ann_id},dog\n")
    return read_all(CustomSource(str(instances), str(sentences)).open())


def custom_data() -> Cases:
    """Yield hostile lines and COCO annotations."""
    yield from paths()
    yield from lines()
    yield from coco()


def paths() -> Cases:
    """Yield lines whose image or mask is not one."""
    names = [
        *("../../../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/full"),
        *("/proc/self/environ", ".", "..", "/", "a\0.png", "x" * 5000, "\ud800.png"),
        *("~/.bashrc", "http://example.com/a.png", "a.png/../../b.png"),
    ]
    for name in names:
        short = ascii(name[:30])
        yield Case(
            f"custom data, image {short}",
            partial(read_line, line={"image": name}),
            error=r"mine\.jsonl .*(not an image that can be read|no image at|x{90})",
        )
        yield Case(
            f"custom data, mask {short}",
            partial(read_line, line={"polygons": None, "mask": name}),
            error=r"mine\.jsonl .*(not a mask that can be read|no mask at|x{90})",
        )


def lines() -> Cases:
    """Yield other lines."""
    runs = {"size": [200, 300], "counts": [60_000]}
    huge_runs = {"size": [2**31, 2**31], "counts": [2**62]}
    zigzag = [0, 0, *[-2000, -2000, 2000, 2000] * 5000]
    invalid: dict[str, Any] = {
        "lists nested 100,000 deep": "[" * MANY,
        "number of a million digits": "9" * MILLION,
        "zero byte": "\0",
        "lone surrogate in a sentence": {"sentence": "\ud800"},
        "lone surrogate in a split": {"split": "\ud800"},
        "polygon of NaN": {"polygons": [[math.nan] * 6]},
        "polygon of 10^300": {"polygons": [[10**300] * 6]},
        "zigzag that needs gigabytes": {"polygons": [zigzag]},
        "polygons of true": {"polygons": [[True] * 6]},
        "runs for another image": {"polygons": None, "rle": runs | {"size": [300, 200]}},
        "runs of 2^62 pixels": {"polygons": None, "rle": huge_runs},
        "empty runs": {"polygons": None, "rle": runs},
        "key with a meaning in Python": {"__class__": "os.system"},
        "sentence that is an object": {"sentence": {"a": 1}},
    }
    for name, line in invalid.items():
        yield Case(f"custom data, {name}", partial(read_line, line=line), error="mine.jsonl")
    marked = b"\xef\xbb\xbf" + json.dumps(LINE).encode()
    yield Case("custom data, byte order mark", partial(read_line, line=marked), value=VALID)
    act = partial(read_line, line={"image": "./../case/a.png"})
    yield Case("custom data, image by a detour", act)


def coco() -> Cases:
    """Yield COCO annotations and their CSV."""
    yield Case("COCO data, valid", read_coco, value=VALID)
    act = partial(read_coco, ann_id="\u0665")
    yield Case("COCO data, Arabic digits", act, value=VALID)
    invalid: dict[str, tuple[dict[str, Any], str]] = {
        "id of five thousand digits": ({"ann_id": "9" * 5000}, "sentences.csv"),
        "infinite id": ({"id": math.inf}, "instances.json"),
        "missing image": ({"image_id": 8}, "sentences.csv"),
        "image elsewhere": ({"file_name": "../../etc/passwd"}, "sentences.csv"),
        "endless field": ({"ann_id": "5" * MILLION}, "sentences.csv"),
    }
    for name, (changes, error) in invalid.items():
        yield Case(f"COCO data, {name}", partial(read_coco, **changes), error=error)
