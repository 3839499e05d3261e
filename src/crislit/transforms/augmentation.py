"""The letterbox as an Albumentations transform, and the augmentations chosen in ``conf/augment``.

Apart from ``letterbox.py``, because importing Albumentations takes seconds that prediction saves.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from crislit.errors import InputError, require
from crislit.io import Image
from crislit.transforms.letterbox import letterbox_image, letterbox_mask

CHECK = "NO_ALBUMENTATIONS_UPDATE"
_is_set = CHECK in os.environ
os.environ.setdefault(CHECK, "1")  # during the import, which otherwise asks a server for updates
import albumentations as A  # noqa: E402
from albumentations.core.transforms_interface import BaseTransformInitSchema  # noqa: E402
from albumentations.core.type_definitions import Targets  # noqa: E402

if not _is_set:
    del os.environ[CHECK]

SIDES = {"left": "right", "right": "left", "lhs": "rhs", "rhs": "lhs"}
SIDE = re.compile(
    r"\b(?P<prefix>top|bottom|upper|lower|far|front|back|mid|middle)?"
    r"(?P<side>left|right|lhs|rhs)(?=(?:most|wards?|side|hand|handed|ers?)?\b)",
    re.I,
)
"""A side, alone or as in "leftmost", "right-hand" and "topleft"."""
BEFORE_SIDE = (
    *("the", "on", "to", "from", "at", "far", "very", "extreme", "top", "bottom", "upper"),
    *("lower", "front", "back", "his", "her", "its", "their", "your", "my"),
)
"""Words after which "right" is a side, as in "on right behind the dog"."""
INTENSIFIER = re.compile(
    "".join(rf"(?<!\b{word} )" for word in BEFORE_SIDE) + r"\bright(?= (?:"
    r"next|behind|above|below|beside|besides|under|underneath|beneath|near|before|after|between"
    r"|at|by|against|across|along|alongside|around|outside|inside|over|on|up|down|here|there|where"
    r"|in (?:front|between|back|the (?:middle|center|centre|front|back))|side up)\b)",
    re.I,
)
"""The word "right" in the sense of "immediately", as in "right behind the dog"."""
UNMIRRORABLE = re.compile(r"\b(?:o['’]? ?clock|\w*clockwise|l|r|lf|lft|lt|rt|rgt|rite)\b", re.I)
"""Directions without a mirror image in words, and abbreviations that may mean a side."""


def mirror_sentence(sentence: str) -> str | None:
    """Exchange left and right in a sentence; None if the mirrored meaning cannot be expressed.

    "right" in the sense of "immediately" ("right behind the dog") stays. A sentence such as "left
    behind the dog" would become ambiguous, and has no mirror image.
    """
    if UNMIRRORABLE.search(sentence):
        return None
    mirrored = exchange_sides(sentence)
    return mirrored if exchange_sides(mirrored) == sentence else None


def exchange_sides(sentence: str) -> str:
    """Exchange left and right, except in the sense of "immediately"."""
    unchanged = {match.start() for match in INTENSIFIER.finditer(sentence)}

    def exchange(match: re.Match[str]) -> str:
        if match.start() in unchanged:
            return match[0]
        side = match["side"]
        other = SIDES[side.casefold()]  # "ſ" counts as an "s", too
        other = other.upper() if side.isupper() else other.title() if side.istitle() else other
        return f"{match['prefix'] or ''}{other}"

    return SIDE.sub(exchange, sentence)


class Augmentation:
    """Random changes of training samples: mirroring with the sentences, and Albumentations.

    Args:
        flip: Probability of mirroring the image horizontally. Left and right are exchanged in the
            sentences; a sample for which that is not possible is never mirrored.
        transforms: Albumentations transforms of image and masks. They must keep uint8, and must
            not change what a sentence describes, such as colors or places.

    Raises:
        InputError: If the probability is not in [0, 1].
    """

    def __init__(self, flip: float = 0.0, transforms: Sequence[A.BasicTransform] = ()) -> None:
        require(
            isinstance(flip, (int, float)) and 0 <= flip <= 1,
            f"augment.flip must be a probability in [0, 1], got {flip!r}",
        )
        self.flip, self.transforms = flip, list(transforms)
        self._composed: dict[int, A.Compose] = {}

    def mirror(self, sentences: Sequence[str], seed: int) -> list[str] | None:
        """Decide whether to mirror a sample: return its mirrored sentences, or None."""
        # The transforms are seeded by the seed alone: mirroring must not depend on their choices.
        if np.random.default_rng([seed, 1]).random() >= self.flip:
            return None
        mirrored = [mirror_sentence(sentence) for sentence in sentences]
        return None if None in mirrored else [s for s in mirrored if s is not None]

    def apply(
        self, image: Image, masks: npt.NDArray[np.uint8], size: int, mirrored: bool, seed: int
    ) -> tuple[Image, npt.NDArray[np.uint8]]:
        """Change an image and its masks, and warp them to the square input.

        Args:
            image: (h, w, 3) uint8 RGB.
            masks: (k, h, w) uint8, 0 or 255.
            size: S, side of the square.
            mirrored: Whether the sample is mirrored.
            seed: Decides the transforms' random choices.

        Returns:
            (S, S, 3) uint8 RGB and (k, S, S) uint8.

        Raises:
            InputError: If a transform changes the type of pixels.
        """
        if mirrored:
            image, masks = (np.ascontiguousarray(x) for x in (image[:, ::-1], masks[..., ::-1]))
        if size not in self._composed:
            self._composed[size] = A.Compose([*self.transforms, Letterbox(size)])
        self._composed[size].set_random_seed(seed)
        changed = self._composed[size](image=image, masks=masks)
        image, masks = changed["image"], changed["masks"]
        if image.dtype != np.uint8 or masks.dtype != np.uint8:
            raise InputError(
                f"augmentations must keep uint8, and made {image.dtype} and {masks.dtype}"
            )
        return image, masks


class Letterbox(A.DualTransform):  # type: ignore[misc]  # Albumentations is not typed
    """Warps an image and its mask to the network's square input, for use in a Compose.

    Args:
        size: S, side of the square.
        p: Probability; anything but 1 leaves images of different sizes.
    """

    _targets = (Targets.IMAGE, Targets.MASK)

    class InitSchema(BaseTransformInitSchema):  # type: ignore[misc]
        """Checks the arguments."""

        size: int

    def __init__(self, size: int, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.size = size

    def apply(self, img: Image, **params: Any) -> Image:
        """(h, w, 3) uint8 -> (S, S, 3) uint8."""
        return letterbox_image(img, self.size)

    def apply_to_mask(self, mask: Image, **params: Any) -> Image:
        """(h, w) uint8, 0 or 255 -> (S, S) uint8."""
        return letterbox_mask(mask, self.size)
