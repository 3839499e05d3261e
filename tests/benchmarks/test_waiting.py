"""The share of a training step that waits for data."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from crislit.benchmarks import data, waiting
from crislit.benchmarks.accelerated_training import BATCH, KINDS
from crislit.benchmarks.inference import build_network
from crislit.benchmarks.training import Step
from tests.benchmarks.conftest import CPU


def test_copies_of_an_image_are_samples_of_their_own(tmp_path: Path) -> None:
    root = data.write_images(tmp_path, 2, copies=3)
    module = data.build_module(root, 64, 2, workers=0)
    assert len(module.index) == 6
    paths = [module.index.image_path(ref).name for ref in range(6)]
    assert sorted(paths) == sorted(3 * ["1.jpg", "2.jpg"])
    assert len({module.index.image_id(ref) for ref in range(6)}) == 6
    assert all(module.index.mask(ref).any() for ref in range(6))


def test_an_accelerator_waits_for_the_default_workers_and_for_one_per_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "STEPS", 3)
    monkeypatch.setattr("os.cpu_count", lambda: 0)  # no processes in this test
    root = data.write_images(tmp_path, 3, copies=4)  # fewer than the steps need
    asked: list[int | None] = []

    def build(workers: int | None) -> Any:
        asked.append(workers)
        return data.build_module(root, 64, BATCH, workers=0)

    rows = list(waiting.measure_accelerated_waiting(build_network("tiny"), build, CPU))
    assert asked == [None, 1]
    assert [row.candidate for row in rows] == ["a training step of 8 waits for 0 workers"]
    assert 0 <= rows[0].value < 100
    assert (rows[0].unit, rows[0].rounds) == ("%", 3)


def test_the_default_is_the_data_modules(tmp_path: Path) -> None:
    build = partial(data.build_module, data.write_images(tmp_path, 1), 64, 2)
    assert build(None).workers == min(torch.multiprocessing.cpu_count(), 4)
    assert build(7).workers == 7


def test_steps_are_taken_on_the_batches_and_then_on_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "STEPS", 2)
    root = data.write_images(tmp_path, 2, copies=BATCH)
    loader = data.build_module(root, 64, BATCH, workers=0).train_dataloader()
    step = Step(KINDS["default"], build_network("tiny").train(), 64, batch=BATCH)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(step, "take", lambda: seen.append(step.images))
    seconds = itertools.cycle([8.0, 6.0])
    timed = waiting.time_steps

    def time_steps(*arguments: Any) -> float:
        timed(*arguments)
        return next(seconds)

    monkeypatch.setattr(waiting, "time_steps", time_steps)
    assert waiting.waiting_share(step, loader, CPU) == 0.25
    assert len(seen) == 1 + 2 + 2
    assert all(image is seen[2] for image in seen[3:])
    assert not torch.equal(seen[0], seen[1])
    assert step.masks.dtype == torch.float32
    assert 0 < float(step.masks.max()) <= 1


def test_enough_samples_are_generated_for_all_workers_and_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert waiting.needed_samples() == 1024
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert waiting.needed_samples() == 8 * (2 * 2 + 1 + 60)
