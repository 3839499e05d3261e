"""``scripts/speed_tables.py``: one page of all devices, "not run" where a number is missing."""

import csv
from pathlib import Path

import pytest
from scripts.speed_tables import Speed, page

from scripts import speed_tables

RESULTS = Path(__file__).parents[2] / "results"
GPU = "NVIDIA H100 80GB HBM3"


def rows() -> list[dict[str, str]]:
    with (RESULTS / "speed.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def row(part: str, candidate: str, value: float, unit: str) -> dict[str, str]:
    """A row that a GPU would add."""
    return {
        **{"part": part, "candidate": candidate, "value": str(value), "unit": unit},
        **{"model": "rn50", "image_size": "416", "device": GPU, "GFLOP/s": "51000", "GB/s": "3000"},
    }


def test_the_page_is_the_recorded_rows(capsys: pytest.CaptureFixture[str]) -> None:
    speed_tables.main([str(RESULTS / "speed.csv")])
    assert capsys.readouterr().out == (RESULTS / "speed_tables.md").read_text(encoding="utf-8")


def test_rows_of_a_gpu_fill_its_columns() -> None:
    added = [
        row("rows", "con_dec3, plain", 81.5, "images/s"),
        row("rows", "con_dec3, plain", 131.9, "GFLOP"),
        row("rows", "con_dec3, for inference, float16, compiled", 250.25, "images/s"),
        row("evaluation", "for inference, float16", 0.002, "s per sentence"),
        row("latency", "for inference, float16", 0.0125, "s per sentence"),
        row("training", "16-mixed", 0.01, "s per sentence"),
        row("memory", "16-mixed", 9.5, "GB"),
        row("machine", "product of matrices, TF32", 400000.0, "GFLOP/s"),
        {**row("rows", "con, plain", 999, "images/s"), "image_size": "64"},
    ]
    text = page(Speed([*rows(), *added]))
    assert "a GPU" not in text
    assert "No GPU was measured" not in text
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert "| 81.50 | not run | not run | not run | not run | 250.25 |" in lines["con_dec3"]
    assert "999" not in text
    assert lines["for inference, float16"].endswith("| 500.0 | 12.5 |")
    assert lines["16-mixed"].endswith("| 100.00 | 9.50 |")
    assert lines[GPU] == f"| {GPU} | 51000 | 400000.0 | not run | not run | 3000 |"
