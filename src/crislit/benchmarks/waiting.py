"""Benchmarks how long a training step waits for its data."""

import os
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from crislit.benchmarks.accelerated_training import BATCH, KINDS
from crislit.benchmarks.devices import release_memory, synchronize
from crislit.benchmarks.measurements import Measurement
from crislit.benchmarks.training import Step
from crislit.data import ReferDataModule, TrainBatch
from crislit.models import CRIS, optimize_for_training
from crislit.training import text_to_pixel_contrastive_loss
from crislit.transforms import normalize

CPU_BATCH = 4
CPU_STEPS = 6
"""Training steps on a CPU in which waiting for data is measured."""
STEPS = 60
"""Those on an accelerator."""
AHEAD = 2
"""Batches that a worker loads ahead, PyTorch's default."""
SAMPLES_PER_WORKER = 64
"""Samples for which the data module starts a worker."""


def measure_waiting(model: CRIS, module: ReferDataModule) -> Measurement:
    """Train for some steps; measure the share of the time spent waiting for two workers."""
    # The fastest step waits most.
    model = optimize_for_training(model.train().to(memory_format=torch.channels_last))
    adam = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)
    loader = module.train_dataloader()
    batches = iter(loader)
    next(batches)  # the workers have started
    start, waited = time.perf_counter(), 0.0
    for _ in range(CPU_STEPS):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        adam.zero_grad()
        logits = model(normalize(batch.images), batch.tokens)
        torch.autograd.backward(text_to_pixel_contrastive_loss(logits, batch.masks / 255))
        adam.step()
    name = f"a training step of {CPU_BATCH} waits for {loader.num_workers} workers"
    return Measurement("data", name, 100 * waited / (time.perf_counter() - start), "%")


def needed_samples() -> int:
    """Return how many samples it takes to time all steps with a worker per core."""
    cores = os.cpu_count() or 1
    steps = AHEAD * cores + 1 + STEPS
    return max(SAMPLES_PER_WORKER * cores, BATCH * steps)


def measure_accelerated_waiting(
    model: CRIS,
    build: Callable[[int | None], ReferDataModule],
    device: torch.device,
) -> Iterator[Measurement]:
    """Measure the share of an accelerator's time without work, for lack of data.

    The fastest step waits most. It is taken with a run's default number of workers, and with one
    per core.

    Args:
        model: The network.
        build: Builds the data module with a number of workers, None for the default.
        device: Where the network is trained.
    """
    cores = os.cpu_count() or 1
    modules = {module.workers: module for module in map(build, (None, cores))}
    image_size = next(iter(modules.values())).image_size
    step = Step(KINDS["rearrange, 16-mixed"], model.train().to(device), image_size, batch=BATCH)
    step.prepare()
    for module in modules.values():
        loader = module.train_dataloader()
        loader.pin_memory = device.type == "cuda"  # as the data module does in a training
        workers, share = loader.num_workers, waiting_share(step, loader, device)
        name = f"a training step of {BATCH} waits for {workers} workers"
        yield Measurement("data", name, 100 * share, "%", rounds=STEPS)
    release_memory(device)


def waiting_share(step: Step, loader: Any, device: torch.device) -> float:
    """Return the share of the steps' time that they would not take if data were there at once.

    The device works on earlier steps while the process waits for a batch, so this compares the
    time of steps with the time of as many steps on the batch that the device has already.
    """
    batches = chain.from_iterable(repeat(loader))  # small data take several epochs
    # Batches that were loaded ahead say nothing about the workers' speed.
    for _ in range(AHEAD * loader.num_workers + 1):
        train_on(step, next(batches), device)
    seconds = time_steps(lambda: train_on(step, next(batches), device), device)
    computing = time_steps(step.take, device)
    return max(0.0, 1 - computing / seconds)


def time_steps(take: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of all steps until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(STEPS):
        take()
    synchronize(device)
    return time.perf_counter() - start


def train_on(step: Step, batch: TrainBatch, device: torch.device) -> Tensor:
    """Copy a batch to the device without waiting, and take the step on it."""
    images, tokens, masks = (
        x.to(device, non_blocking=True) for x in (batch.images, batch.tokens, batch.masks)
    )
    step.images, step.tokens, step.masks = normalize(images), tokens, masks / 255
    return step.take()
