"""How training grows with devices, machines and data workers: volumes counted on the network, waiting by simulation.

Writes a Markdown page to the standard output; what it takes from measurements it reads from ``results/speed.csv``. No device
but this machine's is measured: rates of others are assumptions, and the page says so beside each.

    python scripts/scale.py results/speed.csv > results/scale.md
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

from crislit.config import compose_config
from crislit.models.cris import count_parameters
from crislit.training.build import build_model

BATCH = 64
"""Sentences of a step (section 4.2), over all devices."""
DEVICES = {"V100, float32": 7e12, "A100, TF32": 60e12, "A100, bfloat16": 110e12}
"""Floating-point operations a second that convolutions are assumed to reach: about half or a third of the makers' peaks."""
LINKS = {
    "NVLink, 200 GB/s": 200e9,
    "PCIe 4, 20 GB/s": 20e9,
    "100 Gb/s network": 10e9,
    "25 Gb/s network": 2.5e9,
}
"""Bytes a second and device that a ring is assumed to reach."""
SPREAD = 0.3
"""Standard deviation of a sample's loading time, over its mean."""


@dataclass(frozen=True)
class Work:
    """What a sentence of training takes.

    Attributes:
        forward: Floating-point operations of a forward pass with one sentence a picture.
        parameters: Numbers that the devices exchange in a step.
    """

    forward: float
    parameters: int

    def step(self, sentences: int, rate: float) -> float:
        """Return the seconds of a step: the backward pass takes twice the forward one's operations."""
        return 3 * self.forward * sentences / rate

    def exchange(self, devices: int, bandwidth: float) -> float:
        """Return the seconds in which a ring adds up float32 gradients: 2 (N - 1) / N of them through every device's link."""
        return 2 * (devices - 1) / devices * 4 * self.parameters / bandwidth

    def total(self, devices: int, rate: float, bandwidth: float) -> float:
        """Return the seconds of a step of :data:`BATCH` sentences; what does not fit beside the backward pass comes after."""
        step = self.step(BATCH // devices, rate)
        return step + max(0.0, self.exchange(devices, bandwidth) - step * 2 / 3)

    def worth(self, devices: int, rate: float, before: float) -> float:
        """Return the bytes a second and device from which a step on so many devices takes less than it did before."""
        return self.exchange(devices, 1.0) / (before - self.step(BATCH // devices, rate) / 3)


def count(size: int = 416) -> Work:
    """Count RN50's work on shapes alone."""
    with torch.device("meta"):
        model = build_model(compose_config(["model=rn50", "dataset=refcoco"])).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, 3, size, size), torch.empty(1, 17, dtype=torch.long))
    return Work(counter.get_total_flops(), count_parameters(model))


def waiting(
    step: float,
    each: float,
    devices: int,
    batch: int,
    workers: int,
    steps: int = 200,
    seed: int = 0,
) -> float:
    """Simulate a training, and return the share of the time in which devices wait for data.

    Every device has its own workers, each of which loads whole batches in turn and is two ahead at most; a step begins when
    every device has its batch, as gradients are exchanged in each.

    Args:
        step: Seconds that devices compute.
        each: Seconds in which a worker loads a sample.
        devices: How many.
        batch: Samples of a device's batch.
        workers: Of every device.
        steps: How many.
        seed: Of the loading times.
    """
    rng = random.Random(seed)
    free = [[0.0] * workers for _ in range(devices)]  # when each worker can begin a batch
    for heap in free:
        heapq.heapify(heap)
    ready: list[list[float]] = [[] for _ in range(devices)]
    begun: list[float] = []
    now = idle = 0.0
    for number in range(steps):
        for device in range(devices):
            while len(ready[device]) <= number:
                ahead = (
                    len(ready[device]) - 2 * workers
                )  # its place in the queue is free once that step has begun
                start = max(heapq.heappop(free[device]), begun[ahead] if ahead >= 0 else 0.0)
                end = start + sum(max(0.0, rng.gauss(each, SPREAD * each)) for _ in range(batch))
                heapq.heappush(free[device], end)
                ready[device].append(end)
        start = max(now, *(times[number] for times in ready))
        if number:  # the first batch is nobody's fault
            idle += start - now
        begun.append(start)
        now = start + step
    return idle / (now - begun[0])


def page(work: Work, each: float) -> str:
    """Return the page.

    Args:
        work: RN50's.
        each: Measured seconds of a sample and core.
    """
    lines = [
        "# Scale: what more devices, machines and workers give",
        "",
        paragraph(
            "By `python scripts/scale.py results/speed.csv > results/scale.md`. RN50, 416 pixels, batches of 64 "
            "sentences. **No GPU was measured**: rates of devices (about half or a third of the makers' peaks) and of links "
            "are assumptions, stated beside each; operations, volumes and the loading time of a sample (a picture of COCO's "
            f"size, {1e3 * each:.1f} ms a core, see `speed.csv`) are counted or measured here."
        ),
        "",
        "## Growth",
        "",
        f"- A sentence with a picture of its own: {work.forward / 1e9:.0f} GFLOP forward, three times that in training.",
        *growth(),
        "",
        "## Devices: computing and exchanging",
        "",
        paragraph(
            f"{work.parameters / 1e6:.1f} M parameters are {4 * work.parameters / 1e6:.0f} MB of float32 gradients a step. "
            "Exchanging overlaps with the backward pass, two thirds of a step; what is in bold does not fit under it."
        ),
        "",
        "| 64 sentences over | assumed TFLOP/s | computing, ms | "
        + " | ".join(f"{name}, ms" for name in LINKS)
        + " |",
        "|---|---:|---:" + "|---:" * len(LINKS) + "|",
    ]
    for name, rate in DEVICES.items():
        for devices in (2, 8, 16):
            step = work.step(BATCH // devices, rate)
            exchanges = [work.exchange(devices, bandwidth) for bandwidth in LINKS.values()]
            cells = [
                f"**{1e3 * x:.0f}**" if x > step * 2 / 3 else f"{1e3 * x:.0f}" for x in exchanges
            ]
            lines.append(
                f"| {devices} x {name} | {rate / 1e12:.0f} | {1e3 * step:.0f} | "
                + " | ".join(cells)
                + " |"
            )
    lines += [
        "",
        paragraph(
            "A second machine of eight makes a step shorter where the link between the machines has more than "
            + ", ".join(
                f"{work.worth(16, rate, work.total(8, rate, max(LINKS.values()))) / 1e9:.1f} GB/s ({name})"
                for name, rate in DEVICES.items()
            )
            + ", beside eight on the fastest link here; with less it pays where the batch grows with the devices, which "
            "changes the recipe. FSDP would save what it shards: parameters, gradients and Adam's two moments, 16 bytes each, "
            f"{16 * work.parameters / 1e9:.1f} GB in all and at most seven eighths of it on eight devices, for half as much "
            "again to exchange. Activations take more and grow with the batch; `recompute=true` saves those. So it does not "
            "pay here. SyncBN's exchanges, two small ones a layer, are left out above: they cost their links' latency, which "
            "is not known."
        ),
        "",
        "## Workers: what eight devices need",
        "",
        paragraph(
            f"Simulated: 8 devices, 8 sentences each, {1e3 * each:.1f} ms a sample and worker with a spread of {SPREAD:.0%}, "
            "200 steps; the share of time in which they wait."
        ),
        "",
        "| workers a device | " + " | ".join(DEVICES) + " |",
        "|---:" + "|---:" * len(DEVICES) + "|",
    ]
    enough: dict[str, int] = {}
    for workers in (1, 2, 4, 6, 8):
        shares = {
            name: waiting(work.step(BATCH // 8, rate), each, 8, BATCH // 8, workers)
            for name, rate in DEVICES.items()
        }
        lines.append(
            f"| {workers} | " + " | ".join(f"{share:.0%}" for share in shares.values()) + " |"
        )
        enough = {name: workers for name, share in shares.items() if share < 0.01} | enough
    told = ", ".join(
        f"{enough[name]} for {name}" if name in enough else f"more than 8 for {name}"
        for name in DEVICES
    )
    lines += [
        "",
        paragraph(
            f"Workers of a device after which it waits for less than 1%: {told}. Disks were not simulated."
        ),
    ]
    return "\n".join(lines) + "\n"


def paragraph(text: str) -> str:
    """Return a text in lines."""
    return textwrap.fill(text, 128)


def growth() -> list[str]:
    """Return how operations grow with the picture's side."""
    sides = (256, 416, 640, 832)
    counts = [count(side).forward for side in sides]
    told = ", ".join(
        f"{side} pixels {n / counts[1]:.2f}" for side, n in zip(sides, counts, strict=True)
    )
    return [
        f"- Side of the picture, operations beside those at 416: {told}. Nearly its square: what",
        "  attention between cells takes grows with the fourth power, and is a small part.",
        "- Images and sentences: linearly. An epoch of RefCOCO is 42,404 refs, 662 steps of 64; evaluation encodes a picture",
        "  once for its sentences, seven on average.",
        "- Processes: the same steps, each with its share of the batch; what is exchanged does not shrink with the share.",
    ]


def loading(path: Path) -> float:
    """Return the seconds of a sample and core that a benchmark found."""
    with path.open(encoding="utf-8", newline="") as file:
        found = [
            float(row["value"])
            for row in csv.DictReader(file)
            if row["candidate"] == "whole sample, collated"
        ]
    if not found:
        raise SystemExit(
            f"error: {path} has no line 'whole sample, collated': python -m crislit.benchmark --data --output DIR"
        )
    return found[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("speed", type=Path, help="the benchmark's speed.csv")
    sys.stdout.write(page(count(), loading(parser.parse_args(arguments).speed)))


if __name__ == "__main__":
    main()
