"""Custom data: converts a JSON-lines file, or COCO annotations with a CSV, to refs and annotations.

Each line of a JSON-lines file describes one object of an image:

    {"image": "photos/7.jpg", "sentences": ["the man in red"], "split": "train", "mask": "7.png"}

``sentence`` may replace ``sentences``, and ``polygons`` ([[x, y, x, y, ...], ...]) or ``rle``
({"size", "counts"} as in COCO) may replace ``mask``. Paths are relative to the file. The default
split is train.
"""

import contextlib
import csv
import itertools
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crislit.data.refer_annotations import index_by_id, parse_segmentation
from crislit.errors import InputError, require
from crislit.io import read_json, read_mask, read_upright_size
from crislit.transforms import has_words

KEYS = {"image", "sentence", "sentences", "split", "mask", "polygons", "rle"}


@dataclass(frozen=True)
class Problem:
    """A line that cannot be used.

    Attributes:
        line: Line number, from 1.
        reason: Why the line cannot be used.
        split: The line's split, None if unknown.
    """

    line: int
    reason: str
    split: str | None = None


@dataclass(frozen=True)
class CustomData:
    """Custom data in the format of REFER's two files.

    Attributes:
        refs: The content of a refs file; each sentence also has its ``line``.
        instances: The content of ``instances.json``; file names are paths.
        problems: Lines that were left out.
        folder: The folder that file names are relative to.
    """

    refs: list[dict[str, Any]]
    instances: dict[str, list[dict[str, Any]]]
    problems: list[Problem]
    folder: Path


def read_custom(file: str, sentences: str | None = None, images: str | None = None) -> CustomData:
    """Read custom data.

    Args:
        file: A JSON-lines file, or a COCO instances file.
        sentences: The CSV of a COCO file's sentences. None: ``file`` is a JSON-lines file.
        images: The folder of a COCO file's images. None: the folder of ``file``.

    Raises:
        InputError: If a file is missing or is not of the expected format.
    """
    path = Path(file).expanduser()
    if sentences is not None:
        folder = path.parent if images is None else Path(images).expanduser()
        return read_coco(path, Path(sentences).expanduser(), folder)
    require(
        images is None,
        "dataset.images is for COCO files; image paths in a JSON-lines file are relative to it",
    )
    return read_json_lines(path)


def read_json_lines(path: Path) -> CustomData:
    """Read a JSON-lines file.

    Raises:
        InputError: If the file is missing, empty or not of the expected format.
    """
    builder = _RefBuilder(path.parent)
    for number, line in tqdm(
        _read_lines(path), f"reading {path.name}", unit="line", mininterval=1, disable=None
    ):
        split = None
        try:
            sample = _parse_sample(line)
            split = _parse_split(sample.get("split"))
            image = builder.image(_parse_path(sample, "image"))
            segmentation = builder.segmentation(sample, image)
            sentences = [(number, sentence) for sentence in _parse_sentences(sample)]
            builder.add(image, segmentation, sentences, split)
        except (InputError, ValueError, RecursionError) as error:
            builder.problems.append(Problem(number, str(error), split))
    return builder.build()


def read_coco(instances: Path, table: Path, folder: Path) -> CustomData:
    """Read a COCO instances file and a CSV of sentences: ``ann_id``, ``sentence``, ``split``.

    Args:
        instances: The instances file.
        table: The CSV. Rows with the same ``ann_id`` are sentences of the same object; ``split``
            is optional.
        folder: The folder of the images.

    Raises:
        InputError: If a file is missing or is not of the expected format.
    """
    require(instances.is_file(), f"{instances} not found")
    content = read_json(instances)
    images = index_by_id(content, "images", instances, int)
    annotations = index_by_id(content, "annotations", instances, int)
    builder = _RefBuilder(folder)
    for ann_id, (split, sentences) in _group_rows(table, annotations, builder.problems).items():
        try:
            annotation = annotations[ann_id]
            image_id = str(annotation.get("image_id"))  # COCO files may also contain it as text
            if not image_id.isdecimal() or int(image_id) not in images:
                raise InputError(
                    f"annotation {ann_id} belongs to image {annotation.get('image_id')!r}, "
                    "which is not listed"
                )
            listed = images[int(image_id)]
            image = builder.image(_parse_path(listed, "file_name"))
            for side in ("height", "width"):
                if listed.get(side, image[side]) != image[side]:
                    raise InputError(
                        f"{image['file_name']} has {side} {image[side]}, expected {listed[side]} "
                        f"as in {instances.name}"
                    )
            segmentation = builder.check_segmentation(annotation.get("segmentation"), image)
            builder.add(image, segmentation, sentences, split)
        except (InputError, ValueError) as error:
            builder.problems += [Problem(line, str(error), split) for line, _ in sentences]
    return builder.build()


def _group_rows(
    table: Path, annotations: Container[int], problems: list[Problem]
) -> dict[int, tuple[str, list[tuple[int, str]]]]:
    """Return each annotation's split, and its sentences with their line numbers.

    Rows of the CSV that cannot be used are appended to the problems.
    """
    groups: dict[int, tuple[str, list[tuple[int, str]]]] = {}
    for number, row in _read_rows(table):
        split = None
        try:
            split = _parse_split(row.get("split") or None)
            if not (row["ann_id"] or "").strip().isdecimal():
                raise InputError(f"ann_id must be a number, found {row['ann_id']!r}")
            ann_id = int(row["ann_id"])
            if ann_id not in annotations:
                raise InputError(f"annotation {ann_id} is not in the instances file")
            sentence = _parse_sentences({"sentence": row["sentence"] or ""})[0]
            if len(sentence.splitlines()) > 1:
                raise InputError(
                    f"a sentence spans several lines, is a quote missing? Found {sentence!r}"[:200]
                )
            first_split, sentences = groups.setdefault(ann_id, (split, []))
            if split != first_split:
                raise InputError(
                    f"annotation {ann_id} has split {split!r} here, and {first_split!r} in "
                    f"line {sentences[0][0]}"
                )
            sentences.append((number, sentence))
        except (InputError, ValueError) as error:
            problems.append(Problem(number, str(error), split))
    return groups


@dataclass
class _RefBuilder:
    """Collects refs with their images and annotations."""

    folder: Path
    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)  # reasons, by image
    annotations: list[dict[str, Any]] = field(default_factory=list)
    refs: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    sentence_ids: Iterator[int] = field(default_factory=itertools.count)

    def image(self, name: str) -> dict[str, Any]:
        """Return an image's entry, with the size read from the file's header."""
        if name in self.unusable:
            raise InputError(self.unusable[name])
        if name not in self.images:
            try:
                height, width = read_upright_size(self.folder / name)
            except InputError as error:
                self.unusable[name] = str(error)
                raise
            self.images[name] = {
                "id": len(self.images) + 1,
                "file_name": name,
                "height": height,
                "width": width,
            }
        return self.images[name]

    def segmentation(self, sample: dict[str, Any], image: dict[str, Any]) -> Any:
        """Return a sample's mask as a COCO segmentation."""
        forms = [key for key in ("mask", "polygons", "rle") if sample.get(key) is not None]
        if len(forms) != 1:
            raise InputError(
                f"expected one of mask, polygons and rle, found {' and '.join(forms) or 'none'}"
            )
        segmentation = sample[forms[0]]
        if forms[0] == "mask":
            segmentation = read_mask(
                self.folder / _parse_path(sample, "mask"), (image["height"], image["width"])
            )
        return self.check_segmentation(segmentation, image)

    def check_segmentation(self, segmentation: Any, image: dict[str, Any]) -> Any:
        """Return the segmentation if it fits its image and is not empty."""
        try:
            if isinstance(segmentation, list):
                check_polygons(segmentation)
            polygons, runs = parse_segmentation(segmentation, (image["height"], image["width"]))
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"its mask is neither COCO polygons nor run lengths ({error})"
            ) from error
        if not polygons and not runs:
            raise InputError("its mask marks no pixel of the image")
        return segmentation

    def add(
        self,
        image: dict[str, Any],
        segmentation: Any,
        sentences: list[tuple[int, str]],
        split: str,
    ) -> None:
        """Add a ref; each sentence comes with its line number."""
        number = len(self.refs) + 1
        self.annotations.append(
            {"id": number, "image_id": image["id"], "segmentation": segmentation}
        )
        self.refs.append(
            {
                "ref_id": number,
                "ann_id": number,
                "image_id": image["id"],
                "category_id": 1,
                "split": split,
                "sentences": [
                    {"sent": sentence, "sent_id": next(self.sentence_ids), "line": line}
                    for line, sentence in sentences
                ],
            }
        )

    def build(self) -> CustomData:
        """Return the collected data, with problems sorted by line."""
        return CustomData(
            refs=self.refs,
            instances={"images": list(self.images.values()), "annotations": self.annotations},
            problems=sorted(self.problems, key=lambda problem: problem.line),
            folder=self.folder,
        )


def check_polygons(polygons: list[Any]) -> None:
    """Raise an :class:`InputError` unless each polygon is a flat list of coordinate pairs."""
    for polygon in polygons:
        is_flat = isinstance(polygon, list) and all(
            isinstance(x, (int, float)) and not isinstance(x, bool) for x in polygon
        )
        if not is_flat or len(polygon) % 2:
            raise InputError(
                f"expected each polygon as a list x, y, x, y, ..., found {polygon!r}"[:200]
            )


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the non-empty lines of a file with their numbers."""
    require(path.is_file(), f"{path} not found")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    require(lines, f"{path} is empty, expected one JSON object per line")
    require(
        len(lines) == 1 or not _is_json(text),
        f"{path} is one JSON document over several lines: expected one JSON object per line, "
        "or COCO instances with a CSV of sentences (see check_data --help)",
    )
    yield from lines


def _is_json(text: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text)
        return True
    return False


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV file with their line numbers."""
    require(path.is_file(), f"{path} not found")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or ()
            require(
                {"ann_id", "sentence"} <= set(header),
                f"{path} should have the columns ann_id, sentence, split, "
                f"found {', '.join(header) or 'none'}",
            )
            yield from ((reader.line_num, row) for row in reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8: {error}") from error


def _parse_sample(line: str) -> dict[str, Any]:
    sample = json.loads(line)
    if not isinstance(sample, dict):
        raise InputError(f"expected an object, {{...}}, found {type(sample).__name__}")
    if {"images", "annotations"} <= set(sample):
        raise InputError(
            "this is a COCO instances file, which needs a CSV of sentences: see check_data --help"
        )
    if unknown := sorted(set(sample) - KEYS):
        raise InputError(f"unknown key {unknown[0]!r}; the keys are {', '.join(sorted(KEYS))}")
    return sample


def _parse_path(sample: dict[str, Any], key: str) -> str:
    value = sample.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f"{key} must be a path, found {value!r}")
    return value


def _parse_sentences(sample: dict[str, Any]) -> list[str]:
    sentence, sentences = sample.get("sentence"), sample.get("sentences")
    if (sentence is None) == (sentences is None):
        raise InputError("expected either sentence or sentences")
    sentences = [sentence] if sentences is None else sentences
    is_list = isinstance(sentences, list) and len(sentences) > 0
    if not is_list or not all(isinstance(s, str) and has_words(s) for s in sentences):
        raise InputError(f"a sentence must be non-empty text, found {sentences!r}"[:200])
    try:
        "".join(sentences).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"a sentence has an unpaired surrogate: {error}"[:200]) from error
    return sentences


def _parse_split(value: Any) -> str:
    split = "train" if value is None else value
    if not isinstance(split, str) or not split.strip():
        raise InputError(f"split must be a name such as train, val or test, found {split!r}")
    return split.strip()
