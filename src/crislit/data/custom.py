"""Somebody's own data: a JSON-lines file, or a COCO instances file with a table of sentences, as refs and annotations.

A line of the JSON-lines file is an object of a picture, with what is said of it:

    {"image": "photos/7.jpg", "sentences": ["the man in red"], "split": "train", "mask": "masks/7.png"}

``sentence`` may stand for ``sentences``, and ``polygons`` ([[x, y, x, y, ...], ...]) or ``rle`` ({"size", "counts"} as COCO has
them) for ``mask``. Paths are relative to the file. The split is train where none is given.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from crislit.data.refer import by_id, load_json, outlines
from crislit.data.tokenizer import has_words
from crislit.errors import InputError
from crislit.picture import open_file, read_exif, strips

KEYS = {"image", "sentence", "sentences", "split", "mask", "polygons", "rle"}
COLUMNS = ("ann_id", "sentence", "split")
ORIENTATION = 0x0112
"""EXIF's tag."""


@dataclass(frozen=True)
class Problem:
    """A line that cannot be used.

    Attributes:
        line: Its number, from 1.
        reason: Why.
        split: What the line is for, None if that cannot be known.
    """

    line: int
    reason: str
    split: str | None = None


@dataclass(frozen=True)
class OwnData:
    """What was read, in the shape of REFER's two files.

    Attributes:
        refs: As the refs file has them, each sentence with its ``line``.
        instances: As ``instances.json`` has them; file names are paths.
        problems: Lines left out.
        folder: What the pictures' names are relative to.
    """

    refs: list[dict[str, Any]]
    instances: dict[str, list[dict[str, Any]]]
    problems: list[Problem]
    folder: Path


def read(file: str, sentences: str | None = None, images: str | None = None) -> OwnData:
    """Read somebody's own data.

    Args:
        file: A JSON-lines file; or a COCO instances file, and then
        sentences: the table of its annotations' sentences, and
        images: the folder of its pictures, if that is not the file's own.

    Raises:
        InputError: If a file is missing, or is none of its kind, or nothing in it can be used.
    """
    path = Path(file).expanduser()
    if sentences is None and images is not None:
        raise InputError("dataset.images is for COCO files; in a JSON-lines file, pictures' paths are relative to it")
    if sentences is None:
        return read_lines(path)
    return read_coco(path, Path(sentences).expanduser(), None if images is None else Path(images).expanduser())


def read_lines(path: Path) -> OwnData:
    """Read a JSON-lines file.

    Raises:
        InputError: If there is no such file, or it holds no line.
    """
    found = _Builder(path.parent)
    for number, line in tqdm(_lines(path), f"reading {path.name}", unit="line", mininterval=1, disable=None):
        split = None
        try:
            sample = json.loads(line)
            if not isinstance(sample, dict):
                raise InputError(f"expected an object, {{...}}, found {type(sample).__name__}")
            if {"images", "annotations"} <= set(sample):
                raise InputError("this is a COCO instances file, which needs a table of sentences: see check_data --help")
            if unknown := sorted(set(sample) - KEYS):
                raise InputError(f"unknown key {unknown[0]!r}; the keys are {', '.join(sorted(KEYS))}")
            split = _split(sample.get("split"))
            image = found.image(_text(sample, "image"))
            outline = found.outline(sample, image)
            sentences = _sentences(sample)
            found.add([number] * len(sentences), image, outline, sentences, split)
        except (InputError, ValueError, RecursionError) as error:
            found.problems.append(Problem(number, str(error), split))
    return found.result()


def read_coco(instances: Path, table: Path, images: Path | None = None) -> OwnData:
    """Read a COCO instances file with a CSV table of its annotations' sentences: ``ann_id``, ``sentence``, ``split``.

    Args:
        instances: The instances file.
        table: The table; rows of the same annotation are several sentences of it. ``split`` may be left out: train.
        images: Folder of the pictures; None: the instances file's.

    Raises:
        InputError: If a file is missing, or is none of its kind.
    """
    content = load_json(_existing(instances))
    pictures, annotations = by_id(content, "images", instances, int), by_id(content, "annotations", instances, int)
    found = _Builder(images or instances.parent)
    grouped: dict[int, tuple[str, list[int], list[str]]] = {}
    for number, row in _rows(table):
        split = None
        try:
            split = _split(row.get("split") or None)
            if not (row["ann_id"] or "").strip().isdecimal():
                raise InputError(f"ann_id must be a number, found {row['ann_id']!r}")
            annotation = int(row["ann_id"])
            if annotation not in annotations:
                raise InputError(f"there is no annotation {annotation} in {instances.name}")
            sentence = _sentences({"sentence": row["sentence"] or ""})[0]
            if len(sentence.splitlines()) > 1:
                raise InputError(f"a sentence over several lines: is a quotation mark missing? Found {sentence!r}"[:200])
            of, lines, sentences = grouped.setdefault(annotation, (split, [], []))
            if of != split:
                raise InputError(f"annotation {annotation} is of split {of!r} in line {lines[0]}, and of {split!r} here")
            lines.append(number)
            sentences.append(sentence)
        except (InputError, ValueError) as error:
            found.problems.append(Problem(number, str(error), split))
    for annotation, (split, lines, sentences) in grouped.items():
        try:
            about = annotations[annotation]
            picture = _number(about.get("image_id"))
            if picture not in pictures:
                raise InputError(f"annotation {annotation} belongs to image {about.get('image_id')!r}, which is not listed")
            listed = pictures[picture]
            image = found.image(_text(listed, "file_name"))
            for side in ("height", "width"):
                if listed.get(side, image[side]) != image[side]:
                    name = image["file_name"]
                    raise InputError(f"{name} has {side} {image[side]}, and its annotations are for {listed[side]}")
            found.add(lines, image, found.drawn(about.get("segmentation"), image), sentences, split)
        except (InputError, ValueError) as error:
            found.problems += [Problem(number, str(error), split) for number in lines]
    return found.result()


class _Builder:
    """Collects refs and what they refer to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: dict[str, dict[str, Any]] = {}
        self.unusable: dict[str, str] = {}
        self.annotations: list[dict[str, Any]] = []
        self.refs: list[dict[str, Any]] = []
        self.problems: list[Problem] = []
        self.sentences = 0

    def image(self, name: str) -> dict[str, Any]:
        """Return a picture's entry, its size read from the file's head."""
        if name in self.unusable:
            raise InputError(self.unusable[name])
        if name not in self.images:
            try:
                height, width = picture_size(self.folder / name)
            except InputError as error:
                self.unusable[name] = str(error)
                raise
            self.images[name] = {"id": len(self.images) + 1, "file_name": name, "height": height, "width": width}
        return self.images[name]

    def outline(self, sample: dict[str, Any], image: dict[str, Any]) -> Any:
        """Return a line's mask as COCO's segmentation."""
        given = [name for name in ("mask", "polygons", "rle") if sample.get(name) is not None]
        if len(given) != 1:
            raise InputError(f"expected one of mask, polygons and rle, found {' and '.join(given) or 'none'}")
        if given[0] != "mask":
            return self.drawn(sample[given[0]], image)
        mask = read_mask(self.folder / _text(sample, "mask"), (image["height"], image["width"]))
        return self.drawn(mask, image)

    def drawn(self, segmentation: Any, image: dict[str, Any]) -> Any:
        """Check that a segmentation fits its picture and marks something."""
        try:
            if isinstance(segmentation, list):
                check_polygons(segmentation)
            polygons, runs = outlines(segmentation, (image["height"], image["width"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"its outline is neither polygons nor run lengths as COCO has them ({error})") from error
        if not polygons and not runs:
            raise InputError("its mask marks no pixel of the picture")
        return segmentation

    def add(self, lines: list[int], image: dict[str, Any], segmentation: Any, sentences: list[str], split: str) -> None:
        """Take a ref in, and the line that each of its sentences comes from."""
        number = len(self.refs) + 1
        self.annotations.append({"id": number, "image_id": image["id"], "segmentation": segmentation})
        told = [
            {"sent": sentence, "sent_id": self.sentences + i, "line": line}
            for i, (line, sentence) in enumerate(zip(lines, sentences, strict=True))
        ]
        self.sentences += len(told)
        ref = {"ref_id": number, "ann_id": number, "image_id": image["id"], "category_id": 1, "split": split}
        self.refs.append({**ref, "sentences": told})

    def result(self) -> OwnData:
        """Return everything, problems in the order of their lines."""
        instances = {"images": list(self.images.values()), "annotations": self.annotations}
        problems = sorted(self.problems, key=lambda problem: problem.line)
        return OwnData(self.refs, instances, problems, self.folder)


def check_polygons(polygons: list[Any]) -> None:
    """Raise an :class:`InputError` unless each is a flat list of coordinates in pairs."""
    for polygon in polygons:
        flat = isinstance(polygon, list) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in polygon)
        if not flat or len(polygon) % 2:
            raise InputError(f"a polygon is a list x, y, x, y, ... of numbers, found {polygon!r}"[:200])


def picture_size(path: Path) -> tuple[int, int]:
    """Return a picture's (height, width).

    Raises:
        InputError: If it cannot be read; or is stored rotated, since which way its mask is meant cannot be known; or is
            transparent in places, since what is to be seen there cannot be known.
    """
    try:
        with open_file(path) as picture:
            known = picture.format == "JPEG" or "exif" in picture.info  # elsewhere PIL reads all pixels to look for it
            turned = read_exif(picture).get(ORIENTATION, 1) if known else 1
            width, height = picture.size
            transparent = see_through(picture)
    except FileNotFoundError as error:
        raise InputError(f"there is no picture {path}") from error
    except Exception as error:  # PIL's readers raise whatever damaged bytes lead them to
        raise InputError(f"{path} is no picture that can be read") from error
    if transparent:
        raise InputError(f"{path} has transparent pixels: lay it over a background, and save it without")
    if turned != 1:
        raise InputError(f"{path} is stored turned (EXIF orientation {turned}): save it upright, as its mask is")
    return height, width


def read_mask(path: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Read a picture as a mask, in COCO's run lengths.

    A palette of colours marks by any entry but the first, a picture of 0 and 1 by 1, any other by what is brighter than half.

    Raises:
        InputError: If it cannot be read, or is not of this (height, width).
    """
    try:
        with open_file(path) as picture:
            if (picture.height, picture.width) != size:  # before memory is taken for what a few bytes speak of
                raise InputError(
                    f"the mask {path} has {(picture.height, picture.width)} pixels (height, width), its picture {size}"
                )
            palette = picture.mode == "P" and coloured(picture)
            values = np.array(picture if palette or picture.mode == "1" else picture.convert("L"))
            transparent = picture.mode != "P" and see_through(picture)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is no mask {path}") from error
    except Exception as error:  # PIL's readers raise whatever damaged bytes lead them to
        raise InputError(f"{path} is no mask that can be read") from error
    if transparent:
        raise InputError(f"the mask {path} has transparent pixels: save it in black and white, without")
    marked = values > 0 if palette or values.max() <= 1 else values > 127
    if not marked.any():
        found = ", ".join(map(str, np.unique(values)[:8]))
        raise InputError(
            f"the mask {path} marks no pixel: its values are {found}; what marks is above 127, or 1 beside 0 alone"
        )
    runs = coco_mask.encode(np.asfortranarray(marked, dtype=np.uint8))
    return {"size": list(size), "counts": runs["counts"].decode()}


def coloured(picture: PIL.Image.Image) -> bool:
    """Whether the entries of a palette that are used are not just several greys, whose brightness says what is marked."""
    used = np.unique(np.array(picture.convert("RGB")).reshape(-1, 3), axis=0)
    return len(used) < 2 or bool((used.min(axis=1) < used.max(axis=1)).any())


def see_through(picture: PIL.Image.Image) -> bool:
    """Whether a picture is transparent in places."""
    if not picture.has_transparency_data:
        return False
    return any(np.asarray(strip.convert("RGBA").getchannel("A")).min() < 255 for _, strip in strips(picture))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    return path


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = _existing(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError(f"{path} holds no line: expected one JSON object a line")
    if len(lines) > 1 and _is_json(text):
        raise InputError(
            f"{path} is one JSON document over several lines: expected one JSON object a line, or COCO's instances with a "
            "table of sentences (check_data --help)"
        )
    yield from lines


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with _existing(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if not {"ann_id", "sentence"} <= set(reader.fieldnames or ()):
                found = ", ".join(reader.fieldnames or ()) or "nothing"
                raise InputError(f"{path} should begin with the columns {', '.join(COLUMNS)}, and begins with {found}")
            yield from ((reader.line_num, row) for row in reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no table in CSV and UTF-8: {error}") from error


def _number(value: Any) -> int | None:
    """Return an id, which COCO files write as a number and some programs as text."""
    return int(value) if isinstance(value, (int, str)) and str(value).isdecimal() else None


def _text(sample: dict[str, Any], key: str) -> str:
    value = sample.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f"{key} must be a path, found {value!r}")
    return value


def _sentences(sample: dict[str, Any]) -> list[str]:
    one, several = sample.get("sentence"), sample.get("sentences")
    if (one is None) == (several is None):
        raise InputError("expected either sentence or sentences")
    sentences = [one] if several is None else several
    if not isinstance(sentences, list) or not sentences or not all(isinstance(s, str) and has_words(s) for s in sentences):
        raise InputError(f"a sentence must be text that is not empty, found {sentences!r}"[:200])
    try:
        "".join(sentences).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"a sentence holds half a character: {error}"[:200]) from error
    return sentences


def _split(value: Any) -> str:
    if value is None:
        return "train"
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"split must be a name such as train, val or test, found {value!r}")
    return value.strip()
