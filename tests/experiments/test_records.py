"""Measured results as CSV: what identifies a run, broken rows, and several processes at once."""

import copy
import functools
import logging
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pipe, Process
from pathlib import Path
from typing import Any

import pytest

from crislit.config import compose_config
from crislit.errors import InputError
from crislit.experiments.record_lock import lock_record
from crislit.experiments.records import (
    COLUMNS,
    Row,
    add_run,
    check_record,
    expected_splits,
    find_run,
    is_valid_row,
    read_rows,
    result_rows,
    write_rows,
)
from crislit.io import write_csv
from crislit.training.metrics import METRICS
from crislit.training.provenance import fingerprint


@functools.cache
def compose_once(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Compose a configuration, which takes most of these tests' time."""
    return compose_config(overrides)


def results(*overrides: str, **changes: Any) -> dict[str, Any]:
    """Return a results.json as training writes it, with made-up numbers."""
    config = copy.deepcopy(compose_once(overrides))
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


def find(path: Path, *overrides: str, data: str = "") -> list[Row]:
    """Return the recorded rows of a run."""
    config = compose_once(overrides)
    return find_run(path, config, fingerprint(config, data)["experiment"], data)


def on_data(data: str, *overrides: str, **changes: Any) -> dict[str, Any]:
    """Return a results.json of a run on data with this digest."""
    made = results(*overrides, **changes)
    return made | fingerprint(made["config"], data)


def rewrite(path: Path, drop: tuple[str, ...] = (), add: dict[str, str] | None = None) -> None:
    """Write a record as another version would: without some columns, or with others."""
    rows = [
        {name: value for name, value in row.items() if name not in drop} | (add or {})
        for row in read_rows(path)
    ]
    write_csv(path, list(rows[0]), rows)


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
    assert first["data"] == "", "unknown in results of version 0.1"
    assert {row["data"] for row in result_rows(run | {"data": "0123456789abcdef"})} == {
        "0123456789abcdef"
    }
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


def test_processes_that_record_at_the_same_time_lose_nothing_and_leave_no_file(
    tmp_path: Path,
) -> None:
    with ProcessPoolExecutor(8) as pool:
        list(pool.map(record_seed, [tmp_path / "runs.csv"] * 16, range(16)))
    rows = read_rows(tmp_path / "runs.csv")
    assert sorted(int(row["seed"]) for row in rows if row["split"] == "val") == list(range(16))
    assert len(rows) == 48
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


def test_a_process_killed_while_it_records_blocks_no_other_and_leaves_no_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "runs.csv"
    receiver, sender = Pipe(duplex=False)

    def hold() -> None:
        with lock_record(path):
            sender.send("locked")
            time.sleep(60)

    process = Process(target=hold)
    process.start()
    assert receiver.recv() == "locked"
    assert read_rows(path) == [], "reading does not wait"
    process.kill()
    process.join()
    add_run(path, results())
    assert len(read_rows(path)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


def test_a_process_that_waited_writes_to_the_record_that_replaced_the_one_it_opened(
    tmp_path: Path,
) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results("seed=0"))
    with ProcessPoolExecutor(1) as pool:
        pool.submit(os.getpid).result()  # the process has started
        with lock_record(path):
            waiting = pool.submit(record_seed, path, 2)
            time.sleep(0.5)
            write_rows(path, [*read_rows(path), *result_rows(results("seed=1"))])
            assert not waiting.done()
        waiting.result()
    assert {row["seed"] for row in read_rows(path)} == {"0", "1", "2"}


# -- Records of other versions, and other data


@pytest.mark.parametrize("column", ["data", "Pr@90", "oIoU", "ceiling", "fps", "seconds", "commit"])
def test_a_column_that_an_earlier_version_did_not_have_is_unknown(
    column: str, tmp_path: Path
) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results("seed=1"))
    rewrite(path, drop=(column,))
    assert column not in path.read_text().splitlines()[0].split(",")
    before = path.read_bytes()
    rows = find(path, "seed=1")
    assert [row[column] for row in rows] == ["", "", ""]
    assert path.read_bytes() == before, "reading changes nothing"
    add_run(path, results("seed=2"))
    assert find(path, "seed=1") == rows
    assert len(find(path, "seed=2")) == 3


@pytest.mark.parametrize("column", ["experiment", "mIoU", "split", "samples", "layers", "seed"])
def test_a_column_that_a_row_cannot_do_without_is_named(column: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results())
    rewrite(path, drop=(column,))
    with pytest.raises(InputError, match=f"and lacks {column}$"):
        read_rows(path)


def test_a_metric_added_to_this_version_is_unknown_in_earlier_records_and_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = tmp_path / "runs.csv", results("seed=1")
    add_run(path, run)
    monkeypatch.setattr("crislit.experiments.records.METRICS", (*METRICS, "bIoU"))
    monkeypatch.setattr("crislit.experiments.records.COLUMNS", (*COLUMNS, "bIoU"))
    assert [row["bIoU"] for row in find(path, "seed=1")] == ["", "", ""]
    assert [row["bIoU"] for row in result_rows(run)] == ["", "", ""]
    newer = results("seed=2")
    for values in newer["splits"].values():
        values["bIoU"] = 0.25
    add_run(path, newer)
    assert [row["bIoU"] for row in read_rows(path)] == ["", "", "", "0.2500", "0.2500", "0.2500"]
    newer["splits"]["val"]["bIoU"] = 25.0
    assert not is_valid_row(result_rows(newer)[0]), "a known number must be in its range"


def test_unknown_columns_are_kept_with_a_remark(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results("seed=1"))
    rewrite(path, add={"remark": "mine, with a comma"})
    assert len(find(path, "seed=1")) == 3
    assert "keeping unknown columns: remark" in caplog.text
    add_run(path, results("seed=2"))
    rows = read_rows(path)
    assert [row["remark"] for row in rows] == 3 * ["mine, with a comma"] + 3 * [""]


def test_a_run_on_other_data_counts_as_not_run_and_both_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, mine = tmp_path / "runs.csv", ("dataset=refcoco", "model.clip_weights=null")
    add_run(path, on_data("a" * 16, *mine))
    assert len(find(path, *mine, data="a" * 16)) == 3
    assert caplog.text == ""
    assert find(path, *mine, data="b" * 16) == []
    (message,) = caplog.messages
    assert "holds this run on other sentences or masks of refcoco" in message
    assert f"(digest {'a' * 16}, here {'b' * 16}): it counts as not run" in message
    caplog.clear()
    assert find(path, *mine, "seed=1", data="b" * 16) == []
    assert caplog.text == "", "another seed was not run at all"
    add_run(path, on_data("b" * 16, *mine))
    assert len(find(path, *mine, data="a" * 16)) == len(find(path, *mine, data="b" * 16)) == 3


def test_embedded_data_that_were_changed_count_as_other_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, on_data("a" * 16))
    assert len(find(path, data="a" * 16)) == 3
    assert len(find(path)) == 3, "unknown data agree with any"
    assert find(path, data="b" * 16) == []
    assert "other sentences or masks of shapes" in caplog.text
    rewrite(path, drop=("data",))
    assert len(find(path, data="b" * 16)) == 3, "version 0.1 did not record its data"


@pytest.mark.parametrize(
    "dataset", [("dataset=refcoco",), ("dataset=custom", "dataset.file=nowhere.jsonl")]
)
def test_a_run_whose_data_are_unknown_counts_as_not_run_with_how_to_keep_it(
    dataset: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, mine = tmp_path / "runs.csv", (*dataset, "model.clip_weights=null")
    add_run(path, results(*mine))  # of version 0.1
    rewrite(path, drop=("data",))
    assert find(path, *mine, data="b" * 16) == []
    experiment = fingerprint(compose_once(mine), "b" * 16)["experiment"]
    (message,) = caplog.messages
    assert "\n" not in message
    assert f"holds a run of {dataset[0].removeprefix('dataset=')} with these settings" in message
    assert "which version 0.1 did not record: it counts as not run" in message
    assert f"set experiment to {experiment} and data to {'b' * 16} in its rows" in message
    caplog.clear()
    for other in ("seed=1", "decoder.layers=1", "loss.contrastive=false", "image_size=96"):
        assert find(path, *mine, other, data="b" * 16) == []
    assert caplog.text == "", "these were not run at all"

    rewrite(path, add={"experiment": experiment, "data": "b" * 16})  # as the message says
    assert len(find(path, *mine, data="b" * 16)) == 3
    assert caplog.text == ""


def test_another_run_on_embedded_data_is_not_a_run_whose_data_are_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results())
    assert find(path, "dataset.max_words=9", data="b" * 16) == []
    assert caplog.text == ""


# -- Before anything is trained


def test_checking_a_record_leaves_nothing_behind(tmp_path: Path) -> None:
    check_record(tmp_path / "new/deep/runs.csv")
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "runs.csv"
    add_run(path, results())
    before = path.read_bytes()
    check_record(path)
    assert path.read_bytes() == before
    path.write_bytes(b"")  # of a process that was killed before it wrote
    check_record(path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("folder", "is not a record of runs: it is a folder"),
        ("text.csv", "is not a record of runs: it has the columns hello, and lacks experiment"),
        ("text.csv/runs.csv", "cannot write the record .*Not a directory.*record=FILE"),
        ("x" * 300 + ".csv", "cannot write the record .*name too long"),
        ("x" * 250 + ".csv", "cannot write the record .*name too long"),
        ("pipe", "is not a record of runs: it is a folder or a device"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_before_work(
    name: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.csv").write_text("hello\n")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=expected):
        check_record(tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs Linux")
def test_a_record_in_a_folder_that_cannot_be_written_is_refused_before_work() -> None:
    for path in (Path("/sys/kernel/r.csv"), Path("/sys/kernel/new/r.csv")):
        with pytest.raises(InputError, match=f"cannot write the record {path}: "):
            check_record(path)
        with pytest.raises(InputError, match=f"cannot write the record {path}: "):
            add_run(path, results())


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
    assert "ignoring broken rows, which stay in the file" in caplog.text
    assert rows[1]["experiment"] in caplog.text
    before = path.read_text()
    add_run(path, results("seed=2"))
    assert path.read_text().startswith(before), "the row stays as it is, and can be corrected"
    assert {row["seed"] for row in read_rows(path)} == {"0", "2"}
    add_run(path, results())
    assert [row["seed"] for row in read_rows(path)] == ["2"] * 3 + ["0"] * 3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.5000", "58.3"),
        ("0.5000", "0,5"),
        ("a laptop", "a laptop, old"),  # without quotation marks
        (",a laptop,7,seed=1,", ""),  # cut
    ],
)
def test_a_row_broken_by_hand_survives_other_runs_and_counts_again_once_corrected(
    old: str, new: str, tmp_path: Path
) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results("seed=1"))
    rows, (head, last) = read_rows(path), path.read_text()[:-1].rsplit("\n", 1)
    path.write_text(f"{head}\n{last.replace(old, new)}\n")
    before = path.read_text()
    assert not find(path, "seed=1")
    for seed in ("seed=2", "seed=3"):
        add_run(path, results(seed))
        assert len(find(path, seed)) == 3
    after = path.read_text()
    assert after.startswith(before)
    path.write_text(after.replace(before, f"{head}\n{last}\n"))
    assert find(path, "seed=1") == rows


def test_a_quotation_mark_that_is_not_closed_loses_no_text(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results("seed=1"))
    first, rest = path.read_text().split("a laptop", 1)
    path.write_text(f'{first}"a laptop{rest}')
    add_run(path, results("seed=2"))
    assert path.read_text().startswith(f'{first}"a laptop{rest}"\n')
    assert {row["seed"] for row in read_rows(path)} == {"2"}


def test_a_line_keeps_every_field_when_columns_are_added(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results("seed=1"))
    rewrite(path, drop=("data", "overrides"), add={"remark": "mine"})
    header, first, second, third = path.read_text().splitlines()
    second, third = second.rsplit(",", 3)[0], third.replace("mine", "mine,too")
    path.write_text("\n".join((header, first, second, third)))
    add_run(path, results("seed=2"))
    lines = path.read_text().splitlines()
    assert lines[:4] == [
        header + ",overrides,data",
        first + ",,",
        second,
        third.removesuffix(",too") + ",,,too",
    ]
    assert len(lines) == 7
    assert [(row["seed"], row["remark"]) for row in read_rows(path)] == [
        *(("1", "mine"), ("2", ""), ("2", ""), ("2", ""))
    ]


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
    add_run(path, results("seed=3"))
    assert {row["seed"] for row in read_rows(path)} == {"1", "3"}
    add_run(path, results("seed=2"))
    assert len(read_rows(path)) == len(path.read_text().splitlines()) - 1 == 9, "repaired"


def test_a_file_with_other_columns_is_an_error(tmp_path: Path) -> None:
    path, message = tmp_path / "runs.csv", r"runs\.csv is not a record of runs: "
    path.write_text("a,b\n1,2\n")
    columns = "it has the columns a, b, and lacks experiment, setting, .*initial_weights"
    with pytest.raises(InputError, match=message + columns):
        read_rows(path)
    path.write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(InputError, match=message + ".*utf-8"):
        read_rows(path)
    # Before anything is trained.
    with pytest.raises(InputError, match=r"is not a record of runs: it is a folder"):
        find(tmp_path)
