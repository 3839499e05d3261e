"""Failures of a network and their kinds (figure 5 of the paper)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from pycocotools import mask as coco_mask

from crislit.data import parse_segmentation, rasterize
from crislit.errors import InputError
from crislit.experiments.subjects import Subject, make_grid
from crislit.io import read_json
from crislit.training import draw_mask, intersection_and_union, iou, readable_text

BoolMask = npt.NDArray[np.bool_]
COVERED_SHARE = 0.5
"""Share of an object's pixels that a prediction must contain to cover the object."""
FAILURE_KINDS = {
    "ambiguous sentence": "the prediction covers the target and another object",
    "wrong object": "it covers another object, and not the target",
    "poor boundary": "it covers the target and no other object, but fits badly",
    "missed": "it covers no object",
}
"""Kinds of failures with their rules. An object is covered if half of its pixels are predicted."""
FAILURE_COLUMNS = ("sample", "name", "sentence", "IoU", "sort")
Failure = dict[str, Any]
"""The columns of a failure, and its prediction as COCO's run lengths."""


def classify_failure(prediction: BoolMask, target: BoolMask, others: Sequence[BoolMask]) -> str:
    """Return the kind of a failure, see ``FAILURE_KINDS``."""

    def covers(mask: BoolMask) -> bool:
        return bool(mask.any() and prediction[mask].mean() >= COVERED_SHARE)

    # Pixels shared with the target do not count, such as a tie's on the man who wears it.
    covers_other = any(covers(mask & ~target) for mask in others)
    if covers(target):
        return "ambiguous sentence" if covers_other else "poor boundary"
    return "wrong object" if covers_other else "missed"


def annotations_by_image(subject: Subject) -> dict[int, list[dict[str, Any]]]:
    """Return all annotated objects by image id, also those that no sentence describes.

    Raises:
        InputError: If the data set has no list of all objects.
    """
    path = subject.module.index.annotations_path
    if path is None:
        raise InputError(
            "failures are classified by all objects of an image, but this data set lists only "
            "those that sentences describe"
        )
    annotations: dict[int, list[dict[str, Any]]] = {}
    for annotation in read_json(path)["annotations"]:
        if not annotation.get("iscrowd"):
            annotations.setdefault(int(annotation["image_id"]), []).append(annotation)
    return annotations


def decode_annotation(annotation: Mapping[str, Any], height: int, width: int) -> BoolMask:
    """Return an annotation's mask, as the data set draws its refs.

    Raises:
        InputError: If it has no valid mask.
    """
    try:
        polygons, runs = parse_segmentation(annotation["segmentation"], (height, width))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"annotation {annotation.get('id')} cannot be drawn: {error!r}") from error
    outlines = [polygon.tolist() for polygon in polygons]
    return rasterize(outlines, np.array(runs, dtype=np.int64), height, width).astype(bool)


def find_failures(subject: Subject, numbers: Sequence[int]) -> list[Failure]:
    """Find and classify the samples with an IoU below one half, the worst first."""
    annotations = annotations_by_image(subject)
    failures = []
    for number, probability in subject.predictions(numbers):
        prediction = probability > subject.checkpoint.threshold
        target = subject.data.target(number).astype(bool)
        score = iou(*intersection_and_union(prediction, target))
        if score >= 0.5:
            continue
        image_id = subject.module.index.image_id(int(subject.data.samples[number, 0]))
        objects = [decode_annotation(a, *target.shape) for a in annotations.get(image_id, [])]
        # The target is annotated too.
        others = [mask for mask in objects if iou(*intersection_and_union(mask, target)) < 0.9]
        failures.append(
            {
                "sample": number,
                "name": subject.data.name(number),
                "sentence": subject.data.sentence(number),
                "IoU": score,
                "sort": classify_failure(prediction, target, others),
                # The masks of a whole split would fill the memory.
                "prediction": coco_mask.encode(np.asfortranarray(prediction, dtype=np.uint8)),
            }
        )
    return sorted(failures, key=lambda failure: failure["IoU"])


def draw_failures(subject: Subject, failures: Sequence[Failure], per_kind: int) -> Figure:
    """Draw the first failures of each kind, the target beside the prediction (figure 5)."""
    figure, grid = make_grid(len(FAILURE_KINDS), 2 * per_kind, 2.6, 2.35, 0.3, frame=False)
    for row, (kind, rule) in zip(grid, FAILURE_KINDS.items(), strict=True):
        members = [failure for failure in failures if failure["sort"] == kind]
        row[0].set_ylabel(f"{kind}\n{len(members)} of {len(failures)}", fontsize=9)
        row[0].set_title(rule, fontsize=8, loc="left")
        for i, failure in enumerate(members[:per_kind]):
            image, (left, right) = subject.data.image(failure["sample"]), row[2 * i : 2 * i + 2]
            draw_mask(left, image, subject.data.target(failure["sample"]), "lime")
            draw_mask(right, image, coco_mask.decode(failure["prediction"]), "orange")
            text, fonts = readable_text(f"“{failure['sentence']}”")
            left.set_xlabel(text, family=fonts, fontsize=8, parse_math=False, wrap=True)
            right.set_xlabel(f"predicted, IoU {failure['IoU']:.2f}", fontsize=8)
    return figure
