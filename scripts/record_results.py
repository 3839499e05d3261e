"""Writes a run's results.json as CSV, one row a split, with what it takes to run it again; prints the README's table.

python scripts/record_results.py RUN/results.json results/make_train.csv
"""

import csv
import json
import sys
from pathlib import Path

from crislit.metrics import METRICS

COLUMNS = ("samples", "mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90", "blind", "ceiling")


def main(source: Path, target: Path) -> None:
    """Convert and print."""
    run = json.loads(source.read_text())
    rows = []
    for split, values in run["splits"].items():
        rows.append(
            {
                "dataset": run["config"]["dataset"]["name"],
                "split": split,
                "samples": values["samples"],
                **{metric: f"{values[metric]:.4f}" for metric in METRICS},
                "blind": f"{run['blind'][split]['mIoU']:.4f}" if split in run["blind"] else "",
                "ceiling": f"{run['ceiling'][split]['mIoU']:.4f}",
                "steps": run["steps"],
                "parameters": run["parameters"],
                "seed": run["seed"],
                "overrides": " ".join(run["overrides"]),
                "initial_weights": run["initial_weights"],
                "commit": run["commit"],
                "hardware": run["hardware"],
                "seconds": round(run["seconds"]),
            }
        )
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print("| split | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * len(COLUMNS))
    for row in rows:
        cells = [f"{100 * float(row[name]):.2f}" if row[name] and name != "samples" else row[name] or "-" for name in COLUMNS]
        print(f"| {row['split']} | " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
