"""Measured results as CSV, one row per run and split, with what it takes to repeat the run."""

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from crislit.data import shapes
from crislit.errors import InputError, require
from crislit.experiments.paper import TABLE2_COLUMNS
from crislit.io import write_csv
from crislit.training import METRICS, fingerprint

log = logging.getLogger(__name__)

Config = Mapping[str, Any]
Row = dict[str, str]

COLUMNS = (
    *("experiment", "setting", "dataset", "split", "of_splits", "model", "contrastive", "layers"),
    *("kernel_size", "seed", "samples", *METRICS, "blind", "ceiling", "parameters", "fps"),
    *("steps", "image_size", "threshold", "protocol", "initial_weights", "commit", "hardware"),
    *("seconds", "overrides"),
)
COPIED = (
    *("seed", "parameters", "steps", "threshold", "protocol", "initial_weights", "commit"),
    "hardware",
)
"""Columns that are entries of ``results.json``."""
MINIMA = {
    **{"samples": 1, "steps": 0, "parameters": 1, "seed": 0},
    **{"layers": 0, "kernel_size": 1, "image_size": 1},
}
"""Smallest values of the columns that hold integers."""


def result_rows(results: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a run's ``results.json``, one per split."""
    config = results["config"]
    prints = results if "experiment" in results else fingerprint(config)
    shared = {
        **{name: prints[name] for name in ("experiment", "setting")},
        "dataset": config["dataset"]["name"],
        "of_splits": " ".join(results["splits"]),
        "model": model_name(config),
        "contrastive": str(config["loss"]["contrastive"]).lower(),
        "layers": config["decoder"]["layers"],
        "kernel_size": config["projector"]["kernel_size"],
        "fps": f"{results['fps']:.2f}",
        "image_size": config["image_size"],
        "seconds": round(results["seconds"]),
        "overrides": " ".join(results["overrides"]),
        **{name: results[name] for name in COPIED},
    }
    rows = []
    for split, values in results["splits"].items():
        blind = results["blind"].get(split)
        row = shared | {
            **{metric: f"{values[metric]:.4f}" for metric in METRICS},
            "split": split,
            "samples": values["samples"],
            "blind": f"{blind['mIoU']:.4f}" if blind else "",
            "ceiling": f"{results['ceiling'][split]['mIoU']:.4f}",
        }
        rows.append({name: str(row[name]) for name in COLUMNS})
    return rows


def model_name(config: Config) -> str:
    """Return the name of the backbone."""
    clip = config["model"]["clip"]
    return str(clip).removesuffix("-quickgelu").lower() if isinstance(clip, str) else "tiny"


def is_valid_row(row: Mapping[str, Any]) -> bool:
    """Whether a row has exactly the columns, and every number is in its range."""
    try:
        required = (*METRICS, "ceiling", "threshold")
        shares = [*(float(row[name]) for name in required), float(row["blind"] or 0)]
        return (
            set(row) == set(COLUMNS)
            and None not in row.values()
            and all(0 <= share <= 1 for share in shares)
            and 0 <= float(row["fps"]) < float("inf")
            and all(int(row[name]) >= minimum for name, minimum in MINIMA.items())
            and row["contrastive"] in ("true", "false")
            and row["split"] in row["of_splits"].split()
        )
    except (KeyError, ValueError, TypeError, AttributeError):
        return False


def read_rows(path: Path) -> list[Row]:
    """Read recorded rows; leave out broken ones (truncated, edited by mistake) with a warning.

    Raises:
        InputError: If the file is not a record.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns, rows = set(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a record of runs: {error}") from error
    differences = {
        "it lacks the columns": set(COLUMNS) - columns,
        "it has unknown columns": columns - set(COLUMNS),
    }
    reasons = [f"{text} {', '.join(sorted(names))}" for text, names in differences.items() if names]
    require(not reasons, f"{path} is not a record of runs: {' and '.join(reasons)}")
    broken = [row for row in rows if not is_valid_row(row)]
    if broken:
        names = [f"{r.get('dataset')}/{r.get('split')} of {r.get('experiment')}" for r in broken]
        log.warning(
            "%s: ignoring broken rows, their runs count as not run: %s", path, ", ".join(names)
        )
    return [row for row in rows if is_valid_row(row)]


def find_run(path: Path, config: Config, experiment: str) -> list[Row]:
    """Return a run's recorded rows, one per split; none if they are missing or incomplete.

    Args:
        path: The record.
        config: The run's configuration.
        experiment: Its fingerprint.

    Raises:
        InputError: If the file is not a record.
    """
    if not path.exists():
        return []
    rows = [row for row in read_rows(path) if row["experiment"] == experiment]
    splits, selected = [row["split"] for row in rows], config["dataset"]["select_split"]
    expected = set(expected_splits(config)).union(*(row["of_splits"].split() for row in rows))
    missing = expected - set(splits)
    has_no_blind = any(row["split"] == selected and not row["blind"] for row in rows)
    if rows and missing:
        found = f"only {', '.join(splits)}, not {', '.join(sorted(missing))}"
    elif config["dataset"]["blind_control"] and has_no_blind:
        found = f"no blind control on {selected}"
    else:
        return rows
    log.warning("%s holds %s of run %s: it counts as not run", path, found, experiment)
    return []


def expected_splits(config: Config) -> Sequence[str]:
    """Return the splits that a run evaluates, as far as they are known before it runs."""
    dataset = config["dataset"]
    if dataset["evaluation_splits"] is not None:
        return list(dataset["evaluation_splits"])
    if dataset["embedded"]:
        return [split for split in shapes.SETS[dataset["folder"]].splits if split != "train"]
    return [split for name, split in TABLE2_COLUMNS if name == dataset["name"]]


def add_run(path: Path, results: Mapping[str, Any]) -> None:
    """Record a run, replacing its earlier rows; several processes may do so at once."""
    new = result_rows(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = read_rows(path) if path.is_file() else []
        others = [row for row in rows if row["experiment"] != new[0]["experiment"]]
        write_rows(path, [*others, *new])


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a record atomically."""
    write_csv(path, COLUMNS, rows)
