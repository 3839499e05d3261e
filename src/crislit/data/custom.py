"""Custom data: converts a JSON-lines file, or COCO annotations with a CSV, to refs and annotations.

Each line of a JSON-lines file describes one object of an image:

    {"image": "photos/7.jpg", "sentences": ["the man in red"], "split": "train", "mask": "7.png"}

``sentence`` may replace ``sentences``, and ``polygons`` ([[x, y, x, y, ...], ...]) or ``rle``
({"size", "counts"} as in COCO) may replace ``mask``. Paths are relative to the file. The default
split is train.
"""

import csv
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crislit.data.refer_annotations import index_by_id, parse_segmentation
from crislit.errors import InputError
from crislit.io.dataset_images import read_upright_size
from crislit.io.files import read_json
from crislit.io.masks import read_mask
from crislit.transforms.tokenizer import has_words

KEYS = {"image", "sentence", "sentences", "split", "mask", "polygons", "rle"}
COLUMNS = ("ann_id", "sentence", "split")


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
    if images is not None:
        raise InputError(
            "dataset.images is for COCO files; image paths in a JSON-lines file are relative to it"
        )
    return read_json_lines(path)


def read_json_lines(path: Path) -> CustomData:
    """Read a JSON-lines file.

    Raises:
        InputError: If the file is missing, empty or not of the expected format.
    """
    builder = _RefBuilder(path.parent)
    title = f"reading {path.name}"
    for number, line in tqdm(_read_lines(path), title, unit="line", mininterval=1, disable=None):
        split = None
        try:
            sample = _parse_sample(line)
            split = _parse_split(sample.get("split"))
            image = builder.image(_parse_path(sample, "image"))
            segmentation = builder.segmentation(sample, image)
            sentences = _parse_sentences(sample)
            builder.add([number] * len(sentences), image, segmentation, sentences, split)
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
    content = read_json(_require_file(instances))
    images = index_by_id(content, "images", instances, int)
    annotations = index_by_id(content, "annotations", instances, int)
    builder = _RefBuilder(folder)
    for ann_id, group in _group_sentences(table, annotations, builder.problems).items():
        try:
            annotation = annotations[ann_id]
            image_id = _parse_id(annotation.get("image_id"))
            if image_id not in images:
                raise InputError(
                    f"annotation {ann_id} belongs to image {annotation.get('image_id')!r}, "
                    "which is not listed"
                )
            listed = images[image_id]
            image = builder.image(_parse_path(listed, "file_name"))
            for side in ("height", "width"):
                if listed.get(side, image[side]) != image[side]:
                    raise InputError(
                        f"{image['file_name']} has {side} {image[side]}, expected {listed[side]} "
                        f"as in {instances.name}"
                    )
            segmentation = builder.check_segmentation(annotation.get("segmentation"), image)
            builder.add(group.lines, image, segmentation, group.sentences, group.split)
        except (InputError, ValueError) as error:
            builder.problems += [Problem(line, str(error), group.split) for line in group.lines]
    return builder.build()


@dataclass(frozen=True)
class _Sentences:
    """The sentences of one annotation, with their line numbers."""

    split: str
    lines: list[int] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)


def _group_sentences(
    table: Path, annotations: Container[int], problems: list[Problem]
) -> dict[int, _Sentences]:
    """Return a CSV's sentences by annotation, and append the rows that cannot be used."""
    groups: dict[int, _Sentences] = {}
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
                message = f"a sentence spans several lines, is a quote missing? Found {sentence!r}"
                raise InputError(message[:200])
            group = groups.setdefault(ann_id, _Sentences(split))
            if split != group.split:
                raise InputError(
                    f"annotation {ann_id} has split {split!r} here, and {group.split!r} in "
                    f"line {group.lines[0]}"
                )
            group.lines.append(number)
            group.sentences.append(sentence)
        except (InputError, ValueError) as error:
            problems.append(Problem(number, str(error), split))
    return groups


class _RefBuilder:
    """Collects refs with their images and annotations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: dict[str, dict[str, Any]] = {}
        self.unusable: dict[str, str] = {}
        self.annotations: list[dict[str, Any]] = []
        self.refs: list[dict[str, Any]] = []
        self.problems: list[Problem] = []
        self.sentences = 0

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
            image_id = len(self.images) + 1
            entry = {"id": image_id, "file_name": name, "height": height, "width": width}
            self.images[name] = entry
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
            path = self.folder / _parse_path(sample, "mask")
            segmentation = read_mask(path, (image["height"], image["width"]))
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
        lines: list[int],
        image: dict[str, Any],
        segmentation: Any,
        sentences: list[str],
        split: str,
    ) -> None:
        """Add a ref; ``lines`` has the line number of each sentence."""
        number = len(self.refs) + 1
        self.annotations.append(
            {"id": number, "image_id": image["id"], "segmentation": segmentation}
        )
        entries = [
            {"sent": sentence, "sent_id": self.sentences + i, "line": line}
            for i, (line, sentence) in enumerate(zip(lines, sentences, strict=True))
        ]
        self.sentences += len(entries)
        ref = {"ref_id": number, "ann_id": number, "image_id": image["id"], "category_id": 1}
        self.refs.append({**ref, "split": split, "sentences": entries})

    def build(self) -> CustomData:
        """Return the collected data, with problems sorted by line."""
        instances = {"images": list(self.images.values()), "annotations": self.annotations}
        problems = sorted(self.problems, key=lambda problem: problem.line)
        return CustomData(self.refs, instances, problems, self.folder)


def check_polygons(polygons: list[Any]) -> None:
    """Raise an :class:`InputError` unless each polygon is a flat list of coordinate pairs."""
    for polygon in polygons:
        is_flat = isinstance(polygon, list) and all(
            isinstance(x, (int, float)) and not isinstance(x, bool) for x in polygon
        )
        if not is_flat or len(polygon) % 2:
            message = f"expected each polygon as a list x, y, x, y, ..., found {polygon!r}"
            raise InputError(message[:200])


def _require_file(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path} not found")
    return path


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the non-empty lines of a file with their numbers."""
    try:
        text = _require_file(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty, expected one JSON object per line")
    if len(lines) > 1 and _is_json(text):
        raise InputError(
            f"{path} is one JSON document over several lines: expected one JSON object per line, "
            "or COCO instances with a CSV of sentences (see check_data --help)"
        )
    yield from lines


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV file with their line numbers."""
    try:
        with _require_file(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or ()
            if not {"ann_id", "sentence"} <= set(header):
                raise InputError(
                    f"{path} should have the columns {', '.join(COLUMNS)}, "
                    f"found {', '.join(header) or 'none'}"
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


def _parse_id(value: Any) -> int | None:
    """Return an id as a number; COCO files may also contain it as text."""
    return int(value) if isinstance(value, (int, str)) and str(value).isdecimal() else None


def _parse_path(sample: dict[str, Any], key: str) -> str:
    value = sample.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f"{key} must be a path, found {value!r}")
    return value


def _parse_sentences(sample: dict[str, Any]) -> list[str]:
    sentence, sentences = sample.get("sentence"), sample.get("sentences")
    if (sentence is None) == (sentences is None):
        raise InputError("expected either sentence or sentences")
    if sentences is None:
        sentences = [sentence]
    is_list = isinstance(sentences, list) and len(sentences) > 0
    if not is_list or not all(isinstance(s, str) and has_words(s) for s in sentences):
        raise InputError(f"a sentence must be non-empty text, found {sentences!r}"[:200])
    try:
        "".join(sentences).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"a sentence has an unpaired surrogate: {error}"[:200]) from error
    return sentences


def _parse_split(value: Any) -> str:
    if value is None:
        return "train"
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"split must be a name such as train, val or test, found {value!r}")
    return value.strip()
