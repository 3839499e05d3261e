"""Collects measured runs and groups them by setting."""

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from crislit.checkpoints import OPENAI
from crislit.data import SETS
from crislit.errors import InputError, require
from crislit.experiments.paper import TABLE1, TABLE1_RESULTS, TABLE2_CRIS
from crislit.experiments.records import Row, is_valid_row, on_data, read_rows, result_rows
from crislit.io import read_json
from crislit.training import METRICS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """Settings shared by the runs of one table.

    Attributes:
        setting: Digest of all shared settings, see
            ``crislit.training.provenance.fingerprint``. The other attributes describe them.
    """

    model: str
    image_size: str
    initial_weights: str
    threshold: str
    protocol: str
    kernel_size: str
    setting: str = ""

    def __str__(self) -> str:
        parts = {
            f"{self.model} at {self.image_size} pixels": True,
            f"from {self.initial_weights}": True,
            f"threshold {self.threshold}": True,
            self.protocol: self.protocol != "all_sentences",
            f"k = {self.kernel_size}": self.kernel_size != "3",
            f"settings {self.setting[:6]}": self.setting != "",
        }
        return ", ".join(part for part, is_shown in parts.items() if is_shown)

    @property
    def published(self) -> bool:
        """Whether the paper has results of such runs, trained from CLIP's weights alone."""
        return (
            self.model in TABLE2_CRIS
            and (self.image_size, self.threshold) == ("416", "0.35")
            and self.protocol == "all_sentences"
            and self.initial_weights != "random"
            and not self.initial_weights.startswith("init_from=")
        )


Runs = Mapping[tuple[str, str, str], Sequence[Row]]
"""The rows of one setting, by (data set, row of table 1, split)."""
Groups = Mapping[Setting, Runs]
"""The rows of all settings."""


@dataclass(frozen=True)
class Measured:
    """One number measured with several seeds, in the unit of the paper's table.

    Attributes:
        values: One value per run.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the runs."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the runs; None for a single run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        spread = f" ± {self.spread:.2f}" if len(set(self.values)) > 1 else ""
        return f"{self.mean:.2f}{spread}"


def paper_setting(model: str) -> Setting:
    """Return the setting of the paper's runs with a backbone."""
    return Setting(model, "416", OPENAI, "0.35", "all_sentences", "3")


def collect(paths: Iterable[Path]) -> list[Row]:
    """Read runs from ``results.json`` files, from folders that contain them, and from records.

    A run may occur twice, as a file and in a record.

    Raises:
        InputError: If a path has no results, one of them cannot be read, or two results of the
            same run differ.
    """
    unique: dict[tuple[str, str], Row] = {}
    for path in paths:
        is_record = path.suffix == ".csv" and path.is_file()
        for row in read_rows(path) if is_record else read_result_rows(path):
            other = unique.setdefault((row["experiment"], row["split"]), row)
            facts = [name for name in ("mIoU", "oIoU", "samples", "threshold") if other[name]]
            if not on_data(row, other["data"]) or any(other[n] != row[n] for n in facts if row[n]):
                values = [
                    f"mIoU {r['mIoU']} ({r['hardware']}, data {r['data'] or 'unknown'})"
                    for r in (other, row)
                ]
                raise InputError(
                    f"two runs of one experiment differ, {row['dataset']} {row['split']}, seed "
                    f"{row['seed']}: {' and '.join(values)}. Report only one of them"
                )
    return list(unique.values())


def read_result_rows(path: Path) -> list[Row]:
    """Read the rows of one ``results.json``, or of all in a folder and its subfolders.

    Raises:
        InputError: If there is none, or one cannot be read.
    """
    files = sorted(path.rglob("results.json")) if path.is_dir() else [path]
    require(
        files and all(file.is_file() for file in files),
        f"no results at {path}: expected a results.json, a folder with some, or a CSV record",
    )
    rows: list[Row] = []
    for file in files:
        try:
            results = result_rows(read_json(file))
            if not all(is_valid_row(row) for row in results):
                raise ValueError("a number is out of its range")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file} is not a result of crislit.train or crislit.evaluate: {error!r}"
            ) from error
        rows += results
    return rows


def group_by_setting(rows: Iterable[Row]) -> dict[Setting, dict[tuple[str, str, str], list[Row]]]:
    """Group runs into tables, one per setting; leave out those not in table 1, with a warning.

    Runs on different data of one name are in different rows of their table.

    Raises:
        InputError: If one cell of a table has two runs with the same seed. They are not
            independent, so their spread would mean nothing.
    """
    groups: dict[Setting, dict[tuple[str, str, str], list[Row]]] = {}
    excluded: list[str] = []
    names = {(row.contrastive, row.layers): name for name, row in TABLE1.items()}
    for row in tell_data_apart(rows):
        name = names.get((row["contrastive"] == "true", int(row["layers"])))
        if name is None:
            ablation = f"contrastive={row['contrastive']}, n = {row['layers']}"
            excluded.append(f"{row['dataset']} with {ablation}")
            continue
        setting = Setting(**{field.name: row[field.name] for field in fields(Setting)})
        cell = groups.setdefault(setting, {}).setdefault((row["dataset"], name, row["split"]), [])
        require(
            all(other["seed"] != row["seed"] for other in cell),
            f"there are two different runs of {row['dataset']}, {name}, {row['split']}, seed "
            f"{row['seed']} in one setting: report them separately",
        )
        cell.append(row)
    if excluded:
        log.warning("not in table 1, and left out: %s", "; ".join(dict.fromkeys(excluded)))
    return groups


def tell_data_apart(rows: Iterable[Row]) -> list[Row]:
    """Rename data sets that one setting was measured on with different content.

    Otherwise their numbers would be averaged. Rows of version 0.1 have no digest of their data:
    they keep their name beside a single known digest.
    """
    rows = list(rows)
    digests: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        digests.setdefault((row["setting"], row["dataset"]), set()).update({row["data"]} - {""})
    several = {key: found for key, found in digests.items() if len(found) > 1}
    for (_, dataset), found in several.items():
        log.warning(
            "%s was measured on different sentences or masks, which have separate rows: data %s",
            *(dataset, ", ".join(sorted(found))),
        )
    return [
        row | {"dataset": f"{row['dataset']} (data {row['data'][:6] or 'unknown'})"}
        if (row["setting"], row["dataset"]) in several
        else row
        for row in rows
    ]


def list_datasets(runs: Runs, paper_rows: bool) -> list[str]:
    """Return the data sets of a table 1 in the paper's order, with its three if requested."""
    datasets = {dataset for dataset, _, _ in runs} | set(TABLE1_RESULTS if paper_rows else ())
    order = [*TABLE1_RESULTS, *SETS, *(dataset for dataset, _, _ in runs)]
    return sorted(datasets, key=order.index)


def measure_column(rows: Sequence[Row], name: str) -> Measured | None:
    """Collect a column of some rows: metrics in percent, parameters in millions.

    Frames per second become their median, as their spread is the machine's and not the network's.
    """
    values = tuple(float(row[name]) for row in rows if row[name] != "")
    if not values:
        return None
    if name == "fps":
        values = (statistics.median(values),) * len(values)
    scale = 100 if name in (*METRICS, "blind", "ceiling") else 1e-6 if name == "parameters" else 1
    return Measured(tuple(scale * value for value in values))
