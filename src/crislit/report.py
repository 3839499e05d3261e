"""python -m crislit.report RUNS...: tables 1 and 2 of measured runs beside the paper's, as Markdown, CSV and plots."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from crislit.errors import one_line_errors
from crislit.experiments.report import write_report
from crislit.experiments.runs import collect, group_by_setting
from crislit.experiments.tables import fill_blocks, readme_tables


def main(arguments: Sequence[str] | None = None) -> None:
    """Read runs, write the report, print it."""
    parser = argparse.ArgumentParser("python -m crislit.report", description=__doc__)
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUNS",
        help="results.json, folders of runs, records (CSV)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="where to (default: report)",
    )
    parser.add_argument(
        "--fill",
        type=Path,
        metavar="FILE",
        help="fill the blocks <!-- report NAME --> of a Markdown file",
    )
    options = parser.parse_args(arguments)
    with one_line_errors():
        everything = group_by_setting(collect(options.runs))
        text = write_report(everything, options.output)
        if options.fill:
            options.fill.write_text(
                fill_blocks(options.fill.read_text(encoding="utf-8"), readme_tables(everything)),
                encoding="utf-8",
            )
        print(text)
        print(f"written to {options.output}: report.md, table1.csv, table2.csv and plots")


if __name__ == "__main__":
    main()
