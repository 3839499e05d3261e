"""Reads mask images as COCO run lengths."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask

from crislit.errors import InputError
from crislit.io.images import is_transparent, open_image_file


def read_mask(path: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Read a picture as a mask, in COCO's run lengths.

    A palette of colours marks by any entry but the first, a picture of 0 and 1 by 1, any other by what is brighter than half.

    Raises:
        InputError: If it cannot be read, or is not of this (height, width).
    """
    try:
        with open_image_file(path) as picture:
            if (
                picture.height,
                picture.width,
            ) != size:  # before memory is taken for what a few bytes speak of
                raise InputError(
                    f"the mask {path} has {(picture.height, picture.width)} pixels (height, width), its picture {size}"
                )
            palette = picture.mode == "P" and has_colour(picture)
            values = np.array(picture if palette or picture.mode == "1" else picture.convert("L"))
            transparent = picture.mode != "P" and is_transparent(picture)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is no mask {path}") from error
    except Exception as error:  # PIL's readers raise whatever damaged bytes lead them to
        raise InputError(f"{path} is no mask that can be read") from error
    if transparent:
        raise InputError(
            f"the mask {path} has transparent pixels: save it in black and white, without"
        )
    marked = values > 0 if palette or values.max() <= 1 else values > 127
    if not marked.any():
        found = ", ".join(map(str, np.unique(values)[:8]))
        raise InputError(
            f"the mask {path} marks no pixel: its values are {found}; what marks is above 127, or 1 beside 0 alone"
        )
    runs = coco_mask.encode(np.asfortranarray(marked, dtype=np.uint8))
    return {"size": list(size), "counts": runs["counts"].decode()}


def has_colour(picture: PIL.Image.Image) -> bool:
    """Whether the entries of a palette that are used are not just several greys, whose brightness says what is marked."""
    used = np.unique(np.array(picture.convert("RGB")).reshape(-1, 3), axis=0)
    return len(used) < 2 or bool((used.min(axis=1) < used.max(axis=1)).any())
