"""Masks painted over pictures, each in its own colour."""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from crislit.data.letterbox import Image

COLOURS = (  # told apart by the colour-blind too: Okabe and Ito's, without black
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (0, 114, 178),
    (213, 94, 0),
)


def colour_of(number: int) -> tuple[int, int, int]:
    """Return the colour of a picture's sentence, RGB in [0, 255]; after seven they come again."""
    return COLOURS[number % len(COLOURS)]


def paint(image: Image, masks: Sequence[npt.NDArray[np.bool_]], first: int = 0, strength: float = 0.5) -> Image:
    """Paint masks over a picture, each in its colour and with an outline; later ones over earlier ones.

    Args:
        image: (h, w, 3) uint8 RGB; it stays as it is.
        masks: (h, w) bool each.
        first: Number of the first mask's colour.
        strength: Share of the colour in the mixture, in [0, 1].
    """
    painted = image.copy()
    width = max(round(max(image.shape[:2]) / 300), 1)
    for number, mask in enumerate(masks, start=first):
        colour = np.array(colour_of(number))
        painted[mask] = ((1 - strength) * painted[mask] + strength * colour).round().astype(np.uint8)
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(painted, outlines, -1, colour.tolist(), width)
    return painted
