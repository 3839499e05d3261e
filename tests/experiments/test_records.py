"""Measured results as CSV: what identifies a run, broken rows, and several processes at once."""

import copy
import logging
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from crislit.config import compose_config
from crislit.errors import InputError
from crislit.experiments.records import (
    COLUMNS,
    Row,
    add_run,
    expected_splits,
    find_run,
    is_valid_row,
    read_rows,
    result_rows,
    write_rows,
)
from crislit.training.metrics import METRICS
from crislit.training.provenance import fingerprint


def results(*overrides: str, **changes: Any) -> dict[str, Any]:
    """Return a results.json as training writes it, with made-up numbers."""
    config = compose_config(overrides)
    is_gref = config["dataset"]["name"].startswith("g")
    splits = ("val", "test") if is_gref else ("val", "testA", "testB")
    values = {"samples": 10, "empty": 0, **dict.fromkeys(METRICS, 0.5)}
    made: dict[str, Any] = {
        "config": config,
        "overrides": list(overrides),
        "seed": config["seed"],
        "commit": "abc",
        "hardware": "a laptop",
        "parameters": 123,
        "fps": 2.5,
        "seconds": 7.4,
        "steps": 9,
        "checkpoint": "x.ckpt",
        "initial_weights": "random",
        "threshold": 0.35,
        "protocol": "all_sentences",
        "splits": {split: dict(values) for split in splits},
        "blind": {"val": dict(values, mIoU=0.1)},
        "ceiling": {split: {"mIoU": 0.7} for split in splits},
    }
    return made | changes


def find(path: Path, *overrides: str) -> list[Row]:
    """Return the recorded rows of a run."""
    config = compose_config(overrides)
    return find_run(path, config, fingerprint(config)["experiment"])


# -- Rows


def test_a_run_has_one_row_per_split_with_what_it_takes_to_repeat_it(tmp_path: Path) -> None:
    run = results("ablation=dec1", "seed=3")
    add_run(tmp_path / "deep/runs.csv", run)
    rows = read_rows(tmp_path / "deep/runs.csv")
    assert rows == result_rows(run)
    assert [row["split"] for row in rows] == ["val", "testA", "testB"]
    first = rows[0]
    assert set(first) == set(COLUMNS)
    expected = {"contrastive": "false", "layers": "1", "seed": "3", "mIoU": "0.5000"}
    expected |= {"blind": "0.1000", "ceiling": "0.7000"}
    assert first | expected == first
    assert first["overrides"] == "ablation=dec1 seed=3"
    assert [row["blind"] for row in rows[1:]] == ["", ""]
    assert find(tmp_path / "deep/runs.csv", "ablation=dec1", "seed=3") == rows


def test_recording_a_run_again_replaces_it_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    first = results("seed=1")
    add_run(path, first)
    add_run(path, results("seed=2"))
    again = copy.deepcopy(first)
    again["splits"]["val"]["mIoU"] = 0.75
    add_run(path, again)
    rows = read_rows(path)
    assert len(rows) == 6
    scores = {(row["seed"], row["mIoU"]) for row in rows if row["split"] == "val"}
    assert scores == {("1", "0.7500"), ("2", "0.5000")}


def test_a_missing_file_holds_no_run(tmp_path: Path) -> None:
    assert find(tmp_path / "none.csv") == []


def record_seed(path: Path, seed: int) -> None:
    add_run(path, results(f"seed={seed}"))


def test_processes_that_record_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(record_seed, [tmp_path / "runs.csv"] * 12, range(12)))
    rows = read_rows(tmp_path / "runs.csv")
    assert sorted(int(row["seed"]) for row in rows if row["split"] == "val") == list(range(12))
    assert len(rows) == 36


# -- Incomplete runs


def test_a_run_that_lost_a_split_counts_as_not_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, run = tmp_path / "runs.csv", results()
    add_run(path, run)
    write_rows(path, read_rows(path)[:2])
    with caplog.at_level(logging.WARNING):
        assert find(path) == []
    assert "holds only val, testA, not testB of run" in caplog.text
    add_run(path, run)
    assert len(find(path)) == 3


def test_a_run_that_evaluated_fewer_splits_than_requested_is_run_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, only_val = tmp_path / "runs.csv", "dataset.evaluation_splits=[val]"
    run = results(only_val)
    run["splits"] = {"val": run["splits"]["val"]}
    add_run(path, run)
    assert len(find(path, only_val)) == 1
    assert find(path) == []
    assert "holds only val, not testA, testB of run" in caplog.text


@pytest.mark.parametrize(
    ("override", "splits"),
    [
        ("dataset.name=mine", ["val", "testA", "testB"]),  # a name is a label
        ("dataset=shapes", ["val", "testA", "testB"]),
        ("dataset=gshapes", ["val", "test"]),
        ("dataset=refcoco", ["val", "testA", "testB"]),
        ("dataset=grefcoco", ["val", "test"]),
    ],
)
def test_the_splits_of_known_data_sets_are_expected(override: str, splits: list[str]) -> None:
    assert expected_splits(compose_config([override])) == splits


def test_a_run_without_the_requested_blind_control_is_run_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, no_blind = tmp_path / "runs.csv", "dataset.blind_control=false"
    add_run(path, results(no_blind, blind={}))
    assert len(find(path, no_blind)) == 3
    assert find(path) == []
    assert "no blind control on val" in caplog.text


# -- Broken files


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("mIoU", "nan"), ("mIoU", "1.5"), ("mIoU", ""), ("samples", "0"), ("samples", "x")),
        *(("Pr@90", "-1"), ("split", "other"), ("blind", "7"), ("blind", "abc"), ("fps", "nan")),
        *(("fps", "x"), ("layers", "three"), ("contrastive", "maybe")),
    ],
)
def test_a_broken_row_counts_as_not_run_and_is_named(
    column: str, value: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results())
    rows = read_rows(path)
    rows[1][column] = value
    assert not is_valid_row(rows[1])
    write_rows(path, rows)
    with caplog.at_level(logging.WARNING):
        assert find(path) == []
    assert "ignoring broken rows" in caplog.text
    assert rows[1]["experiment"] in caplog.text


def test_a_row_with_an_additional_field_is_broken_and_others_can_be_recorded(
    tmp_path: Path,
) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results("seed=1"))
    # Edited by hand, without quotation marks.
    path.write_text(path.read_text().replace("a laptop", "a laptop, old"))
    assert not find(path, "seed=1")
    add_run(path, results("seed=2"))
    assert {row["seed"] for row in read_rows(path)} == {"2"}


def test_a_truncated_file_keeps_its_complete_runs(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results("seed=1"))
    size = path.stat().st_size
    add_run(path, results("seed=2"))
    path.write_bytes(path.read_bytes()[: size + 40])
    assert {row["seed"] for row in read_rows(path)} == {"1"}
    assert find(path, "seed=1")
    assert not find(path, "seed=2")


def test_a_file_with_other_columns_is_an_error(tmp_path: Path) -> None:
    path, message = tmp_path / "runs.csv", r"runs\.csv is not a record of runs: "
    path.write_text("a,b\n1,2\n")
    columns = r"it lacks the columns .* and it has unknown columns a, b"
    with pytest.raises(InputError, match=message + columns):
        read_rows(path)
    path.write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(InputError, match=message + ".*utf-8"):
        read_rows(path)
    # Before anything is trained.
    with pytest.raises(InputError, match=r"is not a record of runs: .*directory"):
        find(tmp_path)
