"""Makes a trained network one that ships with the package: weights in half precision, and what these were measured to do.

python scripts/ship_network.py RUN/checkpoints/best.ckpt shapes-tiny --record results/shapes_tiny.csv

The halved weights are evaluated anew, on every split, and their results go into config.json beside them and into the record.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from crislit.checkpoint import RESULTS, read_checkpoint, write_folder
from crislit.errors import one_line_errors
from crislit.models.clip_weights import SHIPPED
from crislit.record import rows_of, write_rows


def main() -> None:
    """Halve, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run's best.ckpt")
    parser.add_argument("name", help="how crislit.load shall call it")
    parser.add_argument("--folder", type=Path, default=SHIPPED, help="where to (default: the package's assets)")
    parser.add_argument("--record", type=Path, required=True, help="a CSV file for the results, one row a split")
    options = parser.parse_args()
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        checkpoint = read_checkpoint(options.checkpoint)
        weights = {name: halved(value) for name, value in checkpoint.weights.items()}
        checkpoint = replace(checkpoint, weights=weights, results={})
        write_folder(checkpoint, Path(folder) / "network")
        evaluate = [sys.executable, "-m", "crislit.evaluate", f"checkpoint={folder}/network", f"hydra.run.dir={folder}/run"]
        subprocess.run(evaluate, check=True)
        results = json.loads((Path(folder) / "run/results.json").read_text())
        write_folder(replace(checkpoint, results={name: results[name] for name in RESULTS}), options.folder / options.name)
        write_rows(options.record, rows_of(results | {"overrides": [f"checkpoint={options.name}"]}))
    print(f"written to {options.folder / options.name}")


def halved(value: Tensor) -> Tensor:
    """Return a tensor in half precision, whole numbers as they are."""
    return value.half() if value.is_floating_point() else value


if __name__ == "__main__":
    main()
