"""Order and shares of training samples, and image-grouped evaluation batches."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from crislit.data.refer_annotations import Ints

NO_SAMPLE = -1
"""Number of an evaluation sample (the set's last) that a process computes and does not count."""


class TrainKey(NamedTuple):
    """Asks the training set for the sample at a position, in an epoch."""

    epoch: int
    position: int


def epoch_order(seed: int, epoch: int, size: int) -> Ints:
    """Return the positions of all training samples in an epoch's order."""
    return np.random.default_rng([seed, epoch]).permutation(size)


class TrainSampler(Sampler[TrainKey]):
    """One process's share of every optimizer step's batch.

    The batches are the same for any number of processes. Samples that do not fill the last batch
    are left out of the epoch.

    Args:
        size: Number of training samples.
        batch_size: Samples per optimizer step, over all processes.
        per_device: Samples per batch of one process.
        rank: This process.
        processes: Number of processes.
        seed: Decides, with the epoch, the order.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        per_device: int,
        rank: int = 0,
        processes: int = 1,
        seed: int = 0,
    ) -> None:
        self.size, self.batch_size, self.per_device = size, batch_size, per_device
        self.rank, self.processes, self.seed = rank, processes, seed
        self.epoch = self.resumed_epoch = self.resumed_batches = 0

    def start_at(self, epoch: int, batches: int) -> None:
        """Skip the first batches of an epoch, on which an earlier run has trained."""
        self.epoch = self.resumed_epoch = epoch
        self.resumed_batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; called by Lightning."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[TrainKey]:
        completed = self.resumed_batches if self.epoch == self.resumed_epoch else 0
        batches = self._batches()[completed:]
        return (TrainKey(self.epoch, int(position)) for position in batches.flat)

    def keys(self, batch: int) -> list[TrainKey]:
        """Return the samples of this process's batch, counted from the start of the epoch."""
        return [TrainKey(self.epoch, int(position)) for position in self._batches()[batch]]

    def _batches(self) -> Ints:
        """Return this process's batches of the epoch, (batches, samples)."""
        order = epoch_order(self.seed, self.epoch, self.size)
        used = self.size // self.batch_size * self.batch_size
        return order[:used].reshape(-1, self.processes, self.per_device)[:, self.rank]

    def __len__(self) -> int:
        return self.size // self.batch_size * (self.batch_size // self.processes)


def evaluation_share(size: int, rank: int = 0, processes: int = 1) -> Sequence[int]:
    """Return a process's consecutive share of the samples, none twice and none left out.

    If there are fewer samples than processes, one without a sample gets ``NO_SAMPLE``: a
    process without a batch would not take part in the collectives of the others.

    Args:
        size: Number of samples.
        rank: Number of the process, from 0.
        processes: Number of processes.
    """
    return range(rank * size // processes, (rank + 1) * size // processes) or [NO_SAMPLE]


class ImageGroupedBatchSampler(Sampler[list[int]]):
    """Batches of evaluation samples that keep an image together, so that it is encoded once.

    Args:
        share: The samples; those of an image are consecutive.
        image_ids: The image of every sample.
        batch_size: Largest number of samples per batch; an image with more is divided.
    """

    def __init__(self, share: Iterable[int], image_ids: Ints, batch_size: int) -> None:
        self.batches: list[list[int]] = []
        for _, group in itertools.groupby(share, key=lambda sample: int(image_ids[sample])):
            samples = list(group)
            if self.batches and len(self.batches[-1]) + len(samples) <= batch_size:
                self.batches[-1] += samples
            else:
                starts = range(0, len(samples), batch_size)
                self.batches += [samples[i : i + batch_size] for i in starts]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
