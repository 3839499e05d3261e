"""ReferIndex: a compact index of REFER annotations (RefCOCO, RefCOCO+, G-Ref).

``instances.json`` and ``refs(...).p`` are read once, and what a model needs of them goes into a few
flat arrays, cached on disk. Masks are decoded on demand.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from crislit.data.refer_annotations import (
    Ints,
    Mask,
    index_by_id,
    name_of_ref,
    parse_file_name,
    parse_id,
    parse_image_id,
    parse_integer,
    parse_segmentation,
    parse_size,
    parse_text,
    rasterize,
)
from crislit.data.refer_cache import (
    MAX_INDEX,
    CachedIndex,
    IndexArrays,
    SkippedSample,
    cache_key,
    cache_places,
    digest_arrays,
    join_arrays,
    read_cache,
    write_cache,
)
from crislit.errors import InputError, first_line, require
from crislit.io import load_pickle, read_json

log = logging.getLogger(__name__)

IMAGE_FOLDERS = ("images/train2014", "images/mscoco/images/train2014")
SPLIT_ORDER = ("train", "val", "test", "testA", "testB")
TREE = """  {root}/
    images/train2014/COCO_train2014_*.jpg   (or images/mscoco/images/train2014/)
    {folder}/instances.json
    {folder}/{refs}"""
HOW_TO_GET = """In crislit's repository, `python scripts/download_refer.py FOLDER` downloads all of
it. By hand: COCO's train2014 images from cocodataset.org, and refcoco, refcoco+ and refcocog of the
REFER project (github.com/lichengunc/refer), in this layout. Then set data_root=FOLDER or
CRISLIT_DATA=FOLDER."""
MALFORMED = (KeyError, TypeError, ValueError, OverflowError, RecursionError, AttributeError)
"""Raised by annotations that are not as REFER's; InputError is a ValueError."""


class ReferIndex:
    """One data set: its refs, their sentences, images and masks.

    Refs are numbered from 0 in the order of the file. Use :meth:`open` or :meth:`of`.

    Attributes:
        image_folder: The folder of the images.
        annotations_path: ``instances.json``; None for custom data.
        splits: Names of the splits, in the order train, val, test, testA, testB, others.
        skipped: Training refs that were left out, and why.
        digest: 16 hexadecimal characters that change with any ref, split, sentence, outline, image
            size or file name, but not with the path of the data. The images' pixels do not count.
    """

    def __init__(
        self,
        arrays: IndexArrays,
        image_folder: Path,
        annotations_path: Path | None,
        skipped: Sequence[SkippedSample] = (),
        digest: str | None = None,
    ) -> None:
        self._arrays, self.skipped = arrays, list(skipped)
        self.digest = digest_arrays(arrays) if digest is None else digest
        self.image_folder, self.annotations_path = image_folder, annotations_path
        rows = range(len(arrays.split_names_ends))
        self._split_names = [self._text("split_names", row) for row in rows]
        usual = [name for name in SPLIT_ORDER if name in self._split_names]
        self.splits = (*usual, *sorted(set(self._split_names) - set(usual)))

    @classmethod
    def open(cls, root: Path, folder: str, refs: str, skip_unusable: bool = False) -> "ReferIndex":
        """Open a data set, from its cache if that is up to date.

        Args:
            root: The folder that holds ``images/`` and the data set's folder.
            folder: The data set's folder, such as ``refcoco``.
            refs: Its refs file, such as ``refs(unc).p``.
            skip_unusable: Leave out training refs that cannot be used, instead of raising an
                error. Such an index has a cache of its own.

        Raises:
            InputError: If a file is missing or cannot be used.
        """
        instances_path, refs_path = root / folder / "instances.json", root / folder / refs
        folders = [root / name for name in IMAGE_FOLDERS]
        image_folder = next(filter(Path.is_dir, folders), folders[0])
        missing = [str(path) for path in (instances_path, refs_path) if not path.is_file()]
        missing += [] if image_folder.is_dir() else [str(image_folder)]
        require(
            not missing,
            f"{folder} is not at {root}: {', '.join(missing)} not found. Expected\n"
            f"{TREE.format(root=root, folder=folder, refs=refs)}\n{HOW_TO_GET}",
        )
        stem = f".{refs_path.stem}.{cache_key(instances_path, refs_path)}"
        complete, incomplete = f"{stem}.crislit", f"{stem}.skip.crislit"
        for name in (complete, incomplete) if skip_unusable else (complete,):
            for path in cache_places(refs_path.parent, name):
                if cached := read_cache(path):
                    return cls(
                        cached.arrays, image_folder, instances_path, cached.skipped, cached.digest
                    )
        log.info("indexing %s (once)", refs_path)
        skipped: list[SkippedSample] = []
        arrays = build_index(
            load_pickle(refs_path),
            read_json(instances_path),
            refs_path,
            skipped=skipped if skip_unusable else None,
        )
        index = cls(arrays, image_folder, instances_path, skipped)
        cached = CachedIndex(arrays, index.digest, skipped)
        write_cache(cached, refs_path.parent, incomplete if skipped else complete)
        return index

    @classmethod
    def of(
        cls,
        refs: Any,
        instances: Any,
        source: Path,
        image_folder: Path,
        skipped: Sequence[SkippedSample] = (),
    ) -> "ReferIndex":
        """Index refs and annotations in memory; file names of images may be paths."""
        arrays = build_index(refs, instances, source, plain_names=False)
        return cls(arrays, image_folder, None, skipped)

    def __len__(self) -> int:
        return len(self._arrays.ref_id)

    def split_refs(self, split: str) -> Ints:
        """Return the numbers of a split's refs.

        Raises:
            InputError: If there is no such split.
        """
        require(
            split in self._split_names,
            f"this data set has no split {split!r}, only {', '.join(self.splits)}",
        )
        return np.flatnonzero(self._arrays.split == self._split_names.index(split))

    def ref_id(self, ref: int) -> int:
        """Return a ref's id in the file."""
        return int(self._arrays.ref_id[ref])

    def image_id(self, ref: int) -> int:
        """Return the COCO id of a ref's image."""
        return int(self._arrays.image_id[self._arrays.ref_image[ref]])

    def image_ids(self, refs: Ints) -> Ints:
        """Return the COCO ids of the refs' images, one per ref."""
        ids: Ints = self._arrays.image_id[self._arrays.ref_image[refs]]
        return ids

    def image_path(self, ref: int) -> Path:
        """Return the path of a ref's image."""
        return self.image_folder / self._text("file_names", int(self._arrays.ref_image[ref]))

    def image_size(self, ref: int) -> tuple[int, int]:
        """Return the annotated (height, width) of a ref's image."""
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
        """Return a ref's mask, the union of its polygons or its run lengths: (h, w) uint8, 0, 1."""
        a = self._arrays
        runs = a.runs[slice(*_span(a.ref_runs_ends, ref))]
        rows = range(*_span(a.ref_polygons_ends, ref))
        polygons = [a.points[slice(*_span(a.polygons_ends, row))].tolist() for row in rows]
        return rasterize(polygons, runs, *self.image_size(ref))

    def without_pixels(self, refs: Ints) -> Ints:
        """Return those of the refs whose mask is empty."""
        ends = self._arrays.ref_polygons_ends + self._arrays.ref_runs_ends
        empty: Ints = refs[np.diff(ends, prepend=0)[refs] == 0]
        return empty

    def check_images(self, refs: Ints) -> None:
        """Check that the refs' images exist.

        Raises:
            InputError: If any is missing, with the first few names.
        """
        present = {entry.name for entry in os.scandir(self.image_folder)}
        rows = np.unique(self._arrays.ref_image[refs])
        names = [self._text("file_names", int(row)) for row in rows]
        missing = [
            name
            for name in names
            if name not in present and not (self.image_folder / name).is_file()
        ]
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        require(
            not missing,
            f"{len(missing)} of {len(rows)} images are missing in {self.image_folder}: {some}. "
            "Fetch them again",
        )

    def _text(self, name: str, row: int) -> str:
        start, end = _span(getattr(self._arrays, f"{name}_ends"), row)
        return bytes(getattr(self._arrays, name)[start:end]).decode()


def _span(ends: Ints, row: int) -> tuple[int, int]:
    return (int(ends[row - 1]) if row else 0), int(ends[row])


# -- Building


@dataclass(frozen=True)
class _Ref:
    """A parsed ref, with its image and annotation."""

    ref_id: int
    split: str
    image_id: int
    size: tuple[int, int]
    file_name: str
    polygons: list[npt.NDArray[np.float64]]
    runs: Ints
    sentences: list[tuple[str, int]]  # text and id

    @property
    def length(self) -> int:
        """Its share of :data:`MAX_INDEX`."""
        characters = sum(100 + len(sentence) for sentence, _ in self.sentences)
        return characters + 4 * (sum(map(len, self.polygons)) + len(self.runs))


def build_index(
    refs: Any,
    instances: Any,
    source: Path,
    plain_names: bool = True,
    skipped: list[SkippedSample] | None = None,
) -> IndexArrays:
    """Join refs and annotations by ``image_id`` and ``ann_id`` into flat arrays.

    Args:
        refs: The unpickled refs file.
        instances: The parsed ``instances.json``.
        source: Path of the refs file, for messages.
        plain_names: Whether file names of images must not be paths.
        skipped: Receives the training refs that cannot be used, and why. None: they are an error.

    Raises:
        InputError: If something is missing or malformed, with the ref's id.
    """
    path = source.with_name("instances.json")
    images = index_by_id(instances, "images", path)
    annotations = index_by_id(instances, "annotations", path)
    require(
        isinstance(refs, list),
        f"{source} should hold a list of refs, and holds {type(refs).__name__}",
    )
    parse_name = parse_file_name if plain_names else parse_text
    parsed: dict[int, _Ref] = {}
    length = 0
    for place, item in enumerate(
        tqdm(refs, f"indexing {source.name}", unit="ref", mininterval=1, disable=len(refs) < 5000)
    ):
        try:
            ref = _parse_ref(item, images, annotations, parse_name, MAX_INDEX - length)
            if ref.ref_id in parsed:
                raise InputError("its ref_id occurs twice, and it would count twice")
        except MALFORMED as error:
            malformed = f" or its image or annotation is malformed: {type(error).__name__}"
            problem = ":" if isinstance(error, InputError) else malformed
            message = f"ref {name_of_ref(item)}{problem} {first_line(error)}"
            is_train = isinstance(item, dict) and item.get("split") in ("train", b"train")
            if skipped is None or not is_train:
                raise InputError(f"{source}: {message}") from error
            printed = message.encode("utf-8", "backslashreplace").decode()
            skipped.append(SkippedSample(f"entry {place + 1} of {source.name}", printed))
        else:
            length += ref.length
            parsed[ref.ref_id] = ref
    empty = [str(i) for i, ref in parsed.items() if not ref.polygons and not len(ref.runs)]
    if empty:
        ids = ", ".join(empty[:20])
        log.warning("%s: %d refs have an empty mask: ref_id %s", source, len(empty), ids)
    return _to_arrays(list(parsed.values()))


def _parse_ref(
    ref: Any,
    images: Mapping[int | str, Any],
    annotations: Mapping[int | str, Any],
    parse_name: Callable[[Any], str],
    room: int,
) -> _Ref:
    image_key, ann_id = parse_id(ref["image_id"], "image_id"), parse_id(ref["ann_id"], "ann_id")
    image, annotation = images[image_key], annotations[ann_id]
    if parse_id(annotation["image_id"], "image_id of its annotation") != image_key:
        raise InputError(
            f"its annotation {ann_id} belongs to image {annotation['image_id']}, not {image_key}"
        )
    size = parse_size(image)
    polygons, runs = parse_segmentation(annotation["segmentation"], size)
    # A few bytes can name one sentence a million times.
    sentences = ref["sentences"] if 100 * len(ref["sentences"]) <= room else []
    parsed = _Ref(
        ref_id=parse_integer(ref["ref_id"], "ref_id"),
        split=parse_text(ref["split"]),
        image_id=parse_image_id(image_key),
        size=size,
        file_name=parse_name(image["file_name"]),
        polygons=polygons,
        runs=np.array(runs, dtype=np.int64),
        sentences=[(parse_text(s["sent"]), parse_integer(s["sent_id"])) for s in sentences],
    )
    if len(sentences) < len(ref["sentences"]) or parsed.length > room:
        raise InputError(f"up to it there are more than {MAX_INDEX:,} characters and numbers")
    if not sentences:
        raise InputError("it has no sentence")
    return parsed


def _to_arrays(refs: list[_Ref]) -> IndexArrays:
    images = {ref.image_id: ref for ref in refs}  # one ref of each image
    image_rows = {key: row for row, key in enumerate(images)}
    split_rows = {split: row for row, split in enumerate(dict.fromkeys(ref.split for ref in refs))}
    numbers = {
        "split": [split_rows[ref.split] for ref in refs],
        "ref_id": [ref.ref_id for ref in refs],
        "ref_image": [image_rows[ref.image_id] for ref in refs],
        "ref_sentences_ends": np.cumsum([len(ref.sentences) for ref in refs]),
        "ref_polygons_ends": np.cumsum([len(ref.polygons) for ref in refs]),
        "image_id": [image.image_id for image in images.values()],
        "image_size": np.reshape([image.size for image in images.values()], (-1, 2)),
        "sentence_id": [number for ref in refs for _, number in ref.sentences],
    }
    texts = {
        "split_names": list(split_rows),
        "file_names": [image.file_name for image in images.values()],
        "sentences": [sentence for ref in refs for sentence, _ in ref.sentences],
    }
    arrays: dict[str, Any] = {name: np.array(v, dtype=np.int64) for name, v in numbers.items()}
    for name, strings in texts.items():
        encoded = [np.frombuffer(string.encode(), dtype=np.uint8) for string in strings]
        arrays[name], arrays[name + "_ends"] = join_arrays(encoded, np.uint8)
    polygons = [polygon for ref in refs for polygon in ref.polygons]
    arrays["points"], arrays["polygons_ends"] = join_arrays(polygons, np.float64)
    arrays["runs"], arrays["ref_runs_ends"] = join_arrays([ref.runs for ref in refs], np.int64)
    return IndexArrays(**arrays)
