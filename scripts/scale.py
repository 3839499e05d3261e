"""Estimates how training scales with devices, machines and data workers.

    python scripts/scale.py results/speed.csv > results/scale.md

Operations and volumes are counted on the network, waiting is simulated, and the loading time comes
from the benchmark. The rates of other devices are assumptions, which the page states.
"""

import argparse
import csv
import heapq
import random
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from crislit.benchmarks.inference import build_network
from crislit.models.cris import count_parameters

BATCH = 64
"""Sentences per step over all devices (section 4.2)."""
DEVICES = {"V100, float32": 7e12, "A100, TF32": 60e12, "A100, bfloat16": 110e12}
"""Assumed operations per second in convolutions: about a half or a third of the vendors' peaks."""
LINKS = {
    "NVLink, 200 GB/s": 200e9,
    "PCIe 4, 20 GB/s": 20e9,
    "100 Gb/s network": 10e9,
    "25 Gb/s network": 2.5e9,
}
"""Assumed bytes per second and device in a ring."""
SPREAD = 0.3
"""Standard deviation of a sample's loading time, over its mean."""


@dataclass(frozen=True)
class Work:
    """Work of one training sentence.

    Attributes:
        forward: Floating-point operations of a forward pass with one sentence per image.
        parameters: Numbers that the devices exchange per step.
    """

    forward: float
    parameters: int

    def step(self, sentences: int, rate: float) -> float:
        """Return the seconds of a step; the backward pass takes twice the forward operations."""
        return 3 * self.forward * sentences / rate

    def exchange(self, devices: int, bandwidth: float) -> float:
        """Return the seconds of adding up float32 gradients in a ring.

        2 (N - 1) / N of all gradients pass through every device's link.
        """
        return 2 * (devices - 1) / devices * 4 * self.parameters / bandwidth

    def total(self, devices: int, rate: float, bandwidth: float) -> float:
        """Return the seconds of a step, with the exchange hidden behind the backward pass."""
        step = self.step(BATCH // devices, rate)
        return step + max(0.0, self.exchange(devices, bandwidth) - step * 2 / 3)

    def worth(self, devices: int, rate: float, before: float) -> float:
        """Return the bytes per second and device at which a step takes as long as before."""
        return self.exchange(devices, 1.0) / (before - self.step(BATCH // devices, rate) / 3)


def count(size: int = 416) -> Work:
    """Count the work of RN50 without allocating it."""
    with torch.device("meta"):
        model = build_network("rn50")
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, 3, size, size), torch.empty(1, 17, dtype=torch.long))
    return Work(counter.get_total_flops(), count_parameters(model))


def waiting(
    step: float,
    loading: float,
    devices: int,
    batch: int,
    workers: int,
    steps: int = 200,
    seed: int = 0,
) -> float:
    """Simulate training; return the share of time in which devices wait for data.

    Every device has its own workers. Each of them loads whole batches in turn and is at most two
    ahead. A step starts when every device has its batch, as every step exchanges gradients.

    Args:
        step: Seconds of computation per step.
        loading: Mean seconds in which a worker loads a sample.
        devices: Number of devices.
        batch: Samples per device and step.
        workers: Workers per device.
        steps: Number of steps.
        seed: Seed of the loading times.
    """
    rng = random.Random(seed)
    # Times at which each device's workers are free; equal times are a heap.
    free = [[0.0] * workers for _ in range(devices)]
    ready: list[list[float]] = [[] for _ in range(devices)]
    starts: list[float] = []
    now = idle = 0.0
    for number in range(steps):
        for device in range(devices):
            while len(ready[device]) <= number:
                # Two batches per worker may be ahead: wait until this earlier step has started.
                earlier = len(ready[device]) - 2 * workers
                begin = max(heapq.heappop(free[device]), starts[earlier] if earlier >= 0 else 0.0)
                samples = (max(0.0, rng.gauss(loading, SPREAD * loading)) for _ in range(batch))
                end = begin + sum(samples)
                heapq.heappush(free[device], end)
                ready[device].append(end)
        start = max(now, *(times[number] for times in ready))
        if number:  # waiting for the first batch does not count
            idle += start - now
        starts.append(start)
        now = start + step
    return idle / (now - starts[0])


def page(work: Work, loading: float) -> str:
    """Return the page as Markdown.

    Args:
        work: Work of RN50.
        loading: Measured seconds per sample and core.
    """
    milliseconds = 1e3 * loading
    parts = [
        "# Scale: more devices, machines and data workers",
        paragraph(
            "Written by `python scripts/scale.py results/speed.csv > results/scale.md` for RN50 at "
            "416 pixels and batches of 64 sentences. **No GPU was measured**: the rates of devices "
            "(about a half or a third of the vendors' peaks) and of links are assumptions, stated "
            "next to each. Operations, volumes and the loading time of a sample (an image of "
            f"COCO's size, {milliseconds:.1f} ms per core, see `speed.csv`) are counted or "
            "measured here."
        ),
        "## Growth",
        growth(work),
        "## Devices: computation and communication",
        paragraph(
            f"The gradients of {work.parameters / 1e6:.1f} M parameters in float32 are "
            f"{4 * work.parameters / 1e6:.0f} MB per step. Their exchange overlaps with the "
            "backward pass, which is two thirds of a step. Numbers in bold do not fit into it."
        ),
        devices_table(work),
        second_machine(work),
        "## Workers: how many eight devices need",
        paragraph(
            f"Simulated with 8 devices, 8 sentences each, {milliseconds:.1f} ms per sample and "
            f"worker with a spread of {SPREAD:.0%}, and 200 steps. The table shows the share of "
            "time that the devices wait."
        ),
        *workers_table(work, loading),
    ]
    return "\n\n".join(parts) + "\n"


def paragraph(text: str, first: str = "", indent: str = "") -> str:
    """Wrap a paragraph, or an item of a list, at 100 columns."""
    return textwrap.fill(
        text, 100, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False
    )


def growth(work: Work) -> str:
    """Return how operations and volumes grow, as a list."""
    counts = {side: count(side).forward for side in (256, 416, 640, 832)}
    ratios = ", ".join(f"{side} pixels {n / counts[416]:.2f}" for side, n in counts.items())
    items = (
        f"A sentence with its own image takes {work.forward / 1e9:.0f} GFLOP in the forward pass, "
        "three times that in training.",
        f"Operations by side of the image, relative to 416: {ratios}. This is almost quadratic: "
        "the attention between cells grows with the fourth power, but is a small part.",
        "Images and sentences: linear. An epoch of RefCOCO has 42,404 refs, which are 662 steps "
        "of 64. Evaluation encodes an image once for all its sentences, seven on average.",
        "Processes: the number of steps stays the same, and each process computes its share of "
        "the batch. The volume exchanged does not shrink with the share.",
    )
    return "\n".join(paragraph(item, "- ", "  ") for item in items)


def devices_table(work: Work) -> str:
    """Return the times of computation and communication by device, number and link."""
    names = ["64 sentences over", "assumed TFLOP/s", "computation, ms"]
    header = " | ".join([*names, *(f"{name}, ms" for name in LINKS)])
    lines = [f"| {header} |", "|---|---:|---:" + "|---:" * len(LINKS) + "|"]
    for name, rate in DEVICES.items():
        for devices in (2, 8, 16):
            step = work.step(BATCH // devices, rate)
            exchanges = [work.exchange(devices, bandwidth) for bandwidth in LINKS.values()]
            cells = [
                f"**{1e3 * x:.0f}**" if x > step * 2 / 3 else f"{1e3 * x:.0f}" for x in exchanges
            ]
            first = f"| {devices} x {name} | {rate / 1e12:.0f} | {1e3 * step:.0f} | "
            lines.append(first + " | ".join(cells) + " |")
    return "\n".join(lines)


def second_machine(work: Work) -> str:
    """Return the paragraph about a second machine and FSDP."""
    fastest = max(LINKS.values())
    bandwidths = ", ".join(
        f"{work.worth(16, rate, work.total(8, rate, fastest)) / 1e9:.1f} GB/s ({name})"
        for name, rate in DEVICES.items()
    )
    return paragraph(
        "A second machine with eight devices shortens a step if the link between the machines is "
        f"faster than {bandwidths}, compared with eight devices on the fastest link of the table. "
        "With a slower link it only helps if the batch grows with the devices, which changes the "
        "recipe. FSDP would shard parameters, gradients and Adam's two moments, 16 bytes per "
        f"parameter, {16 * work.parameters / 1e9:.1f} GB in all. Eight devices would save at most "
        "seven eighths of that, and would exchange half as much again. Activations take more "
        "memory and grow with the batch; `recompute=true` saves those. FSDP is therefore not "
        "worthwhile here. The exchanges of SyncBN, two small ones per layer, are not included: "
        "they cost the latency of the links, which is unknown."
    )


def workers_table(work: Work, loading: float) -> tuple[str, str]:
    """Return the shares of waiting by device and workers, and the paragraph below them."""
    lines = [
        "| workers per device | " + " | ".join(DEVICES) + " |",
        "|---:" + "|---:" * len(DEVICES) + "|",
    ]
    enough: dict[str, int] = {}
    for workers in (1, 2, 4, 6, 8):
        shares = {
            name: waiting(work.step(BATCH // 8, rate), loading, 8, BATCH // 8, workers)
            for name, rate in DEVICES.items()
        }
        cells = " | ".join(f"{share:.0%}" for share in shares.values())
        lines.append(f"| {workers} | {cells} |")
        enough = {name: workers for name, share in shares.items() if share < 0.01} | enough
    needed = ", ".join(f"{enough.get(name, 'more than 8')} for {name}" for name in DEVICES)
    below = f"Workers per device that reduce waiting to less than 1%: {needed}."
    return "\n".join(lines), paragraph(f"{below} Disks were not simulated.")


def loading_time(path: Path) -> float:
    """Return the seconds per sample and core in the benchmark's ``speed.csv``."""
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["candidate"] == "whole sample, collated" and row.get("device", "cpu") == "cpu":
                return float(row["value"])
    raise SystemExit(
        f"error: {path} has no line 'whole sample, collated': run python -m crislit.benchmark "
        "--data --output DIR"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page to the standard output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("speed", type=Path, help="the benchmark's speed.csv")
    options = parser.parse_args(arguments)
    sys.stdout.write(page(count(), loading_time(options.speed)))


if __name__ == "__main__":
    main()
