"""Records a run's results.json as CSV, one row a split, and prints the README's table.

python scripts/record_results.py RUN/results.json results/make_train.csv
"""

import json
import sys
from pathlib import Path

from crislit.record import rows_of, write_rows

COLUMNS = ("samples", "mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90", "blind", "ceiling")


def main(source: Path, target: Path) -> None:
    """Convert and print."""
    rows = rows_of(json.loads(source.read_text()))
    write_rows(target, rows)
    print("| split | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * len(COLUMNS))
    for row in rows:
        cells = [f"{100 * float(row[name]):.2f}" if row[name] and name != "samples" else row[name] or "-" for name in COLUMNS]
        print(f"| {row['split']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
