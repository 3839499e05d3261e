"""python -m crislit.report: tables and plots of measured runs, beside the paper's numbers."""

from collections.abc import Sequence
from pathlib import Path

from crislit.errors import one_line_errors, require
from crislit.inference import command_parser

SHIPPED = Path("results/table1.csv")
EPILOG = f"""
RUNS are results.json files, folders of runs, or records (CSV). Without RUNS, the report shows the
measurements that ship with the repository, {SHIPPED}. To see your own:

  python -m crislit.report outputs/table1.csv    # sweeps over ablation= record their runs there
  python -m crislit.report outputs               # all runs in this folder, also of sweeps

Frames per second are in table1.csv of the report only: other work on the machine changes them.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read runs, then write and print the report."""
    parser = command_parser("report", "--paper", __doc__, EPILOG)
    parser.add_argument(
        "runs", type=Path, nargs="*", metavar="RUNS", help=f"what to report (default: {SHIPPED})"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/report"),
        metavar="DIR",
        help="folder of the report (default: outputs/report)",
    )
    parser.add_argument(
        "--paper", action="store_true", help="also show the paper's rows that were not run"
    )
    parser.add_argument(
        "--fill",
        type=Path,
        metavar="FILE",
        help="also fill the blocks <!-- report NAME --> of a Markdown file",
    )
    options = parser.parse_args(arguments)
    with one_line_errors():
        require(
            options.runs or SHIPPED.is_file(),
            f"which runs? {SHIPPED} is not here: name results.json files, folders of runs or "
            "records (CSV)",
        )
        report(options.runs or [SHIPPED], options.output, options.paper, options.fill)


def report(paths: Sequence[Path], output: Path, paper_rows: bool, readme: Path | None) -> None:
    """Write and print the report of some runs; optionally fill the blocks of a Markdown file."""
    # Imported after the command line is parsed: they take seconds.
    from crislit.experiments import (
        collect,
        fill_blocks,
        group_by_setting,
        readme_tables,
        write_report,
    )
    from crislit.io import write_text

    groups = group_by_setting(collect(paths))
    text = write_report(groups, output, paper_rows)
    if readme:
        old = readme.read_text(encoding="utf-8")
        write_text(readme, fill_blocks(old, readme_tables(groups)))
    print(text)
    print(f"written to {output}: report.md, table1.csv, table2.csv and plots")


if __name__ == "__main__":
    main()
