"""Masks as overlays, files and JSON lines."""

import hashlib
import itertools
import os
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
from pycocotools import mask as coco_mask

from crislit.errors import InputError
from crislit.inference.segmenter import Segmentation
from crislit.io import Image

COLOURS = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((204, 121, 167), (0, 114, 178), (213, 94, 0)),
)
"""Okabe and Ito's palette without black, which the colour-blind can distinguish."""


def colour_of(number: int) -> tuple[int, int, int]:
    """Return the colour of an image's sentence, RGB in [0, 255]; seven colours take turns."""
    return COLOURS[number % len(COLOURS)]


def paint(
    image: Image, masks: Sequence[npt.NDArray[np.bool_]], first: int = 0, strength: float = 0.5
) -> Image:
    """Return a copy of an image with masks painted over it, each in its colour with an outline.

    Later masks cover earlier ones.

    Args:
        image: (h, w, 3) uint8 RGB.
        masks: (h, w) bool each.
        first: Number of the first mask's colour.
        strength: Opacity of the colour, in [0, 1].
    """
    painted = image.copy()
    thickness = max(round(max(image.shape[:2]) / 300), 1)
    for number, mask in enumerate(masks, start=first):
        colour = np.array(colour_of(number))
        painted[mask] = ((1 - strength) * painted[mask] + strength * colour).round()
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(painted, outlines, -1, colour.tolist(), thickness)
    return painted


def to_json(name: str, result: Segmentation) -> dict[str, Any]:
    """Return the JSON line of a result, the mask as COCO's compressed run lengths."""
    runs = coco_mask.encode(np.asfortranarray(result.mask, dtype=np.uint8))
    return {
        "image": name,
        "sentence": result.sentence,
        "score": round(result.score, 6),
        "area": int(result.mask.sum()),
        "box": [int(side) for side in coco_mask.toBbox(runs)],
        "segmentation": {"size": list(map(int, runs["size"])), "counts": runs["counts"].decode()},
    }


def safe_file_name(stem: str, sentence: str, taken: set[str]) -> str:
    """Return a file name for a sentence, without suffix, and add it to the names taken.

    It is valid on every system.
    """
    name = os.fsencode(stem)  # not necessarily valid UTF-8
    if len(name) > 150:  # file systems allow 255 bytes
        stem = f"{name[:140].decode(errors='ignore')}-{hashlib.sha256(name).hexdigest()[:8]}"
    words = re.sub(r"[^a-z0-9]+", "-", sentence.lower()).strip("-")[:60] or "sentence"
    chosen = number_repeated(f"{stem}-{words}", "-{}", taken)
    taken.add(chosen)
    return chosen


def number_repeated(name: str, suffix: str, taken: Container[str]) -> str:
    """Return a name; if it is taken, add the suffix with the lowest free number from 2 on."""
    numbered = (name + suffix.format(number) for number in itertools.count(2))
    return next(x for x in itertools.chain([name], numbered) if x not in taken)


def write_images(base: Path, image: Image, result: Segmentation, number: int) -> dict[str, str]:
    """Write mask and overlay to ``BASE-mask.png`` and ``BASE-overlay.png``; return both paths.

    Raises:
        InputError: If they cannot be written.
    """
    paths = {}
    for kind, pixels in (
        ("mask", 255 * result.mask.astype(np.uint8)),
        ("overlay", paint(image, [result.mask], first=number)),
    ):
        path = base.with_name(f"{base.name}-{kind}.png")
        try:
            PIL.Image.fromarray(pixels).save(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error}") from error
        paths[kind] = str(path)
    return paths
