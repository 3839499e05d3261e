"""The paper's results against the paper's text."""

import re

from crislit.experiments.paper import (
    TABLE1,
    TABLE1_METRICS,
    TABLE1_RESULTS,
    TABLE2_COLUMNS,
    TABLE2_CRIS,
    TABLE2_OTHERS,
)
from tests.conftest import shared


def paper_lines(beginning: str, cells: int) -> list[list[str]]:
    """Return the lines of the paper's text that begin like this and have so many cells."""
    text = (shared("paper") / "cris.txt").read_text()
    lines = [line for line in text.splitlines() if re.match(beginning, line)]
    rows = [re.sub(r"</?b>", "", line).split("\t") for line in lines]
    return [row for row in rows if len(row) == cells]


def test_table_1_is_the_papers() -> None:
    lines = paper_lines(r"(RefCOCO|RefCOCO\+|G-Ref)?\t[-✓]\t[-✓]", cells=12)
    assert len(lines) == 19
    names = {"RefCOCO": "refcoco", "RefCOCO+": "refcoco+", "G-Ref": "grefcoco"}
    ablations = {(row.contrastive, row.layers): name for name, row in TABLE1.items()}
    dataset, rows = "", []
    for cells in lines:
        dataset = names.get(cells[0], dataset)
        row = ablations[cells[1] == "✓", 0 if cells[3] == "-" else int(cells[3])]
        numbers = [float(cell) for cell in cells[4:]]
        assert (*numbers[:6], numbers[7]) == TABLE1_RESULTS[dataset][row]
        assert numbers[6] == TABLE1[row].parameters
        rows.append((dataset, row))
    expected = [(dataset, row) for dataset, results in TABLE1_RESULTS.items() for row in results]
    assert sorted(rows) == sorted(expected)


def test_table_2_is_the_papers() -> None:
    lines = paper_lines(r"[A-Za-z0-9* ()]+(\[\d+\])?\t(ResNet|DarkNet)", cells=10)
    assert len(lines) == 17
    for cells in lines:
        numbers = tuple(None if cell == "-" else float(cell) for cell in cells[2:])
        method = re.sub(r" \[\d+\]| \(Ours\)", "", cells[0])
        if method == "CRIS":
            assert numbers == TABLE2_CRIS[cells[1].replace("ResNet-", "rn")]
        else:
            assert numbers == TABLE2_OTHERS[method, cells[1]]
    assert len(TABLE2_OTHERS) == 15
    assert len(TABLE2_COLUMNS) == 8


def test_every_row_of_table_1_has_all_metrics() -> None:
    for rows in TABLE1_RESULTS.values():
        assert all(len(values) == len(TABLE1_METRICS) for values in rows.values())
