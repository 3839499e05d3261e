"""Tables 1 and 2: measured runs beside the paper's numbers."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence

from crislit.data.shapes import SETS
from crislit.errors import InputError
from crislit.experiments.paper import (
    TABLE1,
    TABLE1_METRICS,
    TABLE1_RESULTS,
    TABLE2_COLUMNS,
    TABLE2_CRIS,
    TABLE2_OTHERS,
)
from crislit.experiments.runs import Measured, Runs, Setting, measure_column, paper_setting

log = logging.getLogger(__name__)
TITLES = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "grefcoco": "G-Ref"}
"""The paper's names of the data sets; every other set is called as its configuration."""
METRIC_COLUMNS = ("mIoU", "oIoU", "Pr@50", "Pr@60", "Pr@70", "Pr@80", "Pr@90")
NOT_RUN = "not run"


def format_beside(ours: Measured | None, paper: float | None) -> str:
    """Write a number beside the paper's, with the difference."""
    told = NOT_RUN if ours is None else str(ours)
    if paper is None:
        return told
    return (
        f"{told} ({paper:.2f})"
        if ours is None
        else f"{told} ({paper:.2f}, {ours.mean - paper:+.2f})"
    )


def list_datasets(runs: Runs, published: bool) -> list[str]:
    """Return the data sets of a table 1: those that ran, in the paper's order, and its three where its numbers are to stand."""
    found = dict.fromkeys(
        [*(TABLE1_RESULTS if published else ()), *(dataset for dataset, _, _ in runs)]
    )
    order = [*TABLE1_RESULTS, *SETS]
    return sorted(
        found, key=lambda dataset: order.index(dataset) if dataset in order else len(order)
    )


def table1(runs: Runs, published: bool) -> list[list[str]]:
    """Return table 1 on val, header first; with the paper's values and differences for its own data sets and RN50."""
    header = ["data", "Con.", "n", "seeds", *METRIC_COLUMNS, "blind", "ceiling", "Params", "FPS"]
    lines = [header]
    for dataset in list_datasets(runs, published):
        paper = TABLE1_RESULTS.get(dataset, {}) if published else {}
        for name, ablation in TABLE1.items():
            rows = runs.get((dataset, name, "val"), [])
            numbers = dict(zip(TABLE1_METRICS, paper[name], strict=True)) if name in paper else {}
            cells = [
                format_beside(measure_column(rows, metric), numbers.get(metric))
                for metric in METRIC_COLUMNS
            ]
            if paper and name not in paper:
                cells[0] += ", not in the paper"
            known = [measure_column(rows, column) for column in ("blind", "ceiling")]
            size, fps = measure_column(rows, "parameters"), measure_column(rows, "fps")
            lines.append(
                [
                    TITLES.get(dataset, dataset),
                    "yes" if ablation.contrastive else "-",
                    str(ablation.layers or "-"),
                    str(len(rows)) if rows else "-",
                    *cells,
                    *(str(value) if value else "-" for value in known),
                    format_beside(size, ablation.parameters if paper else None),
                    format_beside(fps, numbers.get("fps")),
                ]
            )
    return lines


def table2(everything: Mapping[Setting, Runs]) -> list[list[str]]:
    """Return table 2, header first: the paper's other methods, CRIS in the paper, and ours beside it, mIoU and oIoU."""
    lines = [
        ["method", "backbone", *(f"{TITLES[dataset]} {split}" for dataset, split in TABLE2_COLUMNS)]
    ]
    for (method, backbone), numbers in TABLE2_OTHERS.items():
        lines.append(
            [method, backbone, *("-" if number is None else f"{number:.2f}" for number in numbers)]
        )
    for model, numbers in TABLE2_CRIS.items():
        backbone = model.replace("rn", "ResNet-")
        lines.append(["CRIS, in the paper", backbone, *(f"{number:.2f}" for number in numbers)])
        ours = {setting: runs for setting, runs in everything.items() if setting.model == model}
        for setting, runs in (ours or {paper_setting(model): {}}).items():
            told = f" ({setting})" if len(ours) > 1 else ""
            full = [runs.get((dataset, "con_dec3", split), []) for dataset, split in TABLE2_COLUMNS]
            known = numbers if setting.published else [None] * len(numbers)
            cells = [
                format_beside(measure_column(rows, "mIoU"), paper) if rows else NOT_RUN
                for rows, paper in zip(full, known, strict=True)
            ]
            lines.append([f"CRIS, here{told}", backbone, *cells])
            totals = [measure_column(rows, "oIoU") for rows in full]
            lines.append(
                [
                    f"CRIS, here, oIoU{told}",
                    backbone,
                    *(str(value) if value else NOT_RUN for value in totals),
                ]
            )
    return lines


def splits_table(runs: Runs) -> list[list[str]]:
    """Return every split of the full model (n = 3), the way table 2 does, for data sets that the paper has not."""
    lines = [
        ["data", "split", "seeds", "mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90", "blind", "ceiling"]
    ]
    for dataset in list_datasets(runs, published=False):
        for (of, name, split), rows in runs.items():
            if of == dataset and name == "con_dec3" and dataset not in TABLE1_RESULTS:
                values = [measure_column(rows, column) for column in lines[0][3:]]
                lines.append(
                    [
                        dataset,
                        split,
                        str(len(rows)),
                        *(str(value) if value else "-" for value in values),
                    ]
                )
    return lines


def markdown(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lay a table out as Markdown, the first columns to the left."""
    rule = ["---" if i < left else "---:" for i in range(len(lines[0]))]
    rows = [lines[0], rule, *lines[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def is_in_table1(setting: Setting) -> bool:
    """Whether the paper's table 1 has numbers of such runs: it is RN50's."""
    return setting.published and setting.model == "rn50"


def table1_values(everything: Mapping[Setting, Runs]) -> Iterator[list[str]]:
    """Yield table 1 as data, header first: one number a line."""
    yield [
        "setting",
        "data",
        "contrastive",
        "layers",
        "column",
        "runs",
        "mean",
        "spread",
        "paper",
        "difference",
    ]
    for setting, runs in everything.items():
        published = is_in_table1(setting)
        for dataset in list_datasets(runs, published):
            for name, ablation in TABLE1.items():
                rows = runs.get((dataset, name, "val"), [])
                printed = TABLE1_RESULTS.get(dataset, {}).get(name) if published else None
                paper = (
                    dict(zip(TABLE1_METRICS, printed, strict=True))
                    | {"parameters": ablation.parameters}
                    if printed
                    else {}
                )
                for column in (*METRIC_COLUMNS, "blind", "ceiling", "parameters", "fps"):
                    where = [
                        str(setting),
                        dataset,
                        str(ablation.contrastive).lower(),
                        str(ablation.layers),
                        column,
                    ]
                    yield [*where, *value_cells(measure_column(rows, column), paper.get(column))]


def table2_values(everything: Mapping[Setting, Runs]) -> Iterator[list[str]]:
    """Yield table 2 as data, header first: the paper's numbers, then ours beside the paper's."""
    yield [
        "method",
        "backbone",
        "setting",
        "data",
        "split",
        "column",
        "runs",
        "mean",
        "spread",
        "paper",
        "difference",
    ]
    papers = TABLE2_OTHERS | {("CRIS", model): numbers for model, numbers in TABLE2_CRIS.items()}
    for (method, backbone), numbers in papers.items():
        for (dataset, split), number in zip(TABLE2_COLUMNS, numbers, strict=True):
            yield [
                method,
                backbone,
                "in the paper",
                dataset,
                split,
                "mIoU",
                *value_cells(None, number),
            ]
    for setting, runs in everything.items():
        for number, (dataset, split) in enumerate(
            TABLE2_COLUMNS if setting.model in TABLE2_CRIS else ()
        ):
            rows = runs.get((dataset, "con_dec3", split), [])
            paper = TABLE2_CRIS[setting.model][number] if setting.published else None
            for column, value in (("mIoU", paper), ("oIoU", None)):
                where = ["CRIS", setting.model, str(setting), dataset, split, column]
                yield [*where, *value_cells(measure_column(rows, column), value)]


def value_cells(ours: Measured | None, paper: float | None) -> list[str]:
    """Return runs, mean, spread, the paper's number and the difference; empty where there is none."""
    if ours is None:
        return ["0", "", "", "" if paper is None else f"{paper:.2f}", ""]
    spread = "" if ours.spread is None else f"{ours.spread:.4f}"
    known = ["", ""] if paper is None else [f"{paper:.2f}", f"{ours.mean - paper:+.4f}"]
    return [str(len(ours.values)), f"{ours.mean:.4f}", spread, *known]


def readme_tables(everything: Mapping[Setting, Runs]) -> dict[str, str]:
    """Return the tables that a README may hold, by the name of the block; runs from random weights have their own."""
    found = {
        "table2": markdown(
            [line for line in table2(everything) if line[0].startswith(("method", "CRIS"))], left=2
        )
    }
    for setting, runs in everything.items():
        if setting.model not in TABLE2_CRIS:
            name = setting.model + ("-random" if setting.initial_weights == "random" else "")
            if f"table1-{name}" in found:
                raise InputError(
                    f"there are several settings of {name}, and one table of each kind: report them apart"
                )
            chosen = [
                "data",
                "Con.",
                "n",
                "seeds",
                "mIoU",
                "oIoU",
                "Pr@50",
                "Pr@70",
                "Pr@90",
                "blind",
                "ceiling",
            ]
            lines = table1(runs, published=False)
            columns = [lines[0].index(name) for name in chosen]
            found[f"table1-{name}"] = markdown(
                [[line[i] for i in columns] for line in lines], left=3
            )
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
            raise InputError(
                f"there is no table {match[2]!r} for this file, only {', '.join(tables)}"
            )
        return f"{match[1]}\n{table}\n{match[3]}"

    filled, blocks_found = re.subn(
        r"(<!-- report ([\w-]+) -->\n).*?(\n<!-- end -->)", fill, text, flags=re.DOTALL
    )
    if not blocks_found:
        raise InputError(
            f"there is no block to fill: expected <!-- report NAME --> and <!-- end -->, of {', '.join(tables)}"
        )
    return filled
