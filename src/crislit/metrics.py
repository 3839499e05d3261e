"""How well masks fit: mIoU (the paper's "IoU"), oIoU and Pr@X, of the whole data set.

IoU of a sample is I / (U + 1e-6) at the picture's own size. A truth without pixels cannot be met and counts as 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric

from crislit.data.letterbox import letterbox_mask, restore, upsample_probabilities

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
EPSILON = 1e-6
METRICS = ("mIoU", "oIoU", *(f"Pr@{round(100 * at)}" for at in PRECISION_AT))
"""Names of what is reported, each in [0, 1]."""

Mask = npt.NDArray[Any]


def intersection_and_union(prediction: Mask, truth: Mask) -> tuple[int, int]:
    """Count the pixels that two masks of one shape share and that they cover together."""
    prediction, truth = prediction.astype(bool), truth.astype(bool)
    return int(np.count_nonzero(prediction & truth)), int(np.count_nonzero(prediction | truth))


def iou(intersection: int, union: int) -> float:
    """Return I / (U + 1e-6)."""
    return intersection / (union + EPSILON)


class SegmentationMetric(Metric):
    """mIoU, oIoU and Pr@X over samples seen by any number of processes.

    All states are integers, so that the result does not depend on the order or the number of processes: an IoU is summed in
    units of 2^-32.
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
        self.add_state("hits", torch.zeros(len(PRECISION_AT), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, intersections: Sequence[int], unions: Sequence[int], empty: Sequence[bool]) -> None:
        """Add samples.

        Args:
            intersections: Pixels in prediction and truth, one number a sample.
            unions: Pixels in prediction or truth.
            empty: Whether the truth has no pixel.
        """
        for i, u, none in zip(intersections, unions, empty, strict=True):
            value = iou(i, u)
            self.iou_sum += round(value * self.UNIT)
            self.intersection += i
            self.union += u
            self.hits += torch.tensor([value > at for at in PRECISION_AT], device=self.hits.device)
            self.samples += 1
            self.empty += none

    def compute(self) -> dict[str, Tensor]:
        """Return every metric of :data:`METRICS`, each in [0, 1], and the counts ``samples`` and ``empty``.

        Raises:
            ValueError: If no sample was seen.
        """
        samples = int(self.samples)
        if not samples:
            raise ValueError("no sample was evaluated; metrics of nothing are not defined")
        shares = [int(self.iou_sum) / self.UNIT / samples, int(self.intersection) / (int(self.union) + EPSILON)]
        shares += [hits / samples for hits in self.hits.tolist()]
        values = {name: torch.tensor(value) for name, value in zip(METRICS, shares, strict=True)}
        return values | {"samples": torch.tensor(samples), "empty": self.empty.clone()}


def reachable_iou(truth: Mask, image_size: int, threshold: float) -> float:
    """Return the IoU of a perfect prediction: the truth sent through the letterbox, the target at H/4 and the way back.

    Args:
        truth: (h, w) uint8, 0 or 1.
        image_size: S, side of the square input.
        threshold: Where a probability becomes a mask.
    """
    soft = torch.from_numpy(letterbox_mask(255 * truth, image_size)).float() / 255
    target = torch.nn.functional.interpolate(soft[None, None], size=(image_size // 4,) * 2, mode="nearest")
    square = upsample_probabilities(torch.logit(target), image_size)[0]
    return iou(*intersection_and_union(restore(square.numpy(), *truth.shape) > threshold, truth))
