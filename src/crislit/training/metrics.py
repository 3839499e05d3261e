"""Segmentation metrics of a whole data set: mIoU (the paper's "IoU"), oIoU and Pr@X.

The IoU of a sample is I / (U + 1e-6) at its image's own size. An empty target counts as IoU 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from crislit.transforms import letterbox_mask, probability_maps

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
METRICS = ("mIoU", "oIoU", *(f"Pr@{round(100 * at)}" for at in PRECISION_AT))
"""Names of the metrics, each in [0, 1]."""

Mask = npt.NDArray[Any]


def intersection_and_union(prediction: Mask, target: Mask) -> tuple[int, int]:
    """Count the pixels in both of two masks, and in either.

    Args:
        prediction: A mask of any shape; other values than 0 belong to it.
        target: A mask of the same shape.

    Returns:
        The numbers of pixels in the intersection and in the union.
    """
    prediction, target = prediction.astype(bool), target.astype(bool)
    return int(np.count_nonzero(prediction & target)), int(np.count_nonzero(prediction | target))


def iou(intersection: int, union: int) -> float:
    """Return I / (U + 1e-6), which is 0 for two empty masks.

    Args:
        intersection: I, the number of pixels in both masks.
        union: U, the number of pixels in either.

    Returns:
        The IoU, in [0, 1).
    """
    return intersection / (union + 1e-6)


class SegmentationMetric(Metric):
    """mIoU, oIoU and Pr@X over samples seen by any number of processes.

    All states are integers, so the result does not depend on the order of samples or the number of
    processes: IoUs are summed in units of 2^-32.
    """

    UNIT = 2**32
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("iou_sum", "intersection", "union", "samples", "empty"):
            self.add_state(name, torch.tensor(0, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("hits", torch.zeros(len(PRECISION_AT), dtype=torch.long), "sum")

    def update(
        self, intersections: Sequence[int], unions: Sequence[int], empty: Sequence[bool]
    ) -> None:
        """Add samples.

        Args:
            intersections: Pixels in prediction and target, one number per sample.
            unions: Pixels in prediction or target.
            empty: Whether the target is empty.
        """
        ious = [iou(i, u) for i, u, _ in zip(intersections, unions, empty, strict=True)]
        added = {
            "iou_sum": sum(round(value * self.UNIT) for value in ious),
            "intersection": sum(intersections),
            "union": sum(unions),
            "hits": torch.tensor(
                [sum(value > at for value in ious) for at in PRECISION_AT], device=self.device
            ),
            "samples": len(ious),
            "empty": sum(empty),
        }
        for name, value in added.items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, Tensor]:
        """Return scalars: each of ``METRICS`` in [0, 1], and the counts ``samples`` and ``empty``.

        Raises:
            ValueError: If no sample was added.
        """
        sums: dict[str, Any] = {name: getattr(self, name).tolist() for name in self.metric_state}
        samples = sums["samples"]
        if not samples:
            raise ValueError("no sample was evaluated; metrics of nothing are not defined")
        shares = [
            sums["iou_sum"] / self.UNIT / samples,
            iou(sums["intersection"], sums["union"]),
            *(hits / samples for hits in sums["hits"]),
        ]
        values = {name: torch.tensor(value) for name, value in zip(METRICS, shares, strict=True)}
        return values | {"samples": torch.tensor(samples), "empty": torch.tensor(sums["empty"])}


def reachable_iou(target: Mask, image_size: int, threshold: float) -> float:
    """Return the IoU of a perfect prediction at the network's resolution.

    The target goes through the letterbox, to the loss's size H/4, and back to the image.

    Args:
        target: (h, w) uint8, 0 or 1.
        image_size: S, side of the square input.
        threshold: Probability above which a pixel belongs to the mask.
    """
    soft = torch.from_numpy(letterbox_mask(255 * target, image_size)).float() / 255
    quarter = F.interpolate(soft[None, None], size=image_size // 4, mode="nearest")
    (probability,) = probability_maps(torch.logit(quarter), image_size, [target.shape])
    return iou(*intersection_and_union(probability > threshold, target))
