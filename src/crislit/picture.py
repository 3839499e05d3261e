"""A user's pictures, of every kind, as the network takes them."""

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

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

MOST_SCANNED = 4 * 10**9
"""Pixels of a JPEG times its scans, each of which goes over all of them: two seconds. PIL writes ten progressive scans."""
MOST_READS = {b"\xff\xd8": 2000}
"""Pieces of a file's head, before its pixels, by how it begins: PIL's time grows with the square of some kinds of them."""
ELSE_READS = 10_000
"""The same for files that begin otherwise; a GIF's pieces have at most 255 bytes."""
MOST_EXIF = 2**24
"""Bytes of EXIF times its entries, each of which PIL copies, and any of which may be all of it: 250 entries in 64 kB, which is
what a JPEG's segment holds."""
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
    scans, head = count_scans(source), _Head(source)
    PIL.Image.init()
    picture = PIL.Image.open(head, formats=[name for name in FORMATS if name in PIL.Image.OPEN])
    head.left = None
    if scans * picture.width * picture.height > MOST_SCANNED:
        picture.close()
        raise ValueError(f"it goes {scans} times over {picture.width} x {picture.height} pixels")
    if picture.width * picture.height > most_pixels:
        picture.close()
        raise PIL.Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels, at most {most_pixels:,} are read")
    return picture


class _Head:
    """A file of which so many pieces may be read, and about twice its bytes; and everything once its picture is known."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left: int | None = MOST_READS.get(file.read(2), ELSE_READS)
        self._bytes = 2 * file.seek(0, os.SEEK_END) + 2**16
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        if self.left is not None:
            self.left, self._bytes = self.left - 1, self._bytes - len(content)
            if self.left < 0 or self._bytes < 0:
                raise ValueError("its head has too many parts")
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def count_scans(file: IO[bytes]) -> int:
    """Return how many scans a JPEG has, of all its pictures; other files have none."""
    scans, before = 0, b""
    if file.read(2) == b"\xff\xd8":
        while block := file.read(2**20):
            scans += (before + block).count(b"\xff\xda\0")  # pixels have no such bytes
            before = (before + block)[-2:]
    file.seek(0)
    return scans


def read_exif(picture: PIL.Image.Image) -> PIL.Image.Exif:
    """Return a picture's EXIF.

    Raises:
        Exception: Whatever PIL's reader does; a ValueError if it would take more memory than the picture.
    """
    exif = picture.info.get("exif", b"")
    if "Raw profile type exif" in picture.info and not exif:  # of PNG, in hexadecimal after three lines
        exif = bytes.fromhex("".join(str(picture.info["Raw profile type exif"]).split("\n")[3:]))
    tiff = exif.removeprefix(b"Exif\0\0")
    order: Literal["big", "little"] = "big" if tiff[:2] == b"MM" else "little"
    place = int.from_bytes(tiff[4:8], order)
    if tiff and tiff[:4] not in (b"MM\0*", b"II*\0"):
        raise ValueError("it does not begin as EXIF does")
    if int.from_bytes(tiff[place : place + 2], order) * len(tiff) > MOST_EXIF:
        raise ValueError(f"it has too many entries in {len(tiff)} bytes")
    return picture.getexif()


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
    picture.load()  # PNG may have its EXIF behind its pixels
    try:
        read_exif(picture)
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
