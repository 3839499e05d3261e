"""The embedded data sets ``shapes``, ``shapes+`` and ``gshapes``, written in the REFER layout.

They mirror RefCOCO, RefCOCO+ and G-Ref, so that training and evaluation run on any machine. Scenes
are drawn from a seed with NumPy alone, and annotated as in COCO: polygons, or run lengths for
objects with holes. Other readers of the REFER format can read them, too.
"""

import logging
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from crislit.data.expressions import Style, describe
from crislit.data.scenes import Drawn, draw_scene, is_eligible
from crislit.data.shapes_annotations import AnnotationFiles, Scene, to_annotation, to_target
from crislit.data.workers import init_worker
from crislit.errors import InputError, require, see, why_unwritten
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
"""The embedded data sets by name, modeled on RefCOCO, RefCOCO+ and G-Ref."""


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
            f"cannot write the embedded data set below {root} ({why_unwritten(error)}): "
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
            annotations=[to_annotation(d) for d in drawn],
            described=described,
            targets=[to_target(drawn, i) for i, _ in described],
            is_written=cv2.imwrite(
                str(self.folder / file_name), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90]
            ),
        )


def _write_all(root: Path, name: str, seed: int, counts: dict[str, int]) -> None:
    files = AnnotationFiles()
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
    progress = tqdm(loader, desc=f"writing {name}", unit="scene", mininterval=0.5, disable=None)
    for scene, (split, _) in zip(progress, scenes.numbers, strict=True):
        require(
            scene.is_written,
            f"cannot write {folder / scene.file_name}: is the disk full? "
            f"Free some space and start again{see('disk-space')}",
        )
        files.add(scene, split)
    difficulty = files.write(root / name, "refs(crislit).p", {"version": VERSION, "seed": seed})
    log.info("%s, version %d: %s", name, VERSION, difficulty)


def _link_mscoco(images: Path) -> None:
    """Offer the images also where the REFER project's code expects them, without copying them."""
    link = images / "mscoco" / "images" / "train2014"
    link.parent.mkdir(parents=True)
    try:
        link.symlink_to(Path("..", "..", "train2014"), target_is_directory=True)
    except (OSError, NotImplementedError) as error:  # Windows without developer mode, FAT
        log.info("no link from %s to train2014 (%s): point other readers at it", link, error)
