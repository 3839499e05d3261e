"""The README is short, and its numbers are the recorded ones."""

import csv
import re
from pathlib import Path

import pytest

from crislit.experiments.claims import evaluate_claims
from crislit.experiments.runs import collect, group_by_setting

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130
    assert "make train" in README


def test_the_evidence_is_the_recorded_one() -> None:
    (runs,) = group_by_setting(collect([ROOT / "results/table1.csv"])).values()
    (full,) = [
        tested.differences
        for tested in evaluate_claims(runs)
        if (tested.dataset, tested.comparison) == ("shapes", "con_dec3 - baseline")
    ]
    assert len(full.values) == 3
    assert f"beats the baseline** by {full.mean:.1f} points of mIoU (three seeds)" in README
    kills = [ROOT / f"results/{name}.csv" for name in ("kills", "kills_two_processes")]
    rows = [row for path in kills for row in csv.DictReader(path.read_text().splitlines())]
    assert {row["same"] for row in rows} == {"yes"}
    assert f"each of {len(rows)} kills" in README


def test_the_result_table_shows_the_recorded_run() -> None:
    with (ROOT / "results/make_train.csv").open() as file:
        recorded = {row["split"]: row for row in csv.DictReader(file)}
    assert list(recorded) == ["val", "testA", "testB"]
    for split, row in recorded.items():
        shown = re.search(rf"^\| {split} \| (.*) \|$", README, re.MULTILINE)
        assert shown, split
        cells = [cell.strip() for cell in shown.group(1).split("|")]
        names = ("mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90", "blind", "ceiling")
        expected = [f"{100 * float(row[name]):.2f}" if row[name] else "-" for name in names]
        assert cells == [row["samples"], *expected]
    assert float(recorded["val"]["mIoU"]) >= 2 * float(recorded["val"]["blind"])


@pytest.fixture(scope="module")
def speed() -> dict[tuple[str, str], dict[str, str]]:
    """Rows of the recorded benchmark on a CPU, by part and candidate."""
    return {(row["part"], row["candidate"]): row for row in speed_rows() if row["device"] == "cpu"}


def speed_rows() -> list[dict[str, str]]:
    with (ROOT / "results/speed.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_readme_and_the_speed_log_say_whether_a_gpu_was_measured() -> None:
    without = {row["device"] for row in speed_rows()} == {"cpu"}
    for page in (README, (ROOT / "results/speed_log.md").read_text()):
        assert ("No GPU was measured." in " ".join(page.split())) == without


def row_of(page: str, label: str) -> list[str]:
    """Return the cells of a table's row."""
    (cells,) = re.findall(rf"^\| {re.escape(label)} \| (.*) \|$", page, re.MULTILINE)
    return [cell.strip() for cell in cells.split("|")]


def test_the_speed_in_the_readme_is_the_recorded_one(
    speed: dict[tuple[str, str], dict[str, str]],
) -> None:
    ratio = float(speed["evaluation", "for inference"]["ratio"])
    assert f"is {ratio:.1f} times as fast as the released forward pass" in README


def test_the_speed_log_shows_the_recorded_numbers(
    speed: dict[tuple[str, str], dict[str, str]],
) -> None:
    log = (ROOT / "results/speed_log.md").read_text()

    def ratio(part: str, name: str) -> str:
        return f"{float(speed[part, name]['ratio']):.2f}"

    memory = 1 / float(speed["memory", "recompute"]["ratio"])
    start = float(speed["start", "import crislit"]["value"])
    prediction = 1 / float(speed["start", "crislit.predict"]["ratio"])
    expected = {
        "evaluation, seven sentences per image": ratio("evaluation", "for inference"),
        "one image, one sentence": ratio("latency", "for inference"),
        "training step, default": ratio("training", "default"),
        "`rearrange=true`": ratio("training", "rearrange"),
        "four sentences per image": ratio("training", "4 sentences an image"),
        "`rearrange=true`, four sentences per image": ratio(
            "training", "rearrange, 4 sentences an image"
        ),
        "memory, `recompute=true`, relative to the baseline": f"{memory:.2f}",
        "loading, relative to the floor": ratio("data", "whole sample, collated"),
        "the same with floats": ratio("data", "and made floats, as the training process does"),
        "`import crislit`, s": f"{start:.2f}",
        "a prediction, relative to the imports of its libraries": f"{prediction:.2f}",
    }
    assert {label: row_of(log, label)[1] for label in expected} == expected
    labels = {"baseline": "plain", "default (channels last)": "default"}
    errors = {
        label: f"{float(speed['gradients', f'{name}, float32']['value']):.1e}"
        for label, name in labels.items()
    }
    assert {label: row_of(log, label)[1].replace("e-", "e-0") for label in labels} == errors
