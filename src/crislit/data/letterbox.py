"""The square input of the network and the way back to a picture's own pixels.

The map keeps the aspect ratio: s = min(S/h, S/w), and what is left is shared by both sides, not rounded to whole pixels.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from crislit.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BORDER = tuple(255 * channel for channel in CLIP_MEAN)
"""What surrounds a picture in the square: CLIP's mean colour, RGB in [0, 255]."""

Image = npt.NDArray[np.uint8]
Matrix = npt.NDArray[np.float64]


def letterbox_matrices(height: int, width: int, size: int) -> tuple[Matrix, Matrix]:
    """Return the affine map of a picture into a square, and its inverse, (2, 3) each, in OpenCV's pixel indices."""
    scale = min(size / height, size / width)
    left, top = (size - width * scale) / 2, (size - height * scale) / 2
    picture = np.array([[0, 0], [width, 0], [0, height]], dtype=np.float32)
    square = np.array([[left, top], [left + width * scale, top], [left, top + height * scale]], dtype=np.float32)
    forth, back = cv2.getAffineTransform(picture, square), cv2.getAffineTransform(square, picture)
    return forth.astype(np.float64), back.astype(np.float64)


def letterbox_image(image: Image, size: int, square: Image | None = None) -> Image:
    """Warp a picture into a square, cubic: (h, w, 3) uint8 RGB -> (size, size, 3) uint8, written to ``square`` if given."""
    matrix, _ = letterbox_matrices(image.shape[0], image.shape[1], size)
    return cv2.warpAffine(  # type: ignore[return-value]
        image, matrix, (size, size), dst=square, flags=cv2.INTER_CUBIC, borderValue=BORDER
    )


def letterbox_mask(mask: Image, size: int, square: Image | None = None) -> Image:
    """Warp a mask into a square, linear: (h, w) uint8, 0 or 255 -> (size, size) uint8, soft at the edges.

    Args:
        mask: The mask.
        size: S, side of the square.
        square: Zeros to write to; None: new ones.
    """
    square = np.zeros((size, size), dtype=np.uint8) if square is None else square
    left, top, width, height = cv2.boundingRect(mask)
    if width:  # an object is a small part of most pictures: warp what its pixels reach, a cell around them included
        matrix, _ = letterbox_matrices(mask.shape[0], mask.shape[1], size)
        corners = matrix[:, :2] @ [[left - 1, left + width], [top - 1, top + height]] + matrix[:, 2:]
        (x, y), (right, bottom) = np.clip([np.floor(corners[:, 0]), np.ceil(corners[:, 1]) + 1], 0, size).astype(int).tolist()
        matrix[:, 2] -= (x, y)
        part = cv2.warpAffine(mask, matrix, (right - x, bottom - y), flags=cv2.INTER_LINEAR, borderValue=0)
        square[y:bottom, x:right] = part
    return square


def stack_images(images: Sequence[Image]) -> Tensor:
    """Stack squares: (S, S, 3) uint8 RGB each -> (B, 3, S, S) uint8, channels last in memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def normalise(images: Tensor) -> Tensor:
    """Apply CLIP's mean and standard deviation: (B, 3, S, S) uint8 RGB -> the same in float, channels last in memory."""
    rows = images.permute(0, 2, 3, 1).flatten(2) / 255  # long rows: three channels at a time take long
    mean, std = (rows.new_tensor(values).repeat(images.shape[3]) for values in (CLIP_MEAN, CLIP_STD))
    return rows.sub_(mean).div_(std).view(-1, *images.shape[2:], 3).permute(0, 3, 1, 2)


def upsample_probabilities(logits: Tensor, size: int) -> Tensor:
    """Turn logits into probabilities at the input's size: (B, 1, h, w) -> (B, S, S), bicubic with aligned corners.

    Bicubic overshoots: values may lie a little outside [0, 1].
    """
    probabilities = torch.sigmoid(logits.float())
    return F.interpolate(probabilities, size=(size, size), mode="bicubic", align_corners=True)[:, 0]


def restore(square: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.float32]:
    """Warp a map on the square back to a picture's own pixels, cubic, zero outside: (S, S) -> (height, width).

    Raises:
        InputError: If the map has NaN or infinity, of which a mask would be made nevertheless.
    """
    if not np.isfinite(square).all():
        raise InputError(
            "the network computes NaN or infinity: its weights are too large, its training went wrong, or float16 is too small"
        )
    _, inverse = letterbox_matrices(height, width, square.shape[0])
    return cv2.warpAffine(square, inverse, (width, height), flags=cv2.INTER_CUBIC, borderValue=0)  # type: ignore[return-value]
