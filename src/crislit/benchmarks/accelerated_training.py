"""Benchmarks a training step on an accelerator: time and memory in several precisions."""

import copy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from crislit.benchmarks.devices import (
    attempt,
    forget_compiled,
    has_tf32,
    measure_peak,
    release_memory,
)
from crislit.benchmarks.inference import build_network
from crislit.benchmarks.measurements import Measurement, compare_to_reference
from crislit.benchmarks.options import Options
from crislit.benchmarks.timing import Machine, count_cost, interleave
from crislit.benchmarks.training import (
    LOSS_STEPS,
    Kind,
    Step,
    compare_gradients,
    loss_rows,
)
from crislit.models import CRIS

BATCH = 8
"""Sentences per step: the paper's 64 on 8 GPUs (section 4.2)."""
MIXED = Kind(precision="float16")
KINDS = {
    "plain": Kind(reference=True),
    "default": Kind(),
    "default, TF32": Kind(precision="TF32"),
    "16-mixed": MIXED,
    "bf16-mixed": Kind(precision="bfloat16"),
    "rearrange, 16-mixed": replace(MIXED, optimized=True),
    "recompute, 16-mixed": replace(MIXED, recomputed=True),
    "rearrange recompute, 16-mixed": replace(MIXED, optimized=True, recomputed=True),
    "4 sentences an image, 16-mixed": replace(MIXED, sentences=4),
    "rearrange, 4 sentences an image, 16-mixed": replace(MIXED, optimized=True, sentences=4),
    "compiled, 16-mixed": replace(MIXED, compiled=True),
    "rearrange, compiled, 16-mixed": replace(MIXED, optimized=True, compiled=True),
}
"""Kinds of steps by their names in results/speed.csv, the baseline first."""
LOSS_KINDS = {
    "plain": Kind(reference=True),
    "rearrange recompute": Kind(optimized=True, recomputed=True),
    "16-mixed": MIXED,
    "bf16-mixed": Kind(precision="bfloat16"),
}
"""Kinds whose losses are compared."""


@dataclass(frozen=True)
class MeasuredKind:
    """What was measured of one kind of steps.

    Attributes:
        seconds: Of every timed step.
        limits: Seconds that arithmetic and memory traffic take at least.
        peak: Largest memory of all tensors in GB; None if the device does not record it.
    """

    seconds: list[float]
    limits: tuple[float, float]
    peak: float | None


def measure_accelerated_training(
    options: Options, machine: Machine, device: torch.device
) -> Iterator[Measurement]:
    """Measure steps: losses and gradients beside the baseline's, and time and memory.

    Compiled steps come last: where compiling takes too long, all others have been measured.
    """
    yield from compare_losses(options, device)
    if device.type == "mps":
        print("gradients: not measured, as MPS has no float64", file=sys.stderr)
    else:
        yield from compare_gradients(options, device)
    release_memory(device)
    yield from measure_kinds(options, machine, device)


def measure_kinds(
    options: Options, machine: Machine, device: torch.device
) -> Iterator[Measurement]:
    """Measure all kinds, one after another, so that each has the device's memory for itself."""
    model = build_network(options.model).train()
    measured: dict[str, MeasuredKind] = {}
    for name, kind in KINDS.items():
        if kind.precision == "TF32" and not has_tf32(device):
            continue
        work = partial(measure_kind, kind, model, options, machine, device)
        if (result := attempt(f"training, {name}", work, kind.compiled)) is not None:
            measured[name] = result
            yield training_row(name, measured)
            if result.peak is not None:
                yield memory_row(name, measured)
        forget_compiled()
        release_memory(device)
    if all(kind.peak is None for kind in measured.values()):
        print("memory: not measured, as the device does not record its peak", file=sys.stderr)


def training_row(name: str, measured: Mapping[str, MeasuredKind]) -> Measurement:
    """Return the row of the time of a kind, beside the baseline's if that fits into the memory."""
    compared = {x: measured[x] for x in ("plain", name) if x in measured}
    row = compare_to_reference(
        "training",
        {x: kind.seconds for x, kind in compared.items()},
        dict.fromkeys(compared, BATCH),
        "s per sentence",
        {x: kind.limits for x, kind in compared.items()},
    )[-1]
    return row if "plain" in measured else replace(row, ratio=None)


def measure_kind(
    kind: Kind, model: CRIS, options: Options, machine: Machine, device: torch.device
) -> MeasuredKind:
    """Train a copy of the network for some steps."""
    size = options.image_size
    step = Step(kind, copy.deepcopy(model).to(device), size, batch=BATCH)
    step.prepare()
    rounds = max(1, options.rounds // 2)
    seconds = interleave({"step": step.take}, rounds, device=device)["step"]
    peak = measure_peak(step.take, device)
    eager = Step(replace(kind, compiled=False), step.model, size, step.optimizer, BATCH)
    cost = count_cost(eager.take, training=True)
    return MeasuredKind(seconds, (cost.floor(machine, kind.precision), cost.moved(machine)), peak)


def memory_row(name: str, measured: Mapping[str, MeasuredKind]) -> Measurement:
    """Return the row of the memory of a kind, beside the baseline's if that is known."""
    peak, baseline = measured[name].peak, measured["plain"].peak if "plain" in measured else None
    assert peak is not None
    return Measurement("memory", name, peak, "GB", ratio=baseline / peak if baseline else None)


def compare_losses(options: Options, device: torch.device) -> list[Measurement]:
    """Compare the losses of some steps with the baseline's.

    Dropout is off, as its draws differ between the precisions.
    """
    model = build_network(options.model, overrides=["decoder.dropout=0"]).train()
    losses = {}
    for name, kind in LOSS_KINDS.items():
        step = Step(kind, copy.deepcopy(model).to(device), options.image_size, batch=BATCH)
        step.prepare()
        losses[name] = [float(step.take()) for _ in range(LOSS_STEPS)]
        del step
        release_memory(device)
    return loss_rows(losses)
