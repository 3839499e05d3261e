"""Counts the pixels of predicted masks in threads, while the device computes the next batch."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from crislit.data import NO_SAMPLE, EvaluationBatch
from crislit.training.metrics import Mask, intersection_and_union
from crislit.transforms import ProbabilityMap, restore

MAX_PENDING = 2
"""Batches that wait for their threads; more would hold memory only."""
Counts = tuple[int, int, bool]
"""Intersection, union, and whether the target is empty."""


class MaskCounter:
    """Warps probabilities back to their images, thresholds them and counts pixels.

    A batch's probabilities are copied without waiting for the device. Threads take them when they
    have arrived, and so work while the device computes the next batch. The counts are the same with
    any number of threads.

    Args:
        threshold: Probability above which a pixel belongs to the mask.
        threads: Number of threads; 0 counts at once, where the network itself needs the cores.
    """

    def __init__(self, threshold: float, threads: int = 0) -> None:
        self.threshold = threshold
        self._pool = ThreadPoolExecutor(threads, "mask-counter") if threads else None
        self._pending: list[list[Future[Counts]]] = []
        self._counts: list[Counts] = []

    def add(self, squares: Tensor, batch: EvaluationBatch) -> None:
        """Count a batch.

        Args:
            squares: (B, S, S) probabilities on the network's square, on any device.
            batch: Its samples; those without a number are not counted.

        Raises:
            InputError: If this batch or an earlier one has NaN or infinity.
        """
        counted = [i for i, number in enumerate(batch.samples) if number != NO_SAMPLE]
        if self._pool is None:
            host = squares.cpu().numpy()
            self._counts += [self._count(host[i], batch.targets[i]) for i in counted]
            return
        host, arrived = start_copy(squares)
        self._pending.append(
            [self._pool.submit(self._count, host[i], batch.targets[i], arrived) for i in counted]
        )
        self.wait(MAX_PENDING)

    def wait(self, pending: int = 0) -> None:
        """Wait until no more than some batches are left to count.

        Data workers must not be forked while a thread is inside of a library, whose locks would
        stay locked in them.

        Raises:
            InputError: If a batch has NaN or infinity.
        """
        while len(self._pending) > pending:
            self._counts += [future.result() for future in self._pending.pop(0)]

    def finish(self) -> tuple[Sequence[int], Sequence[int], Sequence[bool]]:
        """Return intersections, unions and which targets are empty, and end the threads."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
        intersections, unions, empty = zip(*self._counts, strict=True) if self._counts else 3 * [()]
        return intersections, unions, empty

    def _count(self, square: ProbabilityMap, target: Mask, arrived: Any = None) -> Counts:
        if arrived is not None:
            arrived.synchronize()
        mask = restore(square, *target.shape) > self.threshold
        return *intersection_and_union(mask, target), not target.any()


def start_copy(squares: Tensor) -> tuple[ProbabilityMap, Any]:
    """Start to copy a tensor to the CPU; return the copy and an event to wait for, if any."""
    if squares.device.type != "cuda":
        return squares.cpu().numpy(), None
    host = squares.to("cpu", non_blocking=True)  # in page-locked memory
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(squares.device))
    return host.numpy(), arrived
