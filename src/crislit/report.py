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
    options = parser.parse_args(arguments)
    with one_line_errors():
        require(
            options.runs or SHIPPED.is_file(),
            f"which runs? {SHIPPED} is not here: name results.json files, folders of runs or "
            "records (CSV)",
        )
        report(options.runs or [SHIPPED], options.output, options.paper)


def report(paths: Sequence[Path], output: Path, paper_rows: bool) -> None:
    """Write and print the report of some runs."""
    # Imported after the command line is parsed: they take seconds.
    from crislit.experiments import collect, group_by_setting, write_report

    print(write_report(group_by_setting(collect(paths)), output, paper_rows))
    print(f"written to {output}: report.md, table1.csv, table2.csv and plots")


if __name__ == "__main__":
    main()
