"""Rows of the benchmark's tables and their CSV."""

import csv
from pathlib import Path

from crislit.benchmarks.measurements import (
    Measurement,
    compare_to_reference,
    machine_rows,
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


def read_rows(path: Path, *columns: str) -> list[tuple[str, ...]]:
    with path.open(encoding="utf-8") as file:
        return [tuple(row[column] for column in columns) for row in csv.DictReader(file)]


def test_measuring_on_another_device_keeps_the_rows_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    gpu = Machine(5e13, 3e12, "NVIDIA H100 80GB HBM3", {"float16": 6e14})
    other = Machine(2e13, 1e12, "NVIDIA L4")
    for value, machine in ((1.0, Machine(1e11, 3e10)), (2.0, gpu), (3.0, other), (4.0, gpu)):
        write_measurements(path, [Measurement("rows", "plain", value, "s")], Options(), machine)
    assert read_rows(path, "part", "value", "GFLOP/s", "device") == [
        ("rows", "1", "100.0", "cpu"),
        ("rows", "3", "20000.0", "NVIDIA L4"),
        ("rows", "4", "50000.0", "NVIDIA H100 80GB HBM3"),
    ]
    header = path.read_text(encoding="utf-8").splitlines()[0]
    assert header.endswith(",cores,load,versions,device")


def test_rows_of_files_without_devices_were_measured_on_a_cpu(tmp_path: Path) -> None:
    path, machine = tmp_path / "speed.csv", Machine(5e9, 2e9)
    rows = [Measurement(part, "plain", 1.0, "s") for part in ("rows", "latency")]
    write_measurements(path, rows, Options(), machine)
    former = path.read_text(encoding="utf-8").replace(",device", "").replace(",cpu", "")
    path.write_text(former, encoding="utf-8")
    gpu = Machine(5e13, 3e12, "xpu")
    write_measurements(path, [Measurement("rows", "plain", 2.0, "s")], Options(), gpu)
    write_measurements(path, [Measurement("latency", "plain", 3.0, "s")], Options(), machine)
    assert read_rows(path, "part", "value", "device") == [
        *[("rows", "1", "cpu"), ("rows", "2", "xpu"), ("latency", "3", "cpu")],
    ]


def test_a_machines_rates_are_rows() -> None:
    machine = Machine(5e13, 3e12, "gpu", {"TF32": 4e14, "float16": 6e14})
    rows = [(row.part, row.candidate, row.value, row.unit) for row in machine_rows(machine)]
    assert rows == [
        ("machine", "product of matrices, float32", 5e4, "GFLOP/s"),
        ("machine", "product of matrices, TF32", 4e5, "GFLOP/s"),
        ("machine", "product of matrices, float16", 6e5, "GFLOP/s"),
        ("machine", "copy", 3e3, "GB/s"),
    ]
