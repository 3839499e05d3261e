"""Which runs are read, and which of them share a table."""

import copy
import json
from pathlib import Path

import pytest

from crislit.errors import InputError
from crislit.experiments.records import add_run, result_rows
from crislit.experiments.runs import collect, group_by_setting, measure_column
from tests.experiments.measured_runs import group, run


def test_runs_of_different_settings_are_in_different_tables() -> None:
    groups = group(
        run("ablation=con"),
        run("ablation=con", "image_size=96"),
        run("ablation=con", "threshold=0.5") | {"threshold": 0.5},
    )
    assert len(groups) == 3
    assert all(len(rows) == 1 for runs in groups.values() for rows in runs.values())


@pytest.mark.parametrize(
    "override", ["recipe.epochs=1", "recipe.optimizer.gamma=1", "batch_size=64", "decoder.ffn=8"]
)
def test_runs_of_different_recipes_or_networks_are_in_different_tables(override: str) -> None:
    groups = group(run("ablation=con"), run("ablation=con", override, "seed=1"))
    assert len(groups) == 2
    assert len({str(setting) for setting in groups}) == 2


def test_two_runs_with_one_seed_are_an_error() -> None:
    rows = result_rows(run("ablation=con"))
    others = [{**row, "experiment": "another"} for row in rows]
    expected = "two different runs of shapes, con, val, seed 0 in one setting"
    with pytest.raises(InputError, match=expected):
        group_by_setting([*rows, *others])


def test_evaluating_a_runs_checkpoint_is_the_same_run(tmp_path: Path) -> None:
    trained = run("ablation=con")
    evaluated = copy.deepcopy(trained)
    evaluated["config"] |= {"split": "val", "eval_batch_size": 3, "checkpoint": "x.ckpt"}
    evaluated["config"]["dataset"]["evaluation_splits"] = ["val"]
    for name, results in (("a", trained), ("b", evaluated)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    (cells,) = group_by_setting(collect([tmp_path])).values()
    assert all(len(rows) == 1 for rows in cells.values())


def test_rows_that_are_not_in_table_1_are_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert group(run("decoder.layers=5")) == {}
    assert "left out: shapes with contrastive=true, n = 5" in caplog.text
    assert group(run("decoder.layers=2", "loss.contrastive=false")) == {}


def test_a_settings_name_has_kernel_size_and_weights() -> None:
    (setting,) = group(run("ablation=con", "projector.kernel_size=1"))
    assert str(setting).startswith(
        "tiny at 128 pixels, from openai (sha256 0), threshold 0.35, k = 1, settings "
    )


def test_a_run_in_files_and_records_counts_once(tmp_path: Path) -> None:
    results = run("ablation=con")
    for name in ("a/0", "a/1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a/0/results.json").write_text(json.dumps(results))
    (tmp_path / "a/1/results.json").write_text(json.dumps(run("ablation=dec1")))
    add_run(tmp_path / "runs.csv", results)
    rows = collect([tmp_path / "a", tmp_path / "a/0/results.json", tmp_path / "runs.csv"])
    assert len(rows) == 6


def test_two_results_of_one_run_that_differ_are_an_error(tmp_path: Path) -> None:
    results = run("ablation=con")
    add_run(tmp_path / "runs.csv", results)
    results["splits"]["val"]["mIoU"] += 0.01  # on another machine, for example
    (tmp_path / "results.json").write_text(json.dumps(results))
    expected = r"two runs of one experiment differ, shapes val, seed 0: mIoU .* and mIoU .*"
    with pytest.raises(InputError, match=expected):
        collect([tmp_path / "runs.csv", tmp_path])


def test_results_of_one_run_on_other_data_are_an_error(tmp_path: Path) -> None:
    results = run("ablation=con") | {"data": "a" * 16}
    add_run(tmp_path / "runs.csv", results)
    (tmp_path / "results.json").write_text(json.dumps(results | {"data": "b" * 16}))
    with pytest.raises(InputError, match=r"data a{16}.* and .*data b{16}"):
        collect([tmp_path / "runs.csv", tmp_path])
    (tmp_path / "results.json").write_text(json.dumps(results | {"data": ""}))
    assert len(collect([tmp_path / "runs.csv", tmp_path])) == 3, "unknown data agree with any"


def test_runs_on_different_data_are_never_averaged(caplog: pytest.LogCaptureFixture) -> None:
    def rows(seed: int, miou: float, data: str) -> list[dict[str, str]]:
        return result_rows(run("ablation=con", f"seed={seed}", mIoU=miou) | {"data": data})

    one, other = "a" * 16, "b" * 16
    (cells,) = group_by_setting([*rows(0, 0.4, one), *rows(1, 0.5, "")]).values()
    measured = measure_column(cells["shapes", "con", "val"], "mIoU")
    assert measured is not None
    assert measured.mean == 45, "data of version 0.1 are unknown, and agree with the others"
    assert caplog.text == ""

    mixed = [*rows(0, 0.4, one), *rows(0, 0.6, other), *rows(1, 0.5, one), *rows(2, 0.1, "")]
    (cells,) = group_by_setting(mixed).values()
    means = {
        dataset: [row["mIoU"] for row in found]
        for (dataset, _, split), found in cells.items()
        if split == "val"
    }
    assert means == {
        "shapes (data aaaaaa)": ["0.4000", "0.5000"],
        "shapes (data bbbbbb)": ["0.6000"],
        "shapes (data unknown)": ["0.1000"],
    }
    assert "shapes was measured on different sentences or masks" in caplog.text
    assert f"data {one}, {other}" in caplog.text
