"""A user's pictures, of every kind, as the network takes them."""

import io
import os
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps

from crislit.data.letterbox import Image
from crislit.errors import InputError

Picture = str | os.PathLike[str] | IO[bytes] | bytes | PIL.Image.Image | npt.NDArray[Any]
"""A file (path, open, or its bytes), a PIL image, or an array: (h, w, 3) RGB, (h, w, 4) RGBA or (h, w) grey, uint8; grey may be
uint16."""

SMALLEST = 8
"""Pixels that a picture's sides must have at least."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX")
"""What is read. PIL knows more: some of it starts other programs, and no camera or editor writes the rest."""


def open_picture(source: Picture, most_pixels: int | None = None) -> Image:
    """Read a picture as (h, w, 3) uint8 RGB, upright as EXIF says, transparency laid over white.

    Args:
        source: The picture.
        most_pixels: How many a file may have; None: as many as PIL admits, 179 million.

    Raises:
        InputError: If it is no picture, damaged, too small, or of too many pixels.
    """
    name = "the picture"
    if isinstance(source, (bytes, bytearray)):
        source = io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike, PIL.Image.Image, np.ndarray)) and not hasattr(source, "read"):
        raise InputError(
            f"expected a picture: a path, an open file, its bytes, a PIL image or an array, got {type(source).__name__}"
        )
    try:
        if isinstance(source, np.ndarray):
            name = "the array"
            rgb = to_rgb(from_array(source))
        elif isinstance(source, PIL.Image.Image):
            rgb = to_rgb(source)
        else:
            name = str(source) if isinstance(source, (str, os.PathLike)) else name
            with open_file(source, most_pixels) as picture:
                rgb = to_rgb(picture)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"no picture at {name}") from error
    except PIL.UnidentifiedImageError as error:
        raise InputError(f"{name} is no picture that can be read") from error
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large: {error}") from error
    except Exception as error:  # PIL's readers raise whatever damaged bytes lead them to
        raise InputError(f"{name} is damaged, or of a kind that cannot be read: {error}") from error
    height, width = rgb.shape[:2]
    if min(height, width) < SMALLEST:
        raise InputError(f"{name} has {width} x {height} pixels; both sides need at least {SMALLEST}")
    return rgb


def open_file(source: str | os.PathLike[str] | IO[bytes], most_pixels: int | None = None) -> PIL.Image.Image:
    """Open a picture file of one of the :data:`FORMATS`, its pixels yet to be read.

    Raises:
        Exception: Whatever PIL's readers do; see :func:`open_picture`.
    """
    if isinstance(source, (str, os.PathLike)) and Path(source).exists() and not Path(source).is_file():
        raise OSError("not a file")  # a pipe would be waited for
    PIL.Image.init()
    picture = PIL.Image.open(source, formats=[name for name in FORMATS if name in PIL.Image.OPEN])
    if most_pixels is not None and picture.width * picture.height > most_pixels:
        picture.close()
        raise PIL.Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels, at most {most_pixels:,} are read")
    return picture


def suffixes() -> set[str]:
    """Return what the names of picture files end with, in lower case."""
    PIL.Image.init()
    return {suffix for suffix, name in PIL.Image.registered_extensions().items() if name in FORMATS and name in PIL.Image.OPEN}


def from_array(array: npt.NDArray[Any]) -> PIL.Image.Image:
    """Take an array for a picture.

    Raises:
        InputError: If its shape or type is none of a picture's.
    """
    colour = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if array.dtype not in (np.uint8, np.uint16) or not (colour or array.ndim == 2) or 0 in array.shape:
        hint = "; values in [0, 1] become one by (255 * array).round().astype('uint8')" if array.dtype.kind == "f" else ""
        raise InputError(f"expected a picture as uint8 array (h, w, 3) in RGB, got {array.dtype} of shape {array.shape}{hint}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.dtype == np.uint16:
        array = eight_bits(array)
    return PIL.Image.fromarray(np.ascontiguousarray(array))


def eight_bits(deep: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Turn values of 16 bits into such of 8."""
    if 0 < deep.max() < 4096:
        warnings.warn(
            f"values of 16 bits reach {deep.max()} of 65535 and are read as almost black: stretch them if it is not",
            stacklevel=5,
        )
    return (deep / 257).round().astype(np.uint8)


def to_rgb(picture: PIL.Image.Image) -> Image:
    """Turn a picture of any mode into (h, w, 3) uint8 RGB, upright."""
    try:
        picture.getexif()
    except Exception as error:  # PIL's readers raise whatever damaged bytes lead them to
        warnings.warn(f"its EXIF cannot be read ({error}): the picture is taken as it lies", stacklevel=3)
    else:
        picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # grey of 16 bits, which PIL keeps in modes of 16 or 32
        deep = np.asarray(picture, dtype=np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError(f"grey values from {deep.min()} to {deep.max()}, expected 16 bits")
        if isinstance(clear := picture.info.get("transparency"), int):
            deep = np.where(deep == clear, 65535, deep)
        return np.repeat(eight_bits(deep)[..., None], 3, axis=2)
    if picture.mode in ("La", "RGBa"):  # colours multiplied by their opacity
        picture = picture.convert({"La": "LA", "RGBa": "RGBA"}[picture.mode])
    if picture.mode == "F":
        raise ValueError("floating point pixels have no agreed range")
    if picture.has_transparency_data:
        layered = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", layered.size, "white")
        picture = PIL.Image.alpha_composite(white, layered)
    return np.array(picture.convert("RGB"))
