"""Segmentation metrics of a whole data set: mIoU (the paper's "IoU"), oIoU and Pr@X.

The IoU of a sample is I / (U + 1e-6) at its image's own size. An empty target counts as IoU 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric

from crislit.transforms.letterbox import letterbox_mask, probability_maps

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
EPSILON = 1e-6
METRICS = ("mIoU", "oIoU", *(f"Pr@{round(100 * at)}" for at in PRECISION_AT))
"""Names of the metrics, each in [0, 1]."""

Mask = npt.NDArray[Any]


def intersection_and_union(prediction: Mask, target: Mask) -> tuple[int, int]:
    """Count the pixels in both of two masks, and in either."""
    prediction, target = prediction.astype(bool), target.astype(bool)
    return int(np.count_nonzero(prediction & target)), int(np.count_nonzero(prediction | target))


def iou(intersection: int, union: int) -> float:
    """Return I / (U + 1e-6)."""
    return intersection / (union + EPSILON)


class SegmentationMetric(Metric):
    """mIoU, oIoU and Pr@X over samples seen by any number of processes.

    All states are integers, so the result does not depend on the order of samples or the number of
    processes: IoUs are summed in units of 2^-32.
    """

    UNIT = 2**32
    full_state_update = False
    iou_sum: Tensor
    intersection: Tensor
    union: Tensor
    hits: Tensor
    samples: Tensor
    empty: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("iou_sum", "intersection", "union", "samples", "empty"):
            self.add_state(name, torch.tensor(0, dtype=torch.long), dist_reduce_fx="sum")
        hits = torch.zeros(len(PRECISION_AT), dtype=torch.long)
        self.add_state("hits", hits, dist_reduce_fx="sum")

    def update(
        self, intersections: Sequence[int], unions: Sequence[int], empty: Sequence[bool]
    ) -> None:
        """Add samples.

        Args:
            intersections: Pixels in prediction and target, one number per sample.
            unions: Pixels in prediction or target.
            empty: Whether the target is empty.
        """
        for i, u, is_empty in zip(intersections, unions, empty, strict=True):
            value = iou(i, u)
            self.iou_sum += round(value * self.UNIT)
            self.intersection += i
            self.union += u
            self.hits += torch.tensor([value > at for at in PRECISION_AT], device=self.hits.device)
            self.samples += 1
            self.empty += is_empty

    def compute(self) -> dict[str, Tensor]:
        """Return every metric of :data:`METRICS` in [0, 1], and the counts ``samples``, ``empty``.

        Raises:
            ValueError: If no sample was added.
        """
        samples = int(self.samples)
        if not samples:
            raise ValueError("no sample was evaluated; metrics of nothing are not defined")
        total = int(self.intersection) / (int(self.union) + EPSILON)
        shares = [int(self.iou_sum) / self.UNIT / samples, total]
        shares += [hits / samples for hits in self.hits.tolist()]
        values = {name: torch.tensor(value) for name, value in zip(METRICS, shares, strict=True)}
        return values | {"samples": torch.tensor(samples), "empty": self.empty.clone()}


def reachable_iou(target: Mask, image_size: int, threshold: float) -> float:
    """Return the IoU of a perfect prediction at the network's resolution.

    The target goes through the letterbox, to the loss's size H/4, and back to the image.

    Args:
        target: (h, w) uint8, 0 or 1.
        image_size: S, side of the square input.
        threshold: Probability above which a pixel belongs to the mask.
    """
    soft = torch.from_numpy(letterbox_mask(255 * target, image_size)).float() / 255
    size = (image_size // 4, image_size // 4)
    quarter = torch.nn.functional.interpolate(soft[None, None], size=size, mode="nearest")
    (probability,) = probability_maps(torch.logit(quarter), image_size, [target.shape])
    return iou(*intersection_and_union(probability > threshold, target))
