"""The report: hand-computed means and differences, the paper's own numbers, what was not run."""

import copy
import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from crislit import report
from crislit.errors import InputError
from crislit.experiments import plots, tables
from crislit.experiments.paper import (
    TABLE1,
    TABLE1_METRICS,
    TABLE1_RESULTS,
    TABLE2_COLUMNS,
    TABLE2_CRIS,
    TABLE2_OTHERS,
)
from crislit.experiments.records import add_run, result_rows
from crislit.experiments.runs import Setting, collect, group_by_setting
from tests.conftest import shared
from tests.experiments.test_records import results

OPENAI = {"initial_weights": "openai (sha256 0)"}


def run(*overrides: str, **metrics: float) -> dict[str, Any]:
    made = results(*overrides, **OPENAI)
    for values in made["splits"].values():
        values |= metrics
    return made


def everything(*runs: dict[str, Any]) -> dict[Setting, Any]:
    return dict(group_by_setting([row for made in runs for row in result_rows(made)]))


def line_of(lines: list[list[str]], *beginning: str) -> dict[str, str]:
    found = [line for line in lines if tuple(line[: len(beginning)]) == beginning]
    assert len(found) == 1, beginning
    return dict(zip(lines[0], found[0], strict=True))


# -- The paper's numbers ------------------------------------------------------------------------------------------------------


def paper_lines(beginning: str) -> list[list[str]]:
    text = (shared("paper") / "cris.txt").read_text()
    return [
        re.sub(r"</?b>", "", line).split("\t")
        for line in text.splitlines()
        if re.match(beginning, line)
    ]


def test_table_1_is_the_papers() -> None:
    lines = [
        cells
        for cells in paper_lines(r"(RefCOCO|RefCOCO\+|G-Ref)?\t[-✓]\t[-✓]")
        if len(cells) == 12
    ]
    assert len(lines) == 19
    dataset, found = "", []
    names = {"RefCOCO": "refcoco", "RefCOCO+": "refcoco+", "G-Ref": "grefcoco"}
    for cells in lines:
        dataset = names.get(cells[0], dataset)
        key = (cells[1] == "✓", 0 if cells[3] == "-" else int(cells[3]))
        row = next(
            name
            for name, ablation in TABLE1.items()
            if (ablation.contrastive, ablation.layers) == key
        )
        numbers = [float(cell) for cell in cells[4:]]
        assert (*numbers[:6], numbers[7]) == TABLE1_RESULTS[dataset][row]
        assert numbers[6] == TABLE1[row].parameters
        found.append((dataset, row))
    assert sorted(found) == sorted(
        (dataset, row) for dataset, rows in TABLE1_RESULTS.items() for row in rows
    )


def test_table_2_is_the_papers() -> None:
    lines = [
        cells
        for cells in paper_lines(r"[A-Za-z0-9* ()]+(\[\d+\])?\t(ResNet|DarkNet)")
        if len(cells) == 10
    ]
    assert len(lines) == 17
    for cells in lines:
        numbers = tuple(None if cell == "-" else float(cell) for cell in cells[2:])
        method = re.sub(r" \[\d+\]| \(Ours\)", "", cells[0])
        if method == "CRIS":
            assert numbers == TABLE2_CRIS[cells[1].replace("ResNet-", "rn")]
        else:
            assert numbers == TABLE2_OTHERS[method, cells[1]]
    assert len(TABLE2_OTHERS) == 15
    assert len(TABLE2_COLUMNS) == 8


# -- Table 1 ------------------------------------------------------------------------------------------------------------------


def test_a_measured_number_stands_beside_the_papers_with_the_difference() -> None:
    tables = everything(
        run("model=rn50", "dataset=refcoco", "ablation=con_dec3", **{"mIoU": 0.7002, "Pr@50": 0.8})
    )
    (setting,) = tables
    lines = tables.table1(tables[setting], published=True)
    line = line_of(lines, "RefCOCO", "yes", "3")
    assert line["mIoU"] == "70.02 (69.52, +0.50)"
    assert line["Pr@50"] == "80.00 (81.35, -1.35)"
    assert line["oIoU"] == "50.00"  # not in the paper's table 1
    assert line["seeds"] == "1"
    assert line["FPS"] == "2.50 (19.22, -16.72)"
    assert line["ceiling"] == "70.00"
    assert line_of(lines, "RefCOCO", "-", "-")["mIoU"] == "not run (62.66)"
    assert line_of(lines, "G-Ref", "yes", "4")["mIoU"] == "not run (58.79)"
    assert line_of(lines, "RefCOCO+", "yes", "4")["mIoU"] == "not run, not in the paper"
    assert len(lines) == 1 + 21


def test_several_seeds_become_mean_and_spread() -> None:
    seeds = [
        run("ablation=con", f"seed={seed}", mIoU=value)
        for seed, value in enumerate((0.40, 0.44, 0.45))
    ]
    tables = everything(*seeds)
    (setting,) = tables
    line = line_of(tables.table1(tables[setting], published=False), "shapes", "yes", "-")
    # mean 43.00; deviations -3, 1, 2: sample variance (9 + 1 + 4) / 2 = 7
    assert line["mIoU"] == "43.00 ± 2.65"
    assert line["seeds"] == "3"
    assert line["Params"] == "0.00"  # which has no spread


def test_frames_a_second_are_a_median_in_every_table() -> None:
    made = [
        run("ablation=con", f"seed={seed}") | {"fps": fps}
        for seed, fps in enumerate((100.0, 90.0, 3.0))
    ]
    ((setting, runs),) = everything(*made).items()
    assert line_of(tables.table1(runs, published=False), "shapes", "yes", "-")["FPS"] == "90.00"
    numbers = [
        line for line in tables.table1_values({setting: runs}) if line[2:5] == ["true", "0", "fps"]
    ]
    assert [line[5:8] for line in numbers] == [["3", "90.0000", "0.0000"]]


def curves(axes: Axes) -> dict[str, list[list[float]]]:
    """The points of each curve, by its name in the legend."""
    handles, labels = axes.get_legend_handles_labels()
    lines = [getattr(handle, "lines", [handle])[0] for handle in handles]
    return {
        label: line.get_xydata().round(6).tolist()
        for line, label in zip(lines, labels, strict=True)
    }


def test_the_plot_against_n_shows_means_and_spreads_beside_the_papers() -> None:
    photographs = ("model=rn50", "dataset=refcoco")
    made = [
        run(*photographs, "ablation=con", f"seed={seed}", mIoU=value)
        for seed, value in enumerate((0.60, 0.64))
    ]
    made += [
        run(*photographs, "ablation=con_dec2", mIoU=0.7),
        run(*photographs, "ablation=dec1", mIoU=0.5),
    ]
    ((_, runs),) = everything(*made).items()
    (axes,) = plots.plot_layers(runs, published=True).axes
    drawn = curves(axes)
    assert drawn["RefCOCO, with Con."] == [[0, 62], [2, 70]]
    assert drawn["RefCOCO, without Con."] == [[1, 50]]
    assert drawn["RefCOCO, the paper"] == [[0, 64.64], [1, 68.66], [2, 69.13], [3, 69.52]]
    bars = next(
        drawn for drawn in axes.collections if isinstance(drawn, LineCollection)
    )  # of the first curve
    assert np.asarray(bars.get_segments()[0])[:, 1].tolist() == pytest.approx(
        [62 - 2 * 2**0.5, 62 + 2 * 2**0.5]
    )


def test_the_plot_of_precision_shows_every_row_beside_the_papers() -> None:
    shares = {
        f"Pr@{x}": value
        for x, value in zip((50, 60, 70, 80, 90), (0.9, 0.8, 0.7, 0.6, 0.1), strict=True)
    }
    ((_, runs),) = everything(
        run("model=rn50", "dataset=refcoco", "ablation=con", **shares)
    ).items()
    panels = plots.plot_precision(runs, published=True).axes
    assert [axes.get_title() for axes in panels] == ["RefCOCO", "RefCOCO+", "G-Ref"]
    drawn = curves(panels[0])
    assert drawn["Con., n = 0"] == [[50, 90], [60, 80], [70, 70], [80, 60], [90, 10]]
    assert drawn["Con., n = 0, the paper"] == [
        [50, 74.89],
        [60, 69.58],
        [70, 61.7],
        [80, 45.5],
        [90, 13.31],
    ]
    assert len(drawn) == 1 + 6  # ours, and the paper's rows


def test_other_settings_are_other_tables_and_never_averaged() -> None:
    tables = everything(
        run("ablation=con"),
        run("ablation=con", "image_size=96"),
        run("ablation=con", "threshold=0.5") | {"threshold": 0.5},
    )
    assert len(tables) == 3
    assert all(len(rows) == 1 for runs in tables.values() for rows in runs.values())


@pytest.mark.parametrize(
    "override", ["recipe.epochs=1", "recipe.optimizer.gamma=1", "batch_size=64", "decoder.ffn=8"]
)
def test_runs_of_other_recipes_or_networks_are_other_tables(override: str) -> None:
    tables = everything(run("ablation=con"), run("ablation=con", override, "seed=1"))
    assert len(tables) == 2
    assert len({str(setting) for setting in tables}) == 2


def test_two_runs_of_one_seed_are_not_taken_for_two_seeds() -> None:
    one = result_rows(run("ablation=con"))
    two = [{**row, "experiment": "another"} for row in one]
    with pytest.raises(
        InputError, match="two different runs of shapes, con, val, seed 0 in one setting"
    ):
        group_by_setting([*one, *two])


def test_an_evaluation_of_a_runs_own_checkpoint_is_not_another_run(tmp_path: Path) -> None:
    trained = run("ablation=con")
    evaluated = copy.deepcopy(trained)
    evaluated["config"] |= {"split": "val", "eval_batch_size": 3, "checkpoint": "x.ckpt"}
    evaluated["config"]["dataset"]["evaluation_splits"] = ["val"]
    for name, made in (("a", trained), ("b", evaluated)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(made))
    (cells,) = group_by_setting(collect([tmp_path])).values()
    assert all(len(rows) == 1 for rows in cells.values())


def test_a_released_checkpoints_evaluation_stands_beside_the_paper() -> None:
    made = run("model=rn50", "dataset=refcoco", mIoU=0.6952) | {
        "initial_weights": "released checkpoint cris_r50.pth"
    }
    for name in ("recipe", "batch_size", "batch_size_per_device", "resume", "trainer"):
        del made["config"][name]
    made["config"]["model"] = {name: made["config"]["model"][name] for name in ("clip", "neck")}
    ((setting, runs),) = everything(made).items()
    assert setting.published
    assert (
        line_of(tables.table1(runs, published=True), "RefCOCO", "yes", "3")["mIoU"]
        == "69.52 (69.52, +0.00)"
    )


@pytest.mark.parametrize(
    "override",
    ["image_size=64", "threshold=0.5", "protocol=first_sentence", "model.clip_weights=null"],
)
def test_what_the_paper_did_not_do_is_not_compared_with_it(override: str) -> None:
    weights = {"initial_weights": "random"} if "null" in override else {}
    made = run("model=rn50", "dataset=refcoco", override) | weights
    made |= {"threshold": made["config"]["threshold"], "protocol": made["config"]["protocol"]}
    ((setting, _),) = everything(made).items()
    assert not setting.published
    ours = [
        line
        for line in tables.table2(everything(made))
        if line[0] == "CRIS, here" and line[1] == "ResNet-50"
    ]
    assert ours[0][2] == "50.00"


def test_what_is_no_row_of_table_1_is_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert everything(run("decoder.layers=5")) == {}
    assert "left out: shapes with contrastive=true, n = 5" in caplog.text
    assert everything(run("decoder.layers=2", "loss.contrastive=false")) == {}


# -- Table 2 ------------------------------------------------------------------------------------------------------------------


def test_table_2_puts_ours_under_the_papers_with_the_other_methods_above() -> None:
    tables = everything(run("model=rn101", "dataset=grefcoco", mIoU=0.6, oIoU=0.55))
    lines = tables.table2(tables)
    assert [line[0] for line in lines[1:16]] == [method for method, _ in TABLE2_OTHERS]
    ours = [line for line in lines if line[0] == "CRIS, here"]
    assert [line[1] for line in ours] == ["ResNet-50", "ResNet-101"]
    assert set(ours[0][2:]) == {"not run"}
    assert ours[1][2:] == ["not run"] * 6 + ["60.00 (59.87, +0.13)", "60.00 (60.36, -0.36)"]
    totals = [line for line in lines if line[0] == "CRIS, here, oIoU"]
    assert totals[1][2:] == ["not run"] * 6 + ["55.00", "55.00"]
    assert all(len(line) == 10 for line in lines)


# -- The program --------------------------------------------------------------------------------------------------------------


def test_folders_files_and_records_are_read_and_a_run_counts_once(tmp_path: Path) -> None:
    made = run("ablation=con")
    for name in ("a/0", "a/1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a/0/results.json").write_text(json.dumps(made))
    (tmp_path / "a/1/results.json").write_text(json.dumps(run("ablation=dec1")))
    add_run(tmp_path / "runs.csv", made)
    rows = collect([tmp_path / "a", tmp_path / "a/0/results.json", tmp_path / "runs.csv"])
    assert len(rows) == 6
    made["splits"]["val"]["mIoU"] += 0.01  # on another machine, say
    (tmp_path / "a/1/results.json").write_text(json.dumps(made))
    with pytest.raises(
        InputError,
        match=r"two runs of one experiment differ, shapes val, seed 0: mIoU .* and mIoU .*",
    ):
        collect([tmp_path / "runs.csv", tmp_path / "a"])


@pytest.mark.parametrize(
    "content", ["{}", "[]", "no json", '{"config": {}, "splits": {"val": {}}}']
)
def test_what_is_no_result_is_one_error_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit, match=r"error: .*results\.json is no result|error: no results"):
        report.main([str(tmp_path / "results.json"), "--output", str(tmp_path / "report")])
    with pytest.raises(SystemExit, match="error: no results at"):
        report.main([str(tmp_path / "nowhere")])


def test_a_result_with_a_number_that_makes_no_sense_is_one_error_line(tmp_path: Path) -> None:
    made = run("ablation=con", mIoU=float("nan"))
    (tmp_path / "results.json").write_text(json.dumps(made))
    with pytest.raises(SystemExit, match=r"error: .*results\.json is no result .*out of its range"):
        report.main([str(tmp_path), "--output", str(tmp_path / "report")])


def test_the_report_is_written_and_names_what_was_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, made in enumerate(
        [run("ablation=con", mIoU=0.4), run("ablation=con_dec1", mIoU=0.5), run("dataset=gshapes")]
    ):
        (tmp_path / f"runs/{number}").mkdir(parents=True)
        (tmp_path / f"runs/{number}/results.json").write_text(json.dumps(made))
    report.main([str(tmp_path / "runs"), "--output", str(tmp_path / "report")])
    text = (tmp_path / "report/report.md").read_text()
    assert text in capsys.readouterr().out
    assert "not run (69.52)" in text  # the paper's own table, whatever ran
    for picture in re.findall(r"\]\(([^)]+\.png)\)", text):
        assert (tmp_path / "report" / picture).stat().st_size > 5000
    with (tmp_path / "report/table1.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = [
        row for row in rows if row["data"] == "shapes" and row["column"] == "mIoU" and row["mean"]
    ]
    found = [(row["contrastive"], row["layers"], row["runs"], row["mean"]) for row in measured]
    assert found == [("true", "0", "1", "40.0000"), ("true", "1", "1", "50.0000")]
    full = [row for row in rows if row["data"] == "refcoco" and row["layers"] == "3"]
    papers = [row for row in full if row["column"] in ("mIoU", "parameters")]
    assert [(row["mean"], row["paper"], row["difference"]) for row in papers] == [
        ("", "69.52", ""),
        ("", "146.85", ""),
    ]
    with (tmp_path / "report/table2.csv").open() as file:
        assert len(
            [
                row
                for row in csv.DictReader(file)
                if row["setting"] == "in the paper" and row["paper"]
            ]
        ) == sum(
            number is not None
            for numbers in (*TABLE2_OTHERS.values(), *TABLE2_CRIS.values())
            for number in numbers
        )
    assert "| gshapes | test |" in text


def test_blocks_of_a_readme_are_filled_and_filling_again_changes_nothing(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- report table1-tiny -->\n\nold\n\n<!-- end -->\nafter\n")
    add_run(tmp_path / "runs.csv", run("ablation=con", mIoU=0.4321))
    command = [
        str(tmp_path / "runs.csv"),
        "--output",
        str(tmp_path / "report"),
        "--fill",
        str(readme),
    ]
    report.main(command)
    once = readme.read_text()
    assert "43.21" in once
    assert "old" not in once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    report.main(command)
    assert readme.read_text() == once


def test_an_unknown_block_is_an_error_and_the_file_stays(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- report table9 -->\n\nold\n\n<!-- end -->\n")
    add_run(tmp_path / "runs.csv", run("ablation=con"))
    with pytest.raises(SystemExit, match="no table 'table9'"):
        report.main(
            [
                str(tmp_path / "runs.csv"),
                "--output",
                str(tmp_path / "report"),
                "--fill",
                str(readme),
            ]
        )
    assert "old" in readme.read_text()


def test_a_file_without_a_block_is_an_error(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# No block\n")
    add_run(tmp_path / "runs.csv", run("ablation=con"))
    with pytest.raises(SystemExit, match="no block to fill: expected <!-- report NAME -->"):
        report.main(
            [
                str(tmp_path / "runs.csv"),
                "--output",
                str(tmp_path / "report"),
                "--fill",
                str(readme),
            ]
        )
    assert readme.read_text() == "# No block\n"


def test_the_papers_metrics_are_the_columns() -> None:
    assert all(
        len(values) == len(TABLE1_METRICS)
        for rows in TABLE1_RESULTS.values()
        for values in rows.values()
    )


def test_kernel_size_and_weights_are_part_of_a_tables_title() -> None:
    tables = everything(run("ablation=con", "projector.kernel_size=1"))
    (setting,) = tables
    assert str(setting).startswith(
        "tiny at 128 pixels, from openai (sha256 0), threshold 0.35, k = 1, setting "
    )


def test_a_block_that_two_settings_would_fill_is_an_error(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- report table1-tiny -->\n\nold\n\n<!-- end -->\n")
    for seed, made in enumerate((run("ablation=con"), run("ablation=con", "batch_size=32"))):
        add_run(tmp_path / f"{seed}.csv", made)
    files = [str(tmp_path / "0.csv"), str(tmp_path / "1.csv")]
    with pytest.raises(SystemExit, match="several settings of tiny"):
        report.main([*files, "--output", str(tmp_path / "report"), "--fill", str(readme)])
    assert "old" in readme.read_text()


def test_runs_from_random_weights_fill_a_block_of_their_own(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(
        "<!-- report splits-tiny -->\n\n<!-- end -->\n<!-- report splits-tiny-random -->\n\n<!-- end -->\n"
    )
    from_clip = run("ablation=con_dec3", mIoU=0.4321)
    from_nothing = run("ablation=con_dec3", "model.clip_weights=null", mIoU=0.1234) | {
        "initial_weights": "random"
    }
    add_run(tmp_path / "clip.csv", from_clip)
    add_run(tmp_path / "random.csv", from_nothing)
    records = [str(tmp_path / name) for name in ("clip.csv", "random.csv")]
    report.main([*records, "--output", str(tmp_path / "report"), "--fill", str(readme)])
    first, second = readme.read_text().split("<!-- report splits-tiny-random -->")
    assert "43.21" in first
    assert "12.34" not in first
    assert "12.34" in second
    assert "43.21" not in second
