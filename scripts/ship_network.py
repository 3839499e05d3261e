"""Turn a trained network into one that ships with the package, with weights in half precision.

python scripts/ship_network.py BEST.ckpt shapes-tiny --record results/shapes_tiny.csv

Evaluates the network in half precision on every split, and writes the results to its config.json
and to the record.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from crislit.checkpoints.checkpoint import RESULTS, read_checkpoint, write_folder
from crislit.errors import one_line_errors
from crislit.experiments.records import result_rows, write_rows
from crislit.io.assets import ASSETS


def main() -> None:
    """Convert, evaluate and write the network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a run's best.ckpt")
    parser.add_argument("name", help="the name for crislit.load")
    parser.add_argument(
        "--folder", type=Path, default=ASSETS, help="destination (default: the package's assets)"
    )
    parser.add_argument(
        "--record", type=Path, required=True, help="a CSV file for the results, one row per split"
    )
    options = parser.parse_args()
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        checkpoint = read_checkpoint(options.checkpoint)
        weights = {name: to_half(value) for name, value in checkpoint.weights.items()}
        checkpoint = replace(checkpoint, weights=weights, results={})
        write_folder(checkpoint, Path(folder) / "network")
        overrides = [f"checkpoint={folder}/network", f"hydra.run.dir={folder}/run"]
        subprocess.run([sys.executable, "-m", "crislit.evaluate", *overrides], check=True)
        results = json.loads((Path(folder) / "run/results.json").read_text())
        measured = {name: results[name] for name in RESULTS}
        write_folder(replace(checkpoint, results=measured), options.folder / options.name)
        results["overrides"] = [f"checkpoint={options.name}"]
        write_rows(options.record, result_rows(results))
    print(f"written to {options.folder / options.name}")


def to_half(value: Tensor) -> Tensor:
    """Convert floating-point tensors to half precision; return integer tensors unchanged."""
    return value.half() if value.is_floating_point() else value


if __name__ == "__main__":
    main()
