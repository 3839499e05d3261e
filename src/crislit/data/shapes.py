"""The embedded data sets ``shapes``, ``shapes+`` and ``gshapes``, written in the REFER layout.

They mirror RefCOCO, RefCOCO+ and G-Ref, so that training and evaluation run on any machine. Scenes
are drawn from a seed with NumPy alone, and annotated as in COCO: polygons, or run lengths for
objects with holes. Other readers of the REFER format can read them, too.
"""

import itertools
import json
import logging
import os
import pickle
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from crislit.data.expressions import HEIGHT, SHAPES, WIDTH, Style, describe
from crislit.data.scenes import Drawn, bounding_slices, draw_scene, encode_segmentation, is_eligible
from crislit.data.workers import init_worker
from crislit.errors import InputError, require
from crislit.io import Image

log = logging.getLogger(__name__)
VERSION = 1
"""Version of the definition. Results of different versions are not comparable."""


@dataclass(frozen=True)
class EmbeddedSet:
    """The definition of an embedded data set.

    Attributes:
        style: The kind of sentences.
        splits: Number of scenes per split.
        refs: Described objects per scene, (in training, in evaluation).
        sentences: Sentences per described object.
    """

    style: Style
    splits: dict[str, int]
    refs: tuple[int, int]
    sentences: int


_SPLITS = {"train": 3000, "val": 300, "testA": 300, "testB": 300}
SETS = {
    "shapes": EmbeddedSet("absolute", _SPLITS, (4, 2), 3),
    "shapes+": EmbeddedSet("attributes", _SPLITS, (4, 2), 3),
    "gshapes": EmbeddedSet("relations", {"train": 3000, "val": 300, "test": 300}, (3, 2), 2),
}


def make_scene(
    seed: int, name: str, split: str, number: int
) -> tuple[Image, list[Drawn], list[tuple[int, list[str]]]]:
    """Draw one scene and describe at least two of its objects.

    Args:
        seed: Seed of the data set.
        name: ``shapes``, ``shapes+`` or ``gshapes``.
        split: The scene's split.
        number: The scene's number within its split.

    Returns:
        The image, its objects, and the index and the sentences of each described object.
    """
    spec = SETS[name]
    rng = np.random.default_rng(
        [seed, VERSION, list(SETS).index(name), list(spec.splits).index(split), number]
    )
    max_refs = spec.refs[split != "train"]
    while True:
        image, drawn = draw_scene(rng, unlike=split == "testB")
        things = [d.seen() for d in drawn]
        described: list[tuple[int, list[str]]] = []
        for i in rng.permutation(len(things)):
            if len(described) < max_refs and is_eligible(things, things[i], split):
                sentences = describe(rng, things, things[i], spec.style, spec.sentences)
                if len(sentences) == spec.sentences:
                    described.append((int(i), sentences))
        if len(described) >= 2:
            return image, drawn, described


def write_shapes(
    root: Path, name: str, seed: int = 0, scenes: dict[str, int] | None = None
) -> Path:
    """Write an embedded data set unless it exists, and return its REFER root.

    Args:
        root: Folder of all data; the data set's folder is ``<root>/<name>-v<version>``.
        name: ``shapes``, ``shapes+`` or ``gshapes``.
        seed: Seed of the scenes; part of the folder's name unless 0.
        scenes: Number of scenes per split, as part of the folder's name. None: the definition's.

    Raises:
        InputError: If the folder cannot be written.
    """
    require(name in SETS, f"unknown embedded data set {name!r}, expected one of {', '.join(SETS)}")
    version = f"{name}-v{VERSION}-seed{seed}" if seed else f"{name}-v{VERSION}"
    target = root / "-".join([version, *map(str, (scenes or {}).values())])
    if target.is_dir():
        return target
    log.info("drawing the embedded data set %s to %s (once)", name, target)
    try:
        root.mkdir(parents=True, exist_ok=True)
        part = root / f".{target.name}-{secrets.token_hex(4)}"
        part.mkdir()
    except OSError as error:
        raise InputError(
            f"cannot write the embedded data set below {root} ({error.strerror}): "
            "set data_root to a writable folder"
        ) from error
    try:
        _write_all(part, name, seed, scenes or SETS[name].splits)
        part.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process has written the same files
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


class TargetStatistics(NamedTuple):
    """Statistics of a described object.

    Attributes:
        area: Its visible share of the image.
        visible: The visible share of its own area.
        is_alike: Whether another object of its scene has its shape or its colour.
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


SCENES_PER_WORKER = 200
"""Scenes for which starting another process is worthwhile."""


class _SceneWriter(Dataset[Scene]):
    """Draws and writes scenes by index; scenes are independent, so workers can share them."""

    def __init__(self, folder: Path, name: str, seed: int, counts: dict[str, int]) -> None:
        self.folder, self.name, self.seed = folder, name, seed
        self.numbers = [(split, i) for split, count in counts.items() for i in range(count)]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Scene:
        image, drawn, described = make_scene(self.seed, self.name, *self.numbers[index])
        file_name = f"COCO_train2014_{index + 1:012d}.jpg"
        return Scene(
            file_name=file_name,
            annotations=[_to_annotation(d) for d in drawn],
            described=described,
            targets=[_to_target(drawn, i) for i, _ in described],
            is_written=cv2.imwrite(
                str(self.folder / file_name), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90]
            ),
        )


def _write_all(root: Path, name: str, seed: int, counts: dict[str, int]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    refs: list[dict[str, Any]] = []
    targets: list[TargetStatistics] = []
    sent_ids = itertools.count()
    folder = root / "images" / "train2014"
    folder.mkdir(parents=True)
    _link_mscoco(root / "images")
    scenes = _SceneWriter(folder, name, seed, counts)
    loader = DataLoader(
        scenes,
        batch_size=None,
        num_workers=min(os.cpu_count() or 1, len(scenes) // SCENES_PER_WORKER),
        worker_init_fn=init_worker,
        # Its own generator, so that writing a set does not advance the global one.
        generator=torch.Generator().manual_seed(0),
    )
    for image_id, scene in enumerate(
        tqdm(loader, desc=f"writing {name}", unit="scene", mininterval=0.5, disable=None), start=1
    ):
        require(
            scene.is_written,
            f"cannot write {folder / scene.file_name}: is the disk full? "
            "Free some space and start again",
        )
        targets += scene.targets
        images.append(
            {"id": image_id, "file_name": scene.file_name, "height": HEIGHT, "width": WIDTH}
        )
        first_id = len(annotations) + 1
        annotations += [
            {"id": ann_id, "image_id": image_id, **annotation}
            for ann_id, annotation in enumerate(scene.annotations, start=first_id)
        ]
        for i, sentences in scene.described:
            entries = [
                {"tokens": s.split(), "raw": s, "sent": s, "sent_id": next(sent_ids)}
                for s in sentences
            ]
            refs.append(
                {
                    "ref_id": len(refs),
                    "ann_id": first_id + i,
                    "image_id": image_id,
                    "category_id": scene.annotations[i]["category_id"],
                    "file_name": f"{scene.file_name[:-4]}_{first_id + i}.jpg",
                    "split": scenes.numbers[image_id - 1][0],
                    "sent_ids": [entry["sent_id"] for entry in entries],
                    "sentences": entries,
                }
            )
    difficulty = _describe_difficulty(targets, refs)
    instances = {
        "info": {"version": VERSION, "seed": seed, "difficulty": difficulty},
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": i, "name": shape, "supercategory": "shape"}
            for i, shape in enumerate(SHAPES, start=1)
        ],
    }
    (root / name).mkdir()
    (root / name / "instances.json").write_text(json.dumps(instances))
    (root / name / "refs(crislit).p").write_bytes(pickle.dumps(refs, protocol=2))
    log.info("%s, version %d: %s", name, VERSION, difficulty)


def _link_mscoco(images: Path) -> None:
    """Offer the images also where the REFER project's code expects them, without copying them."""
    link = images / "mscoco" / "images" / "train2014"
    link.parent.mkdir(parents=True)
    try:
        link.symlink_to(Path("..", "..", "train2014"), target_is_directory=True)
    except (OSError, NotImplementedError) as error:  # Windows without developer mode, FAT
        log.info("no link from %s to train2014 (%s): point other readers at it", link, error)


def _to_annotation(drawn: Drawn) -> dict[str, Any]:
    """Return an object as a COCO annotation, without ids."""
    rows, columns = bounding_slices(drawn.visible)
    return {
        "category_id": SHAPES.index(drawn.shape) + 1,
        "segmentation": encode_segmentation(drawn.visible),
        "area": int(np.count_nonzero(drawn.visible)),
        "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
        "iscrowd": 0,
    }


def _to_target(drawn: list[Drawn], i: int) -> TargetStatistics:
    """Return the statistics of a scene's object."""
    target, others = drawn[i], drawn[:i] + drawn[i + 1 :]
    pixels = np.count_nonzero(target.visible)
    is_alike = any(d.shape == target.shape or d.colour == target.colour for d in others)
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
        f"covers {np.median(areas):.1%} of the picture (median), at least {visible.min():.0%} of "
        f"each is visible and {np.mean(visible < 0.99):.0%} are partly hidden; "
        f"{np.mean(is_alike):.0%} share their shape or colour with another object"
    )
