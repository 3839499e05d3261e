"""Measured results as CSV, one row per run and split, with what it takes to repeat the run."""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from crislit.data import shapes
from crislit.errors import InputError, require, why_unwritten
from crislit.experiments.paper import TABLE2_COLUMNS
from crislit.experiments.record_lock import check_writable, lock_record
from crislit.io import write_csv, write_text
from crislit.training import METRICS, fingerprint

log = logging.getLogger(__name__)

Config = Mapping[str, Any]
Row = dict[str, str]

COLUMNS = (
    *("experiment", "setting", "dataset", "split", "of_splits", "model", "contrastive", "layers"),
    *("kernel_size", "seed", "samples", *METRICS, "blind", "ceiling", "parameters", "fps"),
    *("steps", "image_size", "threshold", "protocol", "initial_weights", "commit", "hardware"),
    *("seconds", "overrides", "data"),
)
"""Columns that this version writes. ``data`` is the digest of sentences and masks."""
REQUIRED = (
    *("experiment", "setting", "dataset", "split", "of_splits", "model", "contrastive", "layers"),
    *("kernel_size", "seed", "samples", "mIoU", "image_size", "threshold", "protocol"),
    "initial_weights",
)
"""Columns without which a row means nothing. Any other may be empty, and is unknown then."""
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
SHARES = ("blind", "ceiling", "threshold")
"""Columns in [0, 1] besides the metrics."""


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
        "data": results.get("data") or "",  # absent in version 0.1
        **{name: results[name] for name in COPIED},
    }
    rows = []
    for split, values in results["splits"].items():
        blind = results["blind"].get(split)
        row = shared | {
            # Results of earlier versions lack metrics that were added since.
            **{name: f"{values[name]:.4f}" if name in values else "" for name in METRICS},
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
    """Whether a row has the required columns, and every number is in its range."""
    try:
        known = {name: text for name, text in row.items() if text != "" or name in REQUIRED}
        shares = [known[name] for name in (*METRICS, *SHARES) if name in known]
        integers = [(known[name], least) for name, least in MINIMA.items() if name in known]
        return (
            set(COLUMNS) <= set(row)
            and None not in row
            and None not in row.values()
            and all(0 <= float(share) <= 1 for share in shares)
            and 0 <= float(known.get("fps", 0)) < float("inf")
            and all(int(number) >= least for number, least in integers)
            and row["contrastive"] in ("true", "false")
            and row["split"] in row["of_splits"].split()
        )
    except (KeyError, ValueError, TypeError, AttributeError):
        return False


def read_rows(path: Path) -> list[Row]:
    """Read recorded rows; leave out broken ones (truncated, edited by mistake) with a warning.

    Columns that the record lacks are empty, if they are not required. Columns that this version
    does not know are kept.

    Raises:
        InputError: If the file is not a record.
    """
    columns, lines = _read_lines(path)
    if unknown := [name for name in columns if name not in COLUMNS]:
        log.warning("%s: keeping unknown columns: %s", path, ", ".join(unknown))
    absent = {name: "" for name in COLUMNS if name not in columns}
    # A line that is too short has values of None, and one that is too long has a column of None.
    rows = [dict(zip_longest(columns, fields)) | absent for fields in lines]
    broken = [row for row in rows if not is_valid_row(row)]
    if broken:
        names = [f"{r.get('dataset')}/{r.get('split')} of {r.get('experiment')}" for r in broken]
        log.warning(
            "%s: ignoring broken rows, which stay in the file; their runs count as not run: %s",
            *(path, ", ".join(names)),
        )
    return [row for row in rows if is_valid_row(row)]


def _read_lines(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read a record's columns and the fields of its lines, also of broken ones.

    Raises:
        InputError: If it cannot be read, or lacks required columns.
    """
    try:
        is_other = path.exists() and not path.is_file()  # reading a pipe would block
        require(not is_other, f"{path} is not a record of runs: it is a folder or a device")
        with path.open(newline="", encoding="utf-8-sig") as file:
            columns, *lines = [fields for fields in csv.reader(file) if fields] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a record of runs: {error}") from error
    lacking = [name for name in REQUIRED if name not in columns]
    require(
        not columns or not lacking,  # an empty file was created, and not yet written
        f"{path} is not a record of runs: it has the columns {', '.join(columns)[:200]}, and lacks "
        f"{', '.join(lacking)}",
    )
    return columns, lines


def check_record(path: Path) -> None:
    """Check, before anything is trained, that runs can be added to a record.

    Raises:
        InputError: If the file exists and is not a record, or cannot be written.
    """
    try:
        exists = path.exists()
    except OSError as error:  # its name is too long
        raise InputError(f"cannot write the record {path}: {why_unwritten(error)}") from error
    if exists:
        read_rows(path)
    check_writable(path)


def find_run(path: Path, config: Config, experiment: str, data: str = "") -> list[Row]:
    """Return a run's recorded rows, one per split; none if they are missing or incomplete.

    Rows measured on other data do not count. Where a digest of data is empty, it is unknown and
    agrees with any.

    Args:
        path: The record.
        config: The run's configuration.
        experiment: Its fingerprint.
        data: The digest of its sentences and masks.

    Raises:
        InputError: If the file is not a record.
    """
    if not path.exists():
        return []
    recorded = read_rows(path)
    rows = [row for row in recorded if row["experiment"] == experiment and on_data(row, data)]
    if not rows:
        _log_other_data(path, recorded, config, experiment, data)
        return []
    splits, selected = [row["split"] for row in rows], config["dataset"]["select_split"]
    expected = set(expected_splits(config)).union(*(row["of_splits"].split() for row in rows))
    missing = expected - set(splits)
    has_no_blind = any(row["split"] == selected and not row["blind"] for row in rows)
    if missing:
        found = f"only {', '.join(splits)}, not {', '.join(sorted(missing))}"
    elif config["dataset"]["blind_control"] and has_no_blind:
        found = f"no blind control on {selected}"
    else:
        return rows
    log.warning("%s holds %s of run %s: it counts as not run", path, found, experiment)
    return []


def on_data(row: Row, data: str) -> bool:
    """Whether a row may have been measured on data with this digest."""
    return not (row["data"] and data) or row["data"] == data


def _log_other_data(
    path: Path, rows: Sequence[Row], config: Config, experiment: str, data: str
) -> None:
    """Warn of rows with the same settings, row of table 1 and seed, on other or unknown data."""
    wanted = {
        "setting": fingerprint(config)["setting"],
        "dataset": config["dataset"]["name"],
        "contrastive": str(config["loss"]["contrastive"]).lower(),
        "layers": str(config["decoder"]["layers"]),
        "seed": str(config["seed"]),
    }
    same = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    others = sorted({row["data"] for row in same if not on_data(row, data)})
    if others:
        log.warning(
            "%s holds this run on other sentences or masks of %s (digest %s, here %s): it counts "
            "as not run",
            *(path, wanted["dataset"], ", ".join(others), data),
        )
    # On embedded data, the experiment does not depend on this digest: the rows are another run's.
    if data and not config["dataset"]["embedded"] and any(not row["data"] for row in same):
        log.warning(
            "%s holds a run of %s with these settings and this seed, but not the digest of its "
            "data, which version 0.1 did not record: it counts as not run. To keep it, if the data "
            "are the same, set experiment to %s and data to %s in its rows",
            *(path, wanted["dataset"], experiment, data),
        )


def expected_splits(config: Config) -> Sequence[str]:
    """Return the splits that a run evaluates, as far as they are known before it runs."""
    dataset = config["dataset"]
    if dataset["evaluation_splits"] is not None:
        return list(dataset["evaluation_splits"])
    if dataset["embedded"]:
        return [split for split in shapes.SETS[dataset["folder"]].splits if split != "train"]
    return [split for name, split in TABLE2_COLUMNS if name == dataset["name"]]


def add_run(path: Path, results: Mapping[str, Any]) -> None:
    """Record a run, replacing its earlier rows; several processes may do so at once.

    The lines of other runs stay as they are, also broken ones: their numbers took hours to measure,
    and a user can correct them.

    Raises:
        InputError: If the file is not a record, or cannot be written.
    """
    new = result_rows(results)
    with lock_record(path):
        columns, lines = _read_lines(path)
        added = [name for name in COLUMNS if name not in columns]
        place = [*columns, *added].index("experiment")
        others = [
            _insert_fields(fields, len(columns), len(added))
            for fields in lines
            if fields[place : place + 1] != [new[0]["experiment"]]
        ]
        columns = [*columns, *added]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([columns, *others])
        writer.writerows([row.get(name, "") for name in columns] for row in new)
        write_text(path, text.getvalue())


def _insert_fields(fields: Sequence[str], columns: int, added: int) -> list[str]:
    """Add empty fields for added columns; lines that are too short or too long remain so."""
    empty = [""] * added if len(fields) >= columns else []
    return [*fields[:columns], *empty, *fields[columns:]]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a record of these rows atomically, in place of an existing one."""
    write_csv(path, COLUMNS, rows)
