"""The letterbox as an Albumentations transform, to be composed with augmentations.

A file of its own because importing Albumentations takes seconds that prediction need not spend.
"""

from typing import Any

import albumentations as A
from albumentations.core.transforms_interface import BaseTransformInitSchema
from albumentations.core.type_definitions import Targets

from crislit.data.letterbox import Image, letterbox_image, letterbox_mask


class Letterbox(A.DualTransform):  # type: ignore[misc]  # Albumentations is not typed
    """Warps a picture and its mask into a square, keeping the aspect ratio.

    Args:
        size: Side of the square.
        p: Probability; anything but 1 leaves pictures of different sizes.
    """

    _targets = (Targets.IMAGE, Targets.MASK)

    class InitSchema(BaseTransformInitSchema):  # type: ignore[misc]
        """Checks the arguments."""

        size: int

    def __init__(self, size: int, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.size = size

    def apply(self, img: Image, **params: Any) -> Image:
        """(h, w, 3) uint8 -> (size, size, 3) uint8."""
        return letterbox_image(img, self.size)

    def apply_to_mask(self, mask: Image, **params: Any) -> Image:
        """(h, w) uint8, 0 or 255 -> (size, size) uint8."""
        return letterbox_mask(mask, self.size)
