"""Reads any image file, PIL image or array as RGB uint8."""

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps

from crislit.errors import InputError

ORIENTATION = 0x0112
"""EXIF's tag."""
DAMAGED = "damaged, or of a kind that cannot be read"
MAX_PIXELS = 89_478_485
"""Pixels of a picture, which the rasteriser takes four bytes each for; Pillow warns of larger ones."""
Image = npt.NDArray[np.uint8]
ImageSource = str | os.PathLike[str] | IO[bytes] | bytes | PIL.Image.Image | npt.NDArray[Any]
"""A file (path, open, or its bytes), a PIL image, or an array: (h, w, 3) RGB, (h, w, 4) RGBA or (h, w) grey, uint8; grey may be
uint16."""
MIN_SIDE = 8
"""Pixels that a picture's sides must have at least."""
FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "ICO",
    "TGA",
    "PCX",
)
"""What is read. PIL knows more: some of it starts other programs, and no camera or editor writes the rest."""
MAX_SCANNED_PIXELS = 4 * 10**9
"""Pixels of a JPEG times its scans, each of which goes over all of them: two seconds. PIL writes ten progressive scans."""
MAX_HEADER_READS = {b"\xff\xd8": 2000}
"""Pieces of a file's head, before its pixels, by how it begins: PIL's time grows with the square of some kinds of them."""
MAX_OTHER_HEADER_READS = 10_000
"""The same for files that begin otherwise; a GIF's pieces have at most 255 bytes."""
MAX_EXIF_WORK = 2**24
"""Bytes of EXIF times its entries, each of which PIL copies, and any of which may be all of it: 250 entries in 64 kB, which is
what a JPEG's segment holds."""
MAX_FILE_BYTES = 2**30
"""Bytes."""
STRIP_PIXELS = 2**20
"""Pixels that are worked on at once."""


def open_image(source: ImageSource, most_pixels: int = MAX_PIXELS) -> Image:
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
    if not isinstance(source, (str, os.PathLike, PIL.Image.Image, np.ndarray)) and not hasattr(
        source, "read"
    ):
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
            with open_image_file(source, most_pixels) as picture:
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
    if min(height, width) < MIN_SIDE:
        raise InputError(
            f"{name} has {width} x {height} pixels; both sides need at least {MIN_SIDE}"
        )
    return rgb


def open_image_file(
    source: str | os.PathLike[str] | IO[bytes], most_pixels: int = MAX_PIXELS
) -> PIL.Image.Image:
    """Open a picture file of one of the :data:`FORMATS`, its pixels yet to be read.

    Raises:
        Exception: Whatever PIL's readers do; see :func:`open_picture`.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.exists() and not path.is_file():
            raise OSError("not a file")  # a pipe would be waited for
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        source = io.BytesIO(path.read_bytes())
    try:
        source.seek(0)
    except (AttributeError, OSError):  # it comes from a pipe
        source = io.BytesIO(source.read())
    scans, head = count_scans(source), _BoundedHeader(source)
    PIL.Image.init()
    picture = PIL.Image.open(head, formats=[name for name in FORMATS if name in PIL.Image.OPEN])
    head.left = None
    if scans * picture.width * picture.height > MAX_SCANNED_PIXELS:
        picture.close()
        raise ValueError(f"it goes {scans} times over {picture.width} x {picture.height} pixels")
    if picture.width * picture.height > most_pixels:
        picture.close()
        raise PIL.Image.DecompressionBombError(
            f"{picture.width} x {picture.height} pixels, at most {most_pixels:,} are read"
        )
    return picture


class _BoundedHeader:
    """A file of which so many pieces may be read, and about twice its bytes; and everything once its picture is known."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left: int | None = MAX_HEADER_READS.get(file.read(2), MAX_OTHER_HEADER_READS)
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
    if (
        "Raw profile type exif" in picture.info and not exif
    ):  # of PNG, in hexadecimal after three lines
        exif = bytes.fromhex("".join(str(picture.info["Raw profile type exif"]).split("\n")[3:]))
    tiff = exif.removeprefix(b"Exif\0\0")
    order: Literal["big", "little"] = "big" if tiff[:2] == b"MM" else "little"
    place = int.from_bytes(tiff[4:8], order)
    if tiff and tiff[:4] not in (b"MM\0*", b"II*\0"):
        raise ValueError("it does not begin as EXIF does")
    if int.from_bytes(tiff[place : place + 2], order) * len(tiff) > MAX_EXIF_WORK:
        raise ValueError(f"it has too many entries in {len(tiff)} bytes")
    return picture.getexif()


def image_suffixes() -> set[str]:
    """Return what the names of picture files end with, in lower case."""
    PIL.Image.init()
    return {
        suffix
        for suffix, name in PIL.Image.registered_extensions().items()
        if name in FORMATS and name in PIL.Image.OPEN
    }


def from_array(array: npt.NDArray[Any]) -> PIL.Image.Image:
    """Take an array for a picture.

    Raises:
        InputError: If its shape or type is none of a picture's.
    """
    colour = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if (
        array.dtype not in (np.uint8, np.uint16)
        or not (colour or array.ndim == 2)
        or 0 in array.shape
    ):
        hint = (
            "; values in [0, 1] become one by (255 * array).round().astype('uint8')"
            if array.dtype.kind == "f"
            else ""
        )
        raise InputError(
            f"expected a picture as uint8 array (h, w, 3) in RGB, got {array.dtype} of shape {array.shape}{hint}"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.dtype == np.uint16:
        array = to_eight_bits(array)
    return PIL.Image.fromarray(np.ascontiguousarray(array))


def to_eight_bits(deep: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
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
        warnings.warn(
            f"its EXIF cannot be read ({error}): the picture is taken as it lies", stacklevel=3
        )
    else:
        picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # grey of 16 bits, which PIL keeps in modes of 16 or 32
        deep = np.asarray(picture, dtype=np.int32)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError(f"grey values from {deep.min()} to {deep.max()}, expected 16 bits")
        if isinstance(clear := picture.info.get("transparency"), int):
            deep = np.where(deep == clear, 65535, deep)
        return np.repeat(to_eight_bits(deep)[..., None], 3, axis=2)
    if picture.mode in ("La", "RGBa"):  # colours multiplied by their opacity
        picture = picture.convert({"La": "LA", "RGBa": "RGBA"}[picture.mode])
    if picture.mode == "F":
        raise ValueError("floating point pixels have no agreed range")
    rgb = np.empty((picture.height, picture.width, 3), dtype=np.uint8)
    for top, strip in iterate_strips(
        picture
    ):  # copies of all of it would take several times its memory
        if picture.has_transparency_data:
            layered = strip.convert("RGBA")
            strip = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layered.size, "white"), layered)
        rgb[top : top + strip.height] = np.asarray(strip.convert("RGB"))
    return rgb


def iterate_strips(picture: PIL.Image.Image) -> Iterator[tuple[int, PIL.Image.Image]]:
    """Cut a picture into strips, from above: yield each one's first row and its pixels."""
    rows = max(1, STRIP_PIXELS // max(1, picture.width))
    for top in range(0, picture.height, rows):
        yield top, picture.crop((0, top, picture.width, min(top + rows, picture.height)))


def read_upright_size(path: Path) -> tuple[int, int]:
    """Return a picture's (height, width).

    Raises:
        InputError: If it cannot be read; or is stored rotated, since which way its mask is meant cannot be known; or is
            transparent in places, since what is to be seen there cannot be known.
    """
    try:
        with open_image_file(path) as picture:
            known = (
                picture.format == "JPEG" or "exif" in picture.info
            )  # elsewhere PIL reads all pixels to look for it
            turned = read_exif(picture).get(ORIENTATION, 1) if known else 1
            width, height = picture.size
            transparent = is_transparent(picture)
    except FileNotFoundError as error:
        raise InputError(f"there is no picture {path}") from error
    except Exception as error:  # PIL's readers raise whatever damaged bytes lead them to
        raise InputError(f"{path} is no picture that can be read") from error
    if transparent:
        raise InputError(
            f"{path} has transparent pixels: lay it over a background, and save it without"
        )
    if turned != 1:
        raise InputError(
            f"{path} is stored turned (EXIF orientation {turned}): save it upright, as its mask is"
        )
    return height, width


def is_transparent(picture: PIL.Image.Image) -> bool:
    """Whether a picture is transparent in places."""
    if not picture.has_transparency_data:
        return False
    return any(
        np.asarray(strip.convert("RGBA").getchannel("A")).min() < 255
        for _, strip in iterate_strips(picture)
    )


def decode_image(path: Path, size: tuple[int, int]) -> Image:
    """Read a photograph of this (height, width), see :func:`read_image`."""
    return decode_pixels(read_image_file(path, size), path, size)


def read_image_file(path: Path, size: tuple[int, int]) -> bytes:
    """Read a photograph's file, if by its head and end it is a whole one of this (height, width).

    Raises:
        InputError: If it is not.
    """
    if not path.is_file():
        raise InputError(
            f"image {path} is {'no file' if path.exists() else 'missing'}; fetch it again"
        )
    try:
        content = path.read_bytes()
        with open_image_file(
            io.BytesIO(content)
        ) as picture:  # its head, before memory is taken for the pixels that it speaks of
            width, height = picture.size
            cut = picture.format in ("JPEG", "MPO") and not has_end(content)
    except InputError:
        raise
    except Exception as error:  # PIL's readers raise whatever damaged bytes lead them to
        raise InputError(
            f"image {path} is {DAMAGED}; fetch it again, or save it as PNG or JPEG"
        ) from error
    if (height, width) != size:
        raise InputError(
            f"image {path} has {(height, width)} pixels (height, width), its annotation {size}"
        )
    if cut:
        raise InputError(f"image {path} is cut off; fetch it again, or save it as PNG or JPEG")
    return content


def decode_pixels(content: bytes, path: Path, size: tuple[int, int]) -> Image:
    """Decode what :func:`read_file` has read: (h, w, 3) uint8 RGB.

    Raises:
        InputError: If it is damaged.
    """
    try:
        image = cv2.imdecode(
            np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except Exception as error:  # OpenCV's readers raise whatever damaged bytes lead them to
        raise InputError(
            f"image {path} is {DAMAGED}; fetch it again, or save it as PNG or JPEG"
        ) from error
    if image is None or image.shape[:2] != size:
        raise InputError(f"image {path} is {DAMAGED}; fetch it again, or save it as PNG or JPEG")
    return image  # type: ignore[return-value]


def has_end(jpeg: bytes) -> bool:
    """Whether a JPEG's pixels are followed by its end marker; OpenCV fills up with grey what a picture that is cut off lacks.

    A file that is damaged within its pixels cannot be told from a sound one: JPEG has no checksum.
    """
    place = 2
    while (
        jpeg[place : place + 1] == b"\xff" and jpeg[place + 1 : place + 2] != b"\xda"
    ):  # a segment, thumbnails' included
        fill = jpeg[place + 1 : place + 2] == b"\xff"
        place += 1 if fill else 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return jpeg.rfind(b"\xff\xd9", place) >= 0  # from the end, where it usually is
