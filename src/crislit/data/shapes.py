"""The embedded data sets ``shapes``, ``shapes+`` and ``gshapes``: small scenes in the REFER layout, written by a seed.

They mirror RefCOCO, RefCOCO+ and G-Ref, so that everything that reads, trains on or evaluates those runs on any machine.
Pictures are drawn with NumPy alone and annotated as COCO does (polygons; run lengths where an object has a hole).
"""

import json
import logging
import os
import pickle
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from crislit.data.expressions import HEIGHT, SHAPES, WIDTH, Style, describe
from crislit.data.scenes import Drawn, bounding_slices, draw_scene, encode_segmentation, is_eligible
from crislit.data.workers import init_worker
from crislit.errors import InputError
from crislit.io.images import Image

log = logging.getLogger(__name__)
VERSION = 1
"""Raised whenever the definition changes; results of different versions are never compared."""


@dataclass(frozen=True)
class EmbeddedSet:
    """What distinguishes the three sets.

    Attributes:
        style: What its sentences may use.
        splits: Number of scenes per split.
        refs: Described objects per scene, (in training, in evaluation).
        sentences: Sentences per described object.
    """

    style: Style
    splits: dict[str, int]
    refs: tuple[int, int]
    sentences: int


SETS = {
    "shapes": EmbeddedSet(
        "absolute", {"train": 3000, "val": 300, "testA": 300, "testB": 300}, (4, 2), 3
    ),
    "shapes+": EmbeddedSet(
        "attributes", {"train": 3000, "val": 300, "testA": 300, "testB": 300}, (4, 2), 3
    ),
    "gshapes": EmbeddedSet("relations", {"train": 3000, "val": 300, "test": 300}, (3, 2), 2),
}


def make_scene(
    seed: int, name: str, split: str, number: int
) -> tuple[Image, list[Drawn], list[tuple[int, list[str]]]]:
    """Draw one scene and describe some of its objects, at least two.

    Returns:
        The picture, its objects, and for each described object its number among them and its sentences.
    """
    spec = SETS[name]
    rng = np.random.default_rng(
        [seed, VERSION, list(SETS).index(name), list(spec.splits).index(split), number]
    )
    wanted = spec.refs[split != "train"]
    while True:
        image, drawn = draw_scene(rng, unlike=split == "testB")
        things = [d.seen() for d in drawn]
        described: list[tuple[int, list[str]]] = []
        for i in rng.permutation(len(things)):
            if len(described) < wanted and is_eligible(things, things[i], split):
                sentences = describe(rng, things, things[i], spec.style, spec.sentences)
                if len(sentences) == spec.sentences:
                    described.append((int(i), sentences))
        if len(described) >= 2:
            return image, drawn, described


def write_shapes(
    root: Path, name: str, seed: int = 0, scenes: dict[str, int] | None = None
) -> Path:
    """Write an embedded data set below a folder unless it is there, and return the set's REFER root.

    Args:
        root: Folder of all data; the set goes to ``<root>/<name>-v<version>``.
        name: ``shapes``, ``shapes+`` or ``gshapes``.
        seed: Another seed gives other scenes of the same kind, in a folder of its own.
        scenes: Number of scenes per split, if not the set's own (the folder's name then says so).

    Raises:
        InputError: If the folder cannot be written.
    """
    if name not in SETS:
        raise InputError(f"there is no embedded data set {name!r}, only {', '.join(SETS)}")
    counts = scenes or SETS[name].splits
    suffix = (f"-seed{seed}" if seed else "") + (
        "-" + "-".join(map(str, counts.values())) if scenes else ""
    )
    target = root / f"{name}-v{VERSION}{suffix}"
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=root, prefix=f".{target.name}-"))
    except OSError as error:
        raise InputError(
            f"cannot write the embedded data set below {root} ({error.strerror}): set data_root to a writable folder"
        ) from error
    try:
        _write_all(part, name, seed, counts)
        part.chmod(0o755)  # a temporary folder is its owner's alone
        part.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster, and wrote the same
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


@dataclass
class Difficulty:
    """How hard a set is: promises of its definition, counted on what was drawn.

    Attributes:
        areas: Per target, its visible share of the picture.
        visible: Per target, the visible share of it.
        alike: Per target, whether another object of its scene has its shape or its colour.
        words: Per sentence, how many words it has.
    """

    areas: list[float] = field(default_factory=list)
    visible: list[float] = field(default_factory=list)
    alike: list[bool] = field(default_factory=list)
    words: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, drawn: list[Drawn], described: list[tuple[int, list[str]]]) -> "Difficulty":
        """Count a scene."""
        found = cls()
        for i, sentences in described:
            target, others = drawn[i], [d for d in drawn if d is not drawn[i]]
            pixels = np.count_nonzero(target.visible)
            found.areas.append(pixels / (WIDTH * HEIGHT))
            found.visible.append(pixels / np.count_nonzero(target.full))
            found.alike.append(
                any(d.shape == target.shape or d.colour == target.colour for d in others)
            )
            found.words += [len(sentence.split()) for sentence in sentences]
        return found

    def add(self, other: "Difficulty") -> None:
        """Count what was counted elsewhere."""
        for name in ("areas", "visible", "alike", "words"):
            getattr(self, name).extend(getattr(other, name))

    def __str__(self) -> str:
        return (
            f"{len(self.areas)} targets, {len(self.words)} sentences of {np.mean(self.words):.1f} words; a target covers "
            f"{np.median(self.areas):.1%} of the picture (median), at least {np.min(self.visible):.0%} of each is visible and "
            f"{np.mean(np.array(self.visible) < 0.99):.0%} are partly hidden; {np.mean(self.alike):.0%} share their shape or "
            "colour with another object"
        )


@dataclass
class Scene:
    """What the files say of a picture that is written.

    Attributes:
        file_name: The picture's.
        annotations: Its objects in COCO's format, without ids.
        described: For each described object, its number among them and its sentences.
        difficulty: How hard it is.
        written: Whether the picture is, which a full disk prevents.
    """

    file_name: str
    annotations: list[dict[str, Any]]
    described: list[tuple[int, list[str]]]
    difficulty: Difficulty
    written: bool


SCENES_PER_WORKER = 200
"""Scenes that take one process longer than it takes to start another."""


class _SceneWriter(Dataset[Scene]):
    """Draws and writes a set's pictures, image id by image id; any process can, for scenes know nothing of each other."""

    def __init__(self, folder: Path, name: str, seed: int, counts: dict[str, int]) -> None:
        self.folder, self.name, self.seed = folder, name, seed
        self.places = [
            (split, number) for split, count in counts.items() for number in range(count)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Scene:
        split, number = self.places[index]
        image, drawn, described = make_scene(self.seed, self.name, split, number)
        name = f"COCO_train2014_{index + 1:012d}.jpg"
        written = cv2.imwrite(
            str(self.folder / name), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90]
        )
        return Scene(
            name,
            [_annotation(d) for d in drawn],
            described,
            Difficulty.of(drawn, described),
            written,
        )


def _write_all(root: Path, name: str, seed: int, counts: dict[str, int]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    refs: list[dict[str, Any]] = []
    sentences = 0
    difficulty = Difficulty()
    folder = root / "images" / "train2014"
    folder.mkdir(parents=True)
    scenes = _SceneWriter(folder, name, seed, counts)
    workers = min(os.cpu_count() or 1, len(scenes) // SCENES_PER_WORKER)
    generator = torch.Generator().manual_seed(
        0
    )  # the loader's own, so that what follows draws the same with and without
    loader = DataLoader(
        scenes,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=init_worker,
        generator=generator,
    )
    for image_id, scene in enumerate(
        tqdm(loader, desc=f"writing {name}", unit="scene", mininterval=0.5), start=1
    ):
        if not scene.written:
            raise InputError(
                f"cannot write {folder / scene.file_name}: is the disk full? Make room and start again"
            )
        difficulty.add(scene.difficulty)
        images.append(
            {"id": image_id, "file_name": scene.file_name, "height": HEIGHT, "width": WIDTH}
        )
        first = len(annotations) + 1
        annotations += [
            {"id": first + i, "image_id": image_id} | it for i, it in enumerate(scene.annotations)
        ]
        for i, texts in scene.described:
            told = [
                {"tokens": s.split(), "raw": s, "sent": s, "sent_id": sentences + k}
                for k, s in enumerate(texts)
            ]
            sentences += len(told)
            refs.append(
                {
                    "ref_id": len(refs),
                    "ann_id": first + i,
                    "image_id": image_id,
                    "category_id": annotations[first + i - 1]["category_id"],
                    "file_name": f"{scene.file_name[:-4]}_{first + i}.jpg",
                    "split": scenes.places[image_id - 1][0],
                    "sent_ids": [sentence["sent_id"] for sentence in told],
                    "sentences": told,
                }
            )
    categories = [
        {"id": i, "name": shape, "supercategory": "shape"}
        for i, shape in enumerate(SHAPES, start=1)
    ]
    info = {"version": VERSION, "seed": seed, "difficulty": str(difficulty)}
    instances = {
        "info": info,
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (root / name).mkdir()
    (root / name / "instances.json").write_text(json.dumps(instances))
    with (root / name / "refs(crislit).p").open("wb") as file:
        pickle.dump(refs, file, protocol=2)
    log.info("%s, version %d: %s", name, VERSION, difficulty)


def _annotation(drawn: Drawn) -> dict[str, Any]:
    rows, columns = bounding_slices(drawn.visible)
    return {
        "category_id": SHAPES.index(drawn.shape) + 1,
        "segmentation": encode_segmentation(drawn.visible),
        "area": int(np.count_nonzero(drawn.visible)),
        "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
        "iscrowd": 0,
    }
