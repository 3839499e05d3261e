"""Decides in one place whether an image is stored rotated, for users' images and data sets."""

import io
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
import PIL.Image

from crislit.errors import require, see
from crislit.io.libraries import is_damage

ORIENTATION = 0x0112
"""The EXIF tag of the orientation; 1 is upright, 2 to 8 are mirrored or rotated."""
MAX_EXIF_WORK = 2**24
"""Bytes times entries of EXIF, 250 entries in 64 kB. PIL copies each, and each may be all of it."""
KEYWORDS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Types and keywords of the chunks of a PNG in which PIL looks for an orientation."""
TURNS = {
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
"""What makes an image upright whose orientation swaps height and width."""
MAX_CHUNKS = 10_000
"""Chunks of a PNG that are looked at; of more than that, PIL decodes the pixels."""


def read_orientation(image: PIL.Image.Image) -> int:
    """Return an image's EXIF orientation, from EXIF or XMP, wherever PIL finds it.

    Pixels are only decoded if the orientation may follow them, as in some PNGs. PIL rotates a TIFF
    when it decodes it, after which it is upright.

    Returns:
        2 to 8 if `PIL.ImageOps.exif_transpose` would mirror or rotate the image, else 1.

    Raises:
        Exception: Any type, if PIL cannot read it; ValueError if it would take too much memory.
    """
    if image.format == "PNG" and _may_follow_pixels(image):
        image.load()
    return _find_orientation(image)


def read_tag(image: PIL.Image.Image) -> int:
    """Return the orientation of an opened file from its header, in no time if it has no EXIF.

    Returns:
        1 to 8; 1 if it has no orientation, or EXIF that cannot be read.
    """
    if not {"exif", "xmp"} & image.info.keys():
        return 1
    try:
        with warnings.catch_warnings(action="ignore"):  # PIL warns about damaged EXIF
            return _find_orientation(image)
    except Exception as error:
        if not is_damage(error):
            raise
        return 1


def _find_orientation(image: PIL.Image.Image) -> int:
    _check_exif(image)
    # A PNG's own method decodes the pixels.
    orientation = PIL.Image.Image.getexif(image).get(ORIENTATION, 1)
    return int(orientation) if orientation in range(2, 9) else 1


def turn_upright(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Return pixels whose orientation swaps height and width (5 to 8) upright, others as stored."""
    if orientation not in TURNS:
        return pixels
    return np.array(PIL.Image.fromarray(pixels).transpose(TURNS[orientation]))


def require_upright(image: PIL.Image.Image, name: str) -> None:
    """Check that an image of a data set is not stored rotated: its mask may or may not be.

    Raises:
        InputError: If `crislit.io.open_image` would rotate it.
        Exception: Any type, if PIL cannot read its EXIF.
    """
    orientation = read_orientation(image)
    require(
        orientation == 1,
        f"{name} is stored rotated (EXIF orientation {orientation}): save image and mask upright"
        f"{see('exif')}",
    )


def _may_follow_pixels(image: PIL.Image.Image) -> bool:
    """Whether PIL may find the orientation of a PNG behind its pixels, which are not decoded."""
    file = getattr(image, "fp", None)  # closed and None once the pixels are decoded
    if not isinstance(file, io.BytesIO):
        return False
    content = file.getvalue()
    position, is_behind = 8, False
    for _ in range(MAX_CHUNKS):
        kind = content[position + 4 : position + 8]
        if not kind:
            return False
        is_behind |= kind == b"IDAT"
        if is_behind and (kind == KEYWORDS[0] or content.startswith(KEYWORDS[1:], position + 8)):
            return True
        position += 12 + int.from_bytes(content[position : position + 4], "big")
    return True


def _check_exif(image: PIL.Image.Image) -> None:
    """Raise a ValueError if reading the EXIF would take too much memory."""
    exif = image.info.get("exif", b"")
    if not exif and "Raw profile type exif" in image.info:  # PNG: hexadecimal after three lines
        exif = bytes.fromhex("".join(str(image.info["Raw profile type exif"]).split("\n")[3:]))
    tiff = exif.removeprefix(b"Exif\0\0")
    if tiff and tiff[:4] not in (b"MM\0*", b"II*\0"):
        raise ValueError("its EXIF does not start like EXIF")
    order: Literal["big", "little"] = "big" if tiff[:2] == b"MM" else "little"
    start = int.from_bytes(tiff[4:8], order)
    entries = int.from_bytes(tiff[start : start + 2], order)
    if entries * len(tiff) > MAX_EXIF_WORK:
        raise ValueError(f"its EXIF has too many entries in {len(tiff)} bytes")
