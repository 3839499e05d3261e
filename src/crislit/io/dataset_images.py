"""Reads images of data sets strictly, and decodes them with OpenCV, which is faster than PIL."""

import functools
import logging
from pathlib import Path

import cv2
import numpy as np

from crislit.errors import InputError, printable, require, see
from crislit.io.images import (
    DAMAGED,
    Image,
    image_errors,
    is_transparent,
    open_image_file,
    require_one_frame,
)
from crislit.io.libraries import require_opencv
from crislit.io.orientation import read_tag, require_upright, turn_upright

log = logging.getLogger(__name__)
FIX = f"fetch it again, or save it as PNG or JPEG{see('unreadable-image')}"


def decode_image(path: Path, size: tuple[int, int]) -> Image:
    """Read the image at a path, of the (height, width) that its annotation states.

    COCO's annotations were drawn on the stored pixels: browsers ignored the EXIF orientation then.
    It is not applied, unlike in prediction, unless only the upright image has the stated size.
    Where both have the same size, a warning is logged.

    Raises:
        InputError: If it is missing, damaged or of another size.
    """
    return decode_pixels(read_image_file(path, size), path, size)


def read_image_file(path: Path, size: tuple[int, int]) -> bytes:
    """Read the file at a path without decoding it; check that header and end are an image's.

    The size is checked first: a file of a few bytes can claim any number of pixels.

    Raises:
        InputError: If it is missing, damaged, truncated or of another (height, width).
    """
    if not path.is_file():
        problem = "not a file" if path.exists() else "missing"
        raise InputError(f"image {path} is {problem}; fetch it again")
    with image_errors(f"image {path} {DAMAGED}; {FIX}"):
        content = path.read_bytes()
        with open_image_file(content) as image:
            stored = image.height, image.width
            orientation = read_tag(image)
            is_truncated = image.format in ("JPEG", "MPO") and not has_end(content)
    upright = stored[::-1] if orientation > 4 else stored
    if size not in (stored, upright):
        raise InputError(f"image {path} has {stored} pixels (height, width), its annotation {size}")
    if orientation > 1 and stored == upright:
        _warn_once(path, orientation)
    if is_truncated:
        raise InputError(f"image {path} is truncated; {FIX}")
    return content


def decode_pixels(content: bytes, path: Path, size: tuple[int, int]) -> Image:
    """Decode what ``read_image_file`` returned.

    Args:
        content: The bytes of the file.
        path: Its path, for errors.
        size: The (height, width) of the annotation.

    Returns:
        (h, w, 3) uint8 RGB; turned by its EXIF tag if only then it has this size.

    Raises:
        InputError: If it is damaged, or OpenCV is not of the required version.
    """
    require_opencv()
    damaged = f"image {path} {DAMAGED}; {FIX}"
    with image_errors(damaged):
        image = cv2.imdecode(
            np.frombuffer(content, np.uint8),
            cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
        )
        if image is not None and image.shape[:2] != size:
            with open_image_file(content) as header:
                image = turn_upright(image, read_tag(header))  # type: ignore[arg-type]
    require(image is not None and image.shape[:2] == size, damaged)
    return image  # type: ignore[return-value]


@functools.lru_cache(maxsize=1000)
def _warn_once(path: Path, orientation: int) -> None:
    log.warning(
        "image %s has EXIF orientation %d, and its annotation does not tell whether it was drawn "
        "on the stored or the upright image: the stored one is used, as in COCO",
        printable(str(path)),
        orientation,
    )


def has_end(jpeg: bytes) -> bool:
    """Whether the pixels of a JPEG are followed by an end marker.

    OpenCV fills the missing pixels of a truncated JPEG with gray. Altered pixels remain unnoticed:
    JPEG has no checksum.
    """
    start = 2
    # Skip the segments before the pixels: a thumbnail among them has an end marker, too.
    while jpeg[start : start + 1] == b"\xff" and jpeg[start + 1 : start + 2] != b"\xda":
        is_padding = jpeg[start + 1 : start + 2] == b"\xff"
        start += 1 if is_padding else 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")
    return jpeg.rfind(b"\xff\xd9", start) >= 0


def read_upright_size(path: Path) -> tuple[int, int]:
    """Return the (height, width) of an image.

    Raises:
        InputError: If it cannot be read; if it is stored rotated, since its mask may or may not be;
            or if it has several frames, or transparent pixels, since their color is unknown.
    """
    with (
        image_errors(f"{path} is not an image that can be read", f"no image at {path}"),
        open_image_file(path) as image,
    ):
        width, height = image.size
        require_one_frame(image, str(path))
        require_upright(image, str(path))
        transparent = is_transparent(image)
    require(
        not transparent,
        f"{path} has transparent pixels: lay it over a background and save it without them",
    )
    return height, width
