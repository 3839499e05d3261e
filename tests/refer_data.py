"""Writes small data sets in the REFER layout: `python -m tests.refer_data FOLDER`.

`write_refer_root` writes a root with RefCOCO, RefCOCO+ and both partitions of G-Ref. The images are
drawn; the files resemble the real ones. instances.json follows COCO's format, with objects of
several polygons, overlapping and degenerate polygons, and run lengths for crowds. Refs files are
pickled as Python 2 did. `write_set` writes a set of a single ref, or arbitrary content.
"""

import json
import math
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

Refs = list[dict[str, Any]]
Instances = dict[str, Any]
Mask = npt.NDArray[np.uint8]
Counts = dict[str, tuple[int, int, int]]
"""Refs, sentences and images of each split."""

SETS = (
    ("refcoco", "refs(unc).p"),
    ("refcoco+", "refs(unc).p"),
    ("refcocog", "refs(umd).p"),
    ("refcocog", "refs(google).p"),
)
"""Folder and refs file of every set in a REFER root."""


# -- A root with images


IMAGE_FOLDER = "images/mscoco/images/train2014"
SIZES = ((120, 160), (160, 120), (100, 100), (75, 180), (150, 113))
"""Heights and widths of the images, in rotation."""
SPLITS = {"train": 19, "val": 5, "testA": 4, "testB": 4}
"""Images per split of RefCOCO."""
GRAY_IMAGE = 3
"""Index of the image without color."""

PERSON, DOG, BALL, BUS, FENCE, CROWD = 1, 18, 37, 6, 90, 200
CATEGORIES = {
    PERSON: ("person", "person"),
    DOG: ("animal", "dog"),
    BALL: ("sports", "ball"),
    BUS: ("vehicle", "bus"),
    FENCE: ("outdoor", "fence"),
    CROWD: ("person", "people"),
}
"""COCO's supercategory and name of each kind of object."""
COLORS = {"red": (40, 40, 220), "green": (50, 180, 60), "blue": (220, 90, 40), "white": (240,) * 3}
LOCATION_WORDS = {"left", "right", "leftmost", "rightmost", "middle"}
"""Words that RefCOCO+ does without."""


@dataclass
class Scene:
    """One image, its annotations and what is said about them.

    Attributes:
        image: Its entry in instances.json.
        annotations: The objects from left to right.
        colors: The color of each object.
    """

    image: dict[str, Any]
    annotations: list[dict[str, Any]] = field(default_factory=list)
    colors: list[str] = field(default_factory=list)


def write_refer_root(root: Path) -> Path:
    """Write a REFER root: images, instances.json and refs files of all of `SETS`.

    Images belong to one split only, and G-Ref shares most of its images with RefCOCO. As in the
    real data, testA refers to people and testB to everything else, and RefCOCO+ lacks sentences
    with location words. The google partition consists of val alone. A plain file has the name of
    the other usual image folder, as where a symbolic link was unpacked from a zip file.
    """
    scenes = [make_scene(index) for index in range(sum(SPLITS.values()) + 3)]
    folder = root / IMAGE_FOLDER
    folder.mkdir(parents=True)
    (root / "images/train2014").write_text("mscoco/images/train2014\n")
    for index, scene in enumerate(scenes):
        image = draw_scene(scene, seed=index)
        gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        path = folder / scene.image["file_name"]
        cv2.imwrite(str(path), gray if index == GRAY_IMAGE else image)

    splits = [split for split, count in SPLITS.items() for _ in range(count)]
    in_refcoco, only_in_gref = scenes[: len(splits)], scenes[len(splits) :]
    refcoco = list(make_refcoco(in_refcoco, splits))
    plus = [without_location_words(ref) for ref in refcoco]
    umd = list(make_umd(in_refcoco[11:22] + only_in_gref))
    google = make_google(in_refcoco)
    write_files(root / "refcoco", in_refcoco, {"refs(unc).p": refcoco})
    write_files(root / "refcoco+", in_refcoco, {"refs(unc).p": [r for r in plus if r["sentences"]]})
    write_files(root / "refcocog", scenes, {"refs(umd).p": umd, "refs(google).p": google})
    return root


def make_scene(index: int) -> Scene:
    """Place three or four objects side by side, of kinds and colors that follow from the index."""
    height, width = SIZES[index % len(SIZES)]
    image_id = 25 + 1931 * index  # as wide apart as COCO's
    scene = Scene(
        {
            "id": image_id,
            "height": height,
            "width": width,
            "file_name": f"COCO_train2014_{image_id:012}.jpg",
            "license": 1,
        }
    )
    kinds = (PERSON, BALL, DOG, PERSON, BUS, PERSON, FENCE, BALL, PERSON, CROWD, DOG)
    count = 3 + index % 2
    for slot in range(count):
        kind, color = kinds[(3 * index + slot) % len(kinds)], list(COLORS)[(index + slot) % 4]
        left, right = (slot + 0.08) * width / count, (slot + 0.92) * width / count
        top, bottom = (0.15 + 0.05 * (slot % 3)) * height, (0.8 - 0.04 * (index % 4)) * height
        segmentation = outline(kind, left, top, right, bottom, (height, width))
        runs = coco_mask.merge(coco_mask.frPyObjects(valid_parts(segmentation), height, width))
        scene.annotations.append(
            {
                "id": 100_000 + 10 * index + slot,
                "image_id": image_id,
                "category_id": kind,
                "segmentation": segmentation,
                "area": float(coco_mask.area(runs)),
                "bbox": coco_mask.toBbox(runs).tolist(),
                "iscrowd": int(kind == CROWD),
            }
        )
        scene.colors.append(color)
    return scene


def outline(
    kind: int, left: float, top: float, right: float, bottom: float, size: tuple[int, int]
) -> Any:
    """Return an object's segmentation: polygons, or run lengths for a crowd."""

    def box(x0: float, y0: float, x1: float, y1: float) -> list[float]:
        return [round(number, 2) for number in (x0, y0, x1, y0, x1, y1, x0, y1)]

    def ellipse(x0: float, y0: float, x1: float, y1: float, sides: int = 24) -> list[float]:
        angles = [2 * math.pi * side / sides for side in range(sides)]
        x, y, rx, ry = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
        points = [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]
        return [round(number, 2) for point in points for number in point]

    width, height = right - left, bottom - top
    if kind == PERSON:  # head and body overlap
        head = ellipse(left + 0.25 * width, top, right - 0.25 * width, top + 0.4 * height)
        return [head, box(left + 0.1 * width, top + 0.3 * height, right - 0.1 * width, bottom)]
    if kind == FENCE:  # partly hidden
        return [
            box(left, top + 0.4 * height, left + 0.4 * width, bottom),
            box(right - 0.35 * width, top + 0.4 * height, right, bottom),
        ]
    if kind == DOG:  # COCO has degenerate polygons, too
        body = ellipse(left, top + 0.5 * height, right, bottom, sides=7)
        return [body, [round(left, 2), round(top, 2), round(right, 2), round(top, 2)]]
    if kind == CROWD:
        mask = np.zeros(size, dtype=np.uint8)
        heads = np.linspace(left, right, 4).astype(int)
        for x0, x1 in zip(heads[:-1], heads[1:] - 2, strict=True):
            mask[int(top) : int(bottom), x0:x1] = 1
        return {"size": list(size), "counts": run_lengths(mask)}
    if kind == BALL:
        return [ellipse(left, top + 0.3 * height, right, bottom)]
    return [box(left, top, right, bottom)]


def valid_parts(segmentation: Any) -> Any:
    """Return run lengths in a list, or the polygons of at least three points."""
    if isinstance(segmentation, dict):
        return [segmentation]
    return [polygon for polygon in segmentation if len(polygon) >= 6]


def run_lengths(mask: Mask) -> list[int]:
    """Return COCO's uncompressed run lengths: column by column, starting with zeros."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    lengths: list[int] = np.diff([0, *changes, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def draw_scene(scene: Scene, seed: int) -> npt.NDArray[np.uint8]:
    """Draw the objects in their colors over a noisy gradient: (h, w, 3) BGR."""
    height, width = scene.image["height"], scene.image["width"]
    noise = np.random.default_rng(seed).normal(0, 6, (height, width, 3))
    image = (90 + 60 * np.linspace(0, 1, height)[:, None, None] + noise).clip(0, 255)
    for annotation, color in zip(scene.annotations, scene.colors, strict=True):
        mask = decode(annotation["segmentation"], height, width)
        image[mask > 0] = COLORS[color]
    return image.astype(np.uint8)


def decode(segmentation: Any, height: int, width: int) -> Mask:
    """Return the union of a segmentation's polygons, or its run lengths, as pycocotools draws it.

    Independent of the code under test.
    """
    encoded = [
        coco_mask.frPyObjects([part], height, width)[0] for part in valid_parts(segmentation)
    ]
    mask = np.zeros((height, width), dtype=np.uint8)
    for part in encoded:
        mask |= coco_mask.decode(part)
    return mask


def make_refcoco(scenes: list[Scene], splits: list[str]) -> Iterator[dict[str, Any]]:
    """Refer to every object of a scene; only to people in testA, to all others in testB."""
    ref_id, sent_id = 0, 0
    for scene, split in zip(scenes, splits, strict=True):
        for slot, annotation in enumerate(scene.annotations):
            is_person = annotation["category_id"] in (PERSON, CROWD)
            if (split == "testA" and not is_person) or (split == "testB" and is_person):
                continue
            texts = describe(scene, slot)[: 1 + ref_id % 4]
            yield make_ref(scene, slot, ref_id, split, texts, sent_id)
            ref_id, sent_id = ref_id + 1, sent_id + len(texts)


def describe(scene: Scene, slot: int) -> list[str]:
    """Return four sentences about an object."""
    name, color = CATEGORIES[scene.annotations[slot]["category_id"]][1], scene.colors[slot]
    place = {0: "leftmost", len(scene.annotations) - 1: "rightmost"}.get(slot, "middle")
    side = "left" if slot < len(scene.annotations) / 2 else "right"
    located = f"{place} {name} by the café" if slot == 1 else f"{place} {name}"
    return [located, f"{color} {name}", f"the {color} {name} on the {side}", f"{color} thing"]


def make_ref(
    scene: Scene, slot: int, ref_id: int, split: str, texts: list[str], sent_id: int
) -> dict[str, Any]:
    """Return a ref as REFER has them."""
    annotation, stem = scene.annotations[slot], Path(scene.image["file_name"]).stem
    sentences = [
        {
            "tokens": text.split(),
            "raw": f"{text.capitalize()}.",
            "sent_id": sent_id + i,
            "sent": text,
        }
        for i, text in enumerate(texts)
    ]
    return {
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "file_name": f"{stem}_{ref_id}.jpg",
        "ann_id": annotation["id"],
        "ref_id": ref_id,
        "image_id": scene.image["id"],
        "split": split,
        "sentences": sentences,
        "category_id": annotation["category_id"],
    }


def without_location_words(ref: dict[str, Any]) -> dict[str, Any]:
    """Return a ref of RefCOCO as RefCOCO+ has it, perhaps with no sentence left."""
    sentences = [s for s in ref["sentences"] if not LOCATION_WORDS.intersection(s["tokens"])]
    return ref | {"sentences": sentences, "sent_ids": [s["sent_id"] for s in sentences]}


def make_umd(scenes: list[Scene]) -> Iterator[dict[str, Any]]:
    """Return one longer sentence per object: 11 in val and 8 in test, which two and four processes
    cannot share evenly.
    """
    splits = ["train"] * 7 + ["val"] * 4 + ["test"] * 3
    left = {"train": 99, "val": 11, "test": 8}
    ref_id = 0
    for scene, split in zip(scenes, splits, strict=True):
        for slot in range(len(scene.annotations)):
            if left[split]:
                left[split] -= 1
                text = f"{describe(scene, slot)[2]} side of the scene, next to something else"
                yield make_ref(scene, slot, ref_id, split, [text], ref_id)
                ref_id += 1


def make_google(scenes: list[Scene]) -> Refs:
    """Return 18 refs with one sentence each, all of them in val."""
    objects = [(scene, slot) for scene in scenes for slot in range(3)][:18]
    return [
        make_ref(scene, slot, ref_id, "val", [f"this is the {describe(scene, slot)[1]}"], ref_id)
        for ref_id, (scene, slot) in enumerate(objects)
    ]


def write_files(folder: Path, scenes: list[Scene], refs_files: dict[str, Refs]) -> None:
    """Write a set's instances.json and refs files."""
    folder.mkdir()
    instances = {
        "info": {"description": "generated for tests", "version": "1", "year": 2025},
        "images": [scene.image for scene in scenes],
        "licenses": [{"id": 1, "name": "MIT", "url": ""}],
        "annotations": [annotation for scene in scenes for annotation in scene.annotations],
        "categories": [
            {"supercategory": parent, "id": number, "name": name}
            for number, (parent, name) in CATEGORIES.items()
        ],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    for name, refs in refs_files.items():
        (folder / name).write_bytes(python2_pickle(refs, 2))


# -- Reading a set without the code under test


def read_refs(root: Path, folder: str, refs_file: str) -> Refs:
    """Unpickle a refs file that the tests or the maintainers wrote."""
    refs: Refs = pickle.loads((root / folder / refs_file).read_bytes(), encoding="latin-1")
    return refs


def read_instances(root: Path, folder: str) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return annotations and images by id."""
    instances = json.loads((root / folder / "instances.json").read_text())
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    return annotations, {image["id"]: image for image in instances["images"]}


def count_refs(root: Path, folder: str, refs_file: str) -> Counts:
    """Return refs, sentences and images of each split."""
    counts: Counts = {}
    refs = read_refs(root, folder, refs_file)
    for split in dict.fromkeys(ref["split"] for ref in refs):
        in_split = [ref for ref in refs if ref["split"] == split]
        sentences = sum(len(ref["sentences"]) for ref in in_split)
        counts[split] = (len(in_split), sentences, len({ref["image_id"] for ref in in_split}))
    return counts


# -- Pickles as Python 2 wrote them


def python2_pickle(value: Any, protocol: int) -> bytes:
    """Pickle by protocol 0 or 2 as Python 2 did: strings are bytes, and COCO's ids are longs."""
    return (b"\x80\x02" if protocol == 2 else b"") + python2_opcodes(value, protocol) + b"."


def python2_opcodes(value: Any, protocol: int) -> bytes:
    """Return the opcodes of strings, integers, lists and dictionaries."""
    if isinstance(value, str):
        data = value.encode("latin-1")
        if protocol == 0:
            return b"S" + repr(data)[1:].encode() + b"\n"
        return b"U" + bytes([len(data)]) + data
    if isinstance(value, int):
        if protocol == 0:
            return b"L%dL\n" % value
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, list):
        items = [python2_opcodes(item, protocol) for item in value]
        if protocol == 0:
            return b"(l" + b"".join(item + b"a" for item in items)
        return b"](" + b"".join(items) + b"e"
    assert isinstance(value, dict)
    pairs = [
        python2_opcodes(key, protocol) + python2_opcodes(item, protocol)
        for key, item in value.items()
    ]
    if protocol == 0:
        return b"(d" + b"".join(pair + b"s" for pair in pairs)
    return b"}(" + b"".join(pairs) + b"u"


# -- A set of one ref


HEIGHT, WIDTH = 12, 20
"""Size of its image."""
SQUARE = [2, 2, 8, 2, 8, 8, 2, 8]
"""A polygon that covers pixels 2 to 7 of both axes, 36 of them."""


def one_ref(segmentation: Any = (SQUARE,)) -> tuple[Refs, Instances]:
    """Return a set of one ref with one sentence."""
    image = {"id": 7, "height": HEIGHT, "width": WIDTH, "file_name": "seven.jpg"}
    segmentation = segmentation if isinstance(segmentation, dict) else [*segmentation]
    annotation = {"id": 1, "image_id": 7, "segmentation": segmentation}
    sentence = {"sent": "a square", "raw": "A square!", "tokens": ["a", "square"], "sent_id": 5}
    ref = {
        "ref_id": 3,
        "ann_id": 1,
        "image_id": 7,
        "category_id": 2,
        "file_name": "seven_1.jpg",
        "split": "val",
        "sent_ids": [5],
        "sentences": [sentence],
    }
    return [ref], {"images": [image], "annotations": [annotation]}


def write_set(
    root: Path, refs: bytes | None = None, instances: bytes | None = None, *, image: bool = True
) -> Path:
    """Write the set of one ref, or other files in its place, and return its root."""
    default_refs, default_instances = one_ref()
    (root / "images/train2014").mkdir(parents=True)
    if image:
        (root / "images/train2014/seven.jpg").touch()
    (root / "refcoco").mkdir()
    refs = pickle.dumps(default_refs) if refs is None else refs
    instances = json.dumps(default_instances).encode() if instances is None else instances
    (root / "refcoco/refs(unc).p").write_bytes(refs)
    (root / "refcoco/instances.json").write_bytes(instances)
    return root


if __name__ == "__main__":
    write_refer_root(Path(sys.argv[1]))
