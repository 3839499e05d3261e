"""Rows of the benchmark's tables."""

import csv
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from crislit.benchmarks.options import Options
from crislit.benchmarks.timing import Machine
from crislit.io import write_csv
from crislit.training import commit, hardware


@dataclass(frozen=True)
class Measurement:
    """One row of the benchmark's tables.

    Attributes:
        part: Part of the benchmark.
        candidate: The measured network, kind of step or stage.
        value: Median over the rounds.
        unit: Unit of the value.
        ratio: How many times better than the part's baseline.
        floor: The value if arithmetic were all, in the same unit.
        moved: The value if memory traffic without caches and fusion were all.
        spread: Largest minus smallest value, over the median.
        difference: Relative difference from the result of the part's baseline.
        rounds: Number of values that the median is over.
    """

    part: str
    candidate: str
    value: float
    unit: str
    ratio: float | None = None
    floor: float | None = None
    moved: float | None = None
    spread: float | None = None
    difference: float | None = None
    rounds: int | None = None


def compare_to_reference(
    part: str,
    seconds: Mapping[str, list[float]],
    counts: Mapping[str, int],
    unit: str,
    costs: Mapping[str, tuple[float, float]] | None = None,
    differences: Mapping[str, float] | None = None,
) -> list[Measurement]:
    """Return one row per candidate, with the ratio of the first one's median to its own.

    Args:
        part: Part of the benchmark.
        seconds: Seconds of every candidate's runs, the baseline first.
        counts: Number of items that one run of a candidate processes.
        unit: Unit of the time per item.
        costs: Seconds of a run by arithmetic and by memory traffic, where known.
        differences: Relative differences from the baseline's result, where known.
    """
    rows: list[Measurement] = []
    for name, values in seconds.items():
        median = statistics.median(values)
        value = median / counts[name]
        cost = (costs or {}).get(name)
        rows.append(
            Measurement(
                part,
                name,
                value,
                unit,
                ratio=rows[0].value / value if rows else 1.0,
                floor=cost[0] / counts[name] if cost else None,
                moved=cost[1] / counts[name] if cost else None,
                spread=(max(values) - min(values)) / median,
                difference=(differences or {}).get(name),
                rounds=len(values),
            )
        )
    return rows


def measurement_table(part: str, rows: Sequence[Measurement]) -> Table:
    """Lay rows out as a table."""
    columns = [
        Column(name, justify="left" if name in ("", "unit") else "right", no_wrap=True)
        for name in ("", "median", "unit", "ratio", "floor", "memory", "spread", "difference")
    ]
    table = Table(*columns, title=part)
    formats = {"ratio": ".2f", "floor": ".4f", "moved": ".4f", "spread": ".0%", "difference": ".1e"}
    for row in rows:
        numbers = [(getattr(row, name), spec) for name, spec in formats.items()]
        cells = ["-" if number is None else f"{number:{spec}}" for number, spec in numbers]
        table.add_row(row.candidate, f"{row.value:.4f}", row.unit, *cells)
    return table


def write_measurements(
    path: Path, measurements: Sequence[Measurement], options: Options, machine: Machine
) -> None:
    """Write measurements as CSV with their provenance.

    They replace the rows of their parts that were measured on the same device; all other rows of
    the file stay. Rows of files without the column ``device`` were measured on a CPU.

    Raises:
        InputError: If the file cannot be written.
    """
    provenance = {
        "model": options.model,
        "image_size": options.image_size,
        "commit": commit(),
        "hardware": hardware(),
        "GFLOP/s": f"{machine.flops / 1e9:.1f}",
        "GB/s": f"{machine.bytes / 1e9:.1f}",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[1], 1),
        "versions": installed_versions(),
        "device": machine.name,
    }
    # These parts measure networks of their own.
    networks = {
        "start": {"model": "shapes-tiny", "image_size": None},
        "agreement": {"model": options.checkpoint, "image_size": None},
    }
    rows: list[dict[str, Any]] = [
        {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in asdict(row).items()}
        | provenance
        | networks.get(row.part, {})
        for row in measurements
    ]
    measured = {measurement.part for measurement in measurements}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            earlier = [{"device": "cpu"} | row for row in csv.DictReader(file)]
        rows = [
            x for x in earlier if x["device"] != machine.name or x["part"] not in measured
        ] + rows
    write_csv(path, [*(field.name for field in fields(Measurement)), *provenance], rows)


def machine_rows(machine: Machine) -> list[Measurement]:
    """Return the device's rates as rows."""
    rates = {"float32": machine.flops, **machine.rates}
    return [
        *(
            Measurement("machine", f"product of matrices, {name}", rate / 1e9, "GFLOP/s")
            for name, rate in rates.items()
        ),
        Measurement("machine", "copy", machine.bytes / 1e9, "GB/s"),
    ]


def installed_versions() -> str:
    """Return the versions of Python and of the packages that matter to speed."""
    versions = [f"Python {platform.python_version()}"]
    for name in ("torch", "onnxruntime", "numpy"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # ONNX Runtime is optional
            continue
    return ", ".join(versions)
