"""Made-up runs for the tests of tables and plots."""

from typing import Any

from crislit.experiments.records import result_rows
from crislit.experiments.runs import Setting, group_by_setting
from tests.experiments.test_records import results

Groups = dict[Setting, dict[tuple[str, str, str], list[dict[str, str]]]]


def run(*overrides: str, **metrics: float) -> dict[str, Any]:
    """Return a ``results.json`` with these metrics on every split."""
    measured = results(*overrides, initial_weights="openai (sha256 0)")
    for values in measured["splits"].values():
        values |= metrics
    return measured


def group(*runs: dict[str, Any]) -> Groups:
    """Group the rows of some runs by setting."""
    return group_by_setting([row for measured in runs for row in result_rows(measured)])


def table_row(table: list[list[str]], *beginning: str) -> dict[str, str]:
    """Return the one row of a table that begins with these cells, by column."""
    (row,) = [row for row in table if tuple(row[: len(beginning)]) == beginning]
    return dict(zip(table[0], row, strict=True))
