"""The result of a sentence: a mask, its probabilities, and what is derived from them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
from pycocotools import mask as coco_mask

from crislit.errors import InputError, require, why_unwritten
from crislit.inference.masks import paint
from crislit.io import Image, ImageSource, open_image


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """The mask of one sentence.

    Attributes:
        sentence: The sentence.
        mask: (h, w) bool at the image's own size, upright by its EXIF orientation.
        probability: (h, w) float32 in [0, 1].
        score: Mean probability inside the mask, 0 if the mask is empty. It is not the probability
            that the mask is right.
        image: (h, w, 3) uint8 RGB, upright; all results of an image share it. None if unknown.
    """

    sentence: str
    mask: npt.NDArray[np.bool_]
    probability: npt.NDArray[np.float32]
    score: float
    image: Image | None = None

    def __repr__(self) -> str:
        sentence = shorten(self.sentence, 60)
        height, width = self.mask.shape
        return (
            f"Segmentation({sentence!r}, {height} x {width}, score={self.score:.3f}, "
            f"area={self.area}, box={self.box})"
        )

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(np.count_nonzero(self.mask))

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """Smallest box around the mask in pixels: left, top, width, height. None if it is empty."""
        rows, columns = (np.flatnonzero(self.mask.any(axis=axis)) for axis in (1, 0))
        if not len(rows):
            return None
        left, top = int(columns[0]), int(rows[0])
        return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top

    @property
    def rle(self) -> dict[str, Any]:
        """The mask as COCO's compressed run lengths: ``size`` [h, w], and ``counts`` as text."""
        runs = coco_mask.encode(np.asfortranarray(self.mask, dtype=np.uint8))
        return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode()}

    def overlay(self, image: ImageSource | None = None, number: int = 0) -> Image:
        """Return a copy of the image with the mask painted over it.

        Args:
            image: The image, or an overlay of another sentence; None for the segmented image.
            number: Number of the color; seven colors take turns.

        Returns:
            (h, w, 3) uint8 RGB.

        Raises:
            InputError: If the image is unknown, or does not have the size of the mask.
        """
        below = self.image if image is None else open_image(image)
        if below is None:
            raise InputError("this result does not hold its image: call overlay(image)")
        require(
            below.shape[:2] == self.mask.shape,
            "expected an image of {} x {} pixels (height x width), found {} x {}".format(
                *self.mask.shape, *below.shape[:2]
            ),
        )
        return paint(below, [self.mask], first=number)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as a PNG file of 0 and 255.

        A missing folder is created, and an existing file is replaced.

        Raises:
            InputError: If the name does not end in ``.png``, or the file cannot be written.
        """
        file = Path(path).expanduser()
        require(
            file.suffix.lower() == ".png",
            f"expected a file name that ends in .png, found {file}: a mask is stored without loss",
        )
        write_png(file, 255 * self.mask.astype(np.uint8))

    def to_json(self, name: str) -> dict[str, Any]:
        """Return the result as a JSON line of ``crislit.predict``, for an image of this name."""
        return {
            "image": name,
            "sentence": self.sentence,
            "score": round(self.score, 6),
            "area": self.area,
            "box": list(self.box or (0, 0, 0, 0)),
            "segmentation": self.rle,
        }


def write_images(base: Path, result: Segmentation, number: int) -> dict[str, str]:
    """Write mask and overlay to ``BASE-mask.png`` and ``BASE-overlay.png``; return both paths.

    Args:
        base: The common part of both paths.
        result: The result, with its image.
        number: Number of the overlay's color.

    Raises:
        InputError: If they cannot be written.
    """
    paths = {kind: base.with_name(f"{base.name}-{kind}.png") for kind in ("mask", "overlay")}
    result.save(paths["mask"])
    write_png(paths["overlay"], result.overlay(number=number))
    return {kind: str(path) for kind, path in paths.items()}


def write_png(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Write an array as a PNG file, whose folder is created.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(path, "PNG")
    except OSError as error:
        raise InputError(f"cannot write {path}: {why_unwritten(error)}") from error


def shorten(text: str, maximum: int = 200) -> str:
    """Return a text, or the beginning of a long one."""
    return text if len(text) <= maximum else f"{text[:maximum]}..."
