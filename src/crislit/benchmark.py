"""python -m crislit.benchmark: measures parameters, speed and memory against a baseline.

Without a part, all are measured. The baseline, "plain", is the released implementation's forward
pass: float32, contiguous tensors, one image and one sentence at a time, without reading and
preprocessing. The candidates of a part run in turn. Columns of speed.csv:

  value       in the row's unit; a time is the median over the rounds
  unit        s, s per sentence, s per sample and core, images/s, GFLOP, GB, MB, %, mIoU (0 to 1);
              of losses and gradients, what the value is
  ratio       how many times better than the baseline: "plain", or the first row of --start, --data
  floor       the value if only arithmetic took time, in the same unit
  moved       the value if only memory traffic took time ("memory" in the printed tables)
  spread      largest minus smallest value, as a share of the median
  difference  relative difference from the baseline's result; for --agreement, in mIoU
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

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
from crislit.benchmarks.measurements import (
    Measurement,
    Options,
    measurement_table,
    write_measurements,
)
from crislit.benchmarks.parameters import BACKBONES, count_table1_parameters, parameter_table
from crislit.benchmarks.timing import Machine, measure_machine
from crislit.errors import check_integer, one_line_errors, require
from crislit.training import hardware

PARTS = {
    "parameters": "parameters of table 1's rows in millions, beside the paper's (printed only)",
    "start": "s until a first mask, beside the imports alone",
    "rows": "GFLOP per image and sentence, and images/s, of every row of table 1",
    "evaluation": "s per sentence, with seven sentences per image",
    "latency": "s per sentence, for one image and one sentence",
    "agreement": "mIoU of a trained network on every backend",
    "training": "a training step: s per sentence, memory in GB, losses, gradients",
    "data": "loading: s per sample and core stage by stage, %% of a step spent waiting, and s and "
    "MB of an index of RefCOCO's size",
}
DEFAULT = "(default: %(default)s)"
ARGUMENTS: dict[tuple[str, ...], dict[str, Any]] = {
    ("--model",): {"help": f"rn50, rn101 or tiny, with random weights {DEFAULT}"},
    ("--image-size",): {"type": int, "metavar": "S", "help": f"side of its input {DEFAULT}"},
    ("--rounds",): {"type": int, "metavar": "N", "help": f"timed rounds {DEFAULT}"},
    ("--checkpoint",): {"help": f"trained network for --agreement {DEFAULT}"},
    ("--images", "--pictures"): {
        "type": int,
        "metavar": "N",
        "help": f"images for --agreement {DEFAULT}",
    },
    ("--data-root",): {
        "type": Path,
        "metavar": "DIR",
        "help": "folder of RefCOCO for --data (default: generated images)",
    },
    ("--output",): {"type": Path, "metavar": "DIR", "help": "also write DIR/speed.csv"},
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
    parser.set_defaults(**vars(Options()))
    for flags, settings in ARGUMENTS.items():
        parser.add_argument(*flags, **settings)
    parsed = parser.parse_args(arguments)
    if "--pictures" in (sys.argv if arguments is None else arguments):
        print("--pictures is now --images", file=sys.stderr)
    chosen = [part for part in PARTS if getattr(parsed, part)] or list(PARTS)
    options = Options(**{field.name: getattr(parsed, field.name) for field in fields(Options)})
    with one_line_errors():
        check_integer("--image-size", options.image_size, 32, multiple_of=32)
        check_integer("--rounds", options.rounds, 1)
        check_integer("--images", options.images, 1)
        require(
            options.model in (*BACKBONES, "tiny"),
            f"--model must be tiny, rn50 or rn101, got {options.model}",
        )
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


if __name__ == "__main__":
    main()
