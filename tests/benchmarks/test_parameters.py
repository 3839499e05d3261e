"""Parameter counts of table 1's rows."""

import pytest
from rich.console import Console

from crislit.benchmarks.parameters import count_table1_parameters, parameter_table
from crislit.experiments.paper import TABLE1

PAPER = ["131.86", "134.22", "136.07", "138.43", "142.64", "146.85", "151.06"]
"""Table 1's column "Params", row by row, for RN50."""


def test_the_papers_parameters_are_table_1() -> None:
    assert [f"{row.parameters:.2f}" for row in TABLE1.values()] == PAPER
    assert [(row.contrastive, row.layers) for row in TABLE1.values()] == [
        *((False, 0), (True, 0), (False, 1), (True, 1), (True, 2), (True, 3), (True, 4))
    ]


def test_counts_are_those_of_the_released_networks_without_their_unused_logit_scale() -> None:
    counts = count_table1_parameters()
    assert counts["con_dec3", "rn50"] == 146_849_122 - 1
    assert counts["con_dec3", "rn101"] == 161_251_682 - 1


def test_the_table_shows_a_difference_from_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    counts = count_table1_parameters()
    counts["con", "rn50"] += 20_000
    Console(width=100).print(parameter_table(counts))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "│ con " in line]
    assert "134.24" in line
    assert "+0.02" in line
