"""One rule says which pixels of a mask image are marked; ambiguous masks are errors."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
from pycocotools import mask as coco_mask

from crislit.errors import InputError
from crislit.io import parse_mask_value, read_mask
from tests.conftest import shared

Array = npt.NDArray[Any]
SIZE = 96, 128
y, x = np.ogrid[: SIZE[0], : SIZE[1]]
DISC: Array = np.hypot(x - 50, y - 40) < 24
RING: Array = (np.hypot(x - 50, y - 40) < 29) & ~DISC
LOWER: Array = DISC & (y > 40)
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0]  # the first entries of Pascal VOC's palette


def save(folder: Path, image: Array | PIL.Image.Image, name: str = "m.png", **options: Any) -> Path:
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    image.save(folder / name, **options)
    return folder / name


def palette_image(indices: Array, palette: list[int]) -> PIL.Image.Image:
    image = PIL.Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette(palette)
    return image


def read(path: Path, value: Any = None) -> Array:
    segmentation, _ = read_mask(path, SIZE, parse_mask_value(value))
    mask: Array = coco_mask.decode(segmentation).astype(bool)
    return mask


def colors(background: tuple[int, ...], marked: tuple[int, ...]) -> Array:
    return np.where(DISC[..., None], marked, background).astype(np.uint8)


TWO_VALUES: dict[str, Any] = {
    "bits": DISC,
    "0 and 1": DISC.astype(np.uint8),
    "0 and 255": 255 * DISC.astype(np.uint8),
    "dark and bright": np.where(DISC, 200, 50).astype(np.uint8),
    "16 bits, 0 and 1": DISC.astype(np.uint16),
    "16 bits, 0 and 300": 300 * DISC.astype(np.uint16),
    "16 bits, 0 and 65535": 65535 * DISC.astype(np.uint16),
    "red on black": colors((0, 0, 0), (200, 30, 30)),
    "dark blue on black": colors((0, 0, 0), (0, 0, 60)),
    "red on white": colors((255, 255, 255), (200, 30, 30)),
    "palette": palette_image(DISC, [0, 0, 0, 220, 20, 60]),
    "palette, object first": palette_image(~DISC, [220, 20, 60, 0, 0, 0]),
    "palette, white first": palette_image(~DISC, [255, 255, 255, 0, 0, 0]),
    "palette, blue on white": palette_image(DISC, [255, 255, 255, 0, 0, 128]),
    "palette, white background last": palette_image(~DISC, [0, 0, 128, 255, 255, 255]),
    "palette of one color": palette_image(3 * DISC, [0, 0, 0] * 256),
    "opaque": PIL.Image.fromarray(255 * DISC.astype(np.uint8)).convert("RGBA"),
}


@pytest.mark.parametrize("name", TWO_VALUES)
def test_of_two_values_the_one_that_is_not_the_background_marks(name: str, tmp_path: Path) -> None:
    assert np.array_equal(read(save(tmp_path, TWO_VALUES[name])), DISC)


@pytest.mark.parametrize("quality", [30, 75, 90, 95, 100])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_noise_of_compression_marks_nothing_else(mode: str, quality: int, tmp_path: Path) -> None:
    image = PIL.Image.fromarray(255 * DISC.astype(np.uint8)).convert(mode)
    path = save(tmp_path, image, "m.jpg", quality=quality)
    assert np.array_equal(read(path), DISC)
    with PIL.Image.open(path) as compressed:
        assert np.array_equal(read(save(tmp_path, compressed.convert("L"))), DISC)


def test_webp_and_soft_edges_are_cut_in_the_middle(tmp_path: Path) -> None:
    large = PIL.Image.fromarray(255 * np.kron(DISC, np.ones((4, 4))).astype(np.uint8))
    soft = large.resize((SIZE[1], SIZE[0]), PIL.Image.Resampling.LANCZOS, reducing_gap=None)
    assert len(np.unique(np.array(soft))) > 2
    assert np.array_equal(read(save(tmp_path, soft)), np.array(soft) > 127)
    deep = np.array(soft).astype(np.uint16) * 257
    assert np.array_equal(read(save(tmp_path, deep)), np.array(soft) > 127)
    blurred = PIL.Image.fromarray(255 * DISC.astype(np.uint8)).convert("RGB")
    assert np.array_equal(read(save(tmp_path, blurred, "m.webp", quality=70)), DISC)


def with_alpha(gray: Array, opaque: Array) -> PIL.Image.Image:
    bands = [PIL.Image.fromarray(255 * band.astype(np.uint8)) for band in (gray, opaque)]
    return PIL.Image.merge("LA", bands)


ALL: Array = np.ones(SIZE, dtype=bool)
GRAY = PIL.Image.fromarray(255 * DISC.astype(np.uint8))
BLACK_WHITE = palette_image(DISC, [0, 0, 0, 255, 255, 255])
BLACK_ON_WHITE = palette_image(DISC, [255, 255, 255, 0, 0, 0])
DEEP: Array = (65535 * DISC.astype(np.uint16)).astype(np.uint16)
OPAQUE: dict[str, tuple[Any, dict[str, Any]]] = {
    "L, unused value": (GRAY, {"transparency": 7}),
    "LA": (with_alpha(DISC, ALL), {}),
    "I;16": (DEEP, {}),
    "P, unused entry": (BLACK_WHITE, {"transparency": b"\xff\xff\0"}),
    "P, unused index": (BLACK_WHITE, {"transparency": 2}),
    "P, opaque entries": (BLACK_WHITE, {"transparency": b"\xff\xff"}),
    "RGB, unused color": (GRAY.convert("RGB"), {"transparency": (1, 0, 0)}),
    "RGBA": (GRAY.convert("RGBA"), {}),
}
TRANSPARENT: dict[str, tuple[Any, dict[str, Any]]] = {
    "1": (DISC, {"transparency": 0}),
    "L": (GRAY, {"transparency": 0}),
    "LA, white": (with_alpha(ALL, DISC), {}),
    "LA, black": (with_alpha(~ALL, DISC), {}),
    "I;16": (DEEP, {"transparency": 0}),
    "P, index": (BLACK_WHITE, {"transparency": 0}),
    "P, index of the object": (BLACK_WHITE, {"transparency": 1}),
    "P, entries": (BLACK_WHITE, {"transparency": b"\x80\xff"}),
    "P, black on transparent white": (BLACK_ON_WHITE, {"transparency": 0}),
    "P, one color": (palette_image(DISC, [0] * 6), {"transparency": b"\0\xff"}),
    "RGB": (GRAY.convert("RGB"), {"transparency": (0, 0, 0)}),
    "RGBA": (PIL.Image.merge("RGBA", [GRAY.point([99] * 256)] * 3 + [GRAY]), {}),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_transparency_that_no_pixel_has_changes_nothing(name: str, tmp_path: Path) -> None:
    image, options = OPAQUE[name]
    assert np.array_equal(read(save(tmp_path, image, **options)), DISC)


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_pixels_are_an_error_in_every_mode(name: str, tmp_path: Path) -> None:
    """They may be the background, or an object that was cut out."""
    image, options = TRANSPARENT[name]
    with pytest.raises(InputError, match=r"the mask .*m\.png has transparent pixels: save it"):
        read(save(tmp_path, image, **options))


@pytest.mark.parametrize("transparency", [0, 1, b"\0\xff", b"\xff\0"])
def test_an_index_of_the_palette_chooses_whatever_is_transparent(
    transparency: Any, tmp_path: Path
) -> None:
    path = save(tmp_path, BLACK_ON_WHITE, transparency=transparency)
    assert np.array_equal(read(path, 1), DISC)
    assert np.array_equal(read(path, 0), ~DISC)
    with pytest.raises(InputError, match="has transparent pixels"):
        read(path, "#000000")


FRAMES = {"png": {}, "gif": {}, "tiff": {}, "webp": {"lossless": True}}


@pytest.mark.parametrize("suffix", FRAMES)
def test_a_mask_of_several_frames_is_an_error(suffix: str, tmp_path: Path) -> None:
    first, second = (PIL.Image.fromarray(255 * mask.astype(np.uint8)) for mask in (DISC, ~DISC))
    single = save(tmp_path, first, f"one.{suffix}", **FRAMES[suffix])
    assert np.array_equal(read(single), DISC)
    options = {"save_all": True, "append_images": [second], **FRAMES[suffix]}
    with pytest.raises(InputError, match="has several frames or pages: save the one"):
        read(save(tmp_path, first, f"two.{suffix}", **options))


def test_floating_point_masks_are_rounded_and_nan_is_an_error(tmp_path: Path) -> None:
    soft = np.where(DISC, 0.9, 0.1).astype(np.float32)
    assert np.array_equal(read(save(tmp_path, soft, "m.tiff")), DISC)
    soft[0, 0] = np.nan
    with pytest.raises(InputError, match=r"the mask .*m\.tiff has values that are not numbers"):
        read(save(tmp_path, soft, "m.tiff"))


def test_an_all_white_and_an_inverted_mask_are_legal(tmp_path: Path) -> None:
    assert read(save(tmp_path, np.full(SIZE, 255, dtype=np.uint8))).all()
    assert np.array_equal(read(save(tmp_path, ~DISC)), ~DISC)


LABELS: Array = np.where(RING, 255, DISC).astype(np.uint8)  # Pascal VOC: class 1, border 255
AMBIGUOUS: dict[str, tuple[Any, str]] = {
    "VOC": (LABELS, "its values are 0, 1, 255"),
    "VOC, palette": (palette_image(LABELS, VOC + [0] * 756 + [224, 224, 192]), "#800000, #e0e0c0"),
    "VOC, thin border": (np.where(RING & (y % 3 == 0), 255, DISC).astype(np.uint8), "0, 1, 255"),
    "thin object, thick border": (
        np.where((y // 2 == 20) & (x > 30), 1, 255 * (abs(y - 40) < 9)).astype(np.uint8),
        "0, 1, 255",
    ),
    "instances": (DISC.astype(np.uint8) + LOWER, "marks no pixel: its values are 0, 1, 2"),
    "bright instances": (85 * (DISC.astype(np.uint8) + LOWER), "its values are 0, 85, 170"),
    "trimap": (np.where(RING, 128, 255 * DISC).astype(np.uint8), "its values are 0, 128, 255"),
    "16-bit instances": (1000 * (DISC.astype(np.uint16) + LOWER), "its values are 0, 1000, 2000"),
    "no background": (np.where(DISC, 255, 128).astype(np.uint8), "its values are 128, 255"),
    "one other value": (2 * DISC.astype(np.uint8), "its values are 0, 2"),
    "two colors": (colors((0, 0, 255), (200, 30, 30)), "its colors are #0000ff, #c81e1e"),
    "palette of three": (
        palette_image(DISC.astype(np.uint8) + LOWER, VOC),
        "#000000, #800000, #008000",
    ),
    "dark object, border, a stray pixel": (
        np.where((y == 0) & (x == 0), 100, np.where(RING, 255, 15 * DISC)).astype(np.uint8),
        "its values are 0, 15, 100, 255",
    ),
    "dark objects, border, a stray pixel": (
        np.where((y + x) == 0, 100, np.where(RING, 255, DISC + 1 * LOWER)).astype(np.uint8),
        "its values are 0, 1, 2, 100, 255",
    ),
    "bright object and border, a stray pixel": (
        np.where((y + x) == 0, 100, np.where(RING, 255, 245 * DISC)).astype(np.uint8),
        "its values are 0, 100, 245, 255",
    ),
    "steps": (np.broadcast_to((x // 8 * 17).astype(np.uint8), SIZE), "(16 values)"),
    "image": (np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8), "colors)"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_mask_that_leaves_a_choice_is_an_error_that_lists_it(name: str, tmp_path: Path) -> None:
    image, listed = AMBIGUOUS[name]
    with pytest.raises(InputError) as error:
        read(save(tmp_path, image))
    assert listed in str(error.value)
    assert "name the object's with mask_value" in str(error.value)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_mask_value_chooses(tmp_path: Path) -> None:
    gray = save(tmp_path, LABELS, "gray.png")
    indexed = save(tmp_path, AMBIGUOUS["VOC, palette"][0], "indexed.png")
    rgb = save(tmp_path, PIL.Image.open(indexed).convert("RGB"), "rgb.png")
    shades = save(tmp_path, palette_image(DISC, [0, 0, 0, 90, 90, 90]), "shades.png")
    for path, value in (
        *((gray, 1), (gray, "1"), (gray, [1, 1, 1])),
        *((indexed, 1), (indexed, "#800000"), (indexed, [128, 0, 0]), (indexed, (128, 0, 0))),
        *((rgb, "#800000"), (rgb, "[128, 0, 0]"), (shades, 1), (shades, "#5a5a5a")),
    ):
        assert np.array_equal(read(path, value), DISC), (path.name, value)
    assert np.array_equal(read(gray, 255), RING)
    instances = save(tmp_path, 1000 * (DISC.astype(np.uint16) + LOWER), "instances.png")
    assert np.array_equal(read(instances, 2000), LOWER)
    assert read_mask(gray, SIZE, 1)[1] == "1 (mask_value) of 0, 1, 255"
    for path, value, listed in (
        (gray, 7, "no pixel of mask_value 7: its values are 0, 1, 255"),
        (indexed, "#800001", "no pixel of mask_value #800001: its colors are #000000, #800000"),
        (rgb, 1, "no pixel of mask_value 1: its colors"),
    ):
        with pytest.raises(InputError, match=listed):
            read(path, value)


@pytest.mark.parametrize("value", [-1, 1.5, True, "red", "#80", [1, 2], [1, 2, 256], {}, "70000"])
def test_other_mask_values_are_errors(value: Any) -> None:
    with pytest.raises(InputError, match="mask_value must be a whole number, a color"):
        parse_mask_value(value)


def test_the_cases_of_the_maintainers_give_the_right_object() -> None:
    folder = shared("cases/03-masks")
    truth = read(folder / "truth.png")
    assert np.array_equal(read(folder / "palette-object-first.png"), truth)
    for name in ("voc-L-0-1-255.png", "voc-P-0-1-255.png"):
        with pytest.raises(InputError, match="name the object's"):
            read(folder / name)
        inner = read(folder / name, 1)
        assert not (inner & ~truth).any()
        assert inner.sum() > 0.6 * truth.sum()
