"""ReferIndex: a compact index of REFER annotations (RefCOCO, RefCOCO+, G-Ref).

``instances.json`` and ``refs(...).p`` are read once, and what a model needs of them goes into a few
flat arrays, cached on disk. Masks are decoded on demand.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crislit.data.refer_annotations import Ints, Mask, rasterize
from crislit.data.refer_build import build_index
from crislit.data.refer_cache import (
    CachedIndex,
    IndexArrays,
    SkippedSample,
    cache_key,
    cache_places,
    digest_arrays,
    read_cache,
    write_cache,
)
from crislit.data.wording import SPLIT_ORDER, find_similar
from crislit.errors import InputError, require, see
from crislit.io import load_pickle, read_json

log = logging.getLogger(__name__)

IMAGE_FOLDERS = ("images/train2014", "images/mscoco/images/train2014")
TREE = """  {root}/
    images/train2014/COCO_train2014_*.jpg   (or images/mscoco/images/train2014/)
    {folder}/instances.json
    {folder}/{refs}"""
HOW_TO_GET = """In crislit's repository, `python scripts/download_refer.py FOLDER` downloads all of
it. By hand: COCO's train2014 images from cocodataset.org, and refcoco, refcoco+ and refcocog of the
REFER project (github.com/lichengunc/refer), in this layout. Then set data_root=FOLDER or
CRISLIT_DATA=FOLDER."""


class ReferIndex:
    """One data set: its refs, their sentences, images and masks.

    Refs are numbered from 0 in the order of the file. ``open`` and ``of`` make its arrays.

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
            f"{TREE.format(root=root, folder=folder, refs=refs)}\n{HOW_TO_GET}"
            f"{see('missing-data')}",
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
        """Index refs and annotations in memory.

        Args:
            refs: The content of a refs file.
            instances: The content of ``instances.json``; file names of images may be paths.
            source: The file that errors name.
            image_folder: The folder of the images.
            skipped: Training refs that were left out, and why.

        Raises:
            InputError: If refs or annotations are not valid.
        """
        arrays = build_index(refs, instances, source, plain_names=False)
        return cls(arrays, image_folder, None, skipped)

    def __len__(self) -> int:
        return len(self._arrays.ref_id)

    def split_refs(self, split: str) -> Ints:
        """Return the numbers of a split's refs.

        Raises:
            InputError: If there is no such split.
        """
        if split not in self._split_names:
            similar = find_similar(split, self.splits)
            is_misspelled = split in SPLIT_ORDER and similar not in SPLIT_ORDER
            hint = (
                f": is {similar!r} misspelled in it?"
                if is_misspelled
                else f": did you mean {similar!r}?"
            )
            raise InputError(
                f"this data set has no split {split!r}, only {', '.join(self.splits)}"
                f"{hint if similar else ''}{see('no-val') if split in ('train', 'val') else ''}"
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
        """Return the numbers of a ref's sentences, for ``sentence``."""
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
            f"Fetch them again{see('missing-images')}",
        )

    def _text(self, name: str, row: int) -> str:
        start, end = _span(getattr(self._arrays, f"{name}_ends"), row)
        return bytes(getattr(self._arrays, name)[start:end]).decode()


def _span(ends: Ints, row: int) -> tuple[int, int]:
    return (int(ends[row - 1]) if row else 0), int(ends[row])
