"""The embedded data sets ``shapes``, ``shapes+`` and ``gshapes``: small scenes in the REFER layout, written by a seed.

They mirror RefCOCO, RefCOCO+ and G-Ref, so that everything that reads, trains on or evaluates those runs on any machine.
Pictures are drawn with NumPy alone and annotated as COCO does (polygons; run lengths where an object has a hole).
"""

import colorsys
import json
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from crislit.data.expressions import COLOURS, HEIGHT, PATTERNS, SHAPES, WIDTH, Style, Thing, describe
from crislit.data.workers import worker_init
from crislit.errors import InputError

log = logging.getLogger(__name__)

VERSION = 1
"""Raised whenever the definition changes; results of different versions are never compared."""

Mask = npt.NDArray[np.bool_]
Image = npt.NDArray[np.uint8]
Coordinate = npt.NDArray[np.floating[Any]]

HUES = {"red": 0, "orange": 28, "yellow": 54, "green": 125, "cyan": 180, "blue": 225, "purple": 273, "pink": 322}
AREA = (2600.0, 8200.0)
"""Area of an unoccluded object in pixels, drawn log-uniformly: 3.4 to 10.7 % of the picture."""
VISIBLE = 0.6
"""At least this much of every object is visible."""


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
    "shapes": EmbeddedSet("absolute", {"train": 3000, "val": 300, "testA": 300, "testB": 300}, (4, 2), 3),
    "shapes+": EmbeddedSet("attributes", {"train": 3000, "val": 300, "testA": 300, "testB": 300}, (4, 2), 3),
    "gshapes": EmbeddedSet("relations", {"train": 3000, "val": 300, "test": 300}, (3, 2), 2),
}


def _star(u: Coordinate, v: Coordinate) -> Mask:
    angle = np.mod(np.arctan2(u, -v), 2 * np.pi / 5)  # 0 at a tip
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)
    inner, tip = 0.48, np.pi / 5
    # The edge runs from the tip (radius 1, angle 0) to the notch (radius 0.48, angle pi/5).
    edge = inner * np.sin(tip) / (np.sin(angle) * (1 - inner * np.cos(tip)) + inner * np.sin(tip) * np.cos(angle))
    inside: Mask = np.hypot(u, v) <= edge
    return inside


OUTLINES: dict[str, Callable[[Coordinate, Coordinate], Mask]] = {  # u to the right, v down, within [-1, 1]
    "circle": lambda u, v: np.hypot(u, v) <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 1,
    "triangle": lambda u, v: (v <= 0.85) & (abs(u) <= (v + 0.9) / 1.75),
    "star": _star,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.33) & (np.maximum(abs(u), abs(v)) <= 1),
    "diamond": lambda u, v: abs(u) / 0.72 + abs(v) <= 1,
    "ring": lambda u, v: (np.hypot(u, v) <= 1) & (np.hypot(u, v) >= 0.5),
    "heart": lambda u, v: ((1.2 * u) ** 2 + (0.25 - 1.2 * v) ** 2 - 1) ** 3 <= (1.2 * u) ** 2 * (0.25 - 1.2 * v) ** 3,
}


def _unit_area(shape: str) -> float:
    side = np.linspace(-1, 1, 400)
    return 4 * float(OUTLINES[shape](side, side[:, None]).mean())


UNIT_AREA = {shape: _unit_area(shape) for shape in SHAPES}


@dataclass
class Drawn:
    """An object on the canvas: its attributes, its full mask and, under the later ones, its visible mask."""

    shape: str
    colour: str
    pattern: str
    full: Mask
    visible: Mask

    def seen(self) -> Thing:
        """Return the object as a viewer sees it."""
        columns, rows = self.visible.sum(axis=0), self.visible.sum(axis=1)
        area = int(columns.sum())
        x, y = float(columns @ np.arange(WIDTH)) / area, float(rows @ np.arange(HEIGHT)) / area
        return Thing(self.shape, self.colour, self.pattern, x, y, area, int(np.count_nonzero(self.full)))


def window(mask: Mask) -> tuple[slice, slice]:
    """Return the rows and columns that hold the mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def row_hull(mask: Mask) -> Mask:
    """Fill each row between its first and its last pixel, which closes a ring's hole."""
    from_left = np.logical_or.accumulate(mask, axis=1)
    from_right = np.logical_or.accumulate(mask[:, ::-1], axis=1)[:, ::-1]
    hull: Mask = from_left & from_right
    return hull


def draw_ground(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Draw a pale or dark textured ground without a clear hue, (h, w, 3) in [0, 255]."""
    texture = 3 * rng.standard_normal((HEIGHT, WIDTH), dtype=np.float32)
    for _ in range(3):
        angle, frequency, phase = rng.uniform(0, np.pi), 2 * np.pi / rng.uniform(8, 120), rng.uniform(0, 2 * np.pi)
        across = frequency * np.cos(angle) * np.arange(WIDTH)
        down = frequency * np.sin(angle) * np.arange(HEIGHT)[:, None] + phase
        # A slanted wave, sin(across + down), from two outer products.
        texture += rng.uniform(3, 11) * (np.sin(down) * np.cos(across) + np.cos(down) * np.sin(across))
    tint = rng.uniform(70, 190) + rng.uniform(-8, 8, size=3)
    return tint.astype(np.float32) + texture[..., None]


def place_object(rng: np.random.Generator, shape: str, area: float) -> tuple[Mask, float, float]:
    """Lay an outline of this area anywhere in the picture; return its mask (h, w) and its centre (x, y) in pixels."""
    radius = float(np.sqrt(area / UNIT_AREA[shape]))
    cx, cy = (rng.uniform(radius + 3, side - radius - 3) for side in (WIDTH, HEIGHT))
    xs, ys = (np.arange(int(c - radius) - 1, int(c + radius) + 2) for c in (cx, cy))
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1] = OUTLINES[shape]((xs - cx) / radius, ((ys - cy) / radius)[:, None])
    return mask, cx, cy


def paint(rng: np.random.Generator, colour: str, pattern: str, across: Coordinate, down: Coordinate) -> npt.NDArray[np.float64]:
    """Return the colours of an object's pixels, (n, 3) in [0, 255]; the patterns' period is 14 pixels."""
    rgb = 255 * np.array(colorsys.hsv_to_rgb(HUES[colour] / 360, rng.uniform(0.75, 0.95), rng.uniform(0.8, 1.0)))
    if pattern == "striped":
        dark = np.floor(down / 7) % 2 == 0
    elif pattern == "checkered":
        dark = (np.floor(across / 7) + np.floor(down / 7)) % 2 == 0
    elif pattern == "dotted":
        dark = np.hypot(across / 7 % 2 - 1, down / 7 % 2 - 1) < 0.62
    else:
        dark = np.zeros(across.shape, dtype=bool)
    return rgb * np.where(dark, 0.5, 1.0)[:, None]


def draw_scene(rng: np.random.Generator, unlike: bool = False, objects: int | None = None) -> tuple[Image, list[Drawn]]:
    """Draw 4 to 7 objects, or so many, of few shapes and colours, so that most share one with another.

    An object that would hide too much of another is drawn anew; a scene too full for its last object goes without it.

    Args:
        rng: Decides everything.
        unlike: Of many shapes instead.
        objects: How many, instead of 4 to 7.
    """
    count = int(rng.integers(4, 8)) if objects is None else objects
    shapes = rng.choice(SHAPES, size=int(rng.integers(4, 7)) if unlike else int(rng.integers(2, 5)), replace=False)
    colours = rng.choice(COLOURS, size=int(rng.integers(2, 5)), replace=False)
    canvas = draw_ground(rng)
    drawn: list[Drawn] = []
    tries = 0
    while len(drawn) < min(count, 4) or (len(drawn) < count and tries < 100):
        tries += 1
        shape, colour = str(rng.choice(shapes)), str(rng.choice(colours))
        pattern = str(rng.choice(PATTERNS)) if rng.random() < 0.6 else "plain"
        if any((d.shape, d.colour, d.pattern) == (shape, colour, pattern) for d in drawn) and rng.random() < 0.7:
            continue
        full, cx, cy = place_object(rng, shape, float(np.exp(rng.uniform(*np.log(AREA)))))
        left = [d.visible & ~full for d in drawn]  # what the new object would leave of each
        outside = [mask & ~row_hull(full) for mask in left] if shape == "ring" else left
        shares = [np.count_nonzero(mask) / np.count_nonzero(d.full) for mask, d in zip(left, drawn, strict=True)]
        # What shows only through a ring's hole looks like a disc, whatever it is.
        if min(shares, default=1) >= VISIBLE and all(np.count_nonzero(mask) > 300 for mask in outside):
            rows, columns = window(full)
            ys, xs = np.nonzero(full[rows, columns])
            ys, xs = ys + rows.start, xs + columns.start
            canvas[ys, xs] = paint(rng, colour, pattern, xs - cx, ys - cy)
            for d, mask in zip(drawn, left, strict=True):
                d.visible = mask
            drawn.append(Drawn(shape, colour, pattern, full, full))
    return canvas.clip(0, 255).astype(np.uint8), drawn


def eligible(things: list[Thing], target: Thing, split: str) -> bool:
    """Whether a split may describe the object (testA: another of its shape; testB: none, but its colour or pattern again)."""
    others = [t for t in things if t is not target]
    twin = any(t.shape == target.shape for t in others)
    if split == "testA":
        return twin
    if split == "testB":
        return not twin and any(t.colour == target.colour or t.pattern == target.pattern for t in others)
    return True


def segmentation(mask: Mask) -> list[list[float]] | dict[str, Any]:
    """Encode a mask as COCO does: polygons along the pixels' edges, or uncompressed run lengths where it has holes."""
    rows, columns = window(mask)
    zoom = 4  # a contour runs through the centres of border pixels: finer pixels bring it closer to their edges
    fine = np.repeat(np.repeat(mask[rows, columns].astype(np.uint8), zoom, axis=0), zoom, axis=1)
    contours, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if (hierarchy[0, :, 3] >= 0).any():
        flat = np.concatenate([[False], mask.T.ravel(), [False]])  # column by column, and zeros come first
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
        return {"counts": counts.tolist(), "size": list(mask.shape)}
    polygons = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, 1.2, closed=True)[:, 0]
        points = (points + 0.5) / zoom + (columns.start, rows.start)
        if len(points) >= 3:
            polygons.append(points.round(2).ravel().tolist())
    return polygons


def make_scene(seed: int, name: str, split: str, number: int) -> tuple[Image, list[Drawn], list[tuple[int, list[str]]]]:
    """Draw one scene and describe some of its objects, at least two.

    Returns:
        The picture, its objects, and for each described object its number among them and its sentences.
    """
    spec = SETS[name]
    rng = np.random.default_rng([seed, VERSION, list(SETS).index(name), list(spec.splits).index(split), number])
    wanted = spec.refs[split != "train"]
    while True:
        image, drawn = draw_scene(rng, unlike=split == "testB")
        things = [d.seen() for d in drawn]
        described: list[tuple[int, list[str]]] = []
        for i in rng.permutation(len(things)):
            if len(described) < wanted and eligible(things, things[i], split):
                sentences = describe(rng, things, things[i], spec.style, spec.sentences)
                if len(sentences) == spec.sentences:
                    described.append((int(i), sentences))
        if len(described) >= 2:
            return image, drawn, described


def write(root: Path, name: str, seed: int = 0, scenes: dict[str, int] | None = None) -> Path:
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
    suffix = (f"-seed{seed}" if seed else "") + ("-" + "-".join(map(str, counts.values())) if scenes else "")
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
            found.alike.append(any(d.shape == target.shape or d.colour == target.colour for d in others))
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


WORTH_A_PROCESS = 200
"""Scenes that take one process longer than it takes to start another."""


class _Scenes(Dataset[Scene]):
    """Draws and writes a set's pictures, image id by image id; any process can, for scenes know nothing of each other."""

    def __init__(self, folder: Path, name: str, seed: int, counts: dict[str, int]) -> None:
        self.folder, self.name, self.seed = folder, name, seed
        self.places = [(split, number) for split, count in counts.items() for number in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Scene:
        split, number = self.places[index]
        image, drawn, described = make_scene(self.seed, self.name, split, number)
        name = f"COCO_train2014_{index + 1:012d}.jpg"
        written = cv2.imwrite(str(self.folder / name), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
        return Scene(name, [_annotation(d) for d in drawn], described, Difficulty.of(drawn, described), written)


def _write_all(root: Path, name: str, seed: int, counts: dict[str, int]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    refs: list[dict[str, Any]] = []
    sentences = 0
    difficulty = Difficulty()
    folder = root / "images" / "train2014"
    folder.mkdir(parents=True)
    scenes = _Scenes(folder, name, seed, counts)
    workers = min(os.cpu_count() or 1, len(scenes) // WORTH_A_PROCESS)
    generator = torch.Generator().manual_seed(0)  # the loader's own, so that what follows draws the same with and without
    loader = DataLoader(scenes, batch_size=None, num_workers=workers, worker_init_fn=worker_init, generator=generator)
    for image_id, scene in enumerate(tqdm(loader, desc=f"writing {name}", unit="scene", mininterval=0.5), start=1):
        if not scene.written:
            raise InputError(f"cannot write {folder / scene.file_name}: is the disk full? Make room and start again")
        difficulty.add(scene.difficulty)
        images.append({"id": image_id, "file_name": scene.file_name, "height": HEIGHT, "width": WIDTH})
        first = len(annotations) + 1
        annotations += [{"id": first + i, "image_id": image_id} | it for i, it in enumerate(scene.annotations)]
        for i, texts in scene.described:
            told = [{"tokens": s.split(), "raw": s, "sent": s, "sent_id": sentences + k} for k, s in enumerate(texts)]
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
    categories = [{"id": i, "name": shape, "supercategory": "shape"} for i, shape in enumerate(SHAPES, start=1)]
    info = {"version": VERSION, "seed": seed, "difficulty": str(difficulty)}
    instances = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    (root / name).mkdir()
    (root / name / "instances.json").write_text(json.dumps(instances))
    with (root / name / "refs(crislit).p").open("wb") as file:
        pickle.dump(refs, file, protocol=2)
    log.info("%s, version %d: %s", name, VERSION, difficulty)


def _annotation(drawn: Drawn) -> dict[str, Any]:
    rows, columns = window(drawn.visible)
    return {
        "category_id": SHAPES.index(drawn.shape) + 1,
        "segmentation": segmentation(drawn.visible),
        "area": int(np.count_nonzero(drawn.visible)),
        "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
        "iscrowd": 0,
    }
