"""python -m crislit.report: tables 1 and 2 of measured runs beside the paper's, with plots."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from crislit.errors import one_line_errors
from crislit.experiments import collect, fill_blocks, group_by_setting, readme_tables, write_report
from crislit.io import write_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Read runs, then write and print the report."""
    parser = argparse.ArgumentParser("python -m crislit.report", description=__doc__)
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUNS",
        help="results.json files, folders of runs, or records (CSV)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="folder of the report (default: report)",
    )
    parser.add_argument(
        "--fill",
        type=Path,
        metavar="FILE",
        help="also fill the blocks <!-- report NAME --> of a Markdown file",
    )
    options = parser.parse_args(arguments)
    with one_line_errors():
        groups = group_by_setting(collect(options.runs))
        text = write_report(groups, options.output)
        if options.fill:
            old = options.fill.read_text(encoding="utf-8")
            write_text(options.fill, fill_blocks(old, readme_tables(groups)))
        print(text)
        print(f"written to {options.output}: report.md, table1.csv, table2.csv and plots")


if __name__ == "__main__":
    main()
