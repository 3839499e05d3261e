"""Samplers: every sample is served once, in an order that repeats."""

import numpy as np
import pytest

from crislit.data.samplers import (
    NO_SAMPLE,
    ImageGroupedBatchSampler,
    TrainSampler,
    evaluation_share,
)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 12, 13])
def test_evaluation_shares_are_a_partition(size: int, processes: int) -> None:
    shares = [list(evaluation_share(size, rank, processes)) for rank in range(processes)]
    served = [number for share in shares for number in share if number != NO_SAMPLE]
    assert sorted(served) == list(range(size))
    for share in shares:
        assert share, "every process has a batch"
        assert NO_SAMPLE not in share or share == [NO_SAMPLE]


def test_an_image_is_split_only_if_it_fills_a_batch_alone() -> None:
    images = np.repeat([9, 4, 7, 5, 6], [7, 7, 4, 20, 1])
    batches = list(ImageGroupedBatchSampler(range(39), images, 16))
    assert [len(batch) for batch in batches] == [14, 4, 16, 5]
    assert [sample for batch in batches for sample in batch] == list(range(39))
    assert {images[i] for i in batches[3]} == {5, 6}
    assert list(ImageGroupedBatchSampler([NO_SAMPLE], images, 16)) == [[NO_SAMPLE]]


@pytest.mark.parametrize(
    ("processes", "per_device"), [(1, 12), (1, 4), (2, 6), (2, 3), (3, 4), (3, 2)]
)
def test_an_optimizer_step_sees_the_same_refs_however_it_is_divided(
    processes: int, per_device: int
) -> None:
    order = [key.position for key in TrainSampler(50, 12, 12)]
    samplers = [TrainSampler(50, 12, per_device, rank, processes) for rank in range(processes)]
    shares = [[key.position for key in sampler] for sampler in samplers]
    assert {len(share) for share in shares} == {48 // processes}
    assert {len(sampler) for sampler in samplers} == {48 // processes}
    per_step = 12 // processes
    for step in range(4):
        parts = [share[step * per_step : (step + 1) * per_step] for share in shares]
        in_step = [position for part in parts for position in part]
        assert sorted(in_step) == sorted(order[12 * step : 12 * step + 12])


def test_epochs_differ_and_repeat_by_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = TrainSampler(40, 8, 8, seed=seed)
        sampler.set_epoch(epoch)
        assert {key.epoch for key in sampler} == {epoch}
        return [key.position for key in sampler]

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)
    assert sorted(order(0, 3)) == list(range(40))
