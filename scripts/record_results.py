"""Record a run's results.json in a CSV, one row per split, and print the README's table.

python scripts/record_results.py RUN/results.json results/make_train.csv
"""

import argparse
import json
from pathlib import Path

from crislit.experiments.records import add_run, result_rows

COLUMNS = ("samples", "mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90", "blind", "ceiling")


def main() -> None:
    """Record the results and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a run's results.json")
    parser.add_argument(
        "record", type=Path, help="CSV file; rows of the same experiment are replaced"
    )
    options = parser.parse_args()
    results = json.loads(options.results.read_text(encoding="utf-8"))
    add_run(options.record, results)
    print("| split | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * len(COLUMNS))
    for row in result_rows(results):
        metrics = [f"{100 * float(row[name]):.2f}" if row[name] else "-" for name in COLUMNS[1:]]
        print("| " + " | ".join([row["split"], row["samples"], *metrics]) + " |")


if __name__ == "__main__":
    main()
