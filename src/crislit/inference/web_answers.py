"""Computes masks, probability maps and files for a request of the page."""

import contextlib
import shutil
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image

from crislit.errors import InputError, require
from crislit.inference.masks import color_of, number_repeated, outline, safe_file_name
from crislit.inference.segmenter import Segmenter
from crislit.io import Image, open_image

MAX_SENTENCES = 20
MAX_UPLOAD_PIXELS = 40_000_000
MAX_MAP_PIXELS = 120_000_000
"""Limit of pixels times sentences per request: probability maps take four bytes for each."""
MAX_SENTENCE_LENGTH = 500
"""Characters per sentence, far more than CLIP reads."""
DISPLAY_SIZE = 1280
"""Longer side of the displayed images in pixels; masks have the size of the uploaded image."""
KEEP_SECONDS = 3600
"""Seconds for which uploads and masks are kept."""
Probability = npt.NDArray[np.float32]
Answer = tuple[Image, list[str], list[Probability]]
"""An image, the sentences, and a probability map per sentence."""


def segment(segmenter: Segmenter, path: str | None, text: str) -> Answer:
    """Segment an uploaded image.

    Raises:
        InputError: If the image or the sentences are missing, too large, or cannot be read.
    """
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if path is None:
        more = "" if sentences else " Then write a sentence, one per line."
        raise InputError(f"Upload an image first.{more}")
    require(sentences, "Write a sentence first, one per line.")
    require(
        len(sentences) <= MAX_SENTENCES,
        f"{len(sentences)} sentences are too many: at most {MAX_SENTENCES}.",
    )
    longest = max(map(len, sentences))
    require(
        longest <= MAX_SENTENCE_LENGTH,
        f"A sentence of {longest:,} characters is too long: at most {MAX_SENTENCE_LENGTH}.",
    )
    try:
        image = open_image(path, MAX_UPLOAD_PIXELS)
    except InputError as error:  # does not reveal where uploads are stored
        raise InputError(str(error).replace(path, "The file")) from error
    require(
        image.shape[0] * image.shape[1] * len(sentences) <= MAX_MAP_PIXELS,
        f"{len(sentences)} sentences are too many for such a large image: send a smaller one, "
        "or fewer sentences.",
    )
    return image, sentences, [result.probability for result in segmenter(image, sentences)]


def render(
    answer: Answer, threshold: float, folder: Path
) -> tuple[Any, list[tuple[Any, str]], str]:
    """Return an annotated image, probability maps with captions, and the path of the masks.

    Args:
        answer: The answer.
        threshold: Probability above which a pixel belongs to a mask.
        folder: The folder of mask files.
    """
    image, sentences, probabilities = answer
    labels: list[str] = []
    for sentence in sentences:  # the page assigns colors by label
        labels.append(number_repeated(sentence, " ({})", labels))
    masks = [probability > threshold for probability in probabilities]
    small_image, small_maps = shrink(image), [shrink(x) for x in probabilities]
    small_masks = [small > threshold for small in small_maps]
    outlined = small_image.copy()
    for mask in small_masks:
        outline(outlined, mask)
    annotations = [
        (mask.astype(np.float32), label) for mask, label in zip(small_masks, labels, strict=True)
    ]
    maps = [
        (draw_heat_map(small_image, small), f"{label}: {marked_share(mask)}")
        for small, label, mask in zip(small_maps, labels, masks, strict=True)
    ]
    return (outlined, annotations), maps, str(save_masks(sentences, masks, folder))


def marked_share(mask: npt.NDArray[np.bool_]) -> str:
    """Return in words how much of an image is marked."""
    percent = 100 * mask.mean()
    if not mask.any():
        return "nothing marked"
    if mask.all():
        return "all of the image"
    if percent < 0.1:
        return "less than 0.1 % of the image"
    if percent > 99.9:
        return "more than 99.9 % of the image"
    return f"{percent:.1f} % of the image"


def label_colors(labels: Sequence[str]) -> dict[str, str]:
    """Return each label's color in hexadecimal."""
    return {label: "#{:02x}{:02x}{:02x}".format(*color_of(i)) for i, label in enumerate(labels)}


def shrink(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Shrink an image (h, w, 3) or map (h, w) to ``DISPLAY_SIZE``, if it is larger."""
    height, width = pixels.shape[:2]
    scale = DISPLAY_SIZE / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def draw_heat_map(image: Image, probability: Probability) -> Image:
    """Draw a probability map over a gray image, from dark (0) to bright yellow (1)."""
    levels = np.round(255 * probability).astype(np.uint8)
    colored = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    gray = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    return (0.35 * gray + 0.65 * colored).astype(np.uint8)


def save_masks(
    sentences: Sequence[str], masks: Sequence[npt.NDArray[np.bool_]], root: Path
) -> Path:
    """Write one mask as PNG, or several to an archive, and delete outdated files."""
    for old in root.iterdir():
        with contextlib.suppress(FileNotFoundError):  # deleted by another request
            if time.time() - old.stat().st_mtime > KEEP_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=root))
    taken: set[str] = set()
    files = [folder / f"{safe_file_name('mask', sentence, taken)}.png" for sentence in sentences]
    for file, mask in zip(files, masks, strict=True):
        PIL.Image.fromarray(255 * mask.astype(np.uint8)).save(file)
    if len(files) == 1:
        return files[0]
    archive = folder / "masks.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for file in files:
            target.write(file, file.name)
    return archive
