"""Measured results as CSV, one row a run and split, with what it takes to run it again."""

import csv
import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from crislit.data import shapes
from crislit.errors import InputError
from crislit.metrics import METRICS
from crislit.models.clip_weights import fingerprint_source, sha256
from crislit.paper import TABLE2_COLUMNS

log = logging.getLogger(__name__)

Settings = Mapping[str, Any]
Row = dict[str, str]

COLUMNS = (
    "experiment",
    "setting",
    "dataset",
    "split",
    "of_splits",
    "model",
    "contrastive",
    "layers",
    "kernel_size",
    "seed",
    "samples",
    *METRICS,
    "blind",
    "ceiling",
    "parameters",
    "fps",
    "steps",
    "image_size",
    "threshold",
    "protocol",
    "initial_weights",
    "commit",
    "hardware",
    "seconds",
    "overrides",
)


NO_NUMBERS = {"accelerator", "devices", "num_nodes", "strategy", "log_every_n_steps", "num_sanity_val_steps", "profiler"}
NO_NUMBERS |= {"enable_progress_bar", "enable_model_summary", "enable_checkpointing", "default_root_dir", "benchmark"}
NO_NUMBERS |= {"deterministic", "detect_anomaly", "logger", "callbacks"}
"""Settings of the trainer that change no number but by rounding."""


def identify(settings: Settings) -> dict[str, str]:
    """Return two digests of the settings that a run's numbers depend on.

    Where the data are, how many workers and GPUs share the work, and what is logged changes no number but by rounding.
    Processes on CPUs do: there BatchNorm sees each one's own share of a batch.

    Returns:
        ``experiment``: of all of them. ``setting``: of those that rows of one table have in common, without seed, data set
        and row of table 1.
    """
    names = ("model", "decoder", "loss", "projector", "recipe", "image_size", "batch_size", "batch_size_per_device")
    facts: dict[str, Any] = {name: settings.get(name) for name in (*names, "threshold", "protocol", "resume")}
    if facts["resume"] == "auto":  # which changes nothing: a run goes on as if it had not been interrupted
        facts["resume"] = None
    trainer = dict(settings.get("trainer") or {})
    facts["trainer"] = {name: value for name, value in trainer.items() if name not in NO_NUMBERS}
    if trainer.get("accelerator") == "cpu" and isinstance(trainer.get("devices"), int):
        facts["processes without SyncBN"] = trainer["devices"] * trainer.get("num_nodes", 1)
    else:
        facts["processes without SyncBN"] = 1
    weights = settings["model"].get("clip_weights")
    facts["model"] = settings["model"] | {"clip_weights": fingerprint_source(weights)}
    dataset = settings["dataset"]
    common = facts | {name: dataset.get(name) for name in ("sentences_per_image", "max_images")}
    common["decoder"] = {name: value for name, value in settings["decoder"].items() if name != "layers"}
    common["loss"] = {name: value for name, value in settings["loss"].items() if name != "contrastive"}
    elsewhere = ("evaluation_splits", "blind_control", "file", "sentences", "images")
    own = {name: value for name, value in dataset.items() if name not in elsewhere}
    if own.get("on_error") == "raise":  # as it was before there was a choice
        del own["on_error"]
    own |= {"seed": settings["seed"], "content": data_content(settings)}
    return {"experiment": digest(facts | {"dataset": own}), "setting": digest(common)}


def data_content(settings: Settings) -> str | None:
    """Return what identifies the refs that a run sees: the embedded set's version, or the digest of the refs file."""
    dataset = settings["dataset"]
    if dataset["embedded"]:
        return f"version {shapes.VERSION}"
    if dataset.get("file"):
        paths = [Path(dataset[name]).expanduser() for name in ("file", "sentences") if dataset.get(name)]
    else:
        folder = Path(settings["data_root"]).expanduser() / dataset["folder"]
        paths = [folder / dataset["refs"]]
        if dataset.get("on_error") == "skip":  # where annotations decide which refs there are
            paths.append(folder / "instances.json")
    return " ".join(sha256(path) for path in paths) if all(path.is_file() for path in paths) else None


def digest(facts: Mapping[str, Any]) -> str:
    """Return a short digest of settings."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def rows_of(results: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a run's ``results.json``, one a split."""
    config = results["config"]
    known = results if "experiment" in results else identify(config)
    rows = []
    for split, values in results["splits"].items():
        row = {
            "experiment": known["experiment"],
            "setting": known["setting"],
            "dataset": config["dataset"]["name"],
            "split": split,
            "of_splits": " ".join(results["splits"]),
            "model": model_name(config),
            "contrastive": str(config["loss"]["contrastive"]).lower(),
            "layers": config["decoder"]["layers"],
            "kernel_size": config["projector"]["kernel_size"],
            "samples": values["samples"],
            **{metric: f"{values[metric]:.4f}" for metric in METRICS},
            "blind": f"{results['blind'][split]['mIoU']:.4f}" if split in results["blind"] else "",
            "ceiling": f"{results['ceiling'][split]['mIoU']:.4f}",
            "fps": f"{results['fps']:.2f}",
            "image_size": config["image_size"],
            "seconds": round(results["seconds"]),
            "overrides": " ".join(results["overrides"]),
        }
        same = ("seed", "parameters", "steps", "threshold", "protocol", "initial_weights", "commit", "hardware")
        row |= {name: results[name] for name in same}
        rows.append({name: str(row[name]) for name in COLUMNS})
    return rows


def model_name(config: Settings) -> str:
    """Return the name of the backbone that a configuration chooses."""
    clip = config["model"]["clip"]
    return str(clip).removesuffix("-quickgelu").lower() if isinstance(clip, str) else "tiny"


def is_sound(row: Mapping[str, Any]) -> bool:
    """Whether a row is whole: every column there and no other, every number a number in its range."""
    least = {"samples": 1, "steps": 0, "parameters": 1, "seed": 0, "layers": 0, "kernel_size": 1, "image_size": 1}
    try:
        shares = [float(row[name]) for name in (*METRICS, "ceiling", "threshold")] + [float(row["blind"] or 0)]
        return (
            set(row) == set(COLUMNS)
            and None not in row.values()
            and all(0 <= value <= 1 for value in shares)
            and 0 <= float(row["fps"]) < float("inf")
            and all(int(row[name]) >= limit for name, limit in least.items())
            and row["contrastive"] in ("true", "false")
            and row["split"] in row["of_splits"].split()
        )
    except (KeyError, ValueError, TypeError, AttributeError):
        return False


def read_rows(path: Path) -> list[Row]:
    """Read recorded rows; broken ones (cut off, edited by mistake) are left out, with a warning that names them.

    Raises:
        InputError: If the file is no such record.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns, lines = reader.fieldnames or (), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no record of runs: {error}") from error
    if set(columns) != set(COLUMNS):
        other = {"lacks": set(COLUMNS) - set(columns), "has beside others": set(columns) - set(COLUMNS)}
        told = " and ".join(f"{what} the columns {', '.join(sorted(names))}" for what, names in other.items() if names)
        raise InputError(f"{path} is no record of runs: it {told}")
    rows = [row for row in lines if is_sound(row)]
    broken = [f"{row.get('dataset')}/{row.get('split')} of {row.get('experiment')}" for row in lines if not is_sound(row)]
    if broken:
        log.warning("%s: broken rows are left out, and their runs count as not run: %s", path, ", ".join(broken))
    return rows


def find_run(path: Path, settings: Settings) -> list[Row]:
    """Return a run's recorded rows, one a split; none if it is not recorded, or not whole.

    Raises:
        InputError: If there is something else in the record's place.
    """
    if not path.exists():
        return []
    name = identify(settings)["experiment"]
    rows = [row for row in read_rows(path) if row["experiment"] == name]
    splits, select = [row["split"] for row in rows], settings["dataset"]["select_split"]
    wanted = set(asked_splits(settings)).union(*(row["of_splits"].split() for row in rows))
    if rows and (missing := wanted - set(splits)):
        told = f"only {', '.join(splits)}, not {', '.join(sorted(missing))}"
    elif any(settings["dataset"]["blind_control"] and row["split"] == select and not row["blind"] for row in rows):
        told = f"no blind control on {select}"
    else:
        return rows
    log.warning("%s holds %s of run %s: it counts as not run", path, told, name)
    return []


def asked_splits(settings: Settings) -> Sequence[str]:
    """Return the splits that a run evaluates, as far as its settings and the published data sets tell."""
    dataset = settings["dataset"]
    if dataset["evaluation_splits"] is not None:
        return list(dataset["evaluation_splits"])
    if dataset["embedded"]:
        return [split for split in shapes.SETS[dataset["folder"]].splits if split != "train"]
    return [split for of, split in TABLE2_COLUMNS if of == dataset["name"]]


def add_run(path: Path, results: Mapping[str, Any]) -> None:
    """Record a run, in place of what there was of it; several processes may do so at once."""
    new = rows_of(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        kept = [row for row in read_rows(path) if row["experiment"] != new[0]["experiment"]] if path.is_file() else []
        write_rows(path, [*kept, *new])


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows, the file whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text.getvalue(), encoding="utf-8")
    part.replace(path)
