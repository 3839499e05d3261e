"""Measured results as CSV: what identifies a run, what is whole, and what several processes may do at once."""

import copy
import logging
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from crislit.config import compose_config
from crislit.data import shapes
from crislit.errors import InputError
from crislit.experiments.records import (
    COLUMNS,
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


def experiment(settings: dict[str, Any]) -> str:
    return fingerprint(settings)["experiment"]


def results(*overrides: str, **changes: Any) -> dict[str, Any]:
    """A results.json as train writes it, of made-up numbers."""
    config = compose_config(overrides)
    splits = (
        ("val", "test") if config["dataset"]["name"].startswith("g") else ("val", "testA", "testB")
    )
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


@pytest.mark.parametrize(
    "override",
    [
        "data_root=elsewhere",
        "workers=0",
        "logger=none",
        "eval_batch_size=3",
        "trainer=ddp",
        "trainer=gpu",
        "trainer=cpu",
        "+trainer.enable_progress_bar=false",
        "dataset.evaluation_splits=[val]",
        "checkpoint_every=7",
        "callbacks.pictures=0",
        "record=null",
    ],
)
def test_what_changes_no_number_changes_no_experiment(override: str) -> None:
    assert experiment(compose_config([override])) == experiment(compose_config())


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "decoder.layers=2",
        "loss.contrastive=false",
        "projector.kernel_size=1",
        "dataset=shapes+",
        "dataset.sentences_per_image=1",
        "image_size=96",
        "batch_size=64",
        "recipe.epochs=1",
        "trainer.max_steps=2",
        "recipe.optimizer.learning_rate=2e-3",
        "threshold=0.5",
        "protocol=first_sentence",
        "batch_size_per_device=8",  # BatchNorm sees fewer at once
        "trainer=ddp_cpu",  # and here, where there is no SyncBN
        "trainer.precision=16-mixed",
        "trainer.sync_batchnorm=true",
        "trainer.check_val_every_n_epoch=3",  # decides which checkpoint is the best
        "+trainer.gradient_clip_val=0.1",
        "+trainer.limit_train_batches=0.1",
        "+trainer.limit_test_batches=1",
        "+trainer.fast_dev_run=true",
        "resume=last.ckpt",
        "model.clip_weights=null",
        "model.clip_weights=openai",
    ],
)
def test_what_changes_a_number_changes_the_experiment(override: str) -> None:
    base = [] if override != "model.clip_weights=null" else ["model.clip_weights=other"]
    assert experiment(compose_config([override])) != experiment(compose_config(base))


def test_weights_count_by_their_content_not_their_place(tmp_path: Path) -> None:
    for name, content in (("a.pt", b"1"), ("b.pt", b"1"), ("c.pt", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (
        experiment(compose_config([f"model.clip_weights={tmp_path}/{name}"]))
        for name in ("a.pt", "b.pt", "c.pt")
    )
    assert a == b != c


def test_the_version_of_the_embedded_data_counts(monkeypatch: pytest.MonkeyPatch) -> None:

    shapes_before, real_before = (
        experiment(compose_config()),
        experiment(compose_config(["dataset=refcoco"])),
    )
    monkeypatch.setattr(shapes, "VERSION", shapes.VERSION + 1)
    assert experiment(compose_config()) != shapes_before
    assert experiment(compose_config(["dataset=refcoco"])) == real_before


def test_real_data_count_by_their_content_not_their_place(
    tmp_path: Path, generated_root: Path
) -> None:
    there = tmp_path / "moved"
    (there / "refcoco").mkdir(parents=True)
    content = (generated_root / "refcoco/refs(unc).p").read_bytes()
    (there / "refcoco/refs(unc).p").write_bytes(content)
    settings = ["dataset=refcoco", f"data_root={generated_root}"]
    assert experiment(compose_config(settings)) == experiment(
        compose_config(["dataset=refcoco", f"data_root={there}"])
    )
    (there / "refcoco/refs(unc).p").write_bytes(b"the real one")
    assert experiment(compose_config(settings)) != experiment(
        compose_config(["dataset=refcoco", f"data_root={there}"])
    )


def test_own_data_count_by_their_content_not_their_place(tmp_path: Path) -> None:
    def of(folder: str, said: str) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "instances.json").write_text("{}")
        (tmp_path / folder / "said.csv").write_text(said)
        files = [
            f"dataset.file={tmp_path}/{folder}/instances.json",
            f"dataset.sentences={tmp_path}/{folder}/said.csv",
        ]
        return experiment(compose_config(["dataset=custom", *files]))

    assert of("a", "1,dog") == of("b", "1,dog")
    assert of("a", "1,dog") != of("b", "1,cat"), "the table's sentences are what is learned"


def test_rows_of_one_table_have_one_setting() -> None:
    def setting(*overrides: str) -> str:
        return fingerprint(compose_config(overrides))["setting"]

    for same in (
        ["seed=4"],
        ["dataset=gshapes"],
        ["ablation=baseline"],
        ["ablation=con_dec4", "dataset=shapes+"],
    ):
        assert setting(*same) == setting(), same
    for other in (
        "recipe.optimizer.learning_rate=2e-3",
        "batch_size=32",
        "decoder.ffn=64",
        "dataset.sentences_per_image=1",
    ):
        assert setting(other) != setting(), other


def test_a_run_is_a_row_a_split_with_what_it_takes_to_run_it_again(tmp_path: Path) -> None:
    run = results("ablation=dec1", "seed=3")
    add_run(tmp_path / "deep/runs.csv", run)
    rows = read_rows(tmp_path / "deep/runs.csv")
    assert rows == result_rows(run)
    assert [row["split"] for row in rows] == ["val", "testA", "testB"]
    first = rows[0]
    assert set(first) == set(COLUMNS)
    expected = {
        "contrastive": "false",
        "layers": "1",
        "seed": "3",
        "mIoU": "0.5000",
        "blind": "0.1000",
        "ceiling": "0.7000",
    }
    assert first | expected == first
    assert first["overrides"] == "ablation=dec1 seed=3"
    assert [row["blind"] for row in rows[1:]] == ["", ""]
    assert find_run(tmp_path / "deep/runs.csv", run["config"]) == rows


def test_recording_a_run_again_replaces_it_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    one, two = results("seed=1"), results("seed=2")
    add_run(path, one)
    add_run(path, two)
    again = copy.deepcopy(one)
    again["splits"]["val"]["mIoU"] = 0.75
    add_run(path, again)
    rows = read_rows(path)
    assert len(rows) == 6
    assert {(row["seed"], row["mIoU"]) for row in rows if row["split"] == "val"} == {
        ("1", "0.7500"),
        ("2", "0.5000"),
    }


def test_a_run_that_lost_a_split_counts_as_not_run_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, run = tmp_path / "runs.csv", results()
    add_run(path, run)
    write_rows(path, read_rows(path)[:2])
    with caplog.at_level(logging.WARNING):
        assert find_run(path, run["config"]) == []
    assert "holds only val, testA, not testB of run" in caplog.text
    add_run(path, run)
    assert len(find_run(path, run["config"])) == 3


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("mIoU", "nan"),
        ("mIoU", "1.5"),
        ("mIoU", ""),
        ("samples", "0"),
        ("samples", "x"),
        ("Pr@90", "-1"),
        ("split", "other"),
    ]
    + [
        ("blind", "7"),
        ("blind", "abc"),
        ("fps", "nan"),
        ("fps", "x"),
        ("layers", "three"),
        ("contrastive", "maybe"),
    ],
)
def test_a_broken_row_counts_as_not_run_and_is_named(
    column: str, value: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, run = tmp_path / "runs.csv", results()
    add_run(path, run)
    rows = read_rows(path)
    rows[1][column] = value
    assert not is_valid_row(rows[1])
    write_rows(path, rows)
    with caplog.at_level(logging.WARNING):
        assert find_run(path, run["config"]) == []
    assert "broken rows are left out" in caplog.text
    assert experiment(run["config"]) in caplog.text


def test_a_row_with_a_field_too_many_is_broken_and_recording_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results("seed=1"))
    path.write_text(
        path.read_text().replace("a laptop", "a laptop, old")
    )  # by hand, without quotation marks
    assert not find_run(path, compose_config(["seed=1"]))
    add_run(path, results("seed=2"))
    assert {row["seed"] for row in read_rows(path)} == {"2"}


def test_a_run_that_evaluated_less_than_is_asked_for_is_run_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "runs.csv"
    part = results("dataset.evaluation_splits=[val]")
    part["splits"] = {"val": part["splits"]["val"]}
    add_run(path, part)
    assert len(find_run(path, part["config"])) == 1
    assert find_run(path, compose_config()) == []
    assert "holds only val, not testA, testB of run" in caplog.text
    assert expected_splits(compose_config(["dataset.name=mine"])) == [
        "val",
        "testA",
        "testB",
    ]  # a name is a label
    for name in ("shapes", "gshapes", "refcoco", "grefcoco"):
        assert expected_splits(compose_config([f"dataset={name}"])) == (
            ["val", "test"] if name[0] == "g" else ["val", "testA", "testB"]
        )


def test_a_run_without_the_blind_control_that_is_asked_for_is_run_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results("dataset.blind_control=false", blind={}))
    assert len(find_run(path, compose_config(["dataset.blind_control=false"]))) == 3
    assert find_run(path, compose_config()) == []
    assert "no blind control on val" in caplog.text


def test_a_file_cut_off_in_the_middle_of_a_line_keeps_its_whole_runs(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    add_run(path, results("seed=1"))
    whole = path.stat().st_size
    add_run(path, results("seed=2"))
    path.write_bytes(path.read_bytes()[: whole + 40])
    assert {row["seed"] for row in read_rows(path)} == {"1"}
    assert find_run(path, compose_config(["seed=1"]))
    assert not find_run(path, compose_config(["seed=2"]))


def test_a_file_of_other_columns_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        InputError, match=r"runs\.csv is no record of runs: it lacks the columns .* and has .* a, b"
    ):
        read_rows(tmp_path / "runs.csv")
    (tmp_path / "runs.csv").write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(InputError, match=r"runs\.csv is no record of runs: .*utf-8"):
        read_rows(tmp_path / "runs.csv")
    with pytest.raises(
        InputError, match=r"is no record of runs: .*directory"
    ):  # before anything is trained
        find_run(tmp_path, compose_config())


def test_no_file_is_no_run(tmp_path: Path) -> None:
    assert find_run(tmp_path / "none.csv", compose_config()) == []


def record_seed(path: Path, seed: int) -> None:
    add_run(path, results(f"seed={seed}"))


def test_processes_that_record_at_once_lose_nothing(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(record_seed, [tmp_path / "runs.csv"] * 12, range(12)))
    rows = read_rows(tmp_path / "runs.csv")
    assert sorted(int(row["seed"]) for row in rows if row["split"] == "val") == list(range(12))
    assert len(rows) == 36
