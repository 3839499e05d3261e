"""``python -m crislit.benchmark``."""

import pytest

from crislit import benchmark
from crislit.paper import TABLE1

PRINTED = ["131.86", "134.22", "136.07", "138.43", "142.64", "146.85", "151.06"]
"""Table 1's column "Params", row by row."""
RN101 = ["147.44", "148.62", "151.65", "152.83", "157.04", "161.25", "165.46"]
"""What RN101 adds to each of them: 161,251,681 - 146,849,121 with Con., and less without its smaller text projector."""


def test_the_table_shows_all_rows_of_both_backbones_beside_the_papers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # no terminal is too narrow for the second decimal
    benchmark.main(["--parameters"])
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == list(TABLE1)
    for row, printed, rn101 in zip(rows, PRINTED, RN101, strict=True):
        assert row[3:] == [printed, printed, "+0.00", rn101]


def test_the_papers_numbers_are_table_1() -> None:
    assert [f"{row.parameters:.2f}" for row in TABLE1.values()] == PRINTED
    assert [(row.contrastive, row.layers) for row in TABLE1.values()] == [
        (False, 0),
        (True, 0),
        (False, 1),
        (True, 1),
        (True, 2),
        (True, 3),
        (True, 4),
    ]


def test_the_released_networks_counts_are_exact_but_for_the_unused_logit_scale() -> None:
    counts = benchmark.count_all()
    assert counts["con_dec3", "rn50"] == 146_849_122 - 1
    assert counts["con_dec3", "rn101"] == 161_251_682 - 1


def test_a_difference_shows(capsys: pytest.CaptureFixture[str]) -> None:
    counts = benchmark.count_all()
    counts["con", "rn50"] += 20_000
    from rich.console import Console

    Console(width=100).print(benchmark.parameter_table(counts))
    line = next(line for line in capsys.readouterr().out.splitlines() if "│ con " in line)
    assert "134.24" in line
    assert "+0.02" in line


def test_without_a_task_it_says_what_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark.main([])
    assert stop.value.code == 2
    assert "--parameters" in capsys.readouterr().err
