"""Masks painted over images, and the names of their files."""

import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Container, Sequence

import cv2
import numpy as np
import numpy.typing as npt

from crislit.io import Image

COLORS = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((204, 121, 167), (0, 114, 178), (213, 94, 0)),
)
"""Okabe and Ito's palette without black, which the color-blind can distinguish."""
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]')
"""Characters that Windows forbids in file names, and bytes of Linux's that are not text."""
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])\.", re.IGNORECASE)
"""Beginnings of names that Windows reserves for devices."""


def color_of(number: int) -> tuple[int, int, int]:
    """Return the color of an image's sentence, RGB in [0, 255]; seven colors take turns."""
    return COLORS[number % len(COLORS)]


def paint(
    image: Image, masks: Sequence[npt.NDArray[np.bool_]], first: int = 0, strength: float = 0.5
) -> Image:
    """Return a copy of an image with masks painted over it, each in its color with an outline.

    Later masks cover earlier ones.

    Args:
        image: (h, w, 3) uint8 RGB.
        masks: (h, w) bool each.
        first: Number of the first mask's color.
        strength: Opacity of the color, in [0, 1].
    """
    painted = image.copy()
    for number, mask in enumerate(masks, start=first):
        color = np.array(color_of(number))
        painted[mask] = ((1 - strength) * painted[mask] + strength * color).round()
        outline(painted, mask, color_of(number))
    return painted


def outline(
    image: Image, mask: npt.NDArray[np.bool_], color: tuple[int, int, int] | None = None
) -> None:
    """Draw a white and a black line around a mask, on the image itself.

    They make it visible on an object of any color. Where it ends with the image, they lie inside.

    Args:
        image: (h, w, 3) uint8 RGB.
        mask: (h, w) bool.
        color: Color of a further line along the mask's own pixels; None for no such line.
    """
    inside = image[mask]
    width = max(round(max(image.shape[:2]) / 300), 1)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, contours, -1, BLACK, 5 * width)
    cv2.drawContours(image, contours, -1, WHITE, 3 * width - 1)
    image[mask] = inside
    if color is not None:
        cv2.drawContours(image, contours, -1, color, width)
    image[mask & frame(mask.shape, 2 * width)] = WHITE
    image[mask & frame(mask.shape, width)] = BLACK


def frame(shape: tuple[int, ...], width: int) -> npt.NDArray[np.bool_]:
    """Return (h, w) bool that is True where the border of an image is nearer than the width."""
    pixels = np.ones(shape, dtype=bool)
    pixels[width:-width, width:-width] = False
    return pixels


def safe_file_name(stem: str, sentence: str, taken: set[str]) -> str:
    """Return a file name for a sentence, without suffix, that is valid on every system.

    It keeps the letters and digits of any script.

    Args:
        stem: The beginning of the name, for example the name of the image.
        sentence: The sentence.
        taken: Names given before, as ``fold_name`` returns them; receives the new one.
    """
    digest = hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]  # not necessarily valid UTF-8
    stem = UNSAFE.sub("_", stem)
    if len(stem.encode()) > 150:  # file systems allow 255 bytes
        stem = f"{cut_bytes(stem, 140)}-{digest}"
    if RESERVED.match(stem):
        stem = f"_{stem}"
    name = f"{stem}-{sentence_words(sentence)}"
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    chosen = next(x for x in itertools.chain([name], numbered) if fold_name(x) not in taken)
    taken.add(fold_name(chosen))
    return chosen


def sentence_words(sentence: str) -> str:
    """Return letters and digits of a sentence with dashes in between, in at most 80 bytes."""
    text = unicodedata.normalize("NFC", sentence.lower())
    # Marks are the vowels of many scripts. A mark after anything else belongs to an emoji.
    kinds = "".join(unicodedata.category(c)[0] for c in text)
    words = [text[m.start() : m.end()] for m in re.finditer("(?:[LN]M*)+", kinds)]
    return cut_bytes("-".join(words)[:60], 80).strip("-") or "sentence"


def cut_bytes(text: str, size: int) -> str:
    """Return the beginning of a text that takes at most so many bytes in UTF-8."""
    return text.encode()[:size].decode(errors="ignore")


def fold_name(name: str) -> str:
    """Return what names that are the same file on any system have in common."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def number_repeated(name: str, suffix: str, taken: Container[str]) -> str:
    """Return a name; if it is taken, add the suffix with the lowest free number from 2 on."""
    numbered = (name + suffix.format(number) for number in itertools.count(2))
    return next(x for x in itertools.chain([name], numbered) if x not in taken)
