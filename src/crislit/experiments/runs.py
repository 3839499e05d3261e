"""Collects measured runs and groups them by setting."""

import json
import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from crislit.checkpoints.clip_weights import OPENAI
from crislit.errors import InputError
from crislit.experiments.paper import TABLE1, TABLE2_CRIS
from crislit.experiments.records import Row, is_valid_row, read_rows, result_rows
from crislit.training.metrics import METRICS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What the runs of one table have in common; ``setting`` is a digest of all of it, see :func:`crislit.record.identify`."""

    model: str
    image_size: str
    initial_weights: str
    threshold: str
    protocol: str
    kernel_size: str
    setting: str = ""

    def __str__(self) -> str:
        told = f"{self.model} at {self.image_size} pixels, from {self.initial_weights}, threshold {self.threshold}"
        told += "" if self.protocol == "all_sentences" else f", {self.protocol}"
        told += "" if self.kernel_size == "3" else f", k = {self.kernel_size}"
        return told + (f", setting {self.setting[:6]}" if self.setting else "")

    @property
    def published(self) -> bool:
        """Whether the paper has numbers of such runs: its network and threshold at its size, trained from CLIP's weights."""
        papers = (self.model, self.image_size, self.threshold, self.protocol)
        return (
            papers in [(model, "416", "0.35", "all_sentences") for model in TABLE2_CRIS]
            and self.initial_weights != "random"
        )


@dataclass(frozen=True)
class Measured:
    """One number of several seeds' runs, in the unit of the paper's table.

    Attributes:
        values: One a run.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the runs."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the runs (of a sample), if there are several."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        same = len(set(self.values)) == 1  # a number of parameters has no spread
        return f"{self.mean:.2f}" + (
            f" ± {self.spread:.2f}" if self.spread is not None and not same else ""
        )


def paper_setting(model: str) -> Setting:
    """Return the setting of the paper's own runs of a backbone."""
    return Setting(model, "416", OPENAI, "0.35", "all_sentences", "3")


Runs = Mapping[tuple[str, str, str], Sequence[Row]]
"""The rows of one setting, by (data set, row of table 1, split)."""


def collect(paths: Iterable[Path]) -> list[Row]:
    """Read runs: ``results.json`` files, folders that hold some, and records of sweeps (CSV).

    Raises:
        InputError: If there is none, or one cannot be read.
    """
    rows: list[Row] = []
    for path in paths:
        if path.suffix == ".csv" and path.is_file():
            rows += read_rows(path)
            continue
        files = sorted(path.rglob("results.json")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise InputError(
                f"no results at {path}: expected a results.json, a folder that holds some, or a record in CSV"
            )
        for file in files:
            try:
                measured = result_rows(json.loads(file.read_text(encoding="utf-8")))
                if not all(is_valid_row(row) for row in measured):
                    raise ValueError("a number out of its range")
                rows += measured
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{file} is no result of crislit.train or crislit.evaluate: {error!r}"
                ) from error
    unique: dict[tuple[str, str], Row] = {}
    for row in rows:  # a run may be there twice, as file and in a record
        first = unique.setdefault((row["experiment"], row["split"]), row)
        if any(first[name] != row[name] for name in ("mIoU", "oIoU", "samples", "threshold")):
            found = " and ".join(f"mIoU {one['mIoU']} ({one['hardware']})" for one in (first, row))
            raise InputError(
                f"two runs of one experiment differ, {row['dataset']} {row['split']}, seed {row['seed']}: {found}. "
                "Give the report one of them"
            )
    return list(unique.values())


def table1_row(row: Row) -> str | None:
    """Return the name of the row of table 1 that a run belongs to."""
    key = (row["contrastive"] == "true", int(row["layers"]))
    return next(
        (
            name
            for name, ablation in TABLE1.items()
            if (ablation.contrastive, ablation.layers) == key
        ),
        None,
    )


def group_by_setting(rows: Iterable[Row]) -> dict[Setting, dict[tuple[str, str, str], list[Row]]]:
    """Sort runs into tables, one for each setting; what is no row of table 1 is left out, with a warning.

    Raises:
        InputError: If one cell has two runs of the same seed: they are not independent, and their spread would mean nothing.
    """
    found: dict[Setting, dict[tuple[str, str, str], list[Row]]] = {}
    others: list[str] = []
    for row in rows:
        name = table1_row(row)
        if name is None:
            others.append(
                f"{row['dataset']} with contrastive={row['contrastive']}, n = {row['layers']}"
            )
            continue
        setting = Setting(**{field.name: row[field.name] for field in fields(Setting)})
        cell = found.setdefault(setting, {}).setdefault((row["dataset"], name, row["split"]), [])
        cell.append(row)
        if len({other["seed"] for other in cell}) < len(cell):
            what = f"{row['dataset']}, {name}, {row['split']}, seed {row['seed']}"
            raise InputError(
                f"there are two different runs of {what} in one setting: report them apart"
            )
    if others:
        log.warning("not in table 1's rows, and left out: %s", "; ".join(dict.fromkeys(others)))
    return found


def measure_column(rows: Sequence[Row], name: str) -> Measured | None:
    """Return one column of some runs, metrics in percent and parameters in millions; of frames a second their median."""
    values = tuple(float(row[name]) for row in rows if row[name] != "")
    if name == "fps" and values:  # what else a machine did is no spread of the network's
        values = (statistics.median(values),) * len(values)
    scale = 100 if name in (*METRICS, "blind", "ceiling") else 1e-6 if name == "parameters" else 1
    return Measured(tuple(scale * value for value in values)) if values else None
