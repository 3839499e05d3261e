"""Collects custom data as REFER's refs and annotations."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crislit.data.custom.files import FileFinder
from crislit.data.custom.label_studio_runs import decode_runs
from crislit.data.custom.values import check_polygons, parse_path
from crislit.data.refer_annotations import parse_segmentation
from crislit.errors import InputError, counted
from crislit.io import MaskValue, parse_mask_value, read_mask, read_upright_size


@dataclass(frozen=True)
class Problem:
    """A line that cannot be used.

    Attributes:
        line: Line number from 1, or the number of whatever ``CustomData.unit`` names.
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
        unit: What ``line`` numbers: line, item, annotation or task.
        mask_values: How many mask images have which values, in words.
        notes: Remarks on how the data were read.
    """

    refs: list[dict[str, Any]]
    instances: dict[str, list[dict[str, Any]]]
    problems: list[Problem]
    folder: Path
    unit: str = "line"
    mask_values: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class RefBuilder:
    """Collects refs with their images and annotations.

    Attributes:
        folder: The folder that names of files are relative to.
        unit: What numbers of problems count, see ``CustomData``.
        mask_value: What marks objects in mask images, unless a sample says otherwise.
    """

    folder: Path
    unit: str = "line"
    mask_value: MaskValue | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _images: dict[str, dict[str, Any]] = field(default_factory=dict)  # by their names on disk
    _named: dict[str, dict[str, Any]] = field(default_factory=dict)  # by their names in the list
    _unusable: dict[str, str] = field(default_factory=dict)  # reasons, by image
    _annotations: list[dict[str, Any]] = field(default_factory=list)
    _refs: list[dict[str, Any]] = field(default_factory=list)
    _mask_values: Counter[str] = field(default_factory=Counter)
    _sentence_ids: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._files = FileFinder(self.folder)

    def image(self, name: str) -> dict[str, Any]:
        """Return an image's entry, with the size read from the file's header.

        Raises:
            InputError: If there is no such image, or it cannot be used.
        """
        if name in self._unusable:
            raise InputError(self._unusable[name])
        if name not in self._named:
            try:
                self._named[name] = self._read_image(self._files.find(name) or name)
            except InputError as error:
                is_escaped = re.search(r"[\b\f\n\r\t]", name)  # "images\new.png" in JSON
                hint = r"; in JSON, write / or \\ for a backslash" if is_escaped else ""
                self._unusable[name] = f"{error}{hint}"
                raise InputError(self._unusable[name]) from error
        return self._named[name]

    def has_file(self, name: str) -> bool:
        """Whether there is a file of this name, however it is spelled."""
        return self._files.find(name) is not None

    def _read_image(self, name: str) -> dict[str, Any]:
        if name not in self._images:
            height, width = read_upright_size(self.folder / name)
            self._images[name] = {
                "id": len(self._images) + 1,
                "file_name": name,
                "height": height,
                "width": width,
            }
        return self._images[name]

    def segmentation(self, sample: dict[str, Any], image: dict[str, Any]) -> Any:
        """Return a sample's mask as a COCO segmentation.

        Raises:
            InputError: If it has none or several, or one that cannot be used.
        """
        forms = [key for key in ("mask", "polygons", "rle") if sample.get(key) is not None]
        if len(forms) != 1:
            raise InputError(
                f"expected one of mask, polygons and rle, found {' and '.join(forms) or 'none'}"
            )
        segmentation = sample[forms[0]]
        size = image["height"], image["width"]
        value = parse_mask_value(sample.get("mask_value"))
        if value is not None and forms[0] != "mask":
            raise InputError(f"mask_value is for mask, not for {forms[0]}")
        if forms[0] == "mask":
            name = parse_path(sample, "mask")
            path = self.folder / (self._files.find(name) or name)
            value = self.mask_value if value is None else value
            segmentation, values = read_mask(path, size, value)
            self._mask_values[values] += 1
        elif forms[0] == "rle" and isinstance(segmentation, list) and not _has_parts(segmentation):
            segmentation = decode_runs(segmentation, size)
        return self.check_segmentation(segmentation, image)

    def check_segmentation(self, segmentation: Any, image: dict[str, Any]) -> Any:
        """Return the segmentation if it fits its image and is not empty.

        Raises:
            InputError: If it does not, or is empty.
        """
        try:
            if isinstance(segmentation, list) and not _has_parts(segmentation):
                check_polygons(segmentation)
            polygons, runs = parse_segmentation(segmentation, (image["height"], image["width"]))
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"its mask is neither COCO polygons nor run lengths ({error})"
            ) from error
        if not polygons and not runs:
            raise InputError(_explain_empty(segmentation, image))
        return segmentation

    def add(
        self,
        image: dict[str, Any],
        segmentation: Any,
        sentences: list[tuple[int, str]],
        split: str,
    ) -> None:
        """Add a ref; each sentence comes with its line number."""
        number = len(self._refs) + 1
        self._annotations.append(
            {"id": number, "image_id": image["id"], "segmentation": segmentation}
        )
        self._refs.append(
            {
                "ref_id": number,
                "ann_id": number,
                "image_id": image["id"],
                "category_id": 1,
                "split": split,
                "sentences": [
                    {"sent": sentence, "sent_id": next(self._sentence_ids), "line": line}
                    for line, sentence in sentences
                ],
            }
        )

    def build(self) -> CustomData:
        """Return the collected data, with problems sorted by line."""
        respelled = self._files.respelled
        notes = [
            f"{counted(len(respelled), 'name of a file is', 'names of files are')} spelled "
            f"differently on disk, for example {name} as {found}"
            for name, found in list(respelled.items())[:1]
        ]
        return CustomData(
            refs=self._refs,
            instances={"images": list(self._images.values()), "annotations": self._annotations},
            problems=sorted(self.problems, key=lambda problem: problem.line),
            folder=self.folder,
            unit=self.unit,
            mask_values=dict(self._mask_values),
            notes=[*self.notes, *notes],
        )


def _explain_empty(segmentation: Any, image: dict[str, Any]) -> str:
    """Return why a mask marks no pixel: its polygons may lie outside of the image."""
    is_polygons = isinstance(segmentation, list) and not _has_parts(segmentation)
    points = [x for polygon in segmentation for x in polygon] if is_polygons else []
    ranges = [(min(values), max(values)) for values in (points[::2], points[1::2]) if values]
    sides = image["width"], image["height"]
    if any(high <= 0 or low >= side for (low, high), side in zip(ranges, sides, strict=False)):
        (left, right), (top, bottom) = ranges
        return (
            f"its polygons lie outside of the image of {sides[0]} x {sides[1]} pixels (width x "
            f"height), at x {left:g} to {right:g} and y {top:g} to {bottom:g}: were they drawn on "
            "an image of another size?"
        )
    return "its mask marks no pixel of the image"


def _has_parts(segmentation: list[Any]) -> bool:
    """Whether a segmentation has parts with run lengths of their own, which are united."""
    return any(isinstance(part, dict) for part in segmentation)
