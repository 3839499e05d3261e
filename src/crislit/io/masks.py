"""Reads mask images as COCO run lengths."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask

from crislit.errors import InputError, require
from crislit.io.images import image_errors, is_transparent, open_image_file


def read_mask(path: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Read an image as a mask in COCO's run lengths.

    The marked pixels are those of any colour but the first in an image with a colour palette, 1 in
    an image of 0 and 1, and values above 127 in all other images.

    Raises:
        InputError: If it cannot be read, is not of this (height, width), or marks no pixel.
    """
    with (
        image_errors(f"{path} is not a mask that can be read", f"no mask at {path}"),
        open_image_file(path) as image,
    ):
        found = (image.height, image.width)
        # Checked first: a few bytes can claim any number of pixels.
        require(
            found == size, f"the mask {path} has {found} pixels (height, width), its image {size}"
        )
        is_palette = image.mode == "P" and has_colour(image)
        values = np.array(image if is_palette or image.mode == "1" else image.convert("L"))
        transparent = image.mode != "P" and is_transparent(image)
    require(
        not transparent,
        f"the mask {path} has transparent pixels: save it in black and white, without them",
    )
    marked = values > 0 if is_palette or values.max() <= 1 else values > 127
    if not marked.any():
        listed = ", ".join(map(str, np.unique(values)[:8]))
        raise InputError(
            f"the mask {path} marks no pixel: its values are {listed}; marked pixels need values "
            "above 127, or 1 in an image of 0 and 1"
        )
    runs = coco_mask.encode(np.asfortranarray(marked, dtype=np.uint8))
    return {"size": list(size), "counts": runs["counts"].decode()}


def has_colour(image: PIL.Image.Image) -> bool:
    """Whether a palette image uses other colours than several shades of grey.

    Shades of grey mark by brightness, like an image without a palette.
    """
    used = np.unique(np.array(image.convert("RGB")).reshape(-1, 3), axis=0)
    return len(used) < 2 or bool((used.min(axis=1) < used.max(axis=1)).any())
