"""Remarks on custom data that can be used, but may not mean what the user thinks."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from crislit.data.custom.builder import CustomData
from crislit.data.custom.check import draw_target, images_by_split
from crislit.data.wording import SPLIT_ORDER, find_similar
from crislit.errors import counted
from crislit.transforms import truncated_words

LARGE = 0.5
"""Share of an image above which a target may be an inverted mask."""
SMALL, FEW_PIXELS = 1e-3, 16
"""Share of an image, and number of pixels, below which a target may be a stray pixel."""
OUTSIDE = 0.02
"""Share of an image's side beyond which a point of a polygon is not just inexact."""
FEW_IMAGES = 5
"""Number of images of val below which its scores depend on chance."""
LABEL = re.compile(r"\S*_\S*|\S+\.(jpe?g|png|webp|tiff?|bmp)|\w*\d{3,}\w*", re.IGNORECASE)
"""What labels and names of files look like, instead of sentences."""


@dataclass(frozen=True)
class Remark:
    """A remark on custom data.

    Attributes:
        text: The remark.
        rows: The refs that it is about, numbered from 0.
    """

    text: str
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Target:
    """What remarks need of a target's mask.

    Attributes:
        pixels: Number of marked pixels.
        area: Share of the image, from 0 to 1.
        digest: Digest of the mask.
    """

    pixels: int
    area: float
    digest: bytes


def measure_targets(data: CustomData) -> list[Target]:
    """Draw every target, and return their measures in the order of the refs."""
    targets = []
    for row in range(len(data.refs)):
        mask = draw_target(data, row)
        pixels = int(mask.sum())
        digest = hashlib.sha256(mask.tobytes()).digest()
        targets.append(Target(pixels, pixels / mask.size, digest))
    return targets


def find_remarks(
    data: CustomData, targets: list[Target], digests: dict[int, str], max_tokens: int
) -> list[Remark]:
    """Return remarks on the data.

    Args:
        data: The data.
        targets: Measures of its targets.
        digests: Digests of its images by their ids.
        max_tokens: Tokens per sentence in training.
    """
    return [
        *map(Remark, data.notes),
        *_splits(data, digests),
        *_masks(data, targets),
        *_sentences(data, targets, max_tokens),
    ]


def _splits(data: CustomData, digests: dict[int, str]) -> Iterator[Remark]:
    splits = images_by_split(data)
    for split in ("train", "val"):
        if split not in splits:
            can_share = split == "val" and "train" in splits
            hint = "; dataset.val_share=0.2 takes it from train" if can_share else ""
            yield Remark(f"split {split!r} is missing, which training needs{hint}")
    names = {image["id"]: image["file_name"] for image in data.instances["images"]}
    contents = {digests[image]: image for image in splits["train"] if image in digests}
    for split, images in sorted(splits.items()):
        if split == "train":
            continue
        if shared := images & splits["train"]:
            found = counted(len(shared), f"image of {split} is", f"images of {split} are")
            yield Remark(f"{found} also in train, so metrics on {split} will be too high")
        copies = {i for i in images - splits["train"] if digests.get(i) in contents}
        if copies:
            copy = min(copies)
            original = names[contents[digests[copy]]]
            found = counted(len(copies), f"image of {split} has", f"images of {split} have")
            yield Remark(
                f"{found} the same content as images of train ({names[copy]} and {original}), so "
                f"metrics on {split} will be too high",
                tuple(row for row, ref in enumerate(data.refs) if ref["image_id"] in copies),
            )
    for split in sorted(set(splits) - set(SPLIT_ORDER)):
        rows = tuple(row for row, ref in enumerate(data.refs) if ref["split"] == split)
        similar = find_similar(split, SPLIT_ORDER)
        yield Remark(
            f"split {split!r} ({counted(len(rows), 'object')}) is not one of "
            f"{', '.join(SPLIT_ORDER)}, so it is only evaluated"
            f"{f': did you mean {similar!r}?' if similar else ''}",
            rows,
        )
    if 0 < len(splits["val"]) < FEW_IMAGES:
        yield Remark(f"val has few images ({len(splits['val'])}), so its scores depend on chance")


def _masks(data: CustomData, targets: list[Target]) -> Iterator[Remark]:
    rows = range(len(targets))
    if large := [row for row in rows if targets[row].area > LARGE]:
        found = counted(
            len(large),
            "mask covers more than half of its image",
            "masks cover more than half of their image",
        )
        yield Remark(f"{found} {_lines(data, large)}: inverted?", tuple(large))
    if small := [r for r in rows if targets[r].area < SMALL or targets[r].pixels < FEW_PIXELS]:
        found = counted(len(small), "mask covers", "masks cover")
        yield Remark(
            f"{found} less than {SMALL:.1%} of the image or {FEW_PIXELS} pixels "
            f"{_lines(data, small)}",
            tuple(small),
        )
    if shares := {row: share for row in rows if (share := outside_share(data, row))}:
        found = counted(len(shares), "mask has", "masks have")
        yield Remark(
            f"{found} up to {max(shares.values()):.0%} of the points of polygons outside of "
            f"the image, where they are cut off {_lines(data, shares)}: drawn on an image of "
            "another size?",
            tuple(shares),
        )
    equal: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for row in rows:
        equal[data.refs[row]["image_id"], targets[row].digest].append(row)
    if copies := [row for group in equal.values() for row in group[1:]]:
        found = counted(len(copies), "mask is that", "masks are those")
        yield Remark(
            f"{found} of another object of the image {_lines(data, copies)}: list all sentences "
            "of one object together, each object once",
            tuple(copies),
        )


def outside_share(data: CustomData, row: int) -> float:
    """Return which share of the points of a ref's polygons lies clearly outside of its image."""
    annotation = data.instances["annotations"][row]
    segmentation = annotation["segmentation"]
    if not isinstance(segmentation, list) or any(isinstance(part, dict) for part in segmentation):
        return 0.0  # run lengths
    image = data.instances["images"][annotation["image_id"] - 1]
    sides = np.array([image["width"], image["height"]])
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
    beyond = np.maximum(-points, points - sides) > OUTSIDE * sides
    return float(beyond.any(axis=1).mean())


def _sentences(data: CustomData, targets: list[Target], max_tokens: int) -> Iterator[Remark]:
    remarks = {
        ("also describes", "also describe"): (
            " another target of the image",
            ": a sentence should fit one of them",
        ),
        ("is listed", "are listed"): (" twice for the same object", ""),
        ("looks", "look"): (" like a label or the name of a file", ", for example {}"),
        ("is longer", "are longer"): (
            f" than {max_tokens} tokens and truncated",
            ": raise dataset.max_words",
        ),
    }
    ambiguous, repeated, label, truncated = remarks
    first: dict[tuple[int, str], int] = {}  # the first ref with a sentence, by image and sentence
    found: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    texts: set[str] = set()
    for row, ref in enumerate(data.refs):
        own: set[str] = set()
        for sentence in ref["sentences"]:
            text = " ".join(sentence["sent"].lower().split())
            other = first.setdefault((ref["image_id"], text), row)
            kinds = {
                ambiguous: targets[other].digest != targets[row].digest,
                repeated: text in own,
                label: LABEL.fullmatch(text),
                truncated: truncated_words(sentence["sent"], max_tokens),
            }
            for kind in filter(kinds.get, kinds):
                found[kind].append((row, sentence))
            own.add(text)
        texts |= own
    for kind, (fault, advice) in remarks.items():
        if found[kind]:
            lines = _listed(data, [sentence["line"] for _, sentence in found[kind]])
            advice = advice.format(repr(found[kind][0][1]["sent"])[:60])
            number = counted(len(found[kind]), f"sentence {kind[0]}", f"sentences {kind[1]}")
            yield Remark(f"{number}{fault} {lines}{advice}", tuple(row for row, _ in found[kind]))
    if len(texts) == 1 and len(data.refs) > 2:
        yield Remark(f"all objects have the same sentence, {next(iter(texts))!r:.60}")


def _lines(data: CustomData, rows: Iterable[int]) -> str:
    """Return the lines of refs in words."""
    return _listed(data, [data.refs[row]["sentences"][0]["line"] for row in rows])


def _listed(data: CustomData, lines: list[int]) -> str:
    """Return line numbers in words, at most 5."""
    unit = data.unit if len(lines) == 1 else f"{data.unit}s"
    return f"({unit} {', '.join(map(str, lines[:5]))}{', ...' if len(lines) > 5 else ''})"
