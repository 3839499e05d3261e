"""Rows of the benchmark's tables and their CSV."""

import csv
from pathlib import Path

from crislit.benchmarks.measurements import (
    Measurement,
    compare_to_reference,
    write_measurements,
)
from crislit.benchmarks.options import Options
from crislit.benchmarks.timing import Machine


def test_ratios_are_of_medians_and_floors_are_per_item() -> None:
    reference, other = compare_to_reference(
        "part",
        {"plain": [4.0, 9.0, 8.0], "other": [5.0, 4.0, 3.0]},
        {"plain": 2, "other": 4},
        "s",
        {"other": (2.0, 6.0)},
    )
    assert reference == Measurement("part", "plain", 4.0, "s", 1.0, spread=0.625, rounds=3)
    assert other == Measurement("part", "other", 1.0, "s", 4.0, 0.5, 1.5, spread=0.5, rounds=3)


def test_measuring_a_part_again_replaces_its_rows_and_keeps_other_parts(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    first = [
        Measurement("latency", "plain", 2.0, "s"),
        Measurement("agreement", "plain", 0.5, "mIoU"),
    ]
    again = [Measurement("latency", "plain", 3.0, "s", rounds=4)]
    write_measurements(path, first, Options(), Machine(5e9, 2e9))
    write_measurements(path, again, Options(), Machine(6e9, 2e9))
    columns = ("part", "value", "rounds", "model", "image_size", "GFLOP/s", "GB/s")
    with path.open(encoding="utf-8") as file:
        rows = [tuple(row[column] for column in columns) for row in csv.DictReader(file)]
    assert rows == [
        ("agreement", "0.5", "", "shapes-tiny", "", "5.0", "2.0"),
        ("latency", "3", "4", "rn50", "416", "6.0", "2.0"),
    ]
