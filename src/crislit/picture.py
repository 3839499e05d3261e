"""A user's pictures, of every kind, as the network takes them."""

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps

from crislit.data.letterbox import Image
from crislit.data.refer import LARGEST_PICTURE
from crislit.errors import InputError

Picture = str | os.PathLike[str] | IO[bytes] | bytes | PIL.Image.Image | npt.NDArray[Any]
"""A file (path, open, or its bytes), a PIL image, or an array: (h, w, 3) RGB, (h, w, 4) RGBA or (h, w) grey, uint8; grey may be
uint16."""

SMALLEST = 8
"""Pixels that a picture's sides must have at least."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX")
"""What is read. PIL knows more: some of it starts other programs, and no camera or editor writes the rest."""


MOST_SCANS = 100
"""Of a JPEG, each of which may take as long as the whole picture: libtiff's limit, and ten times what programs write."""
MOST_READS = 2000
"""Pieces of a file's head, before its pixels: PIL takes a time that grows with the square of some kinds of them."""
LARGEST_FILE = 2**30
"""Bytes."""
STRIP = 2**20
"""Pixels that are worked on at once."""


def open_picture(source: Picture, most_pixels: int = LARGEST_PICTURE) -> Image:
    """Read a picture as (h, w, 3) uint8 RGB, upright as EXIF says, transparency laid over white.

    Args:
        source: The picture.
        most_pixels: How many a file may have.

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


def open_file(source: str | os.PathLike[str] | IO[bytes], most_pixels: int = LARGEST_PICTURE) -> PIL.Image.Image:
    """Open a picture file of one of the :data:`FORMATS`, its pixels yet to be read.

    Raises:
        Exception: Whatever PIL's readers do; see :func:`open_picture`.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.exists() and not path.is_file():
            raise OSError("not a file")  # a pipe would be waited for
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE} bytes")
        source = io.BytesIO(path.read_bytes())
    try:
        source.seek(0)
    except (AttributeError, OSError):  # it comes from a pipe
        source = io.BytesIO(source.read())
    refuse_scans(source)
    head = _Head(source)
    PIL.Image.init()
    picture = PIL.Image.open(head, formats=[name for name in FORMATS if name in PIL.Image.OPEN])
    head.left = None
    if picture.width * picture.height > most_pixels:
        picture.close()
        raise PIL.Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels, at most {most_pixels:,} are read")
    return picture


class _Head:
    """A file of which so many pieces may be read, and everything once its picture is known."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left: int | None = MOST_READS

    def read(self, size: int = -1) -> bytes:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise ValueError(f"its head has more than {MOST_READS} pieces")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def refuse_scans(file: IO[bytes]) -> None:
    """Refuse a JPEG of many scans, a few bytes each, that would take minutes.

    Raises:
        ValueError: If it is one; otherwise the file is at its beginning again.
    """
    if file.read(2) == b"\xff\xd8":
        scans, before = 0, b""
        while block := file.read(2**20):
            scans += (before + block).count(b"\xff\xda\0")  # pixels have no such bytes
            before = block[-2:]
        if scans > MOST_SCANS:
            raise ValueError(f"it has {scans} scans, at most {MOST_SCANS} are read")
    file.seek(0)


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
    return ((deep.astype(np.int32) + 128) // 257).astype(np.uint8)


def to_rgb(picture: PIL.Image.Image) -> Image:
    """Turn a picture of any mode into (h, w, 3) uint8 RGB, upright."""
    try:
        picture.getexif()
    except Exception as error:  # PIL's readers raise whatever damaged bytes lead them to
        warnings.warn(f"its EXIF cannot be read ({error}): the picture is taken as it lies", stacklevel=3)
    else:
        picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # grey of 16 bits, which PIL keeps in modes of 16 or 32
        deep = np.asarray(picture, dtype=np.int32)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError(f"grey values from {deep.min()} to {deep.max()}, expected 16 bits")
        if isinstance(clear := picture.info.get("transparency"), int):
            deep = np.where(deep == clear, 65535, deep)
        return np.repeat(eight_bits(deep)[..., None], 3, axis=2)
    if picture.mode in ("La", "RGBa"):  # colours multiplied by their opacity
        picture = picture.convert({"La": "LA", "RGBa": "RGBA"}[picture.mode])
    if picture.mode == "F":
        raise ValueError("floating point pixels have no agreed range")
    rgb = np.empty((picture.height, picture.width, 3), dtype=np.uint8)
    for top, strip in strips(picture):  # copies of all of it would take several times its memory
        if picture.has_transparency_data:
            layered = strip.convert("RGBA")
            strip = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layered.size, "white"), layered)
        rgb[top : top + strip.height] = np.asarray(strip.convert("RGB"))
    return rgb


def strips(picture: PIL.Image.Image) -> Iterator[tuple[int, PIL.Image.Image]]:
    """Cut a picture into strips, from above: yield each one's first row and its pixels."""
    rows = max(1, STRIP // max(1, picture.width))
    for top in range(0, picture.height, rows):
        yield top, picture.crop((0, top, picture.width, min(top + rows, picture.height)))
