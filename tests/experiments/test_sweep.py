"""Sweeps: every job is a complete run of its own and none runs twice, on one process or several."""

import contextlib
import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from crislit.config import compose_config, config_dir
from crislit.experiments.sweep import run_job
from crislit.training.build import build_data
from crislit.training.command_line import quote_value
from crislit.training.provenance import fingerprint
from tests.runs import command, environment

LIMITS = (
    *("batch_size=8", "image_size=64", "workers=0", "callbacks.pictures=0"),
    *("model.clip_weights=null", "+trainer.enable_progress_bar=false"),
)
SMALL = (*LIMITS, "trainer.max_steps=1")

pytestmark = pytest.mark.slow


def sweep(folder: Path, root: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run a sweep in a folder of its own."""
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        command("train", "-m", *SMALL, f"data_root={root}", *overrides),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the results.json of every job."""
    paths = sorted(folder.glob("outputs/multirun/*/*/*/results.json"))
    return [json.loads(path.read_text()) for path in paths]


def read_record(folder: Path) -> list[dict[str, str]]:
    with (folder / "outputs/table1.csv").open() as file:
        return list(csv.DictReader(file))


def test_two_jobs_on_two_processes_each_are_two_complete_runs(
    small_shapes: Path, tmp_path: Path
) -> None:
    result = sweep(tmp_path, small_shapes, "trainer=ddp_cpu", "decoder.layers=1,2")
    assert result.returncode == 0, result.stderr
    runs = read_runs(tmp_path)
    assert len(runs) == 2
    for layers, run in zip((1, 2), runs, strict=True):
        assert run["config"]["decoder"]["layers"] == layers
        assert run["config"]["trainer"]["devices"] == 2
        # As many as a single process counts: 6 scenes, 2 refs each, 3 sentences each.
        assert [values["samples"] for values in run["splits"].values()] == [36, 36, 36]
    assert runs[0]["parameters"] != runs[1]["parameters"]
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}  # no other output folder
    (only,) = tmp_path.glob("outputs/multirun/*/*")
    assert {path.name for path in only.iterdir() if path.is_dir()} == {"0", "1"}


def test_recorded_rows_of_table_1_are_not_run_again_and_broken_ones_are(
    small_shapes: Path, tmp_path: Path
) -> None:
    first, clone = tmp_path / "first", tmp_path / "clone"
    result = sweep(first, small_shapes, "ablation=baseline,con", "dataset=shapes")
    assert result.returncode == 0, result.stderr
    assert len(read_runs(first)) == 2
    splits = ("val", "testA", "testB")
    expected = [(contrastive, split) for contrastive in ("false", "true") for split in splits]
    assert [(row["contrastive"], row["split"]) for row in read_record(first)] == expected
    # A fresh clone has the record and no runs; here the row of one run is damaged.
    (clone / "outputs").mkdir(parents=True)
    lines = (first / "outputs/table1.csv").read_text().splitlines()
    (clone / "outputs/table1.csv").write_text("\n".join([*lines[:5], lines[5][:60]]) + "\n")
    result = sweep(clone, small_shapes, "ablation=baseline,con,dec1", "dataset=shapes")
    assert result.returncode == 0, result.stderr
    output = result.stdout + result.stderr
    assert output.count(", not run again") == 1
    assert "holds only val, testA, not testB of run" in output or "ignoring broken rows" in output
    assert len(read_runs(clone)) == 2  # con again, and dec1
    assert len(read_record(clone)) == 9


def test_a_failing_job_does_not_stop_the_others_and_the_sweep_reports_it(
    small_shapes: Path, tmp_path: Path
) -> None:
    result = sweep(tmp_path, small_shapes, "trainer.strategy=none,auto")
    assert result.returncode == 1
    assert "error: this machine cannot run" in result.stderr
    assert "failed with exit code 1" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(read_runs(tmp_path)) == 1


@pytest.mark.parametrize(
    ("launcher", "plugin"),
    [("joblib", "hydra_joblib_launcher"), ("submitit_local", "hydra_submitit_launcher")],
)
def test_other_launchers_run_the_same_jobs(
    launcher: str, plugin: str, small_shapes: Path, tmp_path: Path
) -> None:
    pytest.importorskip(f"hydra_plugins.{plugin}")
    options = (f"hydra/launcher={launcher}", "ablation=con,dec1", "dataset=shapes")
    result = sweep(tmp_path, small_shapes, *options)
    assert result.returncode == 0, result.stderr
    assert len(read_runs(tmp_path)) == 2
    assert len(read_record(tmp_path)) == 6


def test_results_whose_row_was_lost_are_recorded_without_another_run(
    small_shapes: Path, tmp_path: Path
) -> None:
    options = ("dataset=shapes", f"hydra.sweep.dir={tmp_path}/sweep")
    assert sweep(tmp_path, small_shapes, "ablation=con", *options).returncode == 0
    results = tmp_path / "sweep/0/results.json"
    before, rows = results.stat().st_mtime_ns, read_record(tmp_path)
    (tmp_path / "outputs/table1.csv").unlink()  # as if killed before it was written
    again = sweep(tmp_path, small_shapes, "ablation=con", *options)
    assert again.returncode == 0, again.stderr
    assert results.stat().st_mtime_ns == before
    assert read_record(tmp_path) == rows
    # The results of another run are not taken for this one's.
    other = sweep(tmp_path, small_shapes, "ablation=dec1", *options)
    assert other.returncode == 1
    assert "holds another run" in other.stderr


def test_no_process_of_a_finished_job_starts_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_config(["record=null"])
    results = {**fingerprint(config), "config": config, "splits": {"val": {"mIoU": 0.5}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(subprocess, "Popen", None)
    for process in ("0", "1"):  # of a job on two nodes
        monkeypatch.setenv("SLURM_PROCID", process)
        assert run_job(config, [], tmp_path, "group") == 0.5


# -- Processes


def descendants(pid: int) -> set[int]:
    """Return the ids of all processes that a process and its children have started."""
    ids: set[int] = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == pid:
                ids |= {int(status.parent.name)} | descendants(int(status.parent.name))
    return ids


def trainings(pids: set[int]) -> set[int]:
    """Return those of the processes that are alive and train."""
    training = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            if b"hydra.run.dir" in Path(f"/proc/{pid}/cmdline").read_bytes():
                training.add(pid)
    return training


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_terminated_sweep_leaves_no_job_running(
    launcher: str, small_shapes: Path, tmp_path: Path
) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    options = (f"data_root={small_shapes}", f"hydra/launcher={launcher}", "seed=0,1")
    arguments = command("train", "-m", *LIMITS, "trainer.max_epochs=100000", *options)
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            arguments, cwd=tmp_path, env=environment(), stdout=file, stderr=file
        )
        for _ in range(240):
            time.sleep(0.5)
            if list(tmp_path.glob("outputs/multirun/*/*/0/metrics.csv")):
                break
        started = descendants(process.pid)
        assert trainings(started), "no job trains"
        process.terminate()
        process.wait(30)
        for _ in range(80):
            time.sleep(0.5)
            if not trainings(started):
                break
    assert not trainings(started), log.read_text()[-2000:]


@pytest.mark.parametrize(
    "name", ["a b", "a=b", "a,b", "a'b", "a\\b", "a\\'b", "a\\", "[a]{b}$c", "a\\\\'"]
)
def test_any_path_reaches_the_job_unchanged(name: str) -> None:
    path = Path("/somewhere") / name
    parsed = OverridesParser.create().parse_override(f"hydra.run.dir={quote_value(str(path))}")
    assert parsed.value() == str(path)


# -- Slurm and Weights & Biases


def test_the_slurm_example_asks_for_two_nodes_of_eight_gpus() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    page = (Path(__file__).parents[2] / "docs/reproduce.md").read_text()
    pattern = r"^    python -m crislit.train -m (hydra/launcher=slurm .*?)(?:\s+#.*)?$"
    (line,) = re.findall(pattern, page, re.MULTILINE)
    overrides = [re.sub(r",.*", "", part) for part in line.split()]  # its first job
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose("train", overrides, return_hydra_config=True)
    launcher = config.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 8, 8)
    assert (config.trainer.num_nodes, config.trainer.devices) == (2, launcher.tasks_per_node)
    # Four samples on each of 16 devices.
    assert build_data(compose_config(overrides[1:])).accumulation(16) == 1


class FakeProcess:
    """Stands in for a job's process, and records its environment."""

    environment: ClassVar[dict[str, str]] = {}
    pid = 0

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        FakeProcess.environment = env

    def __enter__(self) -> "FakeProcess":
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait(self, timeout: float | None = None) -> int:
        return 0

    def poll(self) -> int:
        return 0


def test_a_job_joins_its_sweeps_group_and_only_its_first_process_cleans_up_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crislit.experiments.sweep.subprocess.Popen", FakeProcess)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    config = compose_config([f"record={tmp_path / 'record.csv'}"])
    folder, group = tmp_path / "job", "2026-11-25-10-00-00"
    (folder / "checkpoints").mkdir(parents=True)
    assert run_job(config, [], folder, group) == 0.0
    assert FakeProcess.environment["WANDB_RUN_GROUP"] == group
    assert (folder / "checkpoints").is_dir(), "the first process may be writing there"
    assert not (tmp_path / "record.csv").exists()
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    run_job(config, [], folder, group)
    assert FakeProcess.environment["WANDB_RUN_GROUP"] == "mine"
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(FileNotFoundError):  # the fake process writes no results.json
        run_job(config, [], folder, group)
    assert not (folder / "checkpoints").exists(), "those of an interrupted run are removed"
