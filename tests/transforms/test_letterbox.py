"""The letterbox: from an image to the square input and back to the image's own size."""

import pickle
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from crislit.io.images import Image
from crislit.transforms.augmentation import Letterbox
from crislit.transforms.letterbox import (
    CLIP_MEAN,
    CLIP_STD,
    letterbox_image,
    letterbox_mask,
    letterbox_matrices,
    normalize,
    probability_maps,
    restore,
    stack_images,
)

THRESHOLD = 0.35
EXAMPLES = range(4)
GRAY_LEVELS = 0.1
"""Tolerance: versions of OpenCV differ by up to 0.07 gray levels on average, linear interpolation
instead of cubic by 0.19."""
# The same examples on every run, and no failure on a busy machine.
relaxed = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def numbers(golden: Path) -> dict[str, npt.NDArray[Any]]:
    with np.load(golden / "preprocess.npz") as file:
        return {name: file[name] for name in file.files}


def mean_difference(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).mean())


def upsample(logits: torch.Tensor, size: int) -> npt.NDArray[np.float32]:
    """Return probability maps of images that are as large as the square: (B, S, S)."""
    return np.stack(list(probability_maps(logits, size, [(size, size)] * len(logits))))


def iou(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float((a & b).sum() / ((a | b).sum() + 1e-6))


# -- Golden numbers


@pytest.mark.parametrize("i", EXAMPLES)
def test_the_matrices_are_the_golden_ones(numbers: dict[str, npt.NDArray[Any]], i: int) -> None:
    height, width = numbers[f"{i}.mask"].shape
    matrix, inverse = letterbox_matrices(height, width, int(numbers[f"{i}.size"]))
    np.testing.assert_allclose(matrix, numbers[f"{i}.matrix"], atol=1e-5)
    np.testing.assert_allclose(inverse, numbers[f"{i}.inverse"], atol=1e-5)


@pytest.mark.parametrize("i", EXAMPLES)
def test_the_letterboxed_image_is_the_golden_one(
    numbers: dict[str, npt.NDArray[Any]], i: int
) -> None:
    warped = letterbox_image(numbers[f"{i}.image_rgb"], int(numbers[f"{i}.size"]))
    assert warped.dtype == np.uint8
    assert mean_difference(warped, numbers[f"{i}.input_uint8"]) < GRAY_LEVELS


@pytest.mark.parametrize("i", EXAMPLES)
def test_the_letterboxed_mask_is_the_golden_one_and_soft(
    numbers: dict[str, npt.NDArray[Any]], i: int
) -> None:
    warped = letterbox_mask(numbers[f"{i}.mask"], int(numbers[f"{i}.size"]))
    assert warped.dtype == np.uint8
    assert mean_difference(warped, 255 * numbers[f"{i}.input_mask"]) < GRAY_LEVELS
    assert np.isin(warped, (0, 255)).mean() < 1, "the edges are soft"


@pytest.mark.parametrize("i", EXAMPLES)
def test_the_normalized_input_is_the_golden_one(
    numbers: dict[str, npt.NDArray[Any]], i: int
) -> None:
    expected = numbers[f"{i}.input_tensor"]
    golden_input = normalize(stack_images([numbers[f"{i}.input_uint8"]]))[0].numpy()
    np.testing.assert_allclose(golden_input, expected, atol=1e-5)
    warped = letterbox_image(numbers[f"{i}.image_rgb"], int(numbers[f"{i}.size"]))
    ours = normalize(stack_images([warped]))[0].numpy()
    gray_levels = 255 * np.array(CLIP_STD)[:, None, None]
    assert mean_difference(gray_levels * ours, gray_levels * expected) < GRAY_LEVELS


@pytest.mark.parametrize("i", EXAMPLES)
def test_the_way_back_from_logits_is_the_golden_one(
    numbers: dict[str, npt.NDArray[Any]], i: int
) -> None:
    target = numbers[f"{i}.mask"] > 0
    logits = torch.from_numpy(numbers[f"{i}.logits"])
    (probability,) = probability_maps(logits, int(numbers[f"{i}.size"]), [target.shape])
    expected = 255 * numbers[f"{i}.restored_probability"]
    assert mean_difference(255 * probability, expected) < GRAY_LEVELS
    assert mean_difference(probability > THRESHOLD, numbers[f"{i}.restored_mask"]) < 1e-3
    golden_iou = float(numbers[f"{i}.iou"])
    assert iou(probability > THRESHOLD, target) == pytest.approx(golden_iou, abs=1e-3)


# -- Geometry


def test_a_wide_image_is_scaled_by_its_width_and_centered_vertically() -> None:
    matrix, inverse = letterbox_matrices(100, 200, 50)
    np.testing.assert_allclose(matrix, [[0.25, 0, 0], [0, 0.25, 12.5]], atol=1e-6)
    np.testing.assert_allclose(inverse, [[4, 0, 0], [0, 4, -50]], atol=1e-6)


def test_a_tall_image_is_scaled_by_its_height_without_rounding_to_whole_pixels() -> None:
    # 1.5 times 17 is 25.5 pixels, which leaves 34.5 for two sides.
    matrix, _ = letterbox_matrices(40, 17, 60)
    np.testing.assert_allclose(matrix, [[1.5, 0, 17.25], [0, 1.5, 0]], atol=1e-5)


sides = st.integers(1, 3000)


@given(height=sides, width=sides, size=st.integers(32, 1024))
@settings(relaxed, max_examples=200)
def test_the_map_keeps_the_aspect_ratio_and_the_center_and_shows_the_entire_image(
    height: int, width: int, size: int
) -> None:
    matrix, inverse = letterbox_matrices(height, width, size)
    scale = min(size / height, size / width)
    np.testing.assert_allclose(matrix[:, :2], scale * np.eye(2), rtol=1e-4, atol=1e-6 * scale)
    center = matrix @ [width / 2, height / 2, 1]
    np.testing.assert_allclose(center, [size / 2, size / 2], atol=1e-3 * size)
    corners = np.array([[0, 0, 1], [width, height, 1]]) @ matrix.T
    assert corners.min() > -1e-3 * size
    assert corners.max() < size * (1 + 1e-3)
    there_and_back = np.vstack([inverse, [0, 0, 1]]) @ np.vstack([matrix, [0, 0, 1]])
    np.testing.assert_allclose(there_and_back[:2, :2], np.eye(2), atol=1e-3)


@pytest.mark.parametrize("size", [32, 97, 416])
def test_a_square_image_of_the_inputs_size_is_unchanged(size: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    mask = 255 * rng.integers(0, 2, (size, size), dtype=np.uint8)
    probability = rng.random((size, size), dtype=np.float32)
    np.testing.assert_array_equal(letterbox_image(image, size), image)
    np.testing.assert_array_equal(letterbox_mask(mask, size), mask)
    np.testing.assert_allclose(restore(probability, size, size), probability, atol=1e-6)


def draw_mask(height: int, width: int, kind: str, box: tuple[float, float, float, float]) -> Image:
    """Draw a rectangle or an ellipse; the box is (top, left, bottom, right) in [0, 1]."""
    y, x = np.mgrid[:height, :width] + 0.5
    top, left, bottom, right = box[0] * height, box[1] * width, box[2] * height, box[3] * width
    if kind == "rectangle":
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    else:
        across = (x - (left + right) / 2) / (right - left)
        down = (y - (top + bottom) / 2) / (bottom - top)
        inside = across**2 + down**2 <= 0.25
    return np.where(inside, 255, 0).astype(np.uint8)


def round_trip(mask: Image, size: int) -> npt.NDArray[np.bool_]:
    square = (letterbox_mask(mask, size) / 255).astype(np.float32)
    return restore(square, *mask.shape) > 0.5


@pytest.mark.parametrize(
    ("height", "width"),
    [(480, 640), (640, 480), (100, 500), (333, 500), (500, 101), (64, 64), (427, 640)],
)
@pytest.mark.parametrize("kind", ["rectangle", "ellipse"])
def test_a_mask_survives_the_way_there_and_back_at_its_own_size(
    height: int, width: int, kind: str
) -> None:
    mask = draw_mask(height, width, kind, (0.2, 0.3, 0.7, 0.9))
    assert iou(round_trip(mask, max(height, width)), mask > 0) > 0.99


@given(
    height=st.integers(60, 300),
    width=st.integers(60, 300),
    enlargement=st.floats(1, 2),
    kind=st.sampled_from(["rectangle", "ellipse"]),
    top=st.floats(0, 0.5),
    left=st.floats(0, 0.5),
    tall=st.floats(0.35, 0.5),
    wide=st.floats(0.35, 0.5),
)
@settings(relaxed, max_examples=60)
def test_any_mask_survives_the_way_there_and_back_in_a_square_as_large_as_the_image(
    height: int,
    width: int,
    enlargement: float,
    kind: str,
    top: float,
    left: float,
    tall: float,
    wide: float,
) -> None:
    mask = draw_mask(height, width, kind, (top, left, top + tall, left + wide))
    assert iou(round_trip(mask, int(np.ceil(enlargement * max(height, width)))), mask > 0) > 0.99


def test_pixels_outside_the_square_are_restored_as_zero() -> None:
    # At a quarter of the size, column 199 is read at 49.75: between the last column and outside.
    restored = restore(np.ones((50, 50), dtype=np.float32), 100, 200)
    assert restored.shape == (100, 200)
    np.testing.assert_allclose(restored[:, 8:-8], 1, atol=1e-5)
    assert (restored[:, -1] < 0.3).all()


def test_masks_in_column_order_are_warped_like_those_in_row_order() -> None:
    mask = draw_mask(60, 90, "ellipse", (0.1, 0.2, 0.8, 0.5))
    np.testing.assert_array_equal(
        letterbox_mask(np.asfortranarray(mask), 64), letterbox_mask(mask, 64)
    )


# -- Colors and probabilities


@pytest.mark.parametrize(("height", "width"), [(40, 80), (80, 40)])
def test_the_border_has_clips_mean_color_in_rgb(height: int, width: int) -> None:
    warped = letterbox_image(np.zeros((height, width, 3), dtype=np.uint8), 80)
    border = warped[:18] if width > height else warped[:, :18]
    # 122.77, 116.75 and 104.09, rounded.
    assert np.unique(border.reshape(-1, 3), axis=0).tolist() == [[123, 117, 104]]
    inside = warped[23:57] if width > height else warped[:, 23:57]
    assert not inside.any()


@settings(relaxed, max_examples=200)
@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=70)), st.integers(4, 90))
def test_warping_only_the_object_equals_warping_the_entire_mask(
    marked: npt.NDArray[np.bool_], size: int
) -> None:
    mask = 255 * marked.astype(np.uint8)
    matrix, _ = letterbox_matrices(mask.shape[0], mask.shape[1], size)
    expected = cv2.warpAffine(mask, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=0)
    difference = abs(letterbox_mask(mask, size).astype(int) - expected)
    assert difference.max() <= 1, "rounding"


def test_the_border_of_a_mask_is_empty() -> None:
    warped = letterbox_mask(np.full((40, 80), 255, dtype=np.uint8), 80)
    assert not warped[:19].any()
    assert not warped[61:].any()
    assert (warped[22:58] == 255).all()


def test_normalizing_maps_clips_mean_to_zero_and_one_deviation_above_it_to_one() -> None:
    pixels = np.array([[[0, 0, 0], [255, 255, 255], [51, 102, 153]]], dtype=np.uint8)
    values = normalize(stack_images([pixels]))[0]
    assert values.shape == (3, 1, 3)
    assert values.dtype == torch.float32
    for channel, gray in enumerate((0.2, 0.4, 0.6)):
        expected = [(value - CLIP_MEAN[channel]) / CLIP_STD[channel] for value in (0, 1, gray)]
        assert values[channel, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_images_are_stacked_with_channels_last_in_memory() -> None:
    images = [
        np.random.default_rng(i).integers(0, 256, (5, 7, 3), dtype=np.uint8) for i in range(2)
    ]
    stacked = stack_images(images)
    assert np.array_equal(stacked.permute(0, 2, 3, 1), np.stack(images))
    assert stacked.is_contiguous(memory_format=torch.channels_last)
    assert normalize(stacked).is_contiguous(memory_format=torch.channels_last)


def test_probabilities_are_upsampled_with_aligned_corners() -> None:
    logits = torch.tensor([[0.0, 2.0], [-2.0, 0.0]])[None, None]
    (square,) = upsample(logits, 5)
    assert square.shape == (5, 5)
    corners = torch.from_numpy(square[[0, 0, 4, 4], [0, 4, 0, 4]])
    torch.testing.assert_close(corners, torch.sigmoid(logits.flatten()))
    assert square[2, 2] == pytest.approx(0.5), "by symmetry"


def test_probabilities_are_interpolated_instead_of_logits_and_may_overshoot() -> None:
    step = torch.full((1, 1, 8, 8), -50.0)
    step[..., 4:] = 50
    square = upsample(step, 32)
    assert square.min() < -0.01
    assert square.max() > 1.01
    assert abs(square).max() < 1.5, "logits of 50 were not interpolated themselves"


def test_half_precision_logits_give_single_precision_probabilities() -> None:
    logits = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    maps = upsample(logits, 16)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, upsample(logits.float(), 16), rtol=1e-6)


# -- The Albumentations transform


@pytest.fixture(scope="module")
def sample() -> tuple[Image, Image]:
    image = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    return image, draw_mask(45, 70, "ellipse", (0.1, 0.3, 0.7, 0.6))


def test_the_transform_equals_the_pure_functions(sample: tuple[Image, Image]) -> None:
    image, mask = sample
    warped = A.Compose([Letterbox(64)])(image=image, mask=mask)
    np.testing.assert_array_equal(warped["image"], letterbox_image(image, 64))
    np.testing.assert_array_equal(warped["mask"], letterbox_mask(mask, 64))


def test_the_transform_composes_with_an_augmentation_before_it(
    sample: tuple[Image, Image],
) -> None:
    image, mask = sample
    warped = A.Compose([A.HorizontalFlip(p=1), Letterbox(64)], seed=0)(image=image, mask=mask)
    np.testing.assert_array_equal(
        warped["image"], letterbox_image(np.ascontiguousarray(image[:, ::-1]), 64)
    )
    np.testing.assert_array_equal(
        warped["mask"], letterbox_mask(np.ascontiguousarray(mask[:, ::-1]), 64)
    )


def test_the_transform_warps_each_of_several_masks(sample: tuple[Image, Image]) -> None:
    image, mask = sample
    masks = np.stack([mask, 255 - mask, draw_mask(45, 70, "rectangle", (0.0, 0.5, 0.3, 1.0))])
    warped = A.Compose([Letterbox(64)])(image=image, masks=masks)
    np.testing.assert_array_equal(warped["image"], letterbox_image(image, 64))
    np.testing.assert_array_equal(
        np.stack(warped["masks"]), np.stack([letterbox_mask(mask, 64) for mask in masks])
    )


def test_the_transform_survives_pickling(sample: tuple[Image, Image]) -> None:
    image, mask = sample
    transform = A.Compose([A.HorizontalFlip(p=1), Letterbox(48)], seed=0)
    copy = pickle.loads(pickle.dumps(transform))
    expected, result = transform(image=image, mask=mask), copy(image=image, mask=mask)
    assert result["image"].shape == (48, 48, 3)
    np.testing.assert_array_equal(result["image"], expected["image"])
    np.testing.assert_array_equal(result["mask"], expected["mask"])


def test_the_transform_is_always_applied(sample: tuple[Image, Image]) -> None:
    image, mask = sample
    transform = A.Compose([Letterbox(32)], seed=0)
    assert {transform(image=image, mask=mask)["image"].shape for _ in range(50)} == {(32, 32, 3)}


def test_the_transform_requires_an_integer_size() -> None:
    with pytest.raises(ValueError, match="size"):
        Letterbox("large")  # type: ignore[arg-type]
