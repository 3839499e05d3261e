"""REFER annotations (RefCOCO, RefCOCO+, G-Ref and whatever is laid out like them) as a compact index.

A set's two files, ``instances.json`` and ``refs(...).p``, are read once. What a model needs of them goes into a few flat arrays
in one file beside the data, keyed by the two files' sizes and times. Masks are decoded when asked for.
"""

import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from crislit.errors import InputError
from crislit.pickles import load_pickle, told

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of the cache's key, raised whenever the arrays change."""

LARGEST_SIDE = 2**15
"""Pixels; what claims more is damaged, and drawing its mask would exhaust the memory."""

LONGEST_OUTLINE = 2**20
"""Pixels along a polygon's sides, for each of which the rasteriser takes memory; a coast in a large picture has thousands."""

FARTHEST = 10
"""Sides of the picture that a polygon's point may be away: more is no slip of the mouse, and overflows the rasteriser."""

LARGEST_INDEX = 2**27
"""Characters of an index, a number for four and a sentence for a hundred more; a set of RefCOCO's size has 38 million. A few
bytes of a pickle can refer to a long text many times."""

LARGEST_PICTURE = 89_478_485
"""Pixels of a picture, which the rasteriser takes four bytes each for; Pillow warns of larger ones."""

MOST_POLYGONS = 1000
"""Of one object: the time to unite them grows with their square."""

IMAGE_FOLDERS = ("images/train2014", "images/mscoco/images/train2014")

TREE = """  {root}/
    images/train2014/COCO_train2014_*.jpg   (or images/mscoco/images/train2014/)
    {folder}/instances.json
    {folder}/{refs}"""

HOW_TO_GET = """In crislit's repository `python scripts/download_refer.py FOLDER` fetches it all. By hand: COCO's train2014
images from cocodataset.org, and refcoco, refcoco+ and refcocog of the REFER project (github.com/lichengunc/refer), laid out
like this. Then set data_root=FOLDER or CRISLIT_DATA=FOLDER."""

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.uint8]


# -- Reading files that strangers wrote ------------------------------------------------------------------------------------


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: If it is none.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"cannot read {path}: {told(error)}. Fetch it again, it may have been cut off") from error


# -- The index --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arrays:
    """The index's arrays. ``x_ends[i]`` is where item i of the flat array ``x`` ends."""

    split: Ints  # per ref: number of its split's name
    split_names: Bytes
    split_names_ends: Ints
    ref_id: Ints
    ref_image: Ints  # per ref: its row among the images
    category: Ints
    image_id: Ints
    image_size: Ints  # (images, 2): height, width
    file_names: Bytes
    file_names_ends: Ints
    sentences: Bytes
    sentences_ends: Ints
    sentence_id: Ints
    ref_sentences_ends: Ints  # per ref: how many sentences there are up to it
    points: npt.NDArray[np.float64]  # polygons: x, y, x, y, ...
    polygons_ends: Ints  # per polygon, in points
    ref_polygons_ends: Ints  # per ref, in polygons
    runs: Ints  # run lengths, column by column, starting with zeros
    ref_runs_ends: Ints  # per ref, in runs


class ReferIndex:
    """One REFER data set: its refs, their sentences, images and masks.

    Make one with :meth:`open`. Refs are numbered from 0 in the order of the file.

    Attributes:
        image_folder: Where the photographs are.
        annotations_path: ``instances.json``, all annotations of the photographs; None if there is none.
        splits: Names of the splits that the set has, in the order train, val, test, testA, testB, others.
    """

    def __init__(self, arrays: _Arrays, image_folder: Path, annotations_path: Path | None) -> None:
        self._arrays = arrays
        self.image_folder = image_folder
        self.annotations_path = annotations_path
        self._split_names = [self._text("split_names", i) for i in range(len(arrays.split_names_ends))]
        usual = ["train", "val", "test", "testA", "testB"]
        self.splits: tuple[str, ...] = tuple(sorted(self._split_names, key=lambda s: (usual.index(s) if s in usual else 9, s)))

    @classmethod
    def open(cls, root: Path, folder: str, refs: str, skipped: list[tuple[str, str]] | None = None) -> "ReferIndex":
        """Open a set, from its cache if that is up to date.

        Args:
            root: The folder that holds ``images/`` and the set's own folder.
            folder: The set's folder, such as ``refcoco``.
            refs: The refs file in it, such as ``refs(unc).p``.
            skipped: See :func:`build_index`; a set of which something was left out has a cache of its own.

        Raises:
            InputError: If a file is missing or cannot be used.
        """
        instances_path, refs_path = root / folder / "instances.json", root / folder / refs
        image_folder = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
        missing = [str(path) for path in (instances_path, refs_path) if not path.is_file()]
        missing += [str(root / IMAGE_FOLDERS[0])] if image_folder is None else []
        if image_folder is None or missing:
            tree = TREE.format(root=root, folder=folder, refs=refs)
            raise InputError(f"{folder} is not at {root}: {', '.join(missing)} not found. Expected\n{tree}\n{HOW_TO_GET}")
        stem = f".{refs_path.stem}.{_cache_key(instances_path, refs_path)}"
        names = [f"{stem}.crislit"] if skipped is None else [f"{stem}.crislit", f"{stem}.skip.crislit"]
        for name in names:
            for cache in (refs_path.with_name(name), _cache_home() / name):
                found = _read_cache(cache)
                if found is not None:
                    if skipped is not None:
                        skipped += found[1]
                    return cls(found[0], image_folder, instances_path)
        log.info("indexing %s, once", refs_path)
        arrays = build_index(load_pickle(refs_path), load_json(instances_path), refs_path, skipped=skipped)
        _write_cache(arrays, refs_path.with_name(names[1 if skipped else 0]), skipped or [])
        return cls(arrays, image_folder, instances_path)

    @classmethod
    def of(cls, refs: Any, instances: Any, source: Path, image_folder: Path) -> "ReferIndex":
        """Index a set that did not come in REFER's files; its pictures' names may be paths, relative to the folder or not."""
        return cls(build_index(refs, instances, source, plain_names=False), image_folder, None)

    def __len__(self) -> int:
        return len(self._arrays.ref_id)

    def refs_of(self, split: str) -> Ints:
        """Return the numbers of a split's refs.

        Raises:
            InputError: If the set has no such split.
        """
        if split not in self._split_names:
            raise InputError(f"this data set has no split {split!r}, only {', '.join(self.splits)}")
        return np.flatnonzero(self._arrays.split == self._split_names.index(split))

    def ref_id(self, ref: int) -> int:
        """Return a ref's id in the file."""
        return int(self._arrays.ref_id[ref])

    def image_id(self, ref: int) -> int:
        """Return the COCO id of a ref's image."""
        return int(self._arrays.image_id[self._arrays.ref_image[ref]])

    def image_ids(self, refs: Ints) -> Ints:
        """Return the COCO ids of the refs' images, one for each ref."""
        ids: Ints = self._arrays.image_id[self._arrays.ref_image[refs]]
        return ids

    def image_path(self, ref: int) -> Path:
        """Return where a ref's photograph should be."""
        return self.image_folder / self._text("file_names", int(self._arrays.ref_image[ref]))

    def image_size(self, ref: int) -> tuple[int, int]:
        """Return height and width of a ref's photograph, as annotated."""
        h, w = self._arrays.image_size[self._arrays.ref_image[ref]]
        return int(h), int(w)

    def sentence_rows(self, ref: int) -> range:
        """Return the numbers of a ref's sentences, for :meth:`sentence`."""
        return range(*_span(self._arrays.ref_sentences_ends, ref))

    def sentence(self, row: int) -> str:
        """Return a sentence."""
        return self._text("sentences", row)

    def sentence_id(self, row: int) -> int:
        """Return a sentence's id in the file."""
        return int(self._arrays.sentence_id[row])

    def mask(self, ref: int) -> Mask:
        """Decode a ref's mask, the union of its polygons or its run lengths: (h, w) uint8, 0 or 1."""
        runs = self._arrays.runs[slice(*_span(self._arrays.ref_runs_ends, ref))]
        polygons = [
            self._arrays.points[slice(*_span(self._arrays.polygons_ends, i))].tolist()
            for i in range(*_span(self._arrays.ref_polygons_ends, ref))
        ]
        return draw_outlines(polygons, runs, *self.image_size(ref))

    def without_pixels(self, refs: Ints) -> Ints:
        """Return those of the refs whose mask has no pixel."""
        drawn = np.diff(self._arrays.ref_polygons_ends, prepend=0) + np.diff(self._arrays.ref_runs_ends, prepend=0)
        none: Ints = refs[drawn[refs] == 0]
        return none

    def check_images(self, refs: Ints) -> None:
        """Look for the refs' photographs.

        Raises:
            InputError: If any is missing; the message names the first few.
        """
        present = {entry.name for entry in os.scandir(self.image_folder)}
        rows = np.unique(self._arrays.ref_image[refs])
        names = [self._text("file_names", int(row)) for row in rows]
        missing = [name for name in names if name not in present and not (self.image_folder / name).is_file()]
        if missing:
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise InputError(
                f"{len(missing)} of {len(rows)} images are missing in {self.image_folder}: {some}. Fetch them again"
            )

    def _text(self, name: str, row: int) -> str:
        blob: Bytes = getattr(self._arrays, name)
        return blob[slice(*_span(getattr(self._arrays, name + "_ends"), row))].tobytes().decode()


def draw_outlines(polygons: Sequence[Sequence[float]], runs: Ints, h: int, w: int) -> Mask:
    """Draw a mask from its run lengths or the union of its polygons, or without a pixel: (h, w) uint8, 0 or 1."""
    if len(runs):
        flat = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs)
        return _turned(flat.reshape(w, h))
    if not polygons:
        return np.zeros((h, w), dtype=np.uint8)
    return _turned(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, h, w))).T)


def _turned(columns: Mask) -> Mask:
    """Return a mask that lies in memory column by column, (w, h), row by row, (h, w)."""
    mask: Mask = cv2.transpose(columns)  # type: ignore[assignment]  # several times as fast as NumPy's copy
    return mask


def _span(ends: Ints, row: int) -> tuple[int, int]:
    return (int(ends[row - 1]) if row else 0), int(ends[row])


# -- Building ---------------------------------------------------------------------------------------------------------------


def build_index(
    refs: Any,
    instances: Any,
    source: Path,
    plain_names: bool = True,
    skipped: list[tuple[str, str]] | None = None,
) -> _Arrays:
    """Join refs and annotations by ``image_id`` and ``ann_id`` into flat arrays.

    Args:
        refs: The unpickled refs file.
        instances: The parsed instances.json.
        source: The refs file's path, for messages.
        plain_names: Whether a picture's file name may not be a path.
        skipped: A list that takes the names of train refs that cannot be used, and why; None: such a ref is an error.

    Raises:
        InputError: If something is missing or of the wrong kind; the message names the ref.
    """
    path = source.with_name("instances.json")
    images, annotations = by_id(instances, "images", path), by_id(instances, "annotations", path)
    if not isinstance(refs, list):
        raise InputError(f"{source} should hold a list of refs, and holds {type(refs).__name__}")
    image_rows: dict[int, int] = {}
    split_rows: dict[str, int] = {}
    texts: dict[str, list[str]] = {"file_names": [], "sentences": []}
    numbers: dict[str, list[Any]] = {field.name: [] for field in fields(_Arrays)}
    points: list[npt.NDArray[np.float64]] = []
    runs: list[Ints] = []
    empty, seen, room = [], set(), LARGEST_INDEX
    for place, ref in enumerate(tqdm(refs, f"indexing {source.name}", unit="ref", mininterval=1, disable=len(refs) < 5000)):
        try:
            image, annotation = images[_key(ref["image_id"])], annotations[_key(ref["ann_id"])]
            if annotation["image_id"] != ref["image_id"]:
                raise InputError(
                    f"its annotation {ref['ann_id']} belongs to image {annotation['image_id']}, not {ref['image_id']}"
                )
            image_id, size = _number(ref["image_id"]), _size(image)
            file_name = (_file_name if plain_names else _string)(image["file_name"])
            polygons, lengths = outlines(annotation["segmentation"], size)
            split = _string(ref["split"])
            left = room - 100 * len(ref["sentences"]) - 4 * (sum(map(len, polygons)) + len(lengths))
            sentences = [(_string(s["sent"]), _number(s["sent_id"])) for s in ref["sentences"] if left >= 0]
            left -= sum(len(sentence) for sentence, _ in sentences)
            if left < 0:
                raise InputError(f"up to it there are more than {LARGEST_INDEX:,} characters and numbers")
            if not sentences:
                raise InputError("it has no sentence")
            ref_id, category = _number(ref["ref_id"]), _number(ref["category_id"])
            if ref_id in seen:
                raise InputError("its ref_id occurs twice, and it would count twice")
        except (InputError, KeyError, TypeError, ValueError, OverflowError, RecursionError, AttributeError) as error:
            reason = f": {told(error)}"
            if not isinstance(error, InputError):
                reason = f" or its image or annotation is not as REFER has them: {type(error).__name__} {told(error)}"
            if skipped is None or not isinstance(ref, dict) or ref.get("split") not in ("train", b"train"):
                raise InputError(f"{source}: ref {_name_of(ref)}{reason}") from error
            told_of = f"ref {_name_of(ref)}{reason}".encode("utf-8", "backslashreplace").decode()
            skipped.append((f"entry {place + 1} of {source.name}", told_of))
            continue
        # Nothing of a ref that is left out may stay behind.
        room = left
        seen.add(ref_id)
        image_row = image_rows.setdefault(ref["image_id"], len(image_rows))
        if image_row == len(numbers["image_id"]):
            numbers["image_id"].append(image_id)
            numbers["image_size"].append(size)
            texts["file_names"].append(file_name)
        numbers["split"].append(split_rows.setdefault(split, len(split_rows)))
        row = {"ref_id": ref_id, "category": category, "ref_image": image_row}
        for name, value in row.items():
            numbers[name].append(value)
        texts["sentences"] += [sentence for sentence, _ in sentences]
        numbers["sentence_id"] += [number for _, number in sentences]
        numbers["ref_sentences_ends"].append(len(texts["sentences"]))
        points += polygons
        numbers["ref_polygons_ends"].append(len(points))
        runs.append(np.array(lengths, dtype=np.int64))
        if not polygons and not lengths:
            empty.append(ref_id)
    if empty:
        log.warning("%s: %d refs have a mask without pixels: ref_id %s", source, len(empty), ", ".join(map(str, empty[:20])))
    arrays: dict[str, Any] = {name: np.array(values, dtype=np.int64) for name, values in numbers.items() if name not in texts}
    for name, strings in {**texts, "split_names": [*split_rows]}.items():
        arrays[name], arrays[name + "_ends"] = _join([np.frombuffer(s.encode(), dtype=np.uint8) for s in strings], np.uint8)
    arrays["points"], arrays["polygons_ends"] = _join(points, np.float64)
    arrays["runs"], arrays["ref_runs_ends"] = _join(runs, np.int64)
    arrays["image_size"] = arrays["image_size"].reshape(-1, 2)
    return _Arrays(**arrays)


def by_id(instances: Any, kind: str, path: Path, number: Callable[[Any], Any] = lambda value: value) -> dict[int, Any]:
    """Return COCO's images or annotations by their ids.

    Raises:
        InputError: If there is none, or an id stands for two different ones.
    """
    found: dict[int, Any] = {}
    try:
        for item in instances[kind]:
            other = found.setdefault(number(_key(item["id"])), item)
            if other is not item and other != item:
                raise InputError(f"{path}: the id {item['id']!r:.40} occurs twice among the {kind}, for different ones")
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} should hold a list {kind!r} of items with an 'id', as COCO's does") from error
    return found


def outlines(segmentation: Any, size: tuple[int, int]) -> tuple[list[npt.NDArray[np.float64]], list[int]]:
    """Return a segmentation's polygons and its run lengths; one of the two is empty.

    Polygons of fewer than three points, of which COCO has some, are dropped.
    """
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        runs = parse_runs(counts) if isinstance(counts, (str, bytes)) else [_number(count) for count in counts]
        if tuple(segmentation["size"]) != size or sum(runs) != size[0] * size[1] or min(runs, default=0) < 0:
            raise InputError(f"its run lengths do not fill its image of {size[0]} x {size[1]} pixels")
        return [], runs if sum(runs[1::2]) else []
    polygons = [np.array(polygon, dtype=np.float64) for polygon in segmentation]
    if any(polygon.ndim != 1 for polygon in polygons):
        raise InputError("a polygon of its mask is not a flat list x, y, x, y, ... of numbers")
    polygons = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if len(polygons) > MOST_POLYGONS:
        raise InputError(f"its mask has {len(polygons):,} polygons, more than {MOST_POLYGONS:,}: give it as run lengths")
    limit = FARTHEST * max(size)
    if any(not np.isfinite(polygon).all() or (abs(polygon) > limit).any() for polygon in polygons):
        raise InputError("a polygon of its mask has points that are not numbers, or far outside the image")
    if sum(abs(np.diff(polygon.reshape(-1, 2), axis=0)).max(axis=1).sum() for polygon in polygons) > LONGEST_OUTLINE:
        raise InputError(f"the sides of its polygons are longer than {LONGEST_OUTLINE:,} pixels in all")
    if polygons and not coco_mask.area(coco_mask.merge(coco_mask.frPyObjects([p.tolist() for p in polygons], *size))):
        return [], []
    return polygons, []


def parse_runs(counts: str | bytes) -> list[int]:
    """Read COCO's compressed run lengths: five bits a character, low ones first, differences to the run before the last."""
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


def _join(parts: Sequence[npt.NDArray[Any]], dtype: type) -> tuple[npt.NDArray[Any], Ints]:
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return np.concatenate([np.zeros(0, dtype=dtype), *parts]).astype(dtype, copy=False), ends


def _string(value: Any) -> str:
    if not isinstance(value, (str, bytes)):
        raise TypeError(f"expected a string, found {type(value).__name__}")
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    text.encode()  # raises where it holds half a character
    return text


def _key(value: Any) -> Any:
    """Return an id if it is one: hashing anything else may take years."""
    if not isinstance(value, (int, str)):
        raise TypeError(f"expected an id, found {type(value).__name__}")
    return _number(value) if isinstance(value, int) else value  # multiples of 2**61 - 1 all have one hash


def _number(value: Any) -> int:
    number = int(value)
    if isinstance(value, float) and value != number:
        raise ValueError(f"{value} is no whole number")
    if not -(2**63) <= number < 2**63:
        raise OverflowError(f"{number} does not fit 64 bits")
    return number


def _size(image: Any) -> tuple[int, int]:
    h, w = _number(image["height"]), _number(image["width"])
    if not (0 < h <= LARGEST_SIDE and 0 < w <= LARGEST_SIDE and h * w <= LARGEST_PICTURE):
        raise InputError(f"its image is said to have {h} x {w} pixels")
    return h, w


def _file_name(value: Any) -> str:
    name = _string(value)
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name or len(name.encode()) > 255:
        raise InputError(f"its image's file name {name[:80]!r} is not a plain name")
    return name


def _name_of(ref: Any) -> str:
    if not isinstance(ref, dict):
        return f"of type {type(ref).__name__}"
    name = ref.get("ref_id", "without ref_id")
    if isinstance(name, str) or (isinstance(name, int) and abs(name) < 2**80):
        return str(name)[:40]
    return f"with {type(name).__name__} for ref_id"


# -- The cache --------------------------------------------------------------------------------------------------------------


def _cache_key(*paths: Path) -> str:
    facts = [(str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]
    return hashlib.sha256(repr((FORMAT, facts)).encode()).hexdigest()[:16]


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crislit"


def _check(arrays: _Arrays) -> None:
    """Raise a ValueError unless an index is one that :func:`build_index` may make: whoever sends data may send a cache."""
    a = arrays
    kinds = {"split_names": np.uint8, "file_names": np.uint8, "sentences": np.uint8, "points": np.float64}
    for field in fields(a):
        array = getattr(a, field.name)
        if array.dtype != kinds.get(field.name, np.int64) or array.ndim != 1 + (field.name == "image_size"):
            raise ValueError(f"{field.name} is no index's")
    per_ref = (a.split, a.ref_image, a.category, a.ref_sentences_ends, a.ref_polygons_ends, a.ref_runs_ends)
    per_image = (a.image_size[:, :1], a.file_names_ends)
    flat = {
        "split_names": len(a.split_names),
        "file_names": len(a.file_names),
        "sentences": len(a.sentences),
        "ref_sentences": len(a.sentence_id),
        "polygons": len(a.points),
        "ref_polygons": len(a.polygons_ends),
        "ref_runs": len(a.runs),
    }
    lengths = [len(x) == len(a.ref_id) for x in per_ref] + [len(x) == len(a.image_id) for x in per_image]
    lengths += [a.image_size.shape[1] == 2, len(a.sentences_ends) == len(a.sentence_id)]
    if not all(lengths):
        raise ValueError("its arrays are not of one length")
    for name, length in flat.items():
        ends = getattr(a, f"{name}_ends")
        if (np.diff(ends, prepend=0) < 0).any() or (ends[-1] if len(ends) else 0) != length:
            raise ValueError(f"{name}_ends do not end where they should")
    for rows, count in ((a.split, len(a.split_names_ends)), (a.ref_image, len(a.image_id))):
        if len(rows) and not 0 <= rows.min() <= rows.max() < count:
            raise ValueError("a ref belongs to nothing")
    for name in _strings(a.file_names, a.file_names_ends):
        _file_name(name)
    for characters, ends in ((a.split_names, a.split_names_ends), (a.sentences, a.sentences_ends)):
        _strings(characters, ends)  # raises where they are no text
    if (np.diff(a.ref_sentences_ends, prepend=0) == 0).any() or (np.diff(a.polygons_ends, prepend=0) < 6).any():
        raise ValueError("a ref has no sentence, or a polygon fewer than three points")
    sides = a.image_size
    if len(sides) and not (0 < sides.min() <= sides.max() <= LARGEST_SIDE and sides.prod(axis=1).max() <= LARGEST_PICTURE):
        raise ValueError("a picture has a size that none has")
    pixels = a.image_size.prod(axis=1)[a.ref_image]
    filled = np.diff(np.concatenate([[0], a.runs.cumsum()])[a.ref_runs_ends], prepend=0)
    if (len(a.runs) and not 0 <= a.runs.min() <= a.runs.max() <= LARGEST_SIDE**2) or ((filled != 0) & (filled != pixels)).any():
        raise ValueError("run lengths do not fill their picture")
    if not (np.abs(a.points) <= FARTHEST * LARGEST_SIDE).all() or (a.polygons_ends % 2).any():
        raise ValueError("polygons have points that are not numbers, or far away")
    steps = np.abs(np.diff(a.points.reshape(-1, 2), axis=0, prepend=0)).max(axis=1)
    steps[np.concatenate([[0], a.polygons_ends[:-1]])[np.diff(a.polygons_ends, prepend=0) > 0] // 2] = 0  # from another polygon
    along = np.concatenate([[0.0], steps.cumsum()])[np.concatenate([[0], a.polygons_ends])[a.ref_polygons_ends] // 2]
    if (np.diff(along, prepend=0) > LONGEST_OUTLINE + 1).any():
        raise ValueError("polygons are too long")


def _strings(characters: Bytes, ends: Ints) -> list[str]:
    return [characters[start:end].tobytes().decode() for start, end in itertools.pairwise([0, *ends.tolist()])]


def _read_cache(path: Path) -> tuple[_Arrays, list[tuple[str, str]]] | None:
    """Return an index and what was left out of it."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = _Arrays(**{field.name: file.get_tensor(field.name) for field in fields(_Arrays)})
            skipped = json.loads((file.metadata() or {}).get("skipped", "[]"))
        _check(arrays)
        return arrays, [(_string(sample), _string(reason)) for sample, reason in skipped]
    except (OSError, SafetensorError, TypeError, ValueError, IndexError, RecursionError) as error:
        log.warning("ignoring the damaged cache %s (%s)", path, error)
        return None


def _write_cache(arrays: _Arrays, beside: Path, skipped: list[tuple[str, str]]) -> None:
    """Write the cache beside the data, or where that is read-only in the user's cache folder; whole or not at all."""
    tensors = {field.name: getattr(arrays, field.name) for field in fields(_Arrays)}
    writable = beside.parent.stat().st_mode & 0o222  # a read-only folder stays untouched, even where root could write
    for path in (beside, _cache_home() / beside.name) if writable else (_cache_home() / beside.name,):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".crislit-") as part:
                save_file(tensors, Path(part) / path.name, {"skipped": json.dumps(skipped)} if skipped else None)
                (Path(part) / path.name).replace(path)
            return
        except (OSError, SafetensorError) as error:  # the latter for want of room
            log.info("cannot cache the index at %s (%s)", path, error)
    log.warning("the index of %s could not be cached, and is made again at every start", beside.parent)
