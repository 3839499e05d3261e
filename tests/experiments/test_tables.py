"""Tables: means and differences worked out by hand, and what was not run."""

import pytest

from crislit.experiments.paper import TABLE2_OTHERS
from crislit.experiments.tables import table1, table1_values, table2, table2_values
from tests.experiments.measured_runs import group, run, table_row


def test_a_measured_number_is_shown_beside_the_papers_with_the_difference() -> None:
    metrics = {"mIoU": 0.7002, "Pr@50": 0.8}
    ((_, runs),) = group(
        run("model=rn50", "dataset=refcoco", "ablation=con_dec3", **metrics)
    ).items()
    assert [row[0] for row in table1(runs, published=True)] == ["data", "RefCOCO"]
    table = table1(runs, published=True, paper_rows=True)
    row = table_row(table, "RefCOCO", "yes", "3")
    assert row == table_row(table1(runs, published=True), "RefCOCO", "yes", "3")
    assert row["mIoU"] == "70.02 (69.52, +0.50)"
    assert row["Pr@50"] == "80.00 (81.35, -1.35)"
    assert row["oIoU"] == "50.00"  # not in the paper's table 1
    assert row["seeds"] == "1"
    assert row["ceiling"] == "70.00"
    assert table_row(table, "RefCOCO", "-", "-")["mIoU"] == "not run (62.66)"
    assert table_row(table, "G-Ref", "yes", "4")["mIoU"] == "not run (58.79)"
    assert table_row(table, "RefCOCO+", "yes", "4")["mIoU"] == "not run, not in the paper"
    assert len(table) == 1 + 21


def test_several_seeds_become_mean_and_spread() -> None:
    seeds = [
        run("ablation=con", f"seed={seed}", mIoU=value)
        for seed, value in enumerate((0.40, 0.44, 0.45))
    ]
    ((_, runs),) = group(*seeds).items()
    row = table_row(table1(runs, published=False), "shapes", "yes", "-")
    # Mean 43.00; deviations -3, 1, 2; sample variance (9 + 1 + 4) / 2 = 7.
    assert row["mIoU"] == "43.00 ± 2.65"
    assert row["seeds"] == "3"
    assert row["Params"] == "0.00"  # equal values have no spread


def test_frames_per_second_are_a_median_and_only_in_the_csv() -> None:
    seeds = [
        run("ablation=con", f"seed={seed}") | {"fps": fps}
        for seed, fps in enumerate((100.0, 90.0, 3.0))
    ]
    ((setting, runs),) = group(*seeds).items()
    assert "FPS" not in table1(runs, published=False)[0], "other work on the machine changes them"
    (row,) = [
        row
        for row in table1_values({setting: runs})
        if (row["contrastive"], row["layers"], row["column"]) == ("true", "0", "fps")
    ]
    assert (row["runs"], row["mean"], row["spread"]) == ("3", "90.0000", "0.0000")


def test_an_evaluation_of_a_released_checkpoint_is_compared_with_the_paper() -> None:
    results = run("model=rn50", "dataset=refcoco", mIoU=0.6952)
    results["initial_weights"] = "released checkpoint cris_r50.pth"
    for name in ("recipe", "batch_size", "batch_size_per_device", "resume", "trainer"):
        del results["config"][name]
    model = results["config"]["model"]
    results["config"]["model"] = {name: model[name] for name in ("clip", "neck")}
    ((setting, runs),) = group(results).items()
    assert setting.published
    row = table_row(table1(runs, published=True), "RefCOCO", "yes", "3")
    assert row["mIoU"] == "69.52 (69.52, +0.00)"


@pytest.mark.parametrize(
    ("weights", "is_published"),
    [
        ("openai (sha256 afeb0e10f9e5a86d)", True),
        ("RN50.pt (sha256 afeb0e10f9e5a86d)", True),
        ("released checkpoint cris_r50.pth", True),
        ("random", False),
        ("init_from=cris_r50.pth (sha256 0123456789abcdef)", False),
        ("init_from=openai (sha256 0123456789abcdef)", False),
    ],
)
def test_only_runs_from_clips_weights_are_compared_with_the_paper(
    weights: str, is_published: bool
) -> None:
    results = run("model=rn50", "dataset=refcoco", mIoU=0.6952) | {"initial_weights": weights}
    groups = group(results)
    (setting,) = groups
    assert setting.published == is_published
    row = table_row(table2(groups), "CRIS, here", "ResNet-50")
    assert row["RefCOCO val"] == ("69.52 (69.52, +0.00)" if is_published else "69.52")
    means = [row for row in table1_values(groups) if row["column"] == "mIoU"]
    assert {row["paper"] for row in means} == ({"69.52"} if is_published else {""})


@pytest.mark.parametrize(
    "override",
    ["image_size=64", "threshold=0.5", "protocol=first_sentence", "model.clip_weights=null"],
)
def test_settings_that_the_paper_does_not_use_are_not_compared_with_it(override: str) -> None:
    results = run("model=rn50", "dataset=refcoco", override)
    if override == "model.clip_weights=null":
        results["initial_weights"] = "random"
    results |= {name: results["config"][name] for name in ("threshold", "protocol")}
    groups = group(results)
    (setting,) = groups
    assert not setting.published
    assert table_row(table2(groups), "CRIS, here", "ResNet-50")["RefCOCO val"] == "50.00"


def test_table_2_shows_ours_below_the_papers_and_the_other_methods() -> None:
    groups = group(run("model=rn101", "dataset=grefcoco", mIoU=0.6, oIoU=0.55))
    table = table2(groups, paper_rows=True)
    assert [row[0] for row in table[1:16]] == [method for method, _ in TABLE2_OTHERS]
    ours = [row for row in table if row[0] == "CRIS, here"]
    assert [row[1] for row in ours] == ["ResNet-50", "ResNet-101"]
    assert set(ours[0][2:]) == {"not run"}
    assert ours[1][2:] == ["not run"] * 6 + ["60.00 (59.87, +0.13)", "60.00 (60.36, -0.36)"]
    oiou = [row for row in table if row[0] == "CRIS, here, oIoU"]
    assert oiou[1][2:] == ["not run"] * 6 + ["55.00", "55.00"]
    assert all(len(row) == 10 for row in table)


def test_table_2_has_no_row_and_no_column_that_was_not_run_unless_requested() -> None:
    groups = group(
        run("model=rn101", "dataset=grefcoco", mIoU=0.6, oIoU=0.55),
        run("model=rn50x4", "dataset=grefcoco", mIoU=0.7, oIoU=0.65),
        run("dataset=shapes"),
    )
    assert table2(groups) == [
        ["method", "backbone", "G-Ref val", "G-Ref test"],
        ["CRIS, here", "ResNet-101", "60.00 (59.87, +0.13)", "60.00 (60.36, -0.36)"],
        ["CRIS, here, oIoU", "ResNet-101", "55.00", "55.00"],
        ["CRIS, here", "ResNet-50x4", "70.00", "70.00"],
        ["CRIS, here, oIoU", "ResNet-50x4", "65.00", "65.00"],
    ]
    values = [(row["backbone"], row["column"], row["mean"]) for row in table2_values(groups)]
    assert values == [
        *(("rn101", "mIoU", "60.0000"), ("rn101", "oIoU", "55.0000")) * 2,
        *(("rn50x4", "mIoU", "70.0000"), ("rn50x4", "oIoU", "65.0000")) * 2,
    ]


def test_a_number_that_a_runs_version_did_not_measure_is_not_called_not_run() -> None:
    ((_, runs),) = group(run("ablation=con")).items()
    for row in runs["shapes", "con", "val"]:
        row["Pr@90"] = ""
    assert table_row(table1(runs, published=False), "shapes", "yes", "-")["Pr@90"] == "-"
