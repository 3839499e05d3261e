"""Draws the scenes of the embedded data sets."""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from crislit.data.expressions import COLORS, HEIGHT, PATTERNS, SHAPES, WIDTH, Thing
from crislit.io import Image

BoolMask = npt.NDArray[np.bool_]
Coordinate = npt.NDArray[np.floating[Any]]
HUES = {
    "red": 0,
    "orange": 28,
    "yellow": 54,
    "green": 125,
    "cyan": 180,
    "blue": 225,
    "purple": 273,
    "pink": 322,
}
AREA = (2600.0, 8200.0)
"""Area of an unoccluded object in pixels, drawn log-uniformly: 3.4 to 10.7 % of the image."""
MIN_VISIBLE = 0.6
"""Minimum visible share of each object."""


def _star(u: Coordinate, v: Coordinate) -> BoolMask:
    angle = np.mod(np.arctan2(u, -v), 2 * np.pi / 5)  # 0 at a tip
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)
    inner, tip = 0.48, np.pi / 5
    # The edge runs from the tip (radius 1, angle 0) to the notch (radius 0.48, angle pi/5).
    denominator = np.sin(angle) * (1 - inner * np.cos(tip)) + inner * np.sin(tip) * np.cos(angle)
    inside: BoolMask = np.hypot(u, v) <= inner * np.sin(tip) / denominator
    return inside


# Whether a point belongs to the shape: u to the right, v down, both in [-1, 1].
OUTLINES: dict[str, Callable[[Coordinate, Coordinate], BoolMask]] = {
    "circle": lambda u, v: np.hypot(u, v) <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 1,
    "triangle": lambda u, v: (v <= 0.85) & (abs(u) <= (v + 0.9) / 1.75),
    "star": _star,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.33) & (np.maximum(abs(u), abs(v)) <= 1),
    "diamond": lambda u, v: abs(u) / 0.72 + abs(v) <= 1,
    "ring": lambda u, v: (np.hypot(u, v) <= 1) & (np.hypot(u, v) >= 0.5),
    "heart": lambda u, v: (
        ((1.2 * u) ** 2 + (0.25 - 1.2 * v) ** 2 - 1) ** 3 <= (1.2 * u) ** 2 * (0.25 - 1.2 * v) ** 3
    ),
}


# Whether a pattern is dark, given each pixel's distance (across, down) from the object's center.
DARK: dict[str, Callable[[Coordinate, Coordinate], BoolMask]] = {
    "plain": lambda across, down: np.zeros(across.shape, dtype=bool),
    "striped": lambda across, down: np.floor(down / 7) % 2 == 0,
    "dotted": lambda across, down: np.hypot(across / 7 % 2 - 1, down / 7 % 2 - 1) < 0.62,
    "checkered": lambda across, down: (np.floor(across / 7) + np.floor(down / 7)) % 2 == 0,
}
_SIDE = np.linspace(-1, 1, 400)
UNIT_AREA = {shape: 4 * float(OUTLINES[shape](_SIDE, _SIDE[:, None]).mean()) for shape in SHAPES}


@dataclass
class Drawn:
    """An object on the canvas.

    Attributes:
        shape: One of ``SHAPES``.
        color: One of ``COLORS``.
        pattern: One of ``PATTERNS``.
        full: Its mask, (h, w).
        visible: The part of the mask that no later object covers, (h, w).
    """

    shape: str
    color: str
    pattern: str
    full: BoolMask
    visible: BoolMask

    def seen(self) -> Thing:
        """Return the object as a viewer sees it."""
        columns, rows = self.visible.sum(axis=0), self.visible.sum(axis=1)
        area = int(columns.sum())
        return Thing(
            shape=self.shape,
            color=self.color,
            pattern=self.pattern,
            x=float(columns @ np.arange(WIDTH)) / area,
            y=float(rows @ np.arange(HEIGHT)) / area,
            visible=area,
            full=int(np.count_nonzero(self.full)),
        )


def bounding_slices(mask: BoolMask) -> tuple[slice, slice]:
    """Return the rows and columns of the mask's bounding box."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def row_hull(mask: BoolMask) -> BoolMask:
    """Fill each row between its first and last pixel, which closes a ring's hole."""
    from_left = np.logical_or.accumulate(mask, axis=1)
    from_right = np.logical_or.accumulate(mask[:, ::-1], axis=1)[:, ::-1]
    return from_left & from_right


def draw_ground(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Draw a light or dark texture without a clear hue, (h, w, 3) in [0, 255]."""
    texture = 3 * rng.standard_normal((HEIGHT, WIDTH), dtype=np.float32)
    for _ in range(3):
        angle = rng.uniform(0, np.pi)
        frequency = 2 * np.pi / rng.uniform(8, 120)
        phase = rng.uniform(0, 2 * np.pi)
        across = frequency * np.cos(angle) * np.arange(WIDTH)
        down = frequency * np.sin(angle) * np.arange(HEIGHT)[:, None] + phase
        # sin(across + down), by outer products.
        wave = np.sin(down) * np.cos(across) + np.cos(down) * np.sin(across)
        texture += rng.uniform(3, 11) * wave
    tint = rng.uniform(70, 190) + rng.uniform(-8, 8, size=3)
    return tint.astype(np.float32) + texture[..., None]


def place_object(
    rng: np.random.Generator, shape: str, area: float
) -> tuple[BoolMask, float, float]:
    """Place a shape at random, and return its mask (h, w) and its center (x, y) in pixels."""
    radius = float(np.sqrt(area / UNIT_AREA[shape]))
    cx, cy = (rng.uniform(radius + 3, side - radius - 3) for side in (WIDTH, HEIGHT))
    xs, ys = (np.arange(int(c - radius) - 1, int(c + radius) + 2) for c in (cx, cy))
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    u, v = (xs - cx) / radius, (ys - cy) / radius
    mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1] = OUTLINES[shape](u, v[:, None])
    return mask, cx, cy


def paint(
    rng: np.random.Generator, color: str, pattern: str, across: Coordinate, down: Coordinate
) -> npt.NDArray[np.float64]:
    """Return the colors of an object's pixels, (n, 3) in [0, 255].

    Args:
        rng: Draws saturation and brightness.
        color: One of ``COLORS``.
        pattern: One of ``PATTERNS``; their period is 14 pixels.
        across: Horizontal distance of each pixel from the object's center, (n,).
        down: Vertical distance of each pixel from the object's center, (n,).
    """
    rgb = 255 * np.array(
        colorsys.hsv_to_rgb(HUES[color] / 360, rng.uniform(0.75, 0.95), rng.uniform(0.8, 1.0))
    )
    return rgb * np.where(DARK[pattern](across, down), 0.5, 1.0)[:, None]


def draw_scene(
    rng: np.random.Generator, unlike: bool = False, objects: int | None = None
) -> tuple[Image, list[Drawn]]:
    """Draw a scene of 4 to 7 objects.

    Shapes and colors come from a few, so that most objects share one with another object. An
    object that would hide too much of another is redrawn; if a scene has no space for all of its
    objects, the last ones are left out.

    Args:
        rng: Draws everything.
        unlike: Whether to use many shapes.
        objects: Number of objects, instead of 4 to 7.
    """
    count = int(rng.integers(4, 8)) if objects is None else objects
    shape_count = int(rng.integers(4, 7)) if unlike else int(rng.integers(2, 5))
    shapes = rng.choice(SHAPES, size=shape_count, replace=False)
    colors = rng.choice(COLORS, size=int(rng.integers(2, 5)), replace=False)
    canvas = draw_ground(rng)
    drawn: list[Drawn] = []
    tries = 0
    while len(drawn) < min(count, 4) or (len(drawn) < count and tries < 100):
        tries += 1
        shape, color = str(rng.choice(shapes)), str(rng.choice(colors))
        pattern = str(rng.choice(PATTERNS)) if rng.random() < 0.6 else "plain"
        attributes = [(d.shape, d.color, d.pattern) for d in drawn]
        if (shape, color, pattern) in attributes and rng.random() < 0.7:
            continue
        full, cx, cy = place_object(rng, shape, float(np.exp(rng.uniform(*np.log(AREA)))))
        # The visible parts of the other objects below the new one.
        remaining = [d.visible & ~full for d in drawn]
        shares = [
            np.count_nonzero(mask) / np.count_nonzero(d.full)
            for mask, d in zip(remaining, drawn, strict=True)
        ]
        # An object that only shows through a ring's hole looks like a disc.
        outside = [mask & ~row_hull(full) for mask in remaining] if shape == "ring" else remaining
        if min(shares, default=1) < MIN_VISIBLE or any(
            np.count_nonzero(mask) <= 300 for mask in outside
        ):
            continue
        ys, xs = np.nonzero(full)
        canvas[ys, xs] = paint(rng, color, pattern, xs - cx, ys - cy)
        for d, mask in zip(drawn, remaining, strict=True):
            d.visible = mask
        drawn.append(Drawn(shape, color, pattern, full, full))
    return canvas.clip(0, 255).astype(np.uint8), drawn


def is_eligible(things: list[Thing], target: Thing, split: str) -> bool:
    """Whether a split may describe the object.

    In testA, another object has its shape. In testB, none has, but another one has its color or
    pattern.
    """
    others = [t for t in things if t is not target]
    twin = any(t.shape == target.shape for t in others)
    if split == "testA":
        return twin
    if split == "testB":
        return not twin and any(
            t.color == target.color or t.pattern == target.pattern for t in others
        )
    return True


def encode_segmentation(mask: BoolMask) -> list[list[float]] | list[dict[str, Any]]:
    """Encode a mask as COCO polygons, or as compressed run lengths if it has holes.

    Run lengths are in a list of one element, as in refclef: other readers of the REFER format
    expect a list, and pass it to pycocotools.
    """
    rows, columns = bounding_slices(mask)
    # Contours run through the centers of border pixels; zooming brings them close to the edges.
    zoom = 4
    fine = np.repeat(np.repeat(mask[rows, columns].astype(np.uint8), zoom, axis=0), zoom, axis=1)
    contours, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if (hierarchy[0, :, 3] >= 0).any():
        encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        return [{"counts": encoded["counts"].decode(), "size": list(mask.shape)}]
    polygons = [cv2.approxPolyDP(contour, 1.2, closed=True)[:, 0] for contour in contours]
    return [
        ((points + 0.5) / zoom + (columns.start, rows.start)).round(2).ravel().tolist()
        for points in polygons
        if len(points) >= 3
    ]
