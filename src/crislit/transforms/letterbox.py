"""From an image to the network's square input, and from logits back to the image's own pixels.

The letterbox keeps the aspect ratio and centers the image: it scales an image of (h, w) pixels by
s = min(S/h, S/w) and divides the remaining border equally between both sides, without rounding it
to whole pixels. S is the side of the square.
"""

from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from crislit.errors import require, see
from crislit.io import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BORDER = tuple(255 * channel for channel in CLIP_MEAN)
"""Color of the border: CLIP's mean, RGB in [0, 255]."""
Matrix = npt.NDArray[np.float64]
ProbabilityMap = npt.NDArray[np.float32]
"""The probability of each pixel, (h, w)."""


def letterbox_matrices(height: int, width: int, size: int) -> tuple[Matrix, Matrix]:
    """Return the affine map from image to square, and its inverse.

    The image is scaled to fit and centered, which leaves a border at two sides.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        size: Side of the square in pixels.

    Returns:
        Two (2, 3) matrices, as OpenCV's ``warpAffine`` takes them.
    """
    scale = min(size / height, size / width)
    left, top = (size - width * scale) / 2, (size - height * scale) / 2
    right, bottom = left + width * scale, top + height * scale
    image = np.array([[0, 0], [width, 0], [0, height]], dtype=np.float32)
    square = np.array([[left, top], [right, top], [left, bottom]], dtype=np.float32)
    return (  # type: ignore[return-value]
        cv2.getAffineTransform(image, square),
        cv2.getAffineTransform(square, image),
    )


def letterbox_image(image: Image, size: int, out: Image | None = None) -> Image:
    """Warp an image to the square with cubic interpolation and a border of CLIP's mean color.

    Args:
        image: (h, w, 3) uint8 RGB.
        size: S, side of the square.
        out: (S, S, 3) uint8 array that receives the result; None allocates one.

    Returns:
        (S, S, 3) uint8 RGB.
    """
    matrix, _ = letterbox_matrices(image.shape[0], image.shape[1], size)
    return cv2.warpAffine(  # type: ignore[return-value]
        image, matrix, (size, size), dst=out, flags=cv2.INTER_CUBIC, borderValue=BORDER
    )


def letterbox_mask(mask: Image, size: int, out: Image | None = None) -> Image:
    """Warp a mask to the square with linear interpolation and a border of zeros.

    Args:
        mask: (h, w) uint8, 0 or 255.
        size: S, side of the square.
        out: (S, S) uint8 array of zeros that receives the result; None allocates one.

    Returns:
        (S, S) uint8, with values between 0 and 255 at the edges of the object.
    """
    out = np.zeros((size, size), dtype=np.uint8) if out is None else out
    left, top, width, height = cv2.boundingRect(mask)
    if width == 0:
        return out
    # Most objects are small: warp only the cells that the object reaches, and one cell around them.
    matrix, _ = letterbox_matrices(mask.shape[0], mask.shape[1], size)
    box = [[left - 1, left + width], [top - 1, top + height]]
    corners = matrix[:, :2] @ box + matrix[:, 2:]
    x, y = np.clip(np.floor(corners[:, 0]), 0, size).astype(int).tolist()
    right, bottom = np.clip(np.ceil(corners[:, 1]) + 1, 0, size).astype(int).tolist()
    matrix[:, 2] -= (x, y)
    out[y:bottom, x:right] = cv2.warpAffine(
        mask, matrix, (right - x, bottom - y), flags=cv2.INTER_LINEAR, borderValue=0
    )
    return out


def stack_images(images: Sequence[Image]) -> Tensor:
    """Stack (S, S, 3) uint8 RGB images to (B, 3, S, S) uint8, with channels last in memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def normalize(images: Tensor) -> Tensor:
    """Subtract CLIP's mean and divide by its standard deviation.

    Args:
        images: (B, 3, S, S) uint8 RGB.

    Returns:
        (B, 3, S, S) float, with channels last in memory.
    """
    # Long rows vectorise better than three channels at a time.
    rows = images.permute(0, 2, 3, 1).flatten(2) / 255  # (B, S, 3 S)
    mean, std = (repeat_channels(values, rows) for values in (CLIP_MEAN, CLIP_STD))
    return rows.sub_(mean).div_(std).view(-1, *images.shape[2:], 3).permute(0, 3, 1, 2)


def repeat_channels(values: Sequence[float], rows: Tensor) -> Tensor:
    """Return a row that repeats a value per channel; copying one to a GPU would wait for it."""
    row = rows.new_empty(rows.shape[-1])
    for channel, value in enumerate(values):
        row[channel :: len(values)].fill_(value)
    return row


def probability_squares(logits: Tensor, image_size: int) -> Tensor:
    """Take the sigmoid and upsample to the square (bicubic, aligned corners).

    Args:
        logits: (B, 1, S/4, S/4).
        image_size: S, side of the square.

    Returns:
        (B, S, S) float32.
    """
    probabilities = torch.sigmoid(logits.float())
    return F.interpolate(probabilities, size=2 * (image_size,), mode="bicubic", align_corners=True)[
        :, 0
    ]


def probability_maps(
    logits: Tensor, image_size: int, sizes: Iterable[tuple[int, ...]]
) -> Iterator[ProbabilityMap]:
    """Turn logits into one probability map per sentence, at the size of the sentence's image.

    Warps the maps of ``probability_squares`` back to the image (cubic, zero outside the
    square). Cubic interpolation overshoots: values may lie slightly
    outside [0, 1]. To save memory, each map is computed only when it is asked for.

    Args:
        logits: (B, 1, S/4, S/4).
        image_size: S, side of the square.
        sizes: (h, w) of each sentence's image.

    Returns:
        B maps, (h, w) float32 each.

    Raises:
        InputError: If a map contains NaN or infinity.
    """
    squares = probability_squares(logits, image_size).cpu().numpy()
    return (restore(square, *size) for square, size in zip(squares, sizes, strict=True))


def restore(square: ProbabilityMap, height: int, width: int) -> ProbabilityMap:
    """Warp a map on the square back to an image of (height, width), cubic, zero outside.

    Raises:
        InputError: If the map contains NaN or infinity, which thresholding would silently accept.
    """
    require(
        np.isfinite(square).all(),
        "the network computes NaN or infinity: its weights are too large, its training failed, or "
        f"float16 is too small{see('nan')}",
    )
    _, inverse = letterbox_matrices(height, width, square.shape[0])
    return cv2.warpAffine(  # type: ignore[return-value]
        square, inverse, (width, height), flags=cv2.INTER_CUBIC, borderValue=0
    )
