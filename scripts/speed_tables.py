"""Lays the benchmark's rows out as tables, one column or group of columns per device.

    python scripts/speed_tables.py results/speed.csv > results/speed_tables.md

Only rows of RN50 at 416 pixels are shown. What the file lacks is "not run".
"""

import argparse
import csv
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from crislit.benchmarks import accelerated_training, training
from crislit.benchmarks.inference import ACCELERATED
from crislit.benchmarks.speed import NOT_IN_ROWS, NOT_TIMED
from crislit.experiments.paper import TABLE1, TABLE1_METRICS, TABLE1_RESULTS

NETWORK = {"model": "rn50", "image_size": "416"}
NOT_RUN, NEVER_RUN = "not run", "-"
NO_GPU = "a GPU"
"""Stands for accelerators as long as none was measured."""
ON_CPU = ("plain", "for inference")
"""Forms that are measured on a CPU for every row of table 1."""
ON_ACCELERATORS = ("plain", "channels last", *ACCELERATED)
RUNTIMES = ("ONNX Runtime", "ONNX Runtime, int8")
COUNTED = "for inference, counted at image size"
PRECISIONS = ("float32", "TF32", "float16", "bfloat16")
FORMS = {
    "plain": "the baseline: the released implementation's forward pass, in float32 without TF32",
    "channels last": "the baseline in another memory layout",
    "for inference": "the form that `crislit.load` and evaluation use, in float32 without TF32",
}
"""Names of candidates that need an explanation."""
Key = tuple[str, str, str]
"""Device, part and candidate."""


class Speed:
    """The numbers of the benchmark's file.

    Args:
        rows: Its rows.
    """

    def __init__(self, rows: Sequence[Mapping[str, str]]) -> None:
        self.values: dict[Key, float] = {}
        self.rates: dict[str, tuple[str, str]] = {}
        for row in rows:
            device = row.get("device") or "cpu"
            is_operations = row["unit"] == "GFLOP"
            if all(row[name] == value for name, value in NETWORK.items()) and not is_operations:
                self.values[device, row["part"], row["candidate"]] = float(row["value"])
                self.rates[device] = row["GFLOP/s"], row["GB/s"]
        others = [device for device in self.rates if device != "cpu"]
        self.devices = ["cpu", *(others or [NO_GPU])]

    def cell(self, key: Key, digits: int, scale: float = 1, inverse: bool = False) -> str:
        """Format a number, or its inverse, times a scale."""
        if key not in self.values:
            return NOT_RUN
        value = 1 / self.values[key] if inverse else self.values[key]
        return f"{scale * value:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def paper_fps(row: str) -> float:
    """Return the paper's frames per second on RefCOCO, or on G-Ref, which alone has every row."""
    column = TABLE1_METRICS.index("fps")
    return (TABLE1_RESULTS["refcoco"].get(row) or TABLE1_RESULTS["grefcoco"][row])[column]


def fps_table(speed: Speed) -> str:
    """Return table 1's rows with images per second on every device."""
    columns = [
        (device, form)
        for device in speed.devices
        for form in (ON_CPU if device == "cpu" else ON_ACCELERATORS)
        if form not in NOT_IN_ROWS
    ]
    header = ["`ablation=`", "Con.", "n", "the paper, V100"]
    rows = [
        [
            *(name, "yes" if row.contrastive else "-", str(row.layers or "-")),
            f"{paper_fps(name):.2f}",
            *(speed.cell((device, "rows", f"{name}, {form}"), 2) for device, form in columns),
        ]
        for name, row in TABLE1.items()
    ]
    return table([*header, *(f"{device}: {form}" for device, form in columns)], rows)


def inference_table(speed: Speed) -> str:
    """Return sentences per second of evaluation and milliseconds of one sentence, by form."""
    on_cpu = (*ON_CPU, *RUNTIMES)
    on_accelerators = (*(x for x in ON_ACCELERATORS if x not in NOT_TIMED), COUNTED)
    rows = []
    for form in dict.fromkeys([*on_accelerators, *RUNTIMES]):
        cells = [form]
        for device in speed.devices:
            known = form in (on_cpu if device == "cpu" else on_accelerators)
            if (device, "evaluation", form) in speed.values:
                known = True  # by a later version than the other rows
            rate = speed.cell((device, "evaluation", form), 1, inverse=True)
            time = speed.cell((device, "latency", form), 1, scale=1000)
            cells += [rate, NEVER_RUN if form == COUNTED else time] if known else 2 * [NEVER_RUN]
        rows.append(cells)
    titles = ("evaluation, sentences/s", "one sentence, ms")
    return table(["", *(f"{device}: {x}" for device in speed.devices for x in titles)], rows)


def training_table(speed: Speed) -> str:
    """Return sentences per second and memory of every kind of training steps."""
    rows = []
    for kind in dict.fromkeys([*training.KINDS, *accelerated_training.KINDS]):
        cells = [kind]
        for device in speed.devices:
            timed = training.KINDS if device == "cpu" else accelerated_training.KINDS
            weighed = training.MEMORY_KINDS if device == "cpu" else timed
            rate = speed.cell((device, "training", kind), 2, inverse=True)
            memory = speed.cell((device, "memory", kind), 2)
            cells.append(rate if kind in timed else NEVER_RUN)
            cells.append(memory if kind in weighed else NEVER_RUN)
        rows.append(cells)
    titles = ("sentences/s", "memory, GB")
    return table(["", *(f"{device}: {x}" for device in speed.devices for x in titles)], rows)


def device_table(speed: Speed) -> str:
    """Return the rates of all devices, the floor of the times above."""
    rows = []
    for device in speed.devices:
        flops, rate = speed.rates.get(device, (NOT_RUN, NOT_RUN))
        products = [f"product of matrices, {name}" for name in PRECISIONS[1:]]
        others = [
            NEVER_RUN if device == "cpu" else speed.cell((device, "machine", x), 1)
            for x in products
        ]
        rows.append([device, flops, *others, rate])
    return table(["", *(f"{name}, GFLOP/s" for name in PRECISIONS), "copies, GB/s"], rows)


def page(speed: Speed) -> str:
    """Return the page as Markdown."""
    forms = "; ".join(f"`{name}` is {text}" for name, text in FORMS.items())
    measured = [device for device in speed.devices if device != NO_GPU]
    gpu = "No GPU was measured. " if NO_GPU in speed.devices else ""
    parts = [
        "# Speed by device",
        "Written by `python scripts/speed_tables.py results/speed.csv > results/speed_tables.md` "
        f"from the rows of `python -m crislit.benchmark --device DEVICE --output results`: RN50 at "
        f"416 pixels on {', '.join(measured)}. {gpu}Names: {forms}; `TF32`, `float16` and "
        "`bfloat16` change its precision, and `compiled` is by `torch.compile`. `not run`: the "
        "file has no such row; `-`: this is not measured on the device.",
        "## Table 1: images per second, one sentence each",
        "Without reading and preprocessing, on random weights. The paper's numbers are of RefCOCO, "
        "for n = 4 of G-Ref.",
        fps_table(speed),
        "## Inference",
        "Evaluation computes two images of seven sentences, `counted at image size` with their "
        "masks at 640 x 480 pixels.",
        inference_table(speed),
        "## Training",
        f"Batches of {training.BATCH} on a CPU and of {accelerated_training.BATCH} elsewhere. "
        "Memory is the largest of the process on a CPU, and of all tensors elsewhere.",
        training_table(speed),
        "## The devices' rates",
        device_table(speed),
    ]
    return "\n\n".join(x if x[0] in "#|" else textwrap.fill(x, 100) for x in parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page to the standard output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("speed", type=Path, help="the benchmark's speed.csv")
    options = parser.parse_args(arguments)
    with options.speed.open(encoding="utf-8", newline="") as file:
        sys.stdout.write(page(Speed(list(csv.DictReader(file)))))


if __name__ == "__main__":
    main()
