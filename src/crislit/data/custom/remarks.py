"""Remarks on custom data that can be used, but may not mean what the user thinks."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from crislit.data.custom.builder import CustomData
from crislit.data.custom.check import draw_target, images_by_split
from crislit.transforms import truncated_words

LARGE = 0.5
"""Share of an image above which a target may be an inverted mask."""
SMALL, FEW_PIXELS = 1e-3, 16
"""Share of an image, and number of pixels, below which a target may be a stray pixel."""
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
            yield Remark(
                f"{len(shared)} images of {split} are also in train, so metrics on {split} will "
                "be too high"
            )
        copies = {i for i in images - splits["train"] if digests.get(i) in contents}
        if copies:
            copy = min(copies)
            original = names[contents[digests[copy]]]
            yield Remark(
                f"{len(copies)} images of {split} have the same content as images of train "
                f"({names[copy]} and {original}), so metrics on {split} will be too high",
                tuple(row for row, ref in enumerate(data.refs) if ref["image_id"] in copies),
            )
    if 0 < len(splits["val"]) < FEW_IMAGES:
        yield Remark(f"val has few images ({len(splits['val'])}), so its scores depend on chance")


def _masks(data: CustomData, targets: list[Target]) -> Iterator[Remark]:
    rows = range(len(targets))
    large = [row for row in rows if targets[row].area > LARGE]
    if large:
        yield Remark(
            f"{len(large)} masks cover more than half of their image {_lines(data, large)}: are "
            "they inverted?",
            tuple(large),
        )
    small = [row for row in rows if targets[row].area < SMALL or targets[row].pixels < FEW_PIXELS]
    if small:
        yield Remark(
            f"{len(small)} masks cover less than {SMALL:.1%} of their image or {FEW_PIXELS} "
            f"pixels {_lines(data, small)}",
            tuple(small),
        )
    equal: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for row in rows:
        equal[data.refs[row]["image_id"], targets[row].digest].append(row)
    copies = [row for group in equal.values() for row in group[1:]]
    if copies:
        yield Remark(
            f"{len(copies)} masks are those of other objects of their image "
            f"{_lines(data, copies)}: list all sentences of one object together, each object once",
            tuple(copies),
        )


def _sentences(data: CustomData, targets: list[Target], max_tokens: int) -> Iterator[Remark]:
    remarks = {
        "also describe another target of their image": ": a sentence should fit one of them",
        "are listed twice for their object": "",
        "look like labels or names of files": ", for example {}",
        f"longer than {max_tokens} tokens are truncated": ": raise dataset.max_words",
    }
    ambiguous, repeated, label, truncated = remarks
    first: dict[tuple[int, str], int] = {}  # the first ref with a sentence, by image and sentence
    found: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
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
    for kind, advice in remarks.items():
        if found[kind]:
            lines = _listed(data, [sentence["line"] for _, sentence in found[kind]])
            advice = advice.format(repr(found[kind][0][1]["sent"])[:60])
            text = f"{len(found[kind])} sentences {kind} {lines}{advice}"
            yield Remark(text, tuple(row for row, _ in found[kind]))
    if len(texts) == 1 and len(data.refs) > 2:
        yield Remark(f"all objects have the same sentence, {next(iter(texts))!r:.60}")


def _lines(data: CustomData, rows: Iterable[int]) -> str:
    """Return the lines of refs in words."""
    return _listed(data, [data.refs[row]["sentences"][0]["line"] for row in rows])


def _listed(data: CustomData, lines: list[int]) -> str:
    """Return line numbers in words, at most 5."""
    return f"({data.unit}s {', '.join(map(str, lines[:5]))}{', ...' if len(lines) > 5 else ''})"
