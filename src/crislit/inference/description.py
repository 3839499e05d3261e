"""Describes networks, and warns of images and sentences that a network was not trained for."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np

from crislit.errors import see
from crislit.inference.onnx_network import OnnxNetwork
from crislit.inference.segmentation import Segmentation, shorten
from crislit.io import Image
from crislit.models import count_parameters

if TYPE_CHECKING:
    from crislit.inference.segmenter import Segmenter

PHOTO_COLORS = 32
"""Colors above which an image looks like a photo. One of the 3,900 training scenes of ``shapes``
has more, and 46 of 53 images of COCO."""


@dataclass(frozen=True)
class Description:
    """Describes a network to its users: its training data and its input.

    Attributes:
        name: A short name of the network, empty if it has none.
        data: The data set of its training, empty if it is unknown.
        images: The kind of images that it was trained on.
        model: Its encoder, or its number of parameters.
        image_size: Side of its square input in pixels.
    """

    name: str
    data: str
    images: Literal["drawn", "photos", "custom", "unknown"]
    model: str
    image_size: int

    def __str__(self) -> str:
        training = f"trained on {self.data}" if self.data else "training data unknown"
        if self.images == "drawn":
            training += " (knows drawn shapes only)"
        name = f"{self.name}, " if self.name else ""
        return f"{name}{training}; {self.model}, images of {self.image_size} pixels"


def describe_network(segmenter: "Segmenter", source: str | os.PathLike[str]) -> Description:
    """Describe a network.

    Args:
        segmenter: The network.
        source: Where it was loaded from, empty if unknown.
    """
    model = segmenter.model
    if isinstance(model, OnnxNetwork):
        dataset, kind = model.dataset, "exported to ONNX"
    else:
        dataset = segmenter.about.config.get("dataset", {}) if segmenter.about else {}
        clip = model.config.clip
        millions = f"{count_parameters(model) / 1e6:.1f} million parameters"
        kind = f"{clip}, {millions}" if isinstance(clip, str) else millions
    return Description(
        name=short_name(source),
        data=dataset_name(dataset),
        images=kind_of_images(dataset),
        model=kind,
        image_size=segmenter.image_size,
    )


def short_name(source: str | os.PathLike[str]) -> str:
    """Return a name without the folders of this machine: ``RUN/best.ckpt``, ``shapes-tiny``."""
    if not source:
        return ""
    path = Path(source).expanduser().absolute()
    run = path.parents[1].name if path.parent.name == "checkpoints" else ""
    return f"{run}/{path.name}" if run else path.name


def dataset_name(dataset: Mapping[str, Any]) -> str:
    """Return the name of a data set, with the file's name for custom data; empty if unknown."""
    name = str(dataset.get("name") or "")
    file = dataset.get("file")
    return f"{name} data ({Path(str(file)).name})" if file else name


def kind_of_images(
    dataset: Mapping[str, Any],
) -> Literal["drawn", "photos", "custom", "unknown"]:
    """Return the kind of images in a data set, from its entry in a run's configuration."""
    if not dataset:
        return "unknown"
    if dataset.get("embedded"):
        return "drawn"
    return "photos" if dataset.get("folder") else "custom"


def photo_warning(description: Description, image: Image, name: str) -> str:
    """Return a warning if a network that knows drawn shapes only gets a photo.

    Args:
        description: The network and the kind of its training images.
        image: (h, w, 3) uint8 RGB.
        name: The name of the image, for the warning.

    Returns:
        The warning, or an empty string.
    """
    if description.images != "drawn" or not looks_like_photo(image):
        return ""
    return (
        f"{name} looks like a photo, and {description.name} knows drawn shapes only: its masks are "
        "meaningless there. Train a network on photos, and give its file with --checkpoint"
        f"{see('photos')}"
    )


def looks_like_photo(image: Image) -> bool:
    """Whether an image has more colors than drawn scenes: see ``PHOTO_COLORS``.

    Counts the fewest colors that cover 80 % of the image, with 16 levels per channel, after
    shrinking its longer side to 128 pixels.
    """
    scale = 128 / max(image.shape[:2])
    if scale < 1:
        height, width = (max(1, round(scale * side)) for side in image.shape[:2])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    levels = (image >> 4).astype(int) @ np.array([256, 16, 1])
    counts = np.sort(np.unique(levels, return_counts=True)[1])[::-1]
    colors = np.searchsorted(np.cumsum(counts), 0.8 * counts.sum()) + 1
    return bool(colors > PHOTO_COLORS)


def empty_mask_warning(result: Segmentation, threshold: float, name: str) -> str:
    """Return a warning if a mask is empty, with the reason; else an empty string.

    Args:
        result: The result with the mask.
        threshold: Probability above which a pixel belongs to the mask.
        name: The name of the image, for the warning.
    """
    if result.mask.any():
        return ""
    return (
        f"the mask of {shorten(result.sentence, 80)!r} in {name} is empty: the highest probability "
        f"is {result.probability.max():.3f}, and the threshold {threshold:.3g}"
    )
