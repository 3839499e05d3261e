"""Writes the report: tables as Markdown and CSV, and plots."""

from collections.abc import Iterator
from pathlib import Path

from crislit.errors import require
from crislit.experiments.claims import CLAIMS_CSV, claims_table, claims_values
from crislit.experiments.plots import plot_claims, plot_layers, plot_precision
from crislit.experiments.runs import Groups, Runs, Setting, paper_setting
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

APART = "They differ in data set, row of the table and seed."
CLAIMED = (
    "The paper's claims, tested on val: differences in mIoU, in points, between runs of the same "
    "seed. A claim is shown if the 95 % interval of the mean (Student's t) lies above zero, and "
    "contradicted if it lies below. The intervals are not corrected for the number of claims."
)
BESIDE = "In parentheses: the paper's value and the difference."


def write_report(groups: Groups, folder: Path, paper_rows: bool = False) -> str:
    """Write all tables and plots into a folder; return the Markdown.

    Args:
        groups: The rows of all settings.
        folder: Receives ``report.md``, ``table1.csv``, ``claims.csv``, ``table2.csv`` and plots.
        paper_rows: Add the paper's rows that were not run.

    Raises:
        InputError: If there is nothing to report, or a file cannot be written.
    """
    require(groups or paper_rows, "nothing to report: none of the runs is a row of table 1")
    folder.mkdir(parents=True, exist_ok=True)
    if paper_rows and not any(is_in_table1(setting) for setting in groups):
        groups = {**groups, paper_setting("rn50"): {}}
    parts = ["# Measured runs", ""]
    for number, (setting, runs) in enumerate(groups.items(), start=1):
        parts += _setting_parts(setting, runs, folder, number, paper_rows)
    second = table2(groups, paper_rows)
    if len(second) > 1:
        rule = f"mIoU, the paper's IoU. {BESIDE}"
        parts += ["## Table 2", "", rule, "", markdown(second, left=2), ""]
    text = "\n".join(parts)
    write_text(folder / "report.md", text)
    write_csv(folder / "table1.csv", TABLE1_CSV, table1_values(groups, paper_rows))
    write_csv(folder / "claims.csv", CLAIMS_CSV, claims_values(groups))
    write_csv(folder / "table2.csv", TABLE2_CSV, table2_values(groups, paper_rows))
    return text


def _setting_parts(
    setting: Setting, runs: Runs, folder: Path, number: int, paper_rows: bool
) -> Iterator[str]:
    """Draw the plots of one setting and yield the lines of its tables."""
    published = is_in_table1(setting)
    yield from (f"## Table 1: {setting}", "")
    if setting.setting:
        yield from (f"Digest of the settings that its runs share: {setting.setting}. {APART}", "")
    if published:
        yield from (BESIDE, "")
    yield from (markdown(table1(runs, published, paper_rows), left=2), "")
    for name, plot in (("layers", plot_layers), ("precision", plot_precision)):
        plot(runs, published, paper_rows).savefig(folder / f"{name}-{number}.png", dpi=110)
        yield from (f"![{name}, {setting}]({name}-{number}.png)", "")
    claims = claims_table(runs)
    if len(claims) > 1:
        plot_claims(runs).savefig(folder / f"claims-{number}.png", dpi=110)
        yield from (CLAIMED, "", markdown(claims, left=3), "")
        yield from (f"![claims, {setting}](claims-{number}.png)", "")
    splits = splits_table(runs)
    if len(splits) > 1:
        yield from ("The full model (n = 3) on every split:", "", markdown(splits, left=2), "")
