"""Runs the chosen parts of the benchmark, prints their tables and writes their rows."""

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from crislit.benchmarks.accelerated_training import measure_accelerated_training
from crislit.benchmarks.agreement import measure_agreement
from crislit.benchmarks.data import measure_data
from crislit.benchmarks.devices import forget_compiled, release_memory
from crislit.benchmarks.inference import all_candidates, build_network
from crislit.benchmarks.measurements import (
    Measurement,
    machine_rows,
    measurement_table,
    write_measurements,
)
from crislit.benchmarks.options import Options
from crislit.benchmarks.parameters import count_table1_parameters, parameter_table
from crislit.benchmarks.speed import measure_inference, measure_table1_rows
from crislit.benchmarks.startup import measure_startup
from crislit.benchmarks.timing import Machine, measure_machine
from crislit.benchmarks.training import measure_training
from crislit.checkpoints import find_network
from crislit.inference.segmenter import choose_device
from crislit.training import hardware


def run_benchmark(options: Options, chosen: Sequence[str], output: Path | None) -> None:
    """Measure the chosen parts, print their tables and append their rows to ``speed.csv``.

    Raises:
        InputError: If the machine has no such device, or there is no network to compare.
    """
    device = choose_device(options.device)
    if "agreement" in chosen:
        find_network(Path(options.checkpoint))
    console = Console(width=max(Console().width, 120))
    timed = [part for part in chosen if part != "parameters"]
    if "parameters" in chosen:
        console.print(parameter_table(count_table1_parameters()))
    if not timed:
        return
    machine = measure_machine(device)
    console.print(describe(machine))

    def report(part: str, rows: Sequence[Measurement]) -> None:
        if part != "machine":
            console.print(measurement_table(part, rows))
        if output:
            write_measurements(output / "speed.csv", rows, options, machine)

    measure(options, timed, machine, device, report)


def describe(machine: Machine) -> str:
    """Return the device and its rates as a line."""
    others = "".join(f", {rate / 1e9:.0f} in {name}" for name, rate in machine.rates.items())
    device = "" if machine.name == "cpu" else f" on {machine.name}"
    return (
        f"{hardware()}: {machine.flops / 1e9:.0f} GFLOP/s in products of float32 matrices{others}, "
        f"{machine.bytes / 1e9:.1f} GB/s in copies{device}; load {os.getloadavg()[0]:.1f}"
    )


def measure(
    options: Options,
    chosen: Sequence[str],
    machine: Machine,
    device: torch.device,
    report: Callable[[str, Sequence[Measurement]], None],
) -> None:
    """Measure the chosen parts, and report the rows of each as soon as it is done."""
    report("machine", machine_rows(machine))
    with tempfile.TemporaryDirectory() as folder:
        model, size = options.model, options.image_size
        networks = (
            all_candidates(build_network(model), device, size, Path(folder))
            if {"evaluation", "latency"} & set(chosen)
            else {}
        )
        infer = partial(
            measure_inference,
            candidates=networks,
            options=options,
            machine=machine,
            device=device,
        )
        train = (
            partial(measure_training, options, machine)
            if device.type == "cpu"
            else partial(measure_accelerated_training, options, machine, device)
        )
        measurers: dict[str, Callable[[], Iterable[Measurement]]] = {
            "start": partial(measure_startup, options),
            "rows": partial(measure_table1_rows, options, machine, device),
            "evaluation": partial(infer, "evaluation"),
            "latency": partial(infer, "latency"),
            "agreement": partial(measure_agreement, options, device, Path(folder, "trained")),
            "training": train,
            "data": partial(measure_data, options, device),
        }
        for part in chosen:
            if part == "training":  # which needs the memory of the networks
                networks.clear()
                forget_compiled()
                release_memory(device)
            rows: list[Measurement] = []
            try:
                for row in measurers[part]():
                    rows.append(row)
            finally:  # also of a part that is interrupted
                if rows:
                    report(part, rows)
