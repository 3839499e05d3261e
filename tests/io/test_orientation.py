"""Prediction and data sets have one notion of upright: what one rotates, the other refuses."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from crislit.errors import InputError
from crislit.io import decode_image, open_image, read_upright_size
from crislit.io.orientation import read_orientation, require_upright
from tests.conftest import shared
from tests.io.test_images import photo, saved

HEIGHT, WIDTH = 40, 60
TAG = 0x0112


def stored() -> PIL.Image.Image:
    return PIL.Image.fromarray(photo(HEIGHT, WIDTH))


def exif(orientation: int) -> bytes:
    tags = PIL.Image.Exif()
    tags[TAG] = orientation
    return tags.tobytes()


def xmp(orientation: int, as_element: bool = False) -> bytes:
    value = (
        f"><tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description>"
        if as_element
        else f' tiff:Orientation="{orientation}"/>'
    )
    start = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/rdf">'
    description = f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{value}'
    return f"{start}{description}</rdf:RDF></x:xmpmeta>".encode()


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(added: bytes = b"", late: bool = False) -> bytes:
    """Return a PNG with another chunk before or after its pixels."""
    content = saved(stored(), "PNG").getvalue()
    place = len(content) - 12 if late else 33
    return content[:place] + added + content[place:]


def png_exif(orientation: int) -> bytes:
    return chunk(b"eXIf", exif(orientation).removeprefix(b"Exif\0\0"))


def raw_profile(orientation: int) -> bytes:
    """Return EXIF as ImageMagick writes it."""
    content = exif(orientation)
    text = f"\nexif\n{len(content):8}\n{content.hex()}\n".encode()
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


def itxt(orientation: int) -> bytes:
    return chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(orientation))


def mpo(orientation: int) -> io.BytesIO:
    second = stored()
    return saved(stored(), "MPO", save_all=True, append_images=[second], exif=exif(orientation))


Make = Callable[[int], Any]
PLACES: dict[str, Make] = {
    "PNG, eXIf": lambda n: png(png_exif(n)),
    "PNG, eXIf after the pixels": lambda n: png(png_exif(n), late=True),
    "PNG, raw profile": lambda n: png(raw_profile(n)),
    "PNG, raw profile after the pixels": lambda n: png(raw_profile(n), late=True),
    "PNG, XMP": lambda n: png(itxt(n)),
    "PNG, XMP after the pixels": lambda n: png(itxt(n), late=True),
    "JPEG, EXIF": lambda n: saved(stored(), "JPEG", exif=exif(n)),
    "JPEG, XMP": lambda n: saved(stored(), "JPEG", xmp=xmp(n)),
    "JPEG, XMP as an element": lambda n: saved(stored(), "JPEG", xmp=xmp(n, as_element=True)),
    "MPO, EXIF": mpo,
    "WebP, EXIF": lambda n: saved(stored(), "WEBP", lossless=True, exif=exif(n)),
    "WebP, XMP": lambda n: saved(stored(), "WEBP", lossless=True, xmp=xmp(n)),
    "AVIF": lambda n: saved(stored(), "AVIF", exif=exif(n)),
    "AVIF, XMP": lambda n: saved(stored(), "AVIF", xmp=xmp(n)),
    "TIFF": lambda n: saved(stored(), "TIFF", tiffinfo={TAG: n}),
    "TIFF, compressed": lambda n: saved(
        stored(), "TIFF", tiffinfo={TAG: n} if 0 < n < 9 else {}, compression="tiff_lzw"
    ),
    "TIFF, XMP": lambda n: saved(stored(), "TIFF", tiffinfo={700: xmp(n)}),
    "none": lambda n: png(),
}
ROTATIONS = {0: 0, 1: 0, 3: 2, 6: -1, 8: 1, 9: 0}
"""Quarter turns to the left that make an image of an orientation upright; 0 and 9 do not exist."""


@pytest.mark.parametrize("orientation", ROTATIONS)
@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
def test_data_sets_refuse_exactly_the_images_that_prediction_rotates(
    make: Make, orientation: int, tmp_path: Path
) -> None:
    content = make(orientation)
    path = tmp_path / "image"
    path.write_bytes(content if isinstance(content, bytes) else content.getvalue())
    read = open_image(path)  # warnings are errors
    turns = ROTATIONS[orientation] if make is not PLACES["none"] else 0
    upright = np.rot90(photo(HEIGHT, WIDTH), turns)
    assert read.shape == upright.shape
    assert np.abs(read.astype(int) - upright).mean() < 8, "JPEG loses a little"
    if turns:
        with pytest.raises(InputError, match=rf"image is stored rotated .* {orientation}\): save"):
            read_upright_size(path)
    else:
        assert read_upright_size(path) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_mirrored_image_is_refused_too(orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "mirrored.png"
    path.write_bytes(png(itxt(orientation)))
    with pytest.raises(InputError, match=f"orientation {orientation}"):
        read_upright_size(path)


def test_every_case_that_was_seen_is_refused() -> None:
    folder = shared("cases/02-turned-png")
    names = sorted(path.name for path in folder.glob("*3.*")) + ["xmp6.png"]
    assert len(names) == 6
    for name in names:
        with pytest.raises(InputError, match=f"{name} is stored rotated"):
            read_upright_size(folder / name)
    assert read_upright_size(folder / "mask.png")


def test_a_rotated_mask_is_refused_by_the_same_function() -> None:
    with (
        PIL.Image.open(io.BytesIO(png(itxt(3)))) as image,
        pytest.raises(
            InputError, match=r"^the mask m\.png is .* save image and mask upright \(see "
        ),
    ):
        require_upright(image, "the mask m.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_orientation_is_read_without_decoding_pixels(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    path.write_bytes(saved(stored(), kind).getvalue())
    monkeypatch.setattr("PIL.Image.core.new", None)  # pixels need memory from here
    assert read_upright_size(path) == (HEIGHT, WIDTH)


def test_a_date_after_the_pixels_of_a_png_does_not_make_them_be_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ImageMagick writes one into every PNG."""
    late = chunk(b"tEXt", b"date:create\x002026-01-01T00:00:00+00:00")
    with PIL.Image.open(io.BytesIO(png(late, late=True))) as image:
        monkeypatch.setattr(image, "load", lambda: pytest.fail("it was decoded"))
        assert read_orientation(image) == 1


def test_an_orientation_behind_ten_thousand_other_chunks_is_found(tmp_path: Path) -> None:
    path = tmp_path / "many.png"
    path.write_bytes(png(chunk(b"tIME", bytes(7)) * 10_000 + png_exif(3), late=True))
    with pytest.raises(InputError, match="orientation 3"):
        read_upright_size(path)


def test_a_truncated_png_is_not_searched_beyond_its_end(tmp_path: Path) -> None:
    path = tmp_path / "short.png"
    path.write_bytes(png()[:-12])
    assert read_upright_size(path) == (HEIGHT, WIDTH)


def test_a_users_pil_image_is_rotated_by_its_exif_wherever_it_was_opened() -> None:
    with PIL.Image.open(io.BytesIO(png(png_exif(6), late=True))) as image:
        assert open_image(image).shape == (WIDTH, HEIGHT, 3)


def test_costly_exif_after_the_pixels_is_refused(tmp_path: Path) -> None:
    entries = struct.pack("<2sHIH", b"II", 42, 8, 5000).ljust(60_000, b"\0")
    path = tmp_path / "costly.png"
    path.write_bytes(png(chunk(b"eXIf", entries), late=True))
    with pytest.raises(InputError, match=r"costly.png is not an image that can be read"):
        read_upright_size(path)
    with pytest.warns(UserWarning, match="too many entries in 60000 bytes.*not rotated"):
        assert open_image(path).shape == (HEIGHT, WIDTH, 3)


# -- Images of REFER sets

IN_HEADER = ("JPEG, EXIF", "JPEG, XMP", "PNG, eXIf", "PNG, XMP", "WebP, EXIF")


def write(folder: Path, place: str, orientation: int) -> Path:
    content = PLACES[place](orientation)
    path = folder / f"{place} {orientation}"
    path.write_bytes(content if isinstance(content, bytes) else content.getvalue())
    return path


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("place", IN_HEADER)
def test_images_of_refer_sets_are_decoded_as_stored(
    place: str, orientation: int, tmp_path: Path
) -> None:
    """COCO's annotations were drawn on the stored pixels."""
    path = write(tmp_path, place, orientation)
    image = decode_image(path, (HEIGHT, WIDTH))
    assert np.abs(image.astype(int) - photo(HEIGHT, WIDTH)).mean() < 8


@pytest.mark.parametrize("orientation", range(5, 9))
@pytest.mark.parametrize("place", IN_HEADER)
def test_an_annotation_of_the_upright_size_gets_the_image_that_prediction_sees(
    place: str, orientation: int, tmp_path: Path
) -> None:
    path = write(tmp_path, place, orientation)
    upright = decode_image(path, (WIDTH, HEIGHT))
    assert upright.shape == (WIDTH, HEIGHT, 3)
    assert np.abs(upright.astype(int) - open_image(path)).max() < 4, "two decoders of JPEG"


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_an_annotation_that_fits_neither_orientation_is_an_error(
    orientation: int, tmp_path: Path
) -> None:
    path = write(tmp_path, "JPEG, EXIF", orientation)
    sizes = [(HEIGHT, HEIGHT), (WIDTH, WIDTH), *([] if orientation == 6 else [(WIDTH, HEIGHT)])]
    for size in sizes:
        with pytest.raises(InputError, match=r"has \(40, 60\) pixels .*, its annotation \("):
            decode_image(path, size)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("place", IN_HEADER)
def test_an_annotation_that_fits_both_orientations_is_warned_about_once(
    place: str, orientation: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, place, orientation)
    for _ in range(2):
        decode_image(path, (HEIGHT, WIDTH))
    warned = [record for record in caplog.records if "the stored one is used" in record.message]
    assert len(warned) == (orientation in (2, 3, 4))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_of_a_refer_image_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    for exif_bytes in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(6)[:-9]):
        path.write_bytes(saved(stored(), "JPEG", exif=exif_bytes).getvalue())
        assert decode_image(path, (HEIGHT, WIDTH)).shape == (HEIGHT, WIDTH, 3)


def test_a_refer_image_without_exif_is_not_searched_for_its_orientation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(tmp_path, "none", 1)
    monkeypatch.setattr(PIL.Image.Image, "getexif", lambda _: pytest.fail("it was searched"))
    assert decode_image(path, (HEIGHT, WIDTH)).shape == (HEIGHT, WIDTH, 3)
