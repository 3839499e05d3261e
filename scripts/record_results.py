"""Records a run's results.json in a CSV, one row a split, and prints the README's table.

python scripts/record_results.py RUN/results.json results/make_train.csv
"""

import argparse
import json
from pathlib import Path

from crislit.record import add_run, rows_of

COLUMNS = ("samples", "mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90", "blind", "ceiling")


def main() -> None:
    """Record and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a run's results.json")
    parser.add_argument("record", type=Path, help="CSV, in which it takes the place of the same experiment")
    options = parser.parse_args()
    results = json.loads(options.results.read_text(encoding="utf-8"))
    add_run(options.record, results)
    print("| split | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * len(COLUMNS))
    for row in rows_of(results):
        cells = [f"{100 * float(row[name]):.2f}" if row[name] and name != "samples" else row[name] or "-" for name in COLUMNS]
        print(f"| {row['split']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
