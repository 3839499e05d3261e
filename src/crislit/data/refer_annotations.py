"""Parses and checks REFER and COCO annotations."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from crislit.errors import InputError
from crislit.io import MAX_PIXELS

MAX_SIDE = 2**15
"""Pixels; a larger side means damaged annotations, and drawing its mask would exhaust memory."""
MAX_OUTLINE = 2**20
"""Pixels along a mask's polygons; the rasterizer allocates memory for each of them."""
MAX_DISTANCE = 10
"""Distance of a polygon's points in image sides; points further away overflow the rasterizer."""
MAX_POLYGONS = 1000
"""Polygons per mask; the time to merge them grows quadratically."""
SIDES = ("height", "width")
INTEGER = re.compile(r"\s*([+-]?[0-9]{1,19})(?:\.0*)?\s*")
"""Text that is a whole number."""
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.uint8]


def rasterize(polygons: Sequence[Sequence[float]], runs: Ints, h: int, w: int) -> Mask:
    """Draw run lengths, or else the union of polygons, as a mask: (h, w) uint8, 0 or 1."""
    if len(runs):
        return _to_rows(np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs).reshape(w, h))
    if not polygons:
        return np.zeros((h, w), dtype=np.uint8)
    return _to_rows(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, h, w))).T)


def _to_rows(columns: Mask) -> Mask:
    """Transpose a mask from column-major (w, h) to row-major (h, w)."""
    # Several times as fast as NumPy's copy.
    return cv2.transpose(columns)  # type: ignore[return-value]


class DuplicateIdError(InputError):
    """Two different items with the same id."""


def index_by_id(instances: Any, kind: str, path: Path) -> dict[int | str, Any]:
    """Return COCO's images or annotations by their ids.

    Args:
        instances: The parsed ``instances.json``.
        kind: ``images`` or ``annotations``.
        path: Path of the file, for messages.

    Raises:
        InputError: If the list is missing or malformed, or two different items have the same id.
    """
    items: dict[int | str, Any] = {}
    try:
        for item in instances[kind]:
            other = items.setdefault(parse_id(item["id"]), item)
            if other is not item and other != item:
                raise DuplicateIdError(
                    f"{path}: the id {item['id']!r:.40} occurs twice among the {kind}, "
                    "with different content"
                )
    except DuplicateIdError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = f"; {error}" if isinstance(error, InputError) else ""
        raise InputError(
            f"{path} should hold a list {kind!r} of items with an 'id', as in COCO{reason}"
        ) from error
    return items


def parse_segmentation(
    segmentation: Any, size: tuple[int, int]
) -> tuple[list[npt.NDArray[np.float64]], list[int]]:
    """Return a segmentation's polygons and its run lengths; at least one of the two is empty.

    Polygons of fewer than three points, which occur in COCO, are dropped.

    Args:
        segmentation: COCO polygons, run lengths (compressed or not), or a list of run lengths,
            which are united.
        size: The image's (height, width).

    Raises:
        InputError: If it is of neither kind or of both, or too large.
    """
    if isinstance(segmentation, dict):
        return [], _parse_run_lengths(segmentation, size)
    kinds = {isinstance(part, dict) for part in segmentation}
    if len(kinds) == 2:
        raise InputError("its mask mixes polygons and run lengths: convert all to run lengths")
    if kinds == {True}:
        return [], unite_runs([_parse_run_lengths(part, size) for part in segmentation], size)
    polygons = [np.array(polygon, dtype=np.float64) for polygon in segmentation]
    if any(polygon.ndim != 1 for polygon in polygons):
        raise InputError("a polygon of its mask is not a flat list x, y, x, y, ... of numbers")
    polygons = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if len(polygons) > MAX_POLYGONS:
        raise InputError(
            f"its mask has {len(polygons):,} polygons, more than {MAX_POLYGONS:,}: "
            "convert it to run lengths"
        )
    limit = MAX_DISTANCE * max(size)
    if any(not np.isfinite(polygon).all() or (abs(polygon) > limit).any() for polygon in polygons):
        raise InputError(
            "a polygon of its mask has points that are not numbers, or far outside the image"
        )
    sides = [abs(np.diff(polygon.reshape(-1, 2), axis=0)).max(axis=1) for polygon in polygons]
    if sum(lengths.sum() for lengths in sides) > MAX_OUTLINE:
        raise InputError(f"its polygons are longer than {MAX_OUTLINE:,} pixels in total")
    if not polygons:
        return [], []
    encoded = coco_mask.frPyObjects([polygon.tolist() for polygon in polygons], *size)
    return (polygons, []) if coco_mask.area(coco_mask.merge(encoded)) else ([], [])


def _parse_run_lengths(segmentation: dict[str, Any], size: tuple[int, int]) -> list[int]:
    """Return run lengths, none if no pixel is set."""
    counts = segmentation["counts"]
    is_compressed = isinstance(counts, (str, bytes))
    runs = parse_runs(counts) if is_compressed else list(map(parse_integer, counts))
    fills_image = sum(runs) == size[0] * size[1] and min(runs, default=0) >= 0
    if tuple(map(parse_integer, segmentation["size"])) != size or not fills_image:
        raise InputError(f"its run lengths do not fill its image of {size[0]} x {size[1]} pixels")
    return runs if sum(runs[1::2]) else []


def unite_runs(masks: Sequence[Sequence[int]], size: tuple[int, int]) -> list[int]:
    """Return the run lengths of the union of masks, none if no pixel is set.

    Args:
        masks: The run lengths of each mask, none if none of its pixels is set.
        size: The image's (height, width).
    """
    if len(masks) == 1:
        return list(masks[0])
    ends = [np.cumsum(runs, dtype=np.int64) for runs in masks]
    starts = np.concatenate([end[:-1:2] for end in ends])  # of runs of ones
    stops = np.concatenate([end[1::2] for end in ends])
    order = np.argsort(starts, kind="stable")
    order = order[stops[order] > starts[order]]
    if not len(order):
        return []
    starts, reached = starts[order], np.maximum.accumulate(stops[order])
    gaps = np.flatnonzero(starts[1:] > reached[:-1])  # behind everything that started before
    united = np.sort(np.concatenate([starts[:1], reached[gaps], starts[gaps + 1], reached[-1:]]))
    runs: list[int] = np.diff(united, prepend=0, append=size[0] * size[1]).tolist()
    return runs if runs[-1] else runs[:-1]


def parse_runs(counts: str | bytes) -> list[int]:
    """Decode COCO's compressed run lengths.

    Each character holds five bits of a number, lowest first, and a continuation bit. From the
    fourth number on, numbers are differences to the run before the last.
    """
    data = counts.encode() if isinstance(counts, str) else counts
    runs: list[int] = []
    value = shift = 0
    for byte in data:
        bits = byte - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not 0 <= bits < 64 or shift > 40:
            raise InputError("its compressed run lengths are damaged")
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def parse_text(value: Any) -> str:
    """Return text, decoding bytes from Latin-1."""
    if not isinstance(value, (str, bytes)):
        raise TypeError(f"expected a string, found {type(value).__name__}")
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    text.encode()  # raises an error for unpaired surrogates
    return text


def parse_id(value: Any, name: str = "the id") -> int | str:
    """Return an id: a whole number however it is written, or other text.

    Raises:
        InputError: If it is something else. Hashing other types could take years.
    """
    if type(value) is int and -(2**63) <= value < 2**63:  # the usual case, fast
        return value
    if isinstance(value, str) and not INTEGER.fullmatch(value):
        return value
    return parse_integer(value, name)


def parse_image_id(value: Any) -> int:
    """Return an image's id, a whole number from 0 however it is written."""
    try:
        number = parse_integer(value, "image_id")
        if number < 0:
            raise InputError(f"image_id {number} is negative")
    except InputError as error:
        raise InputError(f"{error}: number the images 0, 1, 2, ...") from error
    return number


def parse_integer(value: Any, name: str = "the number") -> int:
    """Return a 64-bit integer, however it is written: 7, 7.0, "7" or "7.0".

    Raises:
        InputError: If it is something else.
    """
    if type(value) is int and -(2**63) <= value < 2**63:  # the usual case, fast
        return value
    number = value
    if isinstance(value, str) and (digits := INTEGER.fullmatch(value)):
        number = int(digits[1])
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, int):
        # Printing other types could take years and gigabytes.
        is_short = value is None or isinstance(value, (str, float, bool))
        found = f"{value!r:.60}" if is_short else f"of type {type(value).__name__}"
        raise InputError(f"{name} {found} is not a whole number")
    # Limit integers: all multiples of 2**61 - 1 have the same hash.
    if not -(2**63) <= number < 2**63:
        raise InputError(f"{name} has {number.bit_length()} bits, and does not fit 64 bits")
    return number


def parse_size(image: Any) -> tuple[int, int]:
    """Return an image's annotated (height, width)."""
    try:
        h, w = (parse_integer(image[side], f"the {side} of its image,") for side in SIDES)
    except InputError as error:
        raise InputError(f"{error}: write the pixels of the stored image, such as 480") from error
    if not (0 < h <= MAX_SIDE and 0 < w <= MAX_SIDE and h * w <= MAX_PIXELS):
        raise InputError(
            f"its image is listed with {h} x {w} pixels (height, width), expected 1 to "
            f"{MAX_SIDE:,} per side and at most {MAX_PIXELS:,} in total"
        )
    return h, w


def parse_file_name(value: Any) -> str:
    """Return a file name without folders, at most 255 bytes long."""
    name = parse_text(value)
    is_plain = Path(name).name == name and name not in ("", ".", "..") and "\0" not in name
    if not is_plain or len(name.encode()) > 255:
        raise InputError(f"its image's file name {name[:80]!r} is not a plain name")
    return name


def name_of_ref(ref: Any) -> str:
    """Return how messages name a ref of any type, at most 40 characters of its id."""
    if not isinstance(ref, dict):
        return f"of type {type(ref).__name__}"
    name = ref.get("ref_id", "without ref_id")
    if isinstance(name, str) or (isinstance(name, int) and abs(name) < 2**80):
        return str(name)[:40]
    return f"with {type(name).__name__} for ref_id"
