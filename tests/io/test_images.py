"""Images of every kind become upright RGB; a bad one is one clear error."""

import io
import os
import re
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from crislit.errors import InputError
from crislit.io import read_upright_size
from crislit.io.images import ImageSource, open_image


def photo(height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    """An image of smooth random colors."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), PIL.Image.Resampling.BICUBIC))


def saved(image: PIL.Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def test_an_image_is_the_same_as_path_file_pil_image_and_array(tmp_path: Path) -> None:
    image, path = photo(), tmp_path / "photo.png"
    PIL.Image.fromarray(image).save(path)
    with path.open("rb") as file:
        content, pil = path.read_bytes(), PIL.Image.fromarray(image)
        sources: list[ImageSource] = [path, str(path), file, content, pil, image]
        for source in sources:
            assert np.array_equal(open_image(source), image)


def test_gray_images_of_8_and_16_bits_have_three_equal_channels() -> None:
    gray = photo()[..., 0]
    expected = np.repeat(gray[..., None], 3, axis=2)
    deep = gray.astype(np.uint16) * 257
    for image in (
        gray,
        deep,
        saved(PIL.Image.fromarray(gray), "PNG"),
        saved(PIL.Image.fromarray(deep), "PNG"),
        saved(PIL.Image.fromarray(deep), "TIFF"),
        PIL.Image.fromarray(deep.astype(np.int32)),
    ):
        assert np.array_equal(open_image(image), expected)
    assert np.array_equal(open_image(deep[..., None]), expected)
    # PIL has no 16-bit colors.
    assert np.array_equal(open_image(photo().astype(np.uint16) * 257), photo())
    one_bit = open_image(PIL.Image.fromarray(gray > 128))
    assert np.array_equal(one_bit, np.where(expected > 128, 255, 0))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP"])
def test_of_several_frames_prediction_takes_the_first_and_data_sets_none(
    kind: str, tmp_path: Path
) -> None:
    first, second = (PIL.Image.new("RGB", (70, 50), color) for color in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    file = saved(first, kind, save_all=True, append_images=[second], **options)
    (tmp_path / "two").write_bytes(file.getvalue())
    with pytest.warns(UserWarning, match="two has several frames: the first is read"):
        assert (open_image(tmp_path / "two") == (255, 0, 0)).all()
    with pytest.raises(InputError, match="two has several frames or pages: save the one"):
        read_upright_size(tmp_path / "two")
    single = saved(first, kind, **options)
    (tmp_path / "one").write_bytes(single.getvalue())
    assert (open_image(single) == (255, 0, 0)).all()
    assert read_upright_size(tmp_path / "one") == (50, 70)


def test_the_preview_in_a_jpeg_of_a_phone_is_not_a_frame(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(photo())
    file = saved(image, "MPO", save_all=True, append_images=[image.resize((35, 25))])
    (tmp_path / "photo.jpg").write_bytes(file.getvalue())
    assert open_image(file).shape == (50, 70, 3)
    assert read_upright_size(tmp_path / "photo.jpg") == (50, 70)


def test_transparency_is_shown_on_white() -> None:
    image = photo()
    alpha = np.zeros(image.shape[:2], dtype=np.uint8)
    alpha[:, :35] = 255
    rgba = np.dstack([image, alpha])
    png = saved(PIL.Image.fromarray(rgba), "PNG")
    webp = saved(PIL.Image.fromarray(rgba), "WEBP", lossless=True)
    for source in (rgba, png, webp):
        rgb = open_image(source)
        assert np.array_equal(rgb[:, :35], image[:, :35])
        assert (rgb[:, 35:] == 255).all()
    gray = PIL.Image.fromarray(np.dstack([image[..., 0], alpha]), "LA")
    assert (open_image(saved(gray, "PNG"))[:, 35:] == 255).all()


def test_a_palette_and_its_transparent_color_are_converted() -> None:
    image = PIL.Image.fromarray(photo()).quantize(16)
    expected = np.array(image.convert("RGB"))
    assert np.array_equal(open_image(saved(image, "PNG")), expected)
    assert np.array_equal(open_image(saved(image, "GIF")), expected)
    first = np.array(image) == 0
    rgb = open_image(saved(image, "PNG", transparency=0))
    assert (rgb[first] == 255).all()
    assert np.array_equal(rgb[~first], expected[~first])


def test_cmyk_is_converted() -> None:
    cmyk = PIL.Image.fromarray(photo()).convert("CMYK")
    for kind in ("JPEG", "TIFF"):
        rgb = open_image(saved(cmyk, kind, quality=95))
        assert abs(rgb.astype(int) - photo()).mean() < 6


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
        (8, lambda x: np.rot90(x)),
    ],
)
def test_the_exif_orientation_is_applied(
    orientation: int, upright: Callable[[np.ndarray], np.ndarray]
) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = saved(PIL.Image.fromarray(photo()), "PNG", exif=exif)
    assert np.array_equal(open_image(file), upright(photo()))


def test_an_image_with_damaged_exif_is_read() -> None:
    file = saved(PIL.Image.fromarray(photo()), "PNG", exif=b"Exif\0\0not valid")
    with pytest.warns(UserWarning, match="its EXIF cannot be read"):
        assert np.array_equal(open_image(file), photo())


def test_16_bit_gray_that_is_almost_black_is_warned_about() -> None:
    deep = PIL.Image.fromarray(np.linspace(0, 4000, 900).reshape(30, 30).astype(np.uint16))
    with pytest.warns(UserWarning, match="reach only 4000 of 65535, which is almost black"):
        assert open_image(deep).max() == 16


def test_transparency_of_16_bit_and_of_premultiplied_gray_is_shown_on_white() -> None:
    deep = PIL.Image.fromarray(np.full((10, 10), 20_000, np.uint16))
    deep.info["transparency"] = 20_000
    assert (open_image(deep) == 255).all()
    clear = PIL.Image.new("LA", (10, 10), (0, 0)).convert("La")
    assert (open_image(clear) == 255).all()


# -- Bad input


def bomb() -> io.BytesIO:
    """A PNG that claims to have 30,000 x 30,000 pixels."""
    file = saved(PIL.Image.new("1", (8, 8)), "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = (30000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return io.BytesIO(bytes(content))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere.jpg", "no image at nowhere.jpg"),
        (".", "in a format that cannot be read"),
        (io.BytesIO(b""), "not an image that can be read"),
        (io.BytesIO(b"<html>not found</html>"), "not an image that can be read"),
        (bomb(), "too large"),
        (np.zeros((7, 100, 3), np.uint8), "100 x 7 pixels; both sides need at least 8"),
        (np.zeros((100, 7, 3), np.uint8), "7 x 100 pixels"),
        (np.zeros((0, 7, 3), np.uint8), "expected an image as uint8 array"),
        (np.zeros((20, 20, 3), np.float32), "got float32 of shape"),
        (np.zeros((3, 20, 20), np.uint8), "of shape"),
        (np.zeros((20, 20, 3), np.int32), "got int32"),
        (PIL.Image.new("F", (20, 20)), "no agreed range"),
        (PIL.Image.fromarray(np.full((20, 20), 70000, np.int32)), "expected 16 bits"),
    ],
)
def test_a_bad_image_is_one_clear_error(source: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        open_image(source)
    assert "\n" not in str(caught.value)


class OnlyRead:
    """A stream that cannot seek."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


def test_anything_else_is_an_error() -> None:
    for other in (None, 7, [[1, 2]], {"a": 1}):
        with pytest.raises(InputError, match=r"expected an image: a path, .* or an array, got"):
            open_image(other)  # type: ignore[arg-type]


def test_an_image_may_come_from_a_pipe() -> None:
    content = saved(PIL.Image.fromarray(photo()), "PNG").getvalue()
    assert np.array_equal(open_image(OnlyRead(content)), photo())  # type: ignore[arg-type]
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe, os.fdopen(writer, "wb") as other:
        threading.Thread(target=other.write, args=(content,)).start()
        threading.Timer(0.2, other.close).start()
        assert np.array_equal(open_image(pipe), photo())


def test_a_truncated_image_is_an_input_error(tmp_path: Path) -> None:
    content = saved(PIL.Image.fromarray(photo(200, 300)), "JPEG").getvalue()
    for tenth in range(10):
        path = tmp_path / f"cut{tenth}.jpg"
        path.write_bytes(content[: len(content) * tenth // 10])
        with pytest.raises(InputError, match=path.name):
            open_image(path)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "TIFF", "JPEG2000", "GIF", "ICO", "PPM"])
def test_damaged_files_of_every_kind_are_input_errors(kind: str) -> None:
    content = saved(PIL.Image.fromarray(photo(64, 64)), kind).getvalue()
    rng, messages = np.random.default_rng(0), []
    for _ in range(60):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), 8):
            damaged[position] = rng.integers(256)
        try:
            image = open_image(io.BytesIO(bytes(damaged[: rng.integers(1, len(content) + 1)])))
            assert image.ndim == 3  # some damage only changes pixels
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 10
    for message in messages:
        assert re.search("is damaged|is not an image|is too large|has .* pixels", message)


def test_formats_that_start_other_programs_are_refused(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "drawn.eps")
    with pytest.raises(InputError, match="not an image that can be read"):
        open_image(tmp_path / "drawn.eps")
