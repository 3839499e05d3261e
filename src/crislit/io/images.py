"""Reads any image file, PIL image or array as RGB uint8."""

import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps

from crislit.errors import InputError, require
from crislit.io.libraries import is_damage, is_system_error, require_opencv
from crislit.io.orientation import read_orientation

Image = npt.NDArray[np.uint8]
"""(h, w, 3) RGB."""
ImageSource = str | os.PathLike[str] | IO[bytes] | bytes | PIL.Image.Image | npt.NDArray[Any]
"""A file (its path, opened, or its bytes), a PIL image or an array.

Arrays are (h, w, 3) RGB, (h, w, 4) RGBA or (h, w) grayscale, in uint8 or uint16.
"""
FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB"),
    *("TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX"),
)
"""Formats that are read. PIL knows more, some of which start other programs."""
MIN_SIDE = 8
"""Minimum height and width of a user's image in pixels."""
MAX_PIXELS = 89_478_485
"""Maximum number of pixels, above which PIL warns; drawing a mask takes 4 bytes per pixel."""
MAX_FILE_BYTES = 2**30
MAX_SCANNED_PIXELS = 4 * 10**9
"""Pixels times scans of a JPEG, about two seconds of decoding. PIL writes up to ten scans."""
MAX_JPEG_HEADER_READS = 2000
"""Reads before the pixels of a JPEG. PIL's time is quadratic in the number of some segments."""
MAX_HEADER_READS = 10_000
"""The same for other formats; a block of a GIF has at most 255 bytes."""
STRIP_PIXELS = 2**20
"""Pixels converted at once: copies of a whole image would take several times its memory."""
DAMAGED = "is damaged, or in a format that cannot be read"


# -- Images from users


def open_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image:
    """Read an image, (H, W, 3) RGB, upright according to its EXIF; transparency becomes white.

    Of several frames, the first is read, with a warning.

    Args:
        source: The image.
        max_pixels: Maximum number of pixels of a file.

    Raises:
        InputError: If it is not an image, damaged, too small or too large.
    """
    require_opencv()
    is_path = isinstance(source, (str, os.PathLike))
    name = str(source) if is_path else "the image"
    try:
        if isinstance(source, np.ndarray):
            name = "the array"
            rgb = to_rgb(from_array(source))
        elif isinstance(source, PIL.Image.Image):
            rgb = to_rgb(source)
        elif is_path or isinstance(source, (bytes, bytearray)) or hasattr(source, "read"):
            with open_image_file(source, max_pixels) as image:
                if has_several_frames(image):
                    warnings.warn(f"{name} has several frames: the first is read", stacklevel=2)
                rgb = to_rgb(image)
        else:
            raise InputError(
                "expected an image: a path, an open file, its bytes, a PIL image or an array, "
                f"got {type(source).__name__}"
            )
    except InputError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"no image at {name}") from error
    except PIL.UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image that can be read") from error
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large: {error}") from error
    except Exception as error:
        if is_system_error(error):
            raise InputError(f"cannot read {name}: {error.strerror}") from error
        if not is_damage(error):
            raise
        raise InputError(f"{name} {DAMAGED}: {error}") from error
    height, width = rgb.shape[:2]
    require(
        min(height, width) >= MIN_SIDE,
        f"{name} has {width} x {height} pixels; both sides need at least {MIN_SIDE}",
    )
    return rgb


def from_array(array: npt.NDArray[Any]) -> PIL.Image.Image:
    """Convert an array to a PIL image.

    Raises:
        InputError: If its shape or type is not that of an image.
    """
    has_channels = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    hint = "; convert values in [0, 1] by (255 * array).round().astype('uint8')"
    require(
        array.dtype in (np.uint8, np.uint16)
        and (has_channels or array.ndim == 2)
        and 0 not in array.shape,
        "expected an image as uint8 array (h, w, 3) in RGB, "
        f"got {array.dtype} of shape {array.shape}{hint if array.dtype.kind == 'f' else ''}",
    )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.dtype == np.uint16:
        array = to_8_bits(array)
    return PIL.Image.fromarray(np.ascontiguousarray(array))


def to_rgb(image: PIL.Image.Image) -> Image:
    """Convert an image of any mode to upright RGB."""
    image.load()  # the EXIF of a PNG may follow its pixels
    try:
        is_rotated = read_orientation(image) != 1
    except Exception as error:
        if not is_damage(error):
            raise
        warnings.warn(f"its EXIF cannot be read ({error}): the image is not rotated", stacklevel=3)
    else:
        image = PIL.ImageOps.exif_transpose(image) if is_rotated else image
    if image.mode.startswith("I"):  # 16-bit grayscale, which PIL stores in 16 or 32 bits
        gray = np.asarray(image, dtype=np.int32)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"gray values from {gray.min()} to {gray.max()}, expected 16 bits")
        if isinstance(transparent := image.info.get("transparency"), int):
            gray = np.where(gray == transparent, 65535, gray)
        return np.repeat(to_8_bits(gray)[..., None], 3, axis=2)
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    if image.mode == "F":
        raise ValueError("floating point pixels have no agreed range")
    rgb = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top, strip in iterate_strips(image):
        if image.has_transparency_data:
            rgba = strip.convert("RGBA")
            strip = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "white"), rgba)
        rgb[top : top + strip.height] = np.asarray(strip.convert("RGB"))
    return rgb


def to_8_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scale 16-bit values to 8 bits, and warn if they are almost black."""
    if 0 < values.max() < 4096:
        warnings.warn(
            f"the 16-bit values reach only {values.max()} of 65535, which is almost black: "
            "rescale them if the image is not that dark",
            stacklevel=5,
        )
    return ((values.astype(np.int32) + 128) // 257).astype(np.uint8)


# -- Image files


@contextmanager
def image_errors(unreadable: str, missing: str = "") -> Iterator[None]:
    """Raise an ``InputError`` with one of the messages if an image cannot be read.

    Errors of the system, such as a missing permission, are reported as such. Errors that do not
    come from the file are not caught.
    """
    try:
        yield
    except InputError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(missing or unreadable) from error
    except Exception as error:
        if is_system_error(error):
            name = getattr(error, "filename", None)
            problem = f"cannot read {name}: " if name else f"{unreadable}: "
            raise InputError(f"{problem}{error.strerror}") from error
        if not is_damage(error):
            raise
        raise InputError(unreadable) from error


def open_image_file(
    source: str | os.PathLike[str] | IO[bytes] | bytes, max_pixels: int = MAX_PIXELS
) -> PIL.Image.Image:
    """Open an image file in one of the ``FORMATS`` without decoding its pixels.

    Raises:
        Exception: Any type, if PIL cannot read it or it would take too much time or memory.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.exists() and not path.is_file():
            raise OSError("not a file")  # reading a pipe would wait for its writer
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        content = path.read_bytes()
    elif isinstance(source, (bytes, bytearray)):
        content = source
    else:
        with suppress(AttributeError, OSError):  # a pipe
            source.seek(0)
        content = source.read()
    is_jpeg = content[:2] == b"\xff\xd8"
    scans = content.count(b"\xff\xda\0") if is_jpeg else 0  # the bytes never occur within pixels
    header = _BoundedHeader(content, MAX_JPEG_HEADER_READS if is_jpeg else MAX_HEADER_READS)
    PIL.Image.init()
    image = PIL.Image.open(header, formats=[name for name in FORMATS if name in PIL.Image.OPEN])
    header.reads_left = header.bytes_left = math.inf
    pixels = image.width * image.height
    if scans * pixels > MAX_SCANNED_PIXELS:
        raise ValueError(f"it has {scans} scans of {image.width} x {image.height} pixels")
    if pixels > max_pixels:
        raise PIL.Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels, at most {max_pixels:,} are read"
        )
    return image


class _BoundedHeader(io.BytesIO):
    """A file whose header is read in a limited number of reads, of about twice its size in all."""

    def __init__(self, content: bytes, reads: int) -> None:
        super().__init__(content)
        self.reads_left: float = reads
        self.bytes_left: float = 2 * len(content) + 2**16

    def read(self, size: int | None = -1) -> bytes:
        part = super().read(size)
        self.reads_left -= 1
        self.bytes_left -= len(part)
        if self.reads_left < 0 or self.bytes_left < 0:
            raise ValueError("its header has too many parts")
        return part


def iterate_strips(image: PIL.Image.Image) -> Iterator[tuple[int, PIL.Image.Image]]:
    """Yield an image from top to bottom in strips, each with the index of its first row."""
    rows = max(1, STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def has_several_frames(image: PIL.Image.Image) -> bool:
    """Whether an opened file is an animation or has several pages.

    The further frames of a JPEG (MPO) do not count: phones store previews and depth there.
    """
    return image.format != "MPO" and bool(getattr(image, "is_animated", False))


def require_one_frame(image: PIL.Image.Image, name: str) -> None:
    """Raise an ``InputError`` if an opened file of a data set has several frames."""
    require(
        not has_several_frames(image),
        f"{name} has several frames or pages: save the one that counts as a file of its own",
    )


def is_transparent(image: PIL.Image.Image) -> bool:
    """Whether any pixel of an image is transparent."""
    return image.has_transparency_data and any(
        np.asarray(strip.convert("RGBA").getchannel("A")).min() < 255
        for _, strip in iterate_strips(image)
    )


def image_suffixes() -> set[str]:
    """Return the suffixes of image files that can be read, in lower case with the dot."""
    extensions = PIL.Image.registered_extensions().items()
    return {suffix for suffix, name in extensions if name in FORMATS and name in PIL.Image.OPEN}
