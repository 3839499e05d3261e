"""Writes the report: tables as Markdown and CSV, and plots."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from crislit.experiments.plots import plot_layers, plot_precision
from crislit.experiments.runs import Runs, Setting, paper_setting
from crislit.experiments.tables import (
    is_in_table1,
    markdown,
    splits_table,
    table1,
    table1_values,
    table2,
    table2_values,
)


def write_report(everything: Mapping[Setting, Runs], folder: Path) -> str:
    """Write all tables and plots into a folder; return the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(
        is_in_table1(setting) for setting in everything
    ):  # the paper's own table, whatever ran
        everything = {**everything, paper_setting("rn50"): {}}
    parts = ["# Measured beside the paper", ""]
    for number, (setting, runs) in enumerate(everything.items(), start=1):
        published = is_in_table1(setting)
        parts += [f"## Table 1: {setting}", "", markdown(table1(runs, published), left=2), ""]
        for name, figure in (
            ("layers", plot_layers(runs, published)),
            ("precision", plot_precision(runs, published)),
        ):
            figure.savefig(folder / f"{name}-{number}.png", dpi=110)
            parts += [f"![{name}, {setting}]({name}-{number}.png)", ""]
        splits = splits_table(runs)
        if len(splits) > 1:
            parts += ["The full model (n = 3) on every split:", "", markdown(splits, left=2), ""]
    second = table2(everything)
    parts += [
        "## Table 2",
        "",
        "mIoU, the paper's IoU; in parentheses the paper's value and the difference.",
        "",
    ]
    parts += [markdown(second, left=2), ""]
    text = "\n".join(parts)
    (folder / "report.md").write_text(text, encoding="utf-8")
    write_csv(folder / "table1.csv", list(table1_values(everything)))
    write_csv(folder / "table2.csv", list(table2_values(everything)))
    return text


def write_csv(path: Path, lines: Iterable[Sequence[str]]) -> None:
    """Write a table as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
