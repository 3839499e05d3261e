"""python -m crislit.report RUNS...: tables 1 and 2 of measured runs beside the paper's, as Markdown, CSV and plots."""

import argparse
import csv
import json
import logging
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from matplotlib.figure import Figure

from crislit.data.shapes import SETS
from crislit.errors import InputError, one_line_errors
from crislit.metrics import METRICS
from crislit.models.clip_weights import OPENAI
from crislit.paper import TABLE1, TABLE1_METRICS, TABLE1_RESULTS, TABLE2_COLUMNS, TABLE2_CRIS, TABLE2_OTHERS
from crislit.record import Row, is_sound, read_rows, rows_of

log = logging.getLogger(__name__)

TITLES = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "grefcoco": "G-Ref"}
"""The paper's names of the data sets; every other set is called as its configuration."""
COUNTED = ("mIoU", "oIoU", "Pr@50", "Pr@60", "Pr@70", "Pr@80", "Pr@90")
NOT_RUN = "not run"


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
        return papers in [(model, "416", "0.35", "all_sentences") for model in TABLE2_CRIS] and self.initial_weights != "random"


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
        return f"{self.mean:.2f}" + (f" ± {self.spread:.2f}" if self.spread is not None and not same else "")


def papers_setting(model: str) -> Setting:
    """Return the setting of the paper's own runs of a backbone."""
    return Setting(model, "416", OPENAI, "0.35", "all_sentences", "3")


Runs = Mapping[tuple[str, str, str], Sequence[Row]]
"""The rows of one setting, by (data set, row of table 1, split)."""


# -- What was run -------------------------------------------------------------------------------------------------------------


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
            raise InputError(f"no results at {path}: expected a results.json, a folder that holds some, or a record in CSV")
        for file in files:
            try:
                measured = rows_of(json.loads(file.read_text(encoding="utf-8")))
                if not all(is_sound(row) for row in measured):
                    raise ValueError("a number out of its range")
                rows += measured
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{file} is no result of crislit.train or crislit.evaluate: {error!r}") from error
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


def row_of_table1(row: Row) -> str | None:
    """Return the name of the row of table 1 that a run belongs to."""
    key = (row["contrastive"] == "true", int(row["layers"]))
    return next((name for name, ablation in TABLE1.items() if (ablation.contrastive, ablation.layers) == key), None)


def by_setting(rows: Iterable[Row]) -> dict[Setting, dict[tuple[str, str, str], list[Row]]]:
    """Sort runs into tables, one for each setting; what is no row of table 1 is left out, with a warning.

    Raises:
        InputError: If one cell has two runs of the same seed: they are not independent, and their spread would mean nothing.
    """
    found: dict[Setting, dict[tuple[str, str, str], list[Row]]] = {}
    others: list[str] = []
    for row in rows:
        name = row_of_table1(row)
        if name is None:
            others.append(f"{row['dataset']} with contrastive={row['contrastive']}, n = {row['layers']}")
            continue
        setting = Setting(**{field.name: row[field.name] for field in fields(Setting)})
        cell = found.setdefault(setting, {}).setdefault((row["dataset"], name, row["split"]), [])
        cell.append(row)
        if len({other["seed"] for other in cell}) < len(cell):
            what = f"{row['dataset']}, {name}, {row['split']}, seed {row['seed']}"
            raise InputError(f"there are two different runs of {what} in one setting: report them apart")
    if others:
        log.warning("not in table 1's rows, and left out: %s", "; ".join(dict.fromkeys(others)))
    return found


def measured(rows: Sequence[Row], name: str) -> Measured | None:
    """Return one column of some runs, metrics in percent and parameters in millions; of frames a second their median."""
    values = tuple(float(row[name]) for row in rows if row[name] != "")
    if name == "fps" and values:  # what else a machine did is no spread of the network's
        values = (statistics.median(values),) * len(values)
    scale = 100 if name in (*METRICS, "blind", "ceiling") else 1e-6 if name == "parameters" else 1
    return Measured(tuple(scale * value for value in values)) if values else None


# -- Tables -------------------------------------------------------------------------------------------------------------------


def beside(ours: Measured | None, paper: float | None) -> str:
    """Write a number beside the paper's, with the difference."""
    told = NOT_RUN if ours is None else str(ours)
    if paper is None:
        return told
    return f"{told} ({paper:.2f})" if ours is None else f"{told} ({paper:.2f}, {ours.mean - paper:+.2f})"


def datasets_of(runs: Runs, published: bool) -> list[str]:
    """Return the data sets of a table 1: those that ran, in the paper's order, and its three where its numbers are to stand."""
    found = dict.fromkeys([*(TABLE1_RESULTS if published else ()), *(dataset for dataset, _, _ in runs)])
    order = [*TABLE1_RESULTS, *SETS]
    return sorted(found, key=lambda dataset: order.index(dataset) if dataset in order else len(order))


def table1(runs: Runs, published: bool) -> list[list[str]]:
    """Return table 1 on val, header first; with the paper's values and differences for its own data sets and RN50."""
    header = ["data", "Con.", "n", "seeds", *COUNTED, "blind", "ceiling", "Params", "FPS"]
    lines = [header]
    for dataset in datasets_of(runs, published):
        paper = TABLE1_RESULTS.get(dataset, {}) if published else {}
        for name, ablation in TABLE1.items():
            rows = runs.get((dataset, name, "val"), [])
            numbers = dict(zip(TABLE1_METRICS, paper[name], strict=True)) if name in paper else {}
            cells = [beside(measured(rows, metric), numbers.get(metric)) for metric in COUNTED]
            if paper and name not in paper:
                cells[0] += ", not in the paper"
            known = [measured(rows, column) for column in ("blind", "ceiling")]
            size, fps = measured(rows, "parameters"), measured(rows, "fps")
            lines.append(
                [
                    TITLES.get(dataset, dataset),
                    "yes" if ablation.contrastive else "-",
                    str(ablation.layers or "-"),
                    str(len(rows)) if rows else "-",
                    *cells,
                    *(str(value) if value else "-" for value in known),
                    beside(size, ablation.parameters if paper else None),
                    beside(fps, numbers.get("fps")),
                ]
            )
    return lines


def table2(everything: Mapping[Setting, Runs]) -> list[list[str]]:
    """Return table 2, header first: the paper's other methods, CRIS in the paper, and ours beside it, mIoU and oIoU."""
    lines = [["method", "backbone", *(f"{TITLES[dataset]} {split}" for dataset, split in TABLE2_COLUMNS)]]
    for (method, backbone), numbers in TABLE2_OTHERS.items():
        lines.append([method, backbone, *("-" if number is None else f"{number:.2f}" for number in numbers)])
    for model, numbers in TABLE2_CRIS.items():
        backbone = model.replace("rn", "ResNet-")
        lines.append(["CRIS, in the paper", backbone, *(f"{number:.2f}" for number in numbers)])
        ours = {setting: runs for setting, runs in everything.items() if setting.model == model}
        for setting, runs in (ours or {papers_setting(model): {}}).items():
            told = f" ({setting})" if len(ours) > 1 else ""
            full = [runs.get((dataset, "con_dec3", split), []) for dataset, split in TABLE2_COLUMNS]
            known = numbers if setting.published else [None] * len(numbers)
            cells = [
                beside(measured(rows, "mIoU"), paper) if rows else NOT_RUN for rows, paper in zip(full, known, strict=True)
            ]
            lines.append([f"CRIS, here{told}", backbone, *cells])
            totals = [measured(rows, "oIoU") for rows in full]
            lines.append([f"CRIS, here, oIoU{told}", backbone, *(str(value) if value else NOT_RUN for value in totals)])
    return lines


def splits_table(runs: Runs) -> list[list[str]]:
    """Return every split of the full model (n = 3), the way table 2 does, for data sets that the paper has not."""
    lines = [["data", "split", "seeds", "mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90", "blind", "ceiling"]]
    for dataset in datasets_of(runs, published=False):
        for (of, name, split), rows in runs.items():
            if of == dataset and name == "con_dec3" and dataset not in TABLE1_RESULTS:
                values = [measured(rows, column) for column in lines[0][3:]]
                lines.append([dataset, split, str(len(rows)), *(str(value) if value else "-" for value in values)])
    return lines


def markdown(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lay a table out as Markdown, the first columns to the left."""
    rule = ["---" if i < left else "---:" for i in range(len(lines[0]))]
    rows = [lines[0], rule, *lines[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# -- Plots --------------------------------------------------------------------------------------------------------------------


def plot_layers(runs: Runs, published: bool) -> Figure:
    """Draw mIoU against the decoder's layers n, with and without contrastive learning."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, dataset in enumerate(datasets_of(runs, published)):
        colour = f"C{number}"
        for contrastive, style in ((True, "o-"), (False, "s:")):
            points = []
            for name, row in TABLE1.items():
                value = measured(runs.get((dataset, name, "val"), []), "mIoU")
                if row.contrastive == contrastive and value:
                    points.append((row.layers, value.mean, value.spread or 0.0))
            if points:
                label = f"{TITLES.get(dataset, dataset)}, {'with' if contrastive else 'without'} Con."
                n, mean, spread = zip(*points, strict=True)
                axes.errorbar(n, mean, yerr=spread, fmt=style, color=colour, capsize=3, label=label)
        if published and dataset in TABLE1_RESULTS:
            paper = [
                (TABLE1[name].layers, values[0]) for name, values in TABLE1_RESULTS[dataset].items() if TABLE1[name].contrastive
            ]
            axes.plot(*zip(*paper, strict=True), "x--", color=colour, alpha=0.6, label=f"{TITLES[dataset]}, the paper")
    axes.set_xlabel("layers of the decoder, n")
    axes.set_ylabel("mIoU on val, percent")
    axes.set_xticks(range(5))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def plot_precision(runs: Runs, published: bool) -> Figure:
    """Draw Pr@X against X for every row of table 1, one panel a data set."""
    datasets = datasets_of(runs, published)
    figure = Figure(figsize=(4.2 * len(datasets), 3.8), layout="constrained")
    xs = [50, 60, 70, 80, 90]
    for dataset, axes in zip(datasets, figure.subplots(1, len(datasets), squeeze=False)[0], strict=True):
        for number, (name, row) in enumerate(TABLE1.items()):
            label = f"{'Con., ' if row.contrastive else ''}n = {row.layers}"
            values = [measured(runs.get((dataset, name, "val"), []), f"Pr@{x}") for x in xs]
            if all(values):
                axes.plot(xs, [value.mean for value in values if value], "o-", color=f"C{number}", label=label)
            if published and name in TABLE1_RESULTS.get(dataset, {}):
                axes.plot(
                    xs, TABLE1_RESULTS[dataset][name][1:6], "x--", color=f"C{number}", alpha=0.6, label=f"{label}, the paper"
                )
        axes.set_title(TITLES.get(dataset, dataset), fontsize=10)
        axes.set_xlabel("X, percent")
        axes.set_ylabel("Pr@X on val, percent")
        axes.set_xticks(xs)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


# -- The program --------------------------------------------------------------------------------------------------------------


def in_table1(setting: Setting) -> bool:
    """Whether the paper's table 1 has numbers of such runs: it is RN50's."""
    return setting.published and setting.model == "rn50"


def write_report(everything: Mapping[Setting, Runs], folder: Path) -> str:
    """Write all tables and plots into a folder; return the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(in_table1(setting) for setting in everything):  # the paper's own table, whatever ran
        everything = {**everything, papers_setting("rn50"): {}}
    parts = ["# Measured beside the paper", ""]
    for number, (setting, runs) in enumerate(everything.items(), start=1):
        published = in_table1(setting)
        parts += [f"## Table 1: {setting}", "", markdown(table1(runs, published), left=2), ""]
        for name, figure in (("layers", plot_layers(runs, published)), ("precision", plot_precision(runs, published))):
            figure.savefig(folder / f"{name}-{number}.png", dpi=110)
            parts += [f"![{name}, {setting}]({name}-{number}.png)", ""]
        splits = splits_table(runs)
        if len(splits) > 1:
            parts += ["The full model (n = 3) on every split:", "", markdown(splits, left=2), ""]
    second = table2(everything)
    parts += ["## Table 2", "", "mIoU, the paper's IoU; in parentheses the paper's value and the difference.", ""]
    parts += [markdown(second, left=2), ""]
    text = "\n".join(parts)
    (folder / "report.md").write_text(text, encoding="utf-8")
    write_csv(folder / "table1.csv", list(numbers1(everything)))
    write_csv(folder / "table2.csv", list(numbers2(everything)))
    return text


def numbers1(everything: Mapping[Setting, Runs]) -> Iterator[list[str]]:
    """Yield table 1 as data, header first: one number a line."""
    yield ["setting", "data", "contrastive", "layers", "column", "runs", "mean", "spread", "paper", "difference"]
    for setting, runs in everything.items():
        published = in_table1(setting)
        for dataset in datasets_of(runs, published):
            for name, ablation in TABLE1.items():
                rows = runs.get((dataset, name, "val"), [])
                printed = TABLE1_RESULTS.get(dataset, {}).get(name) if published else None
                paper = dict(zip(TABLE1_METRICS, printed, strict=True)) | {"parameters": ablation.parameters} if printed else {}
                for column in (*COUNTED, "blind", "ceiling", "parameters", "fps"):
                    where = [str(setting), dataset, str(ablation.contrastive).lower(), str(ablation.layers), column]
                    yield [*where, *as_data(measured(rows, column), paper.get(column))]


def numbers2(everything: Mapping[Setting, Runs]) -> Iterator[list[str]]:
    """Yield table 2 as data, header first: the paper's numbers, then ours beside the paper's."""
    yield ["method", "backbone", "setting", "data", "split", "column", "runs", "mean", "spread", "paper", "difference"]
    papers = TABLE2_OTHERS | {("CRIS", model): numbers for model, numbers in TABLE2_CRIS.items()}
    for (method, backbone), numbers in papers.items():
        for (dataset, split), number in zip(TABLE2_COLUMNS, numbers, strict=True):
            yield [method, backbone, "in the paper", dataset, split, "mIoU", *as_data(None, number)]
    for setting, runs in everything.items():
        for number, (dataset, split) in enumerate(TABLE2_COLUMNS if setting.model in TABLE2_CRIS else ()):
            rows = runs.get((dataset, "con_dec3", split), [])
            paper = TABLE2_CRIS[setting.model][number] if setting.published else None
            for column, value in (("mIoU", paper), ("oIoU", None)):
                where = ["CRIS", setting.model, str(setting), dataset, split, column]
                yield [*where, *as_data(measured(rows, column), value)]


def as_data(ours: Measured | None, paper: float | None) -> list[str]:
    """Return runs, mean, spread, the paper's number and the difference; empty where there is none."""
    if ours is None:
        return ["0", "", "", "" if paper is None else f"{paper:.2f}", ""]
    spread = "" if ours.spread is None else f"{ours.spread:.4f}"
    known = ["", ""] if paper is None else [f"{paper:.2f}", f"{ours.mean - paper:+.4f}"]
    return [str(len(ours.values)), f"{ours.mean:.4f}", spread, *known]


def write_csv(path: Path, lines: Iterable[Sequence[str]]) -> None:
    """Write a table as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def blocks(everything: Mapping[Setting, Runs]) -> dict[str, str]:
    """Return the tables that a README may hold, by the name of the block; runs from random weights have their own."""
    found = {"table2": markdown([line for line in table2(everything) if line[0].startswith(("method", "CRIS"))], left=2)}
    for setting, runs in everything.items():
        if setting.model not in TABLE2_CRIS:
            name = setting.model + ("-random" if setting.initial_weights == "random" else "")
            if f"table1-{name}" in found:
                raise InputError(f"there are several settings of {name}, and one table of each kind: report them apart")
            chosen = ["data", "Con.", "n", "seeds", "mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90", "blind", "ceiling"]
            lines = table1(runs, published=False)
            columns = [lines[0].index(name) for name in chosen]
            found[f"table1-{name}"] = markdown([[line[i] for i in columns] for line in lines], left=3)
            found[f"splits-{name}"] = markdown(splits_table(runs), left=2)
    return found


def fill_blocks(text: str, tables: Mapping[str, str]) -> str:
    """Put tables between ``<!-- report NAME -->`` and ``<!-- end -->``.

    Raises:
        InputError: If a block is named that is no table, or there is no block at all.
    """

    def fill(match: re.Match[str]) -> str:
        table = tables.get(match[2])
        if table is None:
            raise InputError(f"there is no table {match[2]!r} for this file, only {', '.join(tables)}")
        return f"{match[1]}\n{table}\n{match[3]}"

    filled, blocks_found = re.subn(r"(<!-- report ([\w-]+) -->\n).*?(\n<!-- end -->)", fill, text, flags=re.DOTALL)
    if not blocks_found:
        raise InputError(f"there is no block to fill: expected <!-- report NAME --> and <!-- end -->, of {', '.join(tables)}")
    return filled


def main(arguments: Sequence[str] | None = None) -> None:
    """Read runs, write the report, print it."""
    parser = argparse.ArgumentParser("python -m crislit.report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="results.json, folders of runs, records (CSV)")
    parser.add_argument("--output", type=Path, default=Path("report"), metavar="DIR", help="where to (default: report)")
    parser.add_argument("--fill", type=Path, metavar="FILE", help="fill the blocks <!-- report NAME --> of a Markdown file")
    options = parser.parse_args(arguments)
    with one_line_errors():
        everything = by_setting(collect(options.runs))
        text = write_report(everything, options.output)
        if options.fill:
            options.fill.write_text(fill_blocks(options.fill.read_text(encoding="utf-8"), blocks(everything)), encoding="utf-8")
        print(text)
        print(f"written to {options.output}: report.md, table1.csv, table2.csv and plots")


if __name__ == "__main__":
    main()
