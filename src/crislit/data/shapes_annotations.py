"""Annotations of drawn scenes, as COCO's instances and REFER's refs."""

import itertools
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crislit.data.expressions import HEIGHT, SHAPES, WIDTH
from crislit.data.scenes import Drawn, bounding_slices, encode_segmentation


class TargetStatistics(NamedTuple):
    """Statistics of a described object.

    Attributes:
        area: Its visible share of the image.
        visible: The visible share of its own area.
        is_alike: Whether another object of its scene has its shape or its color.
    """

    area: float
    visible: float
    is_alike: bool


@dataclass
class Scene:
    """A written image and its entries for the annotation files.

    Attributes:
        file_name: The image's file name.
        annotations: The objects as COCO annotations, without ids.
        described: The index and the sentences of each described object.
        targets: Statistics of each described object.
        is_written: Whether the image was written; False if the disk is full.
    """

    file_name: str
    annotations: list[dict[str, Any]]
    described: list[tuple[int, list[str]]]
    targets: list[TargetStatistics]
    is_written: bool


@dataclass
class AnnotationFiles:
    """Collects the annotations of scenes and writes them as the two files of a REFER data set."""

    _images: list[dict[str, Any]] = field(default_factory=list)
    _annotations: list[dict[str, Any]] = field(default_factory=list)
    _refs: list[dict[str, Any]] = field(default_factory=list)
    _targets: list[TargetStatistics] = field(default_factory=list)
    _sentence_ids: Iterator[int] = field(default_factory=itertools.count)

    def add(self, scene: Scene, split: str) -> None:
        """Add a scene's image, objects and described objects."""
        image_id, first_id = len(self._images) + 1, len(self._annotations) + 1
        self._targets += scene.targets
        self._images.append(
            {"id": image_id, "file_name": scene.file_name, "height": HEIGHT, "width": WIDTH}
        )
        self._annotations += [
            {"id": ann_id, "image_id": image_id, **annotation}
            for ann_id, annotation in enumerate(scene.annotations, start=first_id)
        ]
        for i, sentences in scene.described:
            entries = [
                {"tokens": s.split(), "raw": s, "sent": s, "sent_id": next(self._sentence_ids)}
                for s in sentences
            ]
            self._refs.append(
                {
                    "ref_id": len(self._refs),
                    "ann_id": first_id + i,
                    "image_id": image_id,
                    "category_id": scene.annotations[i]["category_id"],
                    "file_name": f"{scene.file_name[:-4]}_{first_id + i}.jpg",
                    "split": split,
                    "sent_ids": [entry["sent_id"] for entry in entries],
                    "sentences": entries,
                }
            )

    def write(self, folder: Path, refs_file: str, info: dict[str, Any]) -> str:
        """Write ``instances.json`` and the refs file, and return the set's statistics in words.

        Args:
            folder: The data set's folder, which does not exist yet.
            refs_file: Name of the refs file.
            info: What ``instances.json`` states of itself.
        """
        difficulty = _describe_difficulty(self._targets, self._refs)
        instances = {
            "info": {**info, "difficulty": difficulty},
            "images": self._images,
            "annotations": self._annotations,
            "categories": [
                {"id": i, "name": shape, "supercategory": "shape"}
                for i, shape in enumerate(SHAPES, start=1)
            ],
        }
        folder.mkdir()
        (folder / "instances.json").write_text(json.dumps(instances))
        (folder / refs_file).write_bytes(pickle.dumps(self._refs, protocol=2))
        return difficulty


def to_annotation(drawn: Drawn) -> dict[str, Any]:
    """Return an object as a COCO annotation, without ids."""
    rows, columns = bounding_slices(drawn.visible)
    return {
        "category_id": SHAPES.index(drawn.shape) + 1,
        "segmentation": encode_segmentation(drawn.visible),
        "area": int(np.count_nonzero(drawn.visible)),
        "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
        "iscrowd": 0,
    }


def to_target(drawn: list[Drawn], i: int) -> TargetStatistics:
    """Return the statistics of a scene's object."""
    target, others = drawn[i], drawn[:i] + drawn[i + 1 :]
    pixels = np.count_nonzero(target.visible)
    is_alike = any(d.shape == target.shape or d.color == target.color for d in others)
    visible = pixels / np.count_nonzero(target.full)
    return TargetStatistics(pixels / (WIDTH * HEIGHT), visible, is_alike)


def _describe_difficulty(targets: list[TargetStatistics], refs: list[dict[str, Any]]) -> str:
    # Part of instances.json: changing it changes the files of all sets.
    areas = [target.area for target in targets]
    visible = np.array([target.visible for target in targets])
    is_alike = [target.is_alike for target in targets]
    words = [len(sentence["tokens"]) for ref in refs for sentence in ref["sentences"]]
    return (
        f"{len(areas)} targets, {len(words)} sentences of {np.mean(words):.1f} words; a target "
        f"covers {np.median(areas):.1%} of the image (median), at least {visible.min():.0%} of "
        f"each is visible and {np.mean(visible < 0.99):.0%} are partly hidden; "
        f"{np.mean(is_alike):.0%} share their shape or color with another object"
    )
