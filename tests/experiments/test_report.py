"""The command ``python -m crislit.report``."""

import csv
import json
import re
from pathlib import Path

import pytest

from crislit import report
from crislit.errors import InputError
from crislit.experiments.paper import TABLE2_CRIS, TABLE2_OTHERS
from crislit.experiments.records import add_run
from crislit.experiments.runs import collect, group_by_setting
from crislit.experiments.tables import tables_by_name
from tests.experiments.measured_runs import run

CONF = Path(__file__).parents[2] / "conf/train.yaml"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "content", ["{}", "[]", "no json", '{"config": {}, "splits": {"val": {}}}']
)
def test_a_file_that_is_not_a_result_ends_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    expected = r"error: .*results\.json is not a result|error: no results"
    with pytest.raises(SystemExit, match=expected):
        report.main([str(tmp_path / "results.json"), "--output", str(tmp_path / "report")])
    with pytest.raises(SystemExit, match="error: no results at"):
        report.main([str(tmp_path / "nowhere")])


def test_a_result_with_a_number_out_of_its_range_ends_in_one_line(tmp_path: Path) -> None:
    results = run("ablation=con", mIoU=float("nan"))
    (tmp_path / "results.json").write_text(json.dumps(results))
    expected = r"error: .*results\.json is not a result .*out of its range"
    with pytest.raises(SystemExit, match=expected):
        report.main([str(tmp_path), "--output", str(tmp_path / "report")])


def test_a_report_of_two_runs_has_their_rows_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("con", "dec1")):
        (tmp_path / f"runs/{number}").mkdir(parents=True)
        results = json.dumps(run(f"ablation={name}"))
        (tmp_path / f"runs/{number}/results.json").write_text(results)
    monkeypatch.chdir(tmp_path)
    report.main(["runs"])
    printed = capsys.readouterr().out
    assert "not run" not in printed
    assert "RefCOCO" not in printed
    assert len([line for line in printed.splitlines() if line.startswith("| shapes |")]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "outputs"}
    assert len(read_csv(tmp_path / "outputs/report/table1.csv")) == 2 * 11
    assert read_csv(tmp_path / "outputs/report/table2.csv") == []


def test_without_runs_the_shipped_record_is_reported_or_the_message_says_what_to_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"which runs\? results/table1.csv is not here: name"):
        report.main([])
    add_run(tmp_path / "results/table1.csv", run("ablation=con", mIoU=0.4321))
    report.main([])
    assert "43.21" in capsys.readouterr().out


@pytest.mark.parametrize("example", re.findall(r"crislit\.report (\S.*?)\s+#", report.EPILOG))
def test_each_example_of_the_help_finds_the_runs_where_training_writes_them(
    example: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = re.findall(r"dir: ([\w/]+)/\$", CONF.read_text())
    assert len(folders) == 2, "of runs and of sweeps"
    for number, folder in enumerate(folders):
        path = Path(folder) / "2026-11-28/12-00-00-0/0/results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(run("ablation=con", f"seed={number}", mIoU=0.4)))
        add_run(Path("outputs/table1.csv"), run("ablation=con", f"seed={number}", mIoU=0.4))
    report.main(example.split())
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line[:9] == "| shapes "]
    assert row.split("|")[4:6] == [" 2 ", " 40.00 "], "both runs"


def test_runs_outside_table_1_are_nothing_to_report(tmp_path: Path) -> None:
    add_run(tmp_path / "runs.csv", run("decoder.layers=5"))
    with pytest.raises(SystemExit, match="error: nothing to report: none of the runs is a row"):
        report.main([str(tmp_path / "runs.csv"), "--output", str(tmp_path / "report")])


def test_the_report_is_written_and_names_what_was_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        run("ablation=con", mIoU=0.4),
        run("ablation=con_dec1", mIoU=0.5),
        run("dataset=gshapes"),
    ]
    for number, results in enumerate(runs):
        (tmp_path / f"runs/{number}").mkdir(parents=True)
        (tmp_path / f"runs/{number}/results.json").write_text(json.dumps(results))
    output = tmp_path / "report"
    report.main([str(tmp_path / "runs"), "--output", str(output), "--paper"])
    text = (output / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "not run (69.52)" in text, "the paper's own table is always shown"
    assert "| gshapes | test |" in text
    for plot in re.findall(r"\]\(([^)]+\.png)\)", text):
        assert (output / plot).stat().st_size > 5000
    rows = read_csv(output / "table1.csv")
    measured = [
        (row["contrastive"], row["layers"], row["runs"], row["mean"])
        for row in rows
        if row["data"] == "shapes" and row["column"] == "mIoU" and row["mean"]
    ]
    assert measured == [("true", "0", "1", "40.0000"), ("true", "1", "1", "50.0000")]
    paper = {
        row["column"]: (row["mean"], row["paper"], row["difference"])
        for row in rows
        if row["data"] == "refcoco" and row["layers"] == "3"
    }
    assert paper["mIoU"] == ("", "69.52", "")
    assert paper["parameters"] == ("", "146.85", "")
    printed = [row for row in read_csv(output / "table2.csv") if row["setting"] == "in the paper"]
    published = (*TABLE2_OTHERS.values(), *TABLE2_CRIS.values())
    expected = sum(number is not None for numbers in published for number in numbers)
    assert sum(row["paper"] != "" for row in printed) == expected


def test_two_settings_of_one_network_are_an_error(tmp_path: Path) -> None:
    add_run(tmp_path / "0.csv", run("ablation=con"))
    add_run(tmp_path / "1.csv", run("ablation=con", "batch_size=32"))
    with pytest.raises(InputError, match="several settings of tiny"):
        tables_by_name(group_by_setting(collect([tmp_path / "0.csv", tmp_path / "1.csv"])))


def test_runs_from_random_weights_have_tables_of_their_own(tmp_path: Path) -> None:
    from_random = run("ablation=con_dec3", "model.clip_weights=null", mIoU=0.1234)
    from_random["initial_weights"] = "random"
    add_run(tmp_path / "clip.csv", run("ablation=con_dec3", mIoU=0.4321))
    add_run(tmp_path / "random.csv", from_random)
    tables = tables_by_name(group_by_setting(collect(sorted(tmp_path.glob("*.csv")))))
    for kind in ("table1", "splits"):
        assert "43.21" in tables[f"{kind}-tiny"]
        assert "12.34" not in tables[f"{kind}-tiny"]
        assert "12.34" in tables[f"{kind}-tiny-random"]
        assert "43.21" not in tables[f"{kind}-tiny-random"]
