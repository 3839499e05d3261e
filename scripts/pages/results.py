"""Fills ``results.md``, beside this file, with the numbers of the files in ``results/``."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.pages.text import ROOT, code, fill, join_blocks

from crislit.experiments.report import CLAIMED
from crislit.experiments.runs import collect, group_by_setting
from crislit.experiments.tables import SHORT_COLUMNS, markdown, tables_by_name

FOLDER = ROOT / "results"
Rows = Sequence[Mapping[str, Any]]
"""Rows of a table by the names of their columns."""
METRICS = ("dataset", "split", "samples", *SHORT_COLUMNS)
OLD_RECIPE = (
    'recipe.epochs=3 "recipe.optimizer.milestones=[2]" recipe.optimizer.cooldown=0 '
    "trainer.gradient_clip_val=null rearrange=false"
)
SPEED = {
    "evaluation": ("plain", "for inference", "ONNX Runtime", "ONNX Runtime, int8"),
    "latency": ("plain", "for inference", "ONNX Runtime", "ONNX Runtime, int8"),
    "training": (
        *("plain", "default", "rearrange", "4 sentences per image"),
        "rearrange, 4 sentences per image",
    ),
    "memory": ("plain", "recompute"),
    "data": ("whole sample, collated", "index of RefCOCO's size, opened"),
    "start": ("import crislit", "crislit.predict"),
    "agreement": ("plain", "ONNX Runtime, int8"),
}
"""Parts and candidates of the benchmark that the page shows."""


def read_csv(name: str) -> list[dict[str, str]]:
    """Return the rows of a file in ``results/``."""
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_json(name: str) -> dict[str, Any]:
    """Return the content of a JSON file in ``results/``."""
    content: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return content


def cell(row: Mapping[str, Any], column: str) -> str:
    """Format a value of a row; metrics are in percent."""
    value = row.get(column, "")
    if value == "":
        return "-"
    if column in SHORT_COLUMNS or column.startswith("R@"):
        return f"{100 * float(value):.2f}"
    if column in ("value", "ratio"):
        return f"{float(value):.3g}"
    return code(value[:7]) if column == "commit" else str(value).replace(" 1 threads", " 1 thread")


def table(rows: Rows, columns: Sequence[str], left: int = 2) -> str:
    """Return some columns of rows as Markdown, with so many columns aligned to the left."""
    cells = ([cell(row, column) for column in columns] for row in rows)
    return markdown([columns, *cells], left)


def origin(files: str, rows: Rows) -> str:
    """Return where rows come from: files, seeds, commits and hardware."""
    values = {
        column: ", ".join(sorted({cell(row, column) for row in rows}))
        for column in ("seed", "commit", "hardware")
    }
    seed = "" if values["seed"] == "-" else f"Seed {values['seed']}. "
    return fill(f"{files}. {seed}Commit {values['commit']}. {values['hardware']}.")


def section(files: str, rows: Rows, shown: str) -> str:
    """Return a table below the line that says where its rows come from."""
    return f"{origin(files, rows)}\n\n{shown}"


def run_section(name: str) -> str:
    """Return the metrics of a run on every split."""
    rows = read_csv(name)
    return section(code(name), rows, table(rows, METRICS))


def longer_section() -> str:
    """Return the metrics on val of the four networks of figure 4."""
    rows = [row for row in read_csv("figure4.csv") if row["split"] == "val"]
    for row in rows:
        row["Con."] = "yes" if row["contrastive"] == "true" else "-"
        row["n"] = row["layers"].replace("0", "-")
    return section("`figure4.csv`, val", rows, table(rows, ("Con.", "n", *SHORT_COLUMNS)))


def tiny_clip_section(recorded: Mapping[str, Any]) -> str:
    """Return how well the shipped CLIP finds captions and images."""
    rows = [
        {
            "captions of": captions.replace(" 1 objects", " 1 object"),
            "direction": way.replace("_", " "),
            **{f"R@{k}": recalls[f"{way}_R@{k}"] for k in (1, 5, 10)},
        }
        for captions, recalls in recorded["retrieval"].items()
        for way in ("image_to_text", "text_to_image")
    ]
    return section("`tiny_clip.json`", [recorded], table(rows, list(rows[0])))


def fine_tuning_section() -> str:
    """Return the runs of the page about fine-tuning."""
    keys = ("checkpoint=", "init_from=", "recipe.optimizer.learning_rate=")
    rows = read_csv("fine_tuning.csv")
    for row in rows:
        overrides = [code(x) for x in row["overrides"].split() if x.startswith(keys)]
        row["overrides"] = " ".join(overrides) or "none"
    columns = ("overrides", "samples", "mIoU", "oIoU", "Pr@50", "blind", "ceiling")
    return section("`fine_tuning.csv`", rows, table(rows, columns, left=1))


def kills_section() -> str:
    """Return the trials of killing and resuming, by number of processes and moment."""
    files = ("kills.csv", "kills_two_processes.csv")
    trials = [row for name in files for row in read_csv(name)]
    rows = []
    for processes, kind in sorted({(row["processes"], row["kind"]) for row in trials}):
        same = [x["same"] for x in trials if (x["processes"], x["kind"]) == (processes, kind)]
        counts = {"kills": len(same), "same weights": same.count("yes")}
        rows.append({"killed": kind, "processes": processes, **counts})
    return section(", ".join(map(code, files)), trials, table(rows, list(rows[0]), left=1))


def speed_section(measured: Rows) -> str:
    """Return the benchmark's measurements on a CPU."""
    rows = []
    for row in measured:
        words = {name: re.sub(" an? ", " per ", row[name]) for name in ("candidate", "unit")}
        if row["device"] == "cpu" and words["candidate"] in SPEED.get(row["part"], ()):
            ratio = row["ratio"] if "plain" in SPEED[row["part"]] else ""
            rows.append({**row, **words, "ratio": ratio})
    columns = ("part", "candidate", "value", "unit", "ratio")
    return section("`speed.csv`", rows, table(rows, columns))


def fuzz_section() -> str:
    """Return the runs of the fuzzer."""
    names = ("fuzz.json", "fuzz_pickles.json")
    runs = [{**(x := read_json(name)), "crashes": len(x["crashes"])} for name in names]
    rows = [{**run, "file": code(name)} for name, run in zip(names, runs, strict=True)]
    columns = ("file", "executions", "seconds", "crashes")
    return section(", ".join(map(code, names)), rows, table(rows, columns, left=1))


def results_page() -> str:
    """Return all measured results."""
    make_train = read_csv("make_train.csv")[0]
    files = ("table1.csv", "random_weights.csv")
    tables = tables_by_name(group_by_setting(collect(FOLDER / name for name in files)))
    tables = {name: text.replace("± ", "±&nbsp;") for name, text in tables.items()}
    rounding = [row for row in read_csv("rounding.csv") if row["split"] == "val"]
    tiny_clip, speed = read_json("tiny_clip.json"), read_csv("speed.csv")
    template = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    text = template.strip().format(
        **tables,
        **read_json("page_load.json"),
        minutes=round(float(make_train["seconds"]) / 60),
        steps=int(make_train["steps"]),
        make_train=run_section("make_train.csv"),
        shapes_tiny=run_section("shapes_tiny.csv"),
        figure4=longer_section(),
        old_recipe=OLD_RECIPE,
        table1=origin("`table1.csv`, val", read_csv("table1.csv")),
        claimed=fill(CLAIMED),
        random_weights=origin("`random_weights.csv`", read_csv("random_weights.csv")),
        tiny_clip_minutes=round(tiny_clip["seconds"] / 60),
        tiny_clip=tiny_clip_section(tiny_clip),
        fine_tuning=fine_tuning_section(),
        overfit=run_section("overfit.csv"),
        rounding=table(rounding, ("commit", "hardware", "mIoU", "oIoU", "Pr@50", "blind")),
        kills=kills_section(),
        gpu="No GPU was measured; " if all(row["device"] == "cpu" for row in speed) else "",
        speed=speed_section(speed),
        fuzz=fuzz_section(),
    )
    return join_blocks([text])
