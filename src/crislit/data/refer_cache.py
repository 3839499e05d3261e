"""The arrays of a ``ReferIndex``, and their cache on disk."""

import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from crislit.data.refer_annotations import (
    MAX_DISTANCE,
    MAX_OUTLINE,
    MAX_SIDE,
    Bytes,
    Ints,
    parse_file_name,
    parse_text,
)
from crislit.errors import InputError, require, see
from crislit.io import MAX_PIXELS, write_files

log = logging.getLogger(__name__)

FORMAT = 3
"""Part of the cache's key, raised whenever the cache's content changes."""
MAX_INDEX = 2**27
"""Characters of an index, where a number counts as four and a sentence as a hundred more. RefCOCO's
has 38 million. A few bytes of a pickle can repeat a long text many times."""


class SkippedSample(NamedTuple):
    """A training sample that cannot be used, and why."""

    sample: str
    reason: str


@dataclass(frozen=True)
class IndexArrays:
    """The arrays of an index. ``x_ends[i]`` is where item i of the flat array ``x`` ends."""

    split: Ints  # per ref: row of its split's name
    split_names: Bytes
    split_names_ends: Ints
    ref_id: Ints
    ref_image: Ints  # per ref: row of its image
    image_id: Ints
    image_size: Ints  # (images, 2): height, width
    file_names: Bytes
    file_names_ends: Ints
    sentences: Bytes
    sentences_ends: Ints
    sentence_id: Ints
    ref_sentences_ends: Ints  # per ref, in sentences
    points: npt.NDArray[np.float64]  # of polygons: x, y, x, y, ...
    polygons_ends: Ints  # per polygon, in numbers of ``points``
    ref_polygons_ends: Ints  # per ref, in polygons
    runs: Ints  # run lengths, column by column, starting with zeros
    ref_runs_ends: Ints  # per ref, in runs


TYPES = dict.fromkeys(("split_names", "file_names", "sentences"), np.uint8)
"""Types of the arrays that do not hold integers."""


def join_arrays(parts: Sequence[npt.NDArray[Any]], dtype: type) -> tuple[npt.NDArray[Any], Ints]:
    """Concatenate arrays, and return with them where each one ends."""
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return np.concatenate([np.zeros(0, dtype=dtype), *parts]).astype(dtype, copy=False), ends


def cache_key(*paths: Path) -> str:
    """Return a digest of the annotation files' paths, sizes and times."""
    facts = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return hashlib.sha256(repr((FORMAT, facts)).encode()).hexdigest()[:16]


def cache_places(folder: Path, name: str) -> tuple[Path, Path]:
    """Return where a cache may be: beside the data, or in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / name, home / "crislit" / name


def digest_arrays(arrays: IndexArrays) -> str:
    """Return a digest of everything in the arrays: the identity of a data set, whatever its path.

    Checkpoints and records store it. It covers each array's name, type, shape and numbers, in the
    same byte order on all machines.

    Returns:
        16 hexadecimal characters.
    """
    content = hashlib.sha256()
    for name, array in vars(arrays).items():
        little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        content.update(f"{name} {little_endian.dtype.str} {array.shape}\n".encode())
        content.update(little_endian.data)
    return content.hexdigest()[:16]


class CachedIndex(NamedTuple):
    """Content of a cache: the arrays, their digest, and what was left out of them."""

    arrays: IndexArrays
    digest: str
    skipped: list[SkippedSample]


def read_cache(path: Path) -> CachedIndex | None:
    """Read a cache. None if absent or damaged."""
    if not path.is_file():  # reading a pipe would block
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = IndexArrays(*(file.get_tensor(field.name) for field in fields(IndexArrays)))
            metadata = file.metadata() or {}
        check_arrays(arrays)
        digest = metadata.get("digest", "")
        # Only read: computing it whenever an index is opened would take time.
        require(re.fullmatch("[0-9a-f]{16}", digest), "it has no digest of its arrays")
        skipped = json.loads(metadata.get("skipped", "[]"))
        samples = [SkippedSample(parse_text(s), parse_text(reason)) for s, reason in skipped]
        return CachedIndex(arrays, digest, samples)
    except (OSError, SafetensorError, TypeError, ValueError, IndexError, RecursionError) as error:
        log.warning("ignoring the damaged cache %s (%s)", path, error)
        return None


def is_shared(folder: Path) -> bool:
    """Whether a folder belongs to another user, or others may write to it."""
    facts = folder.stat()
    is_own = not hasattr(os, "getuid") or facts.st_uid == os.getuid()
    return not is_own or bool(facts.st_mode & 0o022)


def write_cache(index: CachedIndex, folder: Path, name: str) -> None:
    """Write a cache, and log where.

    The data's folder is preferred if it is the user's own, else the user's cache folder: nothing is
    added to a folder that several users share. The other one is used if that is not possible.
    """
    metadata = {"digest": index.digest, "skipped": json.dumps(index.skipped)}
    beside, home = cache_places(folder, name)
    places = (home, beside) if is_shared(folder) else (beside, home)
    is_writable = folder.stat().st_mode & 0o222  # root may write to read-only folders, too
    for path in places if is_writable else (home,):
        try:
            write_files({path: lambda part: save_file(vars(index.arrays), part, metadata)})
        except InputError as error:
            log.info("cannot cache the index: %s", error)
        else:
            log.info("the index is cached in %s", path)
            return
    log.warning(
        "the index of %s could not be cached; every start builds it again%s",
        folder,
        see("index-cache"),
    )


def check_arrays(a: IndexArrays) -> None:
    """Check that the arrays describe a data set: a cache may come with untrusted data.

    Raises:
        ValueError: If they do not.
    """
    for name, array in vars(a).items():
        dtype = np.float64 if name == "points" else TYPES.get(name, np.int64)
        require(array.dtype == dtype, f"{name} has type {array.dtype}")
        require(array.ndim == (2 if name == "image_size" else 1), f"{name} is {array.ndim}-D")
    refs, images = len(a.ref_id), len(a.image_id)
    per_ref = (a.split, a.ref_image, a.ref_sentences_ends, a.ref_polygons_ends, a.ref_runs_ends)
    fits = (
        all(len(array) == refs for array in per_ref)
        and a.image_size.shape == (images, 2)
        and len(a.file_names_ends) == images
        and len(a.sentences_ends) == len(a.sentence_id)
    )
    require(fits, "its arrays differ in length")
    ends = {
        **{f"{name}_ends": len(getattr(a, name)) for name in TYPES},
        "ref_runs_ends": len(a.runs),
        "ref_sentences_ends": len(a.sentence_id),
        "polygons_ends": len(a.points),
        "ref_polygons_ends": len(a.polygons_ends),
    }
    for name, length in ends.items():
        values = getattr(a, name)
        is_ascending = (np.diff(values, prepend=0) >= 0).all()
        require(is_ascending and values.max(initial=0) == length, f"{name} is inconsistent")
    for rows, count in ((a.split, len(a.split_names_ends)), (a.ref_image, images)):
        require(((rows >= 0) & (rows < count)).all(), "a ref has no split or no image")
    for name in _split_texts(a.file_names, a.file_names_ends):
        parse_file_name(name)
    _split_texts(a.split_names, a.split_names_ends)  # raises if it is not text
    _split_texts(a.sentences, a.sentences_ends)
    require((np.diff(a.ref_sentences_ends, prepend=0) > 0).all(), "a ref has no sentence")
    sides = ((a.image_size > 0) & (a.image_size <= MAX_SIDE)).all()
    require(sides and (a.image_size.prod(axis=1) <= MAX_PIXELS).all(), "an image is too large")
    _check_runs(a)
    _check_polygons(a)


def _check_runs(a: IndexArrays) -> None:
    require(((a.runs >= 0) & (a.runs <= MAX_SIDE**2)).all(), "a run length is out of its range")
    pixels = a.image_size.prod(axis=1)[a.ref_image]
    filled = np.diff(np.concatenate([[0], a.runs.cumsum()])[a.ref_runs_ends], prepend=0)
    require(((filled == 0) | (filled == pixels)).all(), "run lengths do not fill their image")


def _check_polygons(a: IndexArrays) -> None:
    lengths = np.diff(a.polygons_ends, prepend=0)
    require((lengths >= 6).all() and (lengths % 2 == 0).all(), "a polygon has too few points")
    require(
        (np.abs(a.points) <= MAX_DISTANCE * MAX_SIDE).all(),
        "a point of a polygon is far outside its image, or NaN",
    )
    steps = np.abs(np.diff(a.points.reshape(-1, 2), axis=0, prepend=0)).max(axis=1)
    steps[(a.polygons_ends - lengths) // 2] = 0  # not a side: from another polygon
    along = np.concatenate([[0.0], steps.cumsum()])
    ends = np.concatenate([[0], a.polygons_ends])[a.ref_polygons_ends] // 2
    outlines = np.diff(along[ends], prepend=0)
    require((outlines <= MAX_OUTLINE + 1).all(), "the polygons of a ref are too long")


def _split_texts(characters: Bytes, ends: Ints) -> list[str]:
    text = characters.tobytes()
    return [text[start:end].decode() for start, end in itertools.pairwise([0, *ends.tolist()])]
