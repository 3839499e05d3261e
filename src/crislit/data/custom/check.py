"""Checks custom data: finds unreadable images, measures targets, summarizes the splits."""

import hashlib
from collections import Counter, defaultdict
from statistics import median

import numpy as np
from tqdm import tqdm

from crislit.data.custom.builder import CustomData, Problem
from crislit.data.refer_annotations import Mask, parse_segmentation, rasterize
from crislit.errors import InputError, counted
from crislit.io import decode_pixels, read_image_file
from crislit.transforms import truncated_words


def read_images(data: CustomData) -> tuple[list[Problem], dict[int, str]]:
    """Decode every image.

    Returns:
        The lines whose image cannot be decoded, and a digest of each other image by its id.
    """
    lines: dict[int, set[int]] = defaultdict(set)
    for ref in data.refs:
        lines[ref["image_id"]].update(sentence["line"] for sentence in ref["sentences"])
    problems, digests = [], {}
    for image in tqdm(
        data.instances["images"], "reading images", unit="image", mininterval=1, disable=None
    ):
        path, size = data.folder / image["file_name"], (image["height"], image["width"])
        try:
            content = read_image_file(path, size)
            decode_pixels(content, path, size)
            digests[image["id"]] = hashlib.sha256(content).hexdigest()
        except InputError as error:
            problems += [Problem(line, str(error)) for line in lines[image["id"]]]
    return problems, digests


def draw_target(data: CustomData, row: int) -> Mask:
    """Return the mask of a ref: (h, w) uint8, 0 or 1."""
    annotation = data.instances["annotations"][row]
    image = data.instances["images"][annotation["image_id"] - 1]
    size = image["height"], image["width"]
    polygons, runs = parse_segmentation(annotation["segmentation"], size)
    return rasterize([p.tolist() for p in polygons], np.array(runs, dtype=np.int64), *size)


def summarize(data: CustomData) -> list[str]:
    """Return one line per split with its numbers of objects, sentences and images."""
    objects = Counter(ref["split"] for ref in data.refs)
    sentences = Counter(ref["split"] for ref in data.refs for _ in ref["sentences"])
    images = images_by_split(data)
    return [
        f"{split}: {counted(objects[split], 'object')}, {counted(sentences[split], 'sentence')}, "
        f"{counted(len(images[split]), 'image')}"
        for split in sorted(objects)
    ] or ["no line can be used"]


def tabulate(data: CustomData, areas: list[float], max_tokens: int) -> list[str]:
    """Return a table with one row per split, and the values of mask images.

    Args:
        data: The data.
        areas: Each target's share of its image, from 0 to 1.
        max_tokens: Tokens per sentence in training.
    """
    rows: list[tuple[str, ...]] = [
        ("split", "sentences/image", "target area: min", "median", "max", "sentences cut off")
    ]
    for split, images in sorted(images_by_split(data).items()):
        own = [row for row, ref in enumerate(data.refs) if ref["split"] == split]
        sentences = [sentence["sent"] for row in own for sentence in data.refs[row]["sentences"]]
        shares = [areas[row] for row in own]
        rows.append(
            (
                split,
                f"{len(sentences) / len(images):.1f}",
                *(f"{100 * f(shares):.2f} %" for f in (min, median, max)),
                str(sum(bool(truncated_words(sentence, max_tokens)) for sentence in sentences)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (rows if data.refs else [])
    ]
    masks = sorted(data.mask_values.items(), key=lambda item: -item[1])
    lines += [
        f"{counted(count, 'mask file has', 'mask files have')} the values {values}"
        for values, count in masks[:8]
    ]
    others = [f"and {counted(len(masks) - 8, 'other combination')}"]
    return lines + (others if len(masks) > 8 else [])


def images_by_split(data: CustomData) -> defaultdict[str, set[int]]:
    """Return the ids of each split's images."""
    images: defaultdict[str, set[int]] = defaultdict(set)
    for ref in data.refs:
        images[ref["split"]].add(ref["image_id"])
    return images
