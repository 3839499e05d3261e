"""Results: what is derived from a mask, and how they are shown and saved."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as coco_mask

import crislit
from crislit.errors import InputError
from crislit.inference.masks import paint
from crislit.inference.segmentation import Segmentation
from tests.io.test_images import photo


def result(sentence: str = "star", image: np.ndarray | None = None) -> Segmentation:
    """A mask of 3 x 5 pixels at (x, y) = (7, 2) without its corner, in an image of 50 x 70."""
    mask = np.zeros((50, 70), dtype=bool)
    mask[2:5, 7:12] = True
    mask[2, 7] = False
    return Segmentation(sentence, mask, mask.astype(np.float32) * 0.75, 0.75, image)


def empty() -> Segmentation:
    zeros = np.zeros((50, 70), dtype=np.float32)
    return Segmentation("star", zeros > 0, zeros, 0.0)


def test_box_area_and_run_lengths_describe_the_mask() -> None:
    assert result().box == (7, 2, 5, 3)
    assert result().area == 14
    rle = result().rle
    assert rle["size"] == [50, 70]
    assert isinstance(rle["counts"], str)
    runs = {"size": rle["size"], "counts": rle["counts"].encode()}
    assert np.array_equal(coco_mask.decode(runs).astype(bool), result().mask)
    assert (empty().box, empty().area) == (None, 0)
    assert empty().to_json("a.png")["box"] == [0, 0, 0, 0]


@pytest.mark.parametrize("sentence", ["star", "x" * 5000, "line\nbreak"])
def test_a_result_is_shown_as_one_short_line(sentence: str) -> None:
    text = repr(result(sentence))
    assert len(text) < 200
    assert "\n" not in text
    assert text.endswith("50 x 70, score=0.750, area=14, box=(7, 2, 5, 3))")
    assert "box=None" in repr(empty())


def test_an_overlay_is_the_segmented_image_with_the_mask() -> None:
    image = photo()
    overlay = result(image=image).overlay()
    assert np.array_equal(overlay, paint(image, [result().mask]))
    assert np.array_equal(image, photo()), "the image itself does not change"
    # Overlays can be painted over one another.
    both = result().overlay(result().overlay(image), number=1)
    assert np.array_equal(both, paint(paint(image, [result().mask]), [result().mask], first=1))
    with pytest.raises(InputError, match=r"does not hold its image: call overlay\(image\)"):
        result().overlay()
    with pytest.raises(InputError, match=r"expected an image of 50 x 70 .* found 20 x 30"):
        result().overlay(photo(20, 30))


def test_results_of_an_image_share_it() -> None:
    segmenter = crislit.load("shapes-tiny", device="cpu")
    first, second = segmenter(photo(), ["star", "ring"])
    assert first.image is second.image
    assert np.array_equal(first.overlay(), paint(photo(), [first.mask]))


def test_a_mask_is_saved_as_png(tmp_path: Path) -> None:
    for name in ("mask.png", "MASK.PNG"):
        result().save(tmp_path / name)
        saved = np.array(PIL.Image.open(tmp_path / name))
        assert np.array_equal(saved, np.where(result().mask, 255, 0))
    for name in ("mask.jpg", "mask"):
        with pytest.raises(InputError, match=r"a file name that ends in \.png, found .*mask"):
            result().save(tmp_path / name)
    with pytest.raises(InputError, match=r"cannot write .*mask\.png.x\.png: "):
        result().save(tmp_path / "mask.png/x.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MASK.PNG", "mask.png"]


def test_saving_creates_the_folder_as_all_commands_do(tmp_path: Path) -> None:
    result().save(str(tmp_path / "new/deep/mask.png"))
    saved = np.array(PIL.Image.open(tmp_path / "new/deep/mask.png"))
    assert np.array_equal(saved, np.where(result().mask, 255, 0))


def test_the_public_names_of_the_package_are_listed() -> None:
    assert set(crislit.__all__) <= set(dir(crislit))
    assert {"Segmentation", "InputError", "Segmenter", "load"} <= set(dir(crislit))
    assert crislit.Segmentation is Segmentation
    assert crislit.InputError is InputError
    assert set(dir(crislit.inference)) >= {"Segmenter", "load"}
