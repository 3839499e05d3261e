"""Writes the report: tables as Markdown and CSV, and plots."""

from pathlib import Path

from crislit.experiments.plots import plot_layers, plot_precision
from crislit.experiments.runs import Groups, paper_setting
from crislit.experiments.tables import (
    TABLE1_CSV,
    TABLE2_CSV,
    is_in_table1,
    markdown,
    splits_table,
    table1,
    table1_values,
    table2,
    table2_values,
)
from crislit.io import write_csv, write_text


def write_report(groups: Groups, folder: Path) -> str:
    """Write all tables and plots into a folder; return the Markdown.

    Raises:
        InputError: If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not any(is_in_table1(setting) for setting in groups):
        # The paper's own table is always shown.
        groups = {**groups, paper_setting("rn50"): {}}
    parts = ["# Measured beside the paper", ""]
    for number, (setting, runs) in enumerate(groups.items(), start=1):
        published = is_in_table1(setting)
        parts += [f"## Table 1: {setting}", "", markdown(table1(runs, published), left=2), ""]
        for name, plot in (("layers", plot_layers), ("precision", plot_precision)):
            plot(runs, published).savefig(folder / f"{name}-{number}.png", dpi=110)
            parts += [f"![{name}, {setting}]({name}-{number}.png)", ""]
        splits = splits_table(runs)
        if len(splits) > 1:
            parts += ["The full model (n = 3) on every split:", "", markdown(splits, left=2), ""]
    rule = "mIoU, the paper's IoU; in parentheses the paper's value and the difference."
    text = "\n".join([*parts, "## Table 2", "", rule, "", markdown(table2(groups), left=2), ""])
    write_text(folder / "report.md", text)
    write_csv(folder / "table1.csv", TABLE1_CSV, table1_values(groups))
    write_csv(folder / "table2.csv", TABLE2_CSV, table2_values(groups))
    return text
