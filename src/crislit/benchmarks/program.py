"""Runs the chosen parts of the benchmark, prints their tables and writes their rows."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from crislit.benchmarks import data, training
from crislit.benchmarks.inference import (
    backends,
    build_network,
    measure_agreement,
    measure_inference,
    measure_startup,
    measure_table1_rows,
)
from crislit.benchmarks.measurements import Measurement, measurement_table, write_measurements
from crislit.benchmarks.options import Options
from crislit.benchmarks.parameters import count_table1_parameters, parameter_table
from crislit.benchmarks.timing import Machine, measure_machine
from crislit.checkpoints import find_network
from crislit.training import hardware


def run_benchmark(options: Options, chosen: Sequence[str], output: Path | None) -> None:
    """Measure the chosen parts, print their tables and append their rows to ``speed.csv``."""
    if "agreement" in chosen:
        find_network(Path(options.checkpoint))
    console = Console(width=max(Console().width, 120))
    timed = [part for part in chosen if part != "parameters"]
    if "parameters" in chosen:
        console.print(parameter_table(count_table1_parameters()))
    if not timed:
        return
    machine = measure_machine()
    console.print(
        f"{hardware()}: {machine.flops / 1e9:.0f} GFLOP/s in products of float32 matrices, "
        f"{machine.bytes / 1e9:.1f} GB/s in copies; load {os.getloadavg()[0]:.1f}"
    )
    for rows in measure(options, timed, machine, console):
        if output:  # after each part, so that a later failure loses nothing
            write_measurements(output / "speed.csv", rows, options, machine)


def measure(
    options: Options, chosen: Sequence[str], machine: Machine, console: Console
) -> Iterator[list[Measurement]]:
    """Measure the chosen parts; print each part's table when it is done, and yield its rows."""
    with tempfile.TemporaryDirectory() as folder:
        networks = (
            backends(build_network(options.model), options.image_size, Path(folder))
            if {"evaluation", "latency"} & set(chosen)
            else {}
        )
        measurers: dict[str, Callable[[], Iterable[Measurement]]] = {
            "start": partial(measure_startup, options),
            "rows": partial(measure_table1_rows, options, machine),
            "evaluation": partial(measure_inference, "evaluation", networks, options, machine),
            "latency": partial(measure_inference, "latency", networks, options, machine),
            "agreement": partial(measure_agreement, options, Path(folder, "trained")),
            "training": partial(training.measure_training, options, machine),
            "data": partial(data.measure_data, options),
        }
        for part in chosen:
            if part == "training":
                networks.clear()  # training needs their memory
            rows = list(measurers[part]())
            console.print(measurement_table(part, rows))
            yield rows
