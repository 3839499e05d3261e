"""python -m crislit.benchmark: measures parameters, speed and memory against a reference.

Without a part, all are measured. Times are medians of rounds in which the candidates are run in
turn. The reference, "plain", is the released implementation's forward pass: float32, contiguous
tensors, one image and one sentence at a time, without reading and preprocessing. "floor" and
"memory" are what the machine needs for the arithmetic and the memory traffic alone.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from crislit.benchmarks import data, training
from crislit.benchmarks.inference import (
    Network,
    backends,
    build_network,
    measure_agreement,
    measure_inference,
    measure_startup,
    measure_table1_rows,
)
from crislit.benchmarks.measurements import (
    Measurement,
    Options,
    measurement_table,
    write_measurements,
)
from crislit.benchmarks.parameters import BACKBONES, count_table1_parameters, parameter_table
from crislit.benchmarks.timing import Machine, measure_machine
from crislit.errors import InputError, check_integer, one_line_errors
from crislit.training.allocator import keep_freed_memory
from crislit.training.provenance import hardware

PARTS = {
    "parameters": "parameters of table 1's rows, beside the paper's",
    "start": "seconds until a first mask, beside the imports alone",
    "rows": "GFLOPs and images per second of every row of table 1",
    "evaluation": "seconds per sentence, with seven sentences per image",
    "latency": "seconds for one image and one sentence",
    "agreement": "mIoU of a trained network on every backend",
    "training": "a training step: seconds per sentence, memory, losses, gradients",
    "data": "loading of samples stage by stage, and an index of RefCOCO's size",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts named on the command line."""
    parser = argparse.ArgumentParser(
        "python -m crislit.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = parser.add_argument_group("parts")
    for part, text in PARTS.items():
        parts.add_argument(f"--{part}", action="store_true", help=text)
    add = parser.add_argument
    shown = "(default: %(default)s)"
    add("--model", default=Options.model, help=f"rn50, rn101 or tiny, with random weights {shown}")
    add(
        "--image-size",
        type=int,
        default=Options.image_size,
        metavar="S",
        help=f"side of its input {shown}",
    )
    add("--rounds", type=int, default=Options.rounds, metavar="N", help=f"timed rounds {shown}")
    add(
        "--checkpoint",
        default=Options.checkpoint,
        help=f"trained network for --agreement {shown}",
    )
    add(
        "--images",
        "--pictures",
        type=int,
        default=Options.images,
        metavar="N",
        help=f"images for --agreement {shown}",
    )
    add(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of RefCOCO for --data (default: generated images)",
    )
    add("--output", type=Path, metavar="DIR", help="also write DIR/speed.csv")
    parsed = parser.parse_args(arguments)
    chosen = [part for part in PARTS if getattr(parsed, part)] or list(PARTS)
    options = Options(**{field.name: getattr(parsed, field.name) for field in fields(Options)})
    with one_line_errors():
        check_integer("--image-size", options.image_size, 32, multiple_of=32)
        check_integer("--rounds", options.rounds, 1)
        check_integer("--images", options.images, 1)
        if options.model not in (*BACKBONES, "tiny"):
            raise InputError(f"--model must be tiny, rn50 or rn101, got {options.model}")
        console = Console(width=max(Console().width, 120))
        if "parameters" in chosen:
            console.print(parameter_table(count_table1_parameters()))
            chosen.remove("parameters")
        if not chosen:
            return
        machine = measure_machine()
        console.print(
            f"{hardware()}: {machine.flops / 1e9:.0f} GFLOP/s in products of float32 matrices, "
            f"{machine.bytes / 1e9:.1f} GB/s in copies; load {os.getloadavg()[0]:.1f}"
        )
        for rows in measure(options, chosen, machine, console):
            if parsed.output:  # after each part, so that a later failure loses nothing
                write_measurements(parsed.output / "speed.csv", rows, options, machine)


def measure(
    options: Options, chosen: Sequence[str], machine: Machine, console: Console
) -> Iterator[list[Measurement]]:
    """Measure the chosen parts; print each part's table when it is done, and yield its rows."""
    with tempfile.TemporaryDirectory() as folder:
        networks: dict[str, Network] = {}
        if {"evaluation", "latency"} & set(chosen):
            networks = backends(build_network(options.model), options.image_size, Path(folder))
        for part in chosen:
            if part == "start":
                rows = measure_startup(options)
            elif part == "rows":
                rows = measure_table1_rows(options, machine)
            elif part == "agreement":
                rows = measure_agreement(options, Path(folder, "trained"))
            elif part == "training":
                networks.clear()  # training needs their memory
                rows = [
                    *training.measure_training(options, machine),
                    *training.compare_losses(options),
                    *training.compare_gradients(options),
                    *training.measure_memory(options),
                ]
                keep_freed_memory(False)
            elif part == "data":
                rows = list(data.measure_data(options))
            else:
                rows = measure_inference(part, networks, options, machine)
            console.print(measurement_table(part, rows))
            yield rows


if __name__ == "__main__":
    main()
