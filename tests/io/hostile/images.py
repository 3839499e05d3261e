"""Hostile images, read as a user's, as a data set's and as custom data's."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from crislit.io.dataset_images import decode_image, read_upright_size
from crislit.io.images import open_image
from tests.io.hostile.case import Case, Cases

Make = Callable[[], bytes]
"""Makes an image file when its case runs."""
UNREADABLE = r"seven\.jpg is (damaged|truncated|too large|not an image|not a file)"


def read_user_image(folder: Path, make: Make) -> list[int]:
    """Read an image as a user's, and return its shape."""
    (folder / "seven.jpg").write_bytes(make())
    return [*open_image(folder / "seven.jpg").shape]


def read_dataset_image(folder: Path, make: Make, size: tuple[int, int] = (200, 300)) -> list[int]:
    """Read an image as a data set's, which knows its size, and return its shape."""
    (folder / "seven.jpg").write_bytes(make())
    return [*decode_image(folder / "seven.jpg", size).shape]


def read_custom_size(folder: Path, make: Make) -> list[int]:
    """Read the size of an image of custom data."""
    (folder / "seven.jpg").write_bytes(make())
    return [*read_upright_size(folder / "seven.jpg")]


def read_special_file(folder: Path, make: Callable[[Path], object], is_user: bool) -> Any:
    """Read something that is not a file."""
    path = folder / "seven.jpg"
    make(path)
    return open_image(path) if is_user else decode_image(path, (8, 8))


# -- Files


def photo() -> PIL.Image.Image:
    """Return an image of 300 x 200 pixels with soft colors."""
    colors = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(colors).resize((300, 200), PIL.Image.Resampling.BICUBIC)


def encode(image: PIL.Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """Return an image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(**options: Any) -> bytes:
    """Return the photo as JPEG."""
    return encode(photo(), **options)


def png(**options: Any) -> bytes:
    """Return the photo as PNG."""
    return encode(photo(), "PNG", **options)


def truncated(tenth: int, **options: Any) -> bytes:
    """Return some tenths of a JPEG."""
    content = jpeg(**options)
    return content[: len(content) * tenth // 10]


def patch(content: bytes, start: int, value: bytes) -> bytes:
    """Return a file with other bytes at an offset."""
    return content[:start] + value + content[start + len(value) :]


def bomb(kind: str) -> bytes:
    """Return a short file that claims a billion pixels."""
    small = PIL.Image.new("RGB", (8, 8))
    if kind == "PNG":
        content = patch(encode(small, "PNG"), 16, struct.pack(">II", 40_000, 40_000))
        return patch(content, 29, struct.pack(">I", zlib.crc32(content[12:29])))
    if kind == "TIFF":
        width, huge_width = (struct.pack("<HHII", 256, 4, 1, value) for value in (8, 2**31))
        return encode(small, "TIFF").replace(width, huge_width)
    if kind == "PPM":
        return b"P6 99999 99999 255\n" + bytes(100)
    content = encode(small, kind)
    start, size = {
        "GIF": (6, struct.pack("<HH", 65535, 65535)),
        "WebP": (26, struct.pack("<HH", 16383, 16383)),
        "BMP": (18, struct.pack("<ii", 2**30, 2**30)),
        "TGA": (12, struct.pack("<HH", 65535, 65535)),
        "JPEG": (content.find(b"\xff\xc0") + 5, struct.pack(">HH", 65535, 65535)),
    }[kind]
    return patch(content, start, size)


def inflating_text() -> bytes:
    """Return a PNG with a comment of 20 MB, compressed to 20 kB."""
    chunk = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(2 * 10**7))
    length, checksum = struct.pack(">I", len(chunk) - 4), struct.pack(">I", zlib.crc32(chunk))
    content = png()
    return content[:33] + length + chunk + checksum + content[33:]


def many_scans() -> bytes:
    """Return a JPEG whose last scan, of 60 bytes, is repeated two thousand times."""
    content = encode(photo().resize((3000, 2000)).convert("L"), progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * 2000 + content[-2:]


def gif_with(extension: bytes) -> bytes:
    """Return a GIF with an extension before its pixels."""
    content = encode(photo(), "GIF")
    start = 13 + 3 * 256
    return content[:start] + extension + content[start:]


def gif_comment(size: int) -> bytes:
    """Return the comment extension of a GIF."""
    return b"!\xfe" + (b"\xff" + b"a" * 255) * (size // 255) + b"\0"


def gif_xmp() -> bytes:
    """Return the XMP extension of a GIF, which is not divided into blocks."""
    content = b"<x:xmpmeta>" + b"<a>Photoshop</a>" * 12_500 + b"</x:xmpmeta>"
    return b"!\xff\x0bXMP DataXMP" + content + b"\x01" + bytes(range(255, -1, -1)) + b"\0"


def greedy_exif(size: int, entries: int) -> bytes:
    """Return EXIF, or a TIFF, in which each entry claims to be almost the whole file."""
    header = struct.pack("<2sHIH", b"II", 42, 8, entries)
    listed = b"".join(struct.pack("<HHII", 1000 + i, 7, size - 16, 8) for i in range(entries))
    return (header + listed + bytes(4)).ljust(size, b"\0")


def jpeg_with_greedy_exif() -> bytes:
    """Return a JPEG whose EXIF takes megabytes."""
    return jpeg(exif=b"Exif\0\0" + greedy_exif(60_000, 4900))


def png_with_greedy_exif() -> bytes:
    """Return a PNG whose EXIF takes gigabytes."""
    return png(exif=greedy_exif(10**6, 2000))


def jpeg_with_thumbnail() -> bytes:
    """Return a JPEG with another in its EXIF."""
    return jpeg(exif=b"Exif\0\0MM" + encode(photo().resize((16, 16))))


def jpeg_with_segments() -> bytes:
    """Return a JPEG with a million EXIF segments."""
    content = jpeg()
    return content[:2] + b"\xff\xe1\0\x0cExif\0\0aaaa" * 10**6 + content[2:]


def uniform(width: int, height: int, opacity: int = 254) -> bytes:
    """Return a PNG of pixels of one color, a few hundred kB."""
    image = PIL.Image.new("RGBA", (width, height), (9, 9, 9, opacity))
    return encode(image, "PNG", compress_level=1)


# -- Cases


def both(
    name: str, make: Make, size: tuple[int, int] = (200, 300), error: str | None = None
) -> Cases:
    """Yield a file as a data set's image and as a user's."""
    shape = [*size, 3]
    act = partial(read_dataset_image, make=make, size=size)
    yield Case(f"data set image, {name}", act, error, shape)
    yield Case(f"user image, {name}", partial(read_user_image, make=make), error, shape)


def images() -> Cases:
    """Yield all hostile images."""
    yield from damaged_images()
    yield from unusual_images()
    yield from huge_images()
    yield from gifs()
    yield from exif()
    yield from other_files()


def damaged_images() -> Cases:
    """Yield truncated images."""
    for tenth in range(10):
        make = partial(truncated, tenth)
        yield from both(f"truncated at {tenth} tenths", make, error=UNREADABLE)
    for tenth in (5, 9):
        make = partial(truncated, tenth, progressive=True)
        yield from both(f"progressive, truncated at {tenth} tenths", make, error=UNREADABLE)
    yield from both(
        "truncated JPEG with a thumbnail",
        lambda: jpeg_with_thumbnail()[: len(jpeg())],
        error=UNREADABLE,
    )


def unusual_images() -> Cases:
    """Yield images that are read although they are unusual, and images of one pixel."""
    yield from both("PNG named .jpg", png)
    yield from both("WebP named .jpg", lambda: encode(photo(), "WEBP"))
    yield from both("CMYK", lambda: encode(photo().convert("CMYK")))
    yield from both("grayscale", lambda: encode(photo().convert("L")))
    yield from both("16-bit grayscale", lambda: encode(photo().convert("L").convert("I;16"), "PNG"))
    yield from both("JPEG with bytes after its end", lambda: jpeg() + b"<html>" * 100 + b"\xff\xda")
    yield from both("JPEG with a thumbnail", jpeg_with_thumbnail)
    yield from both("progressive JPEG", partial(jpeg, progressive=True))
    yield from both("twelve progressive JPEGs in one file", lambda: 12 * jpeg(progressive=True))
    wide, high = (30_000, 20), (20, 30_000)
    yield from both("30,000 pixels wide", lambda: encode(photo().resize(wide)), (20, 30_000))
    yield from both("30,000 pixels high", lambda: encode(photo().resize(high)), (30_000, 20))
    pixel = partial(encode, photo().resize((1, 1)), "PNG")
    act = partial(read_dataset_image, make=pixel, size=(1, 1))
    yield Case("data set image, 1 x 1", act, value=[1, 1, 3])
    act = partial(read_user_image, make=pixel)
    yield Case("user image, 1 x 1", act, error="at least 8")


def huge_images() -> Cases:
    """Yield small files of many pixels, or that would take minutes or gigabytes."""
    for kind in ("PNG", "GIF", "WebP", "BMP", "TGA", "PPM", "JPEG", "TIFF"):
        yield from both(f"decompression bomb, {kind}", partial(bomb, kind), error=UNREADABLE)
    yield Case(
        "data set image, larger than annotated",
        partial(
            read_dataset_image,
            make=lambda: encode(photo().resize((4000, 4000)).convert("1"), "PNG"),
        ),
        error="4000",
    )
    yield from both(
        "177 million white pixels",
        lambda: encode(PIL.Image.new("1", (13300, 13300), 1), "PNG"),
        (13300, 13300),
        error="seven.jpg is (damaged|too large: .* 89,478,485)",
    )
    yield Case(
        "user image, 36 million transparent pixels",
        partial(read_user_image, make=partial(uniform, 6000, 6000)),
        value=[6000, 6000, 3],
    )
    yield Case(
        "user image, 30 million transparent pixels, 30,000 wide",
        partial(read_user_image, make=partial(uniform, 30_000, 1000)),
        value=[1000, 30_000, 3],
    )
    yield Case(
        "custom image, 36 million opaque pixels",
        partial(read_custom_size, make=partial(uniform, 6000, 6000, 255)),
        value=[6000, 6000],
    )
    yield from both("JPEG of two thousand scans", many_scans, (2000, 3000), error=UNREADABLE)
    yield from both("JPEG of a million segments", jpeg_with_segments, error=UNREADABLE)
    yield from both("PNG with an inflating comment", inflating_text, error=UNREADABLE)


def gifs() -> Cases:
    """Yield GIFs with extensions."""
    yield from both("GIF with two comments", lambda: gif_with(gif_comment(1000) * 2))
    yield from both("GIF with 200 kB of XMP", lambda: gif_with(gif_xmp()))
    yield from both(
        "GIF with a million comments", lambda: gif_with(b"!\xfe\1a\0" * 10**6), error=UNREADABLE
    )
    long = 5 * 10**7
    yield from both(
        "GIF with a comment of 50 MB", lambda: gif_with(gif_comment(long)), error=UNREADABLE
    )
    yield from both(
        "GIF with a comment after a stray byte",
        lambda: gif_with(b"\0" + gif_comment(long)),
        error=UNREADABLE,
    )
    # PIL does not end an extension whose first block is empty.
    yield from both(
        "GIF with a hidden comment",
        lambda: gif_with(b"!\1\0\1,\0" + gif_comment(long)),
        error=UNREADABLE,
    )


def exif() -> Cases:
    """Yield images with invalid or costly EXIF."""
    yield Case(
        "data set image, invalid EXIF",
        partial(read_dataset_image, make=lambda: jpeg(exif=b"Exif\0\0MM" + b"\xff" * 50)),
        value=[200, 300, 3],
    )
    yield from both("JPEG whose EXIF takes megabytes", jpeg_with_greedy_exif)
    yield from both("PNG whose EXIF takes gigabytes", png_with_greedy_exif)
    yield from both(
        "TIFF whose entries take gigabytes", lambda: greedy_exif(10**6, 2000), error=UNREADABLE
    )
    for kind, make in {"JPEG": jpeg_with_greedy_exif, "PNG": png_with_greedy_exif}.items():
        yield Case(
            f"custom image, {kind} with costly EXIF",
            partial(read_custom_size, make=make),
            error="seven.jpg is not an image that can be read",
        )


def other_files() -> Cases:
    """Yield files that are not images."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 200\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    files = {
        "empty file": b"",
        "web page": b"<!DOCTYPE html><html>404</html>",
        "program": b"\x7fELF" + bytes(500),
        "PostScript that runs a program": postscript + b"(%pipe%touch mark) (w) file\n",
        "SVG that fetches a file": svg,
        "pickle that runs code": b"cos\nsystem\n(S'touch mark'\ntR.",
        "zeros": bytes(10_000),
    }
    for name, content in files.items():
        yield from both(name, lambda content=content: content, error=UNREADABLE)  # type: ignore[misc]
    special: dict[str, Callable[[Path], object]] = {"folder": Path.mkdir, "pipe": os.mkfifo}
    for name, make in special.items():
        act = partial(read_special_file, make=make, is_user=False)
        yield Case(f"data set image, {name}", act, error=UNREADABLE)
        act = partial(read_special_file, make=make, is_user=True)
        yield Case(f"user image, {name}", act, error=UNREADABLE)
