"""Tables 1 and 2: measured runs beside the paper's results."""

from collections.abc import Iterator, Sequence

from crislit.errors import require
from crislit.experiments.claims import claims_table
from crislit.experiments.paper import (
    TABLE1,
    TABLE1_METRICS,
    TABLE1_RESULTS,
    TABLE2_COLUMNS,
    TABLE2_CRIS,
    TABLE2_OTHERS,
    TITLES,
    Ablation,
)
from crislit.experiments.records import Row
from crislit.experiments.runs import (
    Groups,
    Measured,
    Runs,
    Setting,
    list_datasets,
    measure_column,
    paper_setting,
)

METRIC_COLUMNS = ("mIoU", "oIoU", "Pr@50", "Pr@60", "Pr@70", "Pr@80", "Pr@90")
SHORT_COLUMNS = ("mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90", "blind", "ceiling")
NOT_RUN = "not run"
VALUE_COLUMNS = ("runs", "mean", "spread", "paper", "difference")
TABLE1_CSV = ("setting", "data", "contrastive", "layers", "column", *VALUE_COLUMNS)
TABLE2_CSV = ("method", "backbone", "setting", "data", "split", "column", *VALUE_COLUMNS)


def format_beside(ours: Measured | None, paper: float | None, was_run: bool = False) -> str:
    """Format a number with the paper's, and the difference, in parentheses.

    A run may lack a number that its version did not measure.
    """
    text = str(ours or ("-" if was_run else NOT_RUN))
    if paper is None:
        return text
    difference = "" if ours is None else f", {ours.mean - paper:+.2f}"
    return f"{text} ({paper:.2f}{difference})"


def format_each(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Format columns of some rows, each without the paper's number."""
    return [str(measure_column(rows, column) or "-") for column in columns]


def table1(runs: Runs, published: bool, paper_rows: bool = False) -> list[list[str]]:
    """Return table 1 on val, the header first.

    Args:
        runs: The rows of one setting.
        published: Add the paper's values and the differences; needs RN50 in the paper's setting.
        paper_rows: Add the rows that were not run.
    """
    table = [["data", "Con.", "n", "seeds", *METRIC_COLUMNS, "blind", "ceiling", "Params"]]
    for dataset, ablation, rows, paper in table1_rows(runs, published, paper_rows):
        cells = {
            column: format_beside(measure_column(rows, column), paper.get(column), bool(rows))
            for column in (*METRIC_COLUMNS, "parameters")
        }
        if paper and "mIoU" not in paper:
            cells["mIoU"] += ", not in the paper"
        table.append(
            [
                TITLES.get(dataset, dataset),
                "yes" if ablation.contrastive else "-",
                str(ablation.layers or "-"),
                str(len(rows) or "-"),
                *(cells[metric] for metric in METRIC_COLUMNS),
                *format_each(rows, ["blind", "ceiling"]),
                cells["parameters"],
            ]
        )
    return table


def table1_rows(
    runs: Runs, published: bool, paper_rows: bool
) -> Iterator[tuple[str, Ablation, Sequence[Row], dict[str, float]]]:
    """Yield data set, ablation, measured rows on val, and the paper's numbers by column.

    Without results of an ablation on a data set, the paper has its number of parameters only.
    """
    for dataset in list_datasets(runs, published and paper_rows):
        results = TABLE1_RESULTS.get(dataset, {}) if published else {}
        for name, ablation in TABLE1.items():
            paper = {"parameters": ablation.parameters} if results else {}
            if name in results:
                paper |= dict(zip(TABLE1_METRICS, results[name], strict=True))
            rows = runs.get((dataset, name, "val"), [])
            if rows or paper_rows:
                yield dataset, ablation, rows, paper


def table2(groups: Groups, paper_rows: bool = False) -> list[list[str]]:
    """Return table 2, the header first.

    Args:
        groups: The rows of all settings.
        paper_rows: Add other methods, the paper's CRIS, and the columns that were not run.
    """
    columns = [column for column in TABLE2_COLUMNS if paper_rows or has_column(groups, column)]
    table = [["method", "backbone", *(f"{TITLES[data]} {split}" for data, split in columns)]]
    if paper_rows:
        table += [
            [method, backbone, *("-" if number is None else f"{number:.2f}" for number in others)]
            for (method, backbone), others in TABLE2_OTHERS.items()
        ]
    for model in dict.fromkeys([*TABLE2_CRIS, *(setting.model for setting in groups)]):
        numbers = dict(zip(TABLE2_COLUMNS, TABLE2_CRIS.get(model, ()), strict=False))
        backbone = model.replace("rn", "ResNet-")
        ours = {
            setting: runs
            for setting, runs in groups.items()
            if setting.model == model
            and any(has_column({setting: runs}, column) for column in columns)
        }
        if paper_rows and numbers:
            cells = [f"{number:.2f}" for number in numbers.values()]
            table.append(["CRIS, in the paper", backbone, *cells])
            ours = ours or {paper_setting(model): {}}
        for setting, runs in ours.items():
            suffix = f" ({setting})" if len(ours) > 1 else ""
            full = {column: full_model(runs, column) for column in columns}
            paper = numbers if setting.published else {}
            miou = [
                format_beside(measure_column(rows, "mIoU"), paper.get(column)) if rows else NOT_RUN
                for column, rows in full.items()
            ]
            oiou = [str(measure_column(rows, "oIoU") or NOT_RUN) for rows in full.values()]
            table.append([f"CRIS, here{suffix}", backbone, *miou])
            table.append([f"CRIS, here, oIoU{suffix}", backbone, *oiou])
    return table


def full_model(runs: Runs, column: tuple[str, str]) -> Sequence[Row]:
    """Return the runs of the full model (n = 3) for a column of table 2."""
    dataset, split = column
    return runs.get((dataset, "con_dec3", split), [])


def has_column(groups: Groups, column: tuple[str, str]) -> bool:
    """Whether a column of table 2 was measured."""
    return any(full_model(runs, column) for runs in groups.values())


def splits_table(runs: Runs) -> list[list[str]]:
    """Return the full model (n = 3) on every split of the data sets that the paper does not use."""
    table = [["data", "split", "seeds", *SHORT_COLUMNS]]
    table += [
        [dataset, split, str(len(rows)), *format_each(rows, SHORT_COLUMNS)]
        for dataset in list_datasets(runs, paper_rows=False)
        for (run_dataset, name, split), rows in runs.items()
        if run_dataset == dataset and name == "con_dec3" and dataset not in TABLE1_RESULTS
    ]
    return table


def markdown(table: Sequence[Sequence[str]], left: int) -> str:
    """Format a table as Markdown, with so many columns aligned to the left."""
    rule = ["---" if i < left else "---:" for i in range(len(table[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [table[0], rule, *table[1:]])


def is_in_table1(setting: Setting) -> bool:
    """Whether the paper's table 1 has results of such runs; it is about RN50."""
    return setting.published and setting.model == "rn50"


def table1_values(groups: Groups, paper_rows: bool = False) -> Iterator[dict[str, str]]:
    """Yield table 1 as data, one number per row, with the columns of ``TABLE1_CSV``."""
    for setting, runs in groups.items():
        lines = table1_rows(runs, is_in_table1(setting), paper_rows)
        for dataset, ablation, rows, paper in lines:
            for column in (*METRIC_COLUMNS, "blind", "ceiling", "parameters", "fps"):
                number = paper.get(column) if "mIoU" in paper else None
                yield {
                    "setting": str(setting),
                    "data": dataset,
                    "contrastive": str(ablation.contrastive).lower(),
                    "layers": str(ablation.layers),
                    "column": column,
                    **value_cells(measure_column(rows, column), number),
                }


def table2_values(groups: Groups, paper_rows: bool = False) -> Iterator[dict[str, str]]:
    """Yield table 2 as data, one number per row, with the columns of ``TABLE2_CSV``."""
    published = TABLE2_OTHERS | {("CRIS", model): row for model, row in TABLE2_CRIS.items()}
    for (method, backbone), numbers in published.items() if paper_rows else ():
        for (dataset, split), number in zip(TABLE2_COLUMNS, numbers, strict=True):
            where = (method, backbone, "in the paper", dataset, split, "mIoU")
            yield dict(zip(TABLE2_CSV, where, strict=False)) | value_cells(None, number)
    for setting, runs in groups.items():
        ours = dict(zip(TABLE2_COLUMNS, TABLE2_CRIS.get(setting.model, ()), strict=False))
        for column in TABLE2_COLUMNS:
            rows = full_model(runs, column)
            if not rows and not (paper_rows and ours):
                continue
            paper = {"mIoU": ours.get(column) if setting.published else None}
            for metric in ("mIoU", "oIoU"):
                where = ("CRIS", setting.model, str(setting), *column, metric)
                yield dict(zip(TABLE2_CSV, where, strict=False)) | value_cells(
                    measure_column(rows, metric), paper.get(metric)
                )


def value_cells(ours: Measured | None, paper: float | None) -> dict[str, str]:
    """Return the cells of ``VALUE_COLUMNS``, empty where a number is missing."""
    spread = ours.spread if ours else None
    return {
        "runs": str(len(ours.values)) if ours else "0",
        "mean": f"{ours.mean:.4f}" if ours else "",
        "spread": "" if spread is None else f"{spread:.4f}",
        "paper": "" if paper is None else f"{paper:.2f}",
        "difference": f"{ours.mean - paper:+.4f}" if ours and paper is not None else "",
    }


def tables_by_name(groups: Groups) -> dict[str, str]:
    """Return the tables as Markdown by name: ``table1-tiny``, ``claims-tiny``, ``splits-tiny``.

    Those of runs from random weights end in ``-random``. ``table2`` is the paper's, too.

    Raises:
        InputError: If two settings would have the same name.
    """
    cris = [row for row in table2(groups, paper_rows=True) if row[0].startswith(("method", "CRIS"))]
    tables = {"table2": markdown(cris, left=2)}
    for setting, runs in groups.items():
        if setting.model in TABLE2_CRIS:
            continue
        name = setting.model + ("-random" if setting.initial_weights == "random" else "")
        require(
            f"table1-{name}" not in tables,
            f"there are several settings of {name}, but one table of each kind: report them "
            "separately",
        )
        table = table1(runs, published=False)
        indices = [table[0].index(c) for c in ("data", "Con.", "n", "seeds", *SHORT_COLUMNS)]
        tables[f"table1-{name}"] = markdown([[row[i] for i in indices] for row in table], left=3)
        tables[f"claims-{name}"] = markdown(claims_table(runs, parts=False), left=2)
        tables[f"splits-{name}"] = markdown(splits_table(runs), left=2)
    return tables
