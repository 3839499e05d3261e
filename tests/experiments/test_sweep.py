"""Sweeps: complete runs of their own, none twice, on one process or several."""

import contextlib
import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from crislit.config import compose_config, config_dir
from crislit.experiments.sweep import quote_override, run_job
from crislit.training.build import build_data
from crislit.training.provenance import fingerprint
from tests.runs import environment

SMALL = (
    "batch_size=8",
    "image_size=64",
    "trainer.max_steps=1",
    "workers=0",
    "callbacks.pictures=0",
    "model.clip_weights=null",
    "+trainer.enable_progress_bar=false",
)

pytestmark = pytest.mark.slow


def sweep(
    folder: Path, root: Path, *overrides: str, seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a sweep in a folder of its own."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "crislit.train", "-m", *SMALL, f"data_root={root}", *overrides]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def runs(folder: Path) -> list[dict[str, object]]:
    return [
        json.loads(path.read_text()) for path in sorted(folder.glob("multirun/*/*/*/results.json"))
    ]


def record(folder: Path) -> list[dict[str, str]]:
    with (folder / "results/table1.csv").open() as file:
        return list(csv.DictReader(file))


def test_two_jobs_on_two_processes_each_are_two_complete_runs(
    small_shapes: Path, tmp_path: Path
) -> None:
    done = sweep(tmp_path, small_shapes, "trainer=ddp_cpu", "decoder.layers=1,2")
    assert done.returncode == 0, done.stderr
    found = runs(tmp_path)
    assert len(found) == 2
    for layers, results in zip((1, 2), found, strict=True):
        assert results["config"]["decoder"]["layers"] == layers  # type: ignore[index]
        assert results["config"]["trainer"]["devices"] == 2  # type: ignore[index]
        # As many as a single process counts: 6 scenes, 2 refs each, 3 sentences each.
        assert [values["samples"] for values in results["splits"].values()] == [36, 36, 36]  # type: ignore[attr-defined]
    assert found[0]["parameters"] != found[1]["parameters"]
    assert {path.name for path in tmp_path.iterdir()} == {"multirun"}  # no other output folder
    (only,) = tmp_path.glob("multirun/*/*")
    assert {path.name for path in only.iterdir() if path.is_dir()} == {"0", "1"}


def test_rows_of_table_1_are_recorded_and_not_run_again_and_broken_ones_are(
    small_shapes: Path, tmp_path: Path
) -> None:
    first = sweep(tmp_path / "a", small_shapes, "ablation=baseline,con", "dataset=shapes")
    assert first.returncode == 0, first.stderr
    assert len(runs(tmp_path / "a")) == 2
    rows = record(tmp_path / "a")
    assert [(row["contrastive"], row["split"]) for row in rows] == [
        (contrastive, split)
        for contrastive in ("false", "true")
        for split in ("val", "testA", "testB")
    ]
    # In a fresh clone, which has the record and no runs; one run's row is damaged there.
    (tmp_path / "b/results").mkdir(parents=True)
    text = (tmp_path / "a/results/table1.csv").read_text().splitlines()
    (tmp_path / "b/results/table1.csv").write_text("\n".join([*text[:5], text[5][:60]]) + "\n")
    second = sweep(tmp_path / "b", small_shapes, "ablation=baseline,con,dec1", "dataset=shapes")
    assert second.returncode == 0, second.stderr
    told = second.stdout + second.stderr
    assert told.count("and not run again") == 1
    assert "holds only val, testA, not testB of run" in told or "broken rows are left out" in told
    assert len(runs(tmp_path / "b")) == 2  # con again, and dec1
    assert len(record(tmp_path / "b")) == 9


def test_a_job_that_fails_does_not_stop_the_others_and_the_sweep_says_so(
    small_shapes: Path, tmp_path: Path
) -> None:
    done = sweep(tmp_path, small_shapes, "decoder.layers=-1,1")
    assert done.returncode == 1
    assert "error: decoder.layers must be a whole number" in done.stderr
    assert "failed with exit code 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(runs(tmp_path)) == 1


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_other_launchers_run_the_same_jobs(
    launcher: str, small_shapes: Path, tmp_path: Path
) -> None:
    pytest.importorskip(
        "hydra_plugins.hydra_joblib_launcher"
        if launcher == "joblib"
        else "hydra_plugins.hydra_submitit_launcher"
    )
    done = sweep(
        tmp_path, small_shapes, f"hydra/launcher={launcher}", "ablation=con,dec1", "dataset=shapes"
    )
    assert done.returncode == 0, done.stderr
    assert len(runs(tmp_path)) == 2
    assert len(record(tmp_path)) == 6


def test_results_whose_row_was_lost_are_recorded_without_another_run(
    small_shapes: Path, tmp_path: Path
) -> None:
    job = ("ablation=con", "dataset=shapes", f"hydra.sweep.dir={tmp_path}/sweep")
    assert sweep(tmp_path, small_shapes, *job).returncode == 0
    results = tmp_path / "sweep/0/results.json"
    before, rows = results.stat().st_mtime_ns, record(tmp_path)
    (tmp_path / "results/table1.csv").unlink()  # killed before it was written
    again = sweep(tmp_path, small_shapes, *job)
    assert again.returncode == 0, again.stderr
    assert results.stat().st_mtime_ns == before
    assert record(tmp_path) == rows
    # Another run's results are not taken for this one's.
    other = sweep(tmp_path, small_shapes, "ablation=dec1", *job[1:])
    assert other.returncode == 1
    assert "holds another run" in other.stderr


def test_no_process_of_a_finished_job_starts_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = compose_config(["record=null"])
    measured = {"experiment": fingerprint(settings)["experiment"], "splits": {"val": {"mIoU": 0.5}}}
    (tmp_path / "results.json").write_text(json.dumps(measured))
    monkeypatch.setattr(subprocess, "Popen", None)
    for process in ("0", "1"):  # of a job on two nodes
        monkeypatch.setenv("SLURM_PROCID", process)
        assert run_job(settings, [], tmp_path, "group") == 0.5


def children(pid: int) -> set[int]:
    """Process ids of all that a process has started, and they."""
    found: set[int] = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == pid:
                found |= {int(status.parent.name)} | children(int(status.parent.name))
    return found


def alive(pids: set[int]) -> set[int]:
    return {
        pid
        for pid in pids
        if Path(f"/proc/{pid}/cmdline").is_file() and Path(f"/proc/{pid}/cmdline").read_bytes()
    }


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_that_is_ended_leaves_no_job_behind(
    launcher: str, small_shapes: Path, tmp_path: Path
) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    long = [part for part in SMALL if "max_steps" not in part] + [
        "trainer.max_epochs=100000",
        f"data_root={small_shapes}",
    ]
    command = [
        sys.executable,
        "-m",
        "crislit.train",
        "-m",
        *long,
        f"hydra/launcher={launcher}",
        "seed=0,1",
    ]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
        for _ in range(240):
            time.sleep(0.5)
            if list(tmp_path.glob("multirun/*/*/0/metrics.csv")):
                break
        started = children(running.pid)
        assert any(
            b"hydra.run.dir" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in alive(started)
        ), "a job trains"
        running.terminate()
        running.wait(30)
        for _ in range(80):
            time.sleep(0.5)
            trainings = {
                pid
                for pid in alive(started)
                if b"hydra.run.dir" in Path(f"/proc/{pid}/cmdline").read_bytes()
            }
            if not trainings:
                break
    assert not trainings, (tmp_path / "log").read_text()[-2000:]


@pytest.mark.parametrize(
    "name", ["a b", "a=b", "a,b", "a'b", "a\\b", "a\\'b", "a\\", "[a]{b}$c", "a\\\\'"]
)
def test_any_path_reaches_the_job_as_it_is(name: str) -> None:
    path = Path("/somewhere") / name
    parsed = OverridesParser.create().parse_override(f"hydra.run.dir={quote_override(path)}")
    assert parsed.value() == str(path)


def test_the_slurm_example_asks_for_two_nodes_of_eight() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(config_dir(), version_base="1.3"):
        readme = (Path(__file__).parents[2] / "README.md").read_text()
        (line,) = re.findall(
            r"^    python -m crislit.train -m (hydra/launcher=slurm .*?)(?:\s+#.*)?$",
            readme,
            re.MULTILINE,
        )
        overrides = [re.sub(r",.*", "", part) for part in line.split()]  # its first job
        config = compose("train", overrides, return_hydra_config=True)
    launcher = config.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 8, 8)
    assert (config.trainer.num_nodes, config.trainer.devices) == (2, launcher.tasks_per_node)
    assert (
        build_data(compose_config(overrides[1:])).accumulation(16) == 1
    )  # four samples on each of 16 devices


class Child:
    """Poses as a job's process, and takes down its environment."""

    environment: ClassVar[dict[str, str]] = {}
    pid = 0

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        Child.environment = env

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait(self, timeout: float | None = None) -> int:
        return 0

    def poll(self) -> int:
        return 0


def test_a_job_joins_its_sweeps_group_and_only_its_first_process_cleans_up_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crislit.experiments.sweep.subprocess.Popen", Child)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    settings = compose_config([f"record={tmp_path / 'record.csv'}"])
    (tmp_path / "job/checkpoints").mkdir(parents=True)
    assert run_job(settings, [], tmp_path / "job", "2026-11-25-10-00-00") == 0.0
    assert Child.environment["WANDB_RUN_GROUP"] == "2026-11-25-10-00-00"
    assert (tmp_path / "job/checkpoints").is_dir(), (
        "the first process's, which may be writing there"
    )
    assert not (tmp_path / "record.csv").exists()
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    run_job(settings, [], tmp_path / "job", "2026-11-25-10-00-00")
    assert Child.environment["WANDB_RUN_GROUP"] == "mine"
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(FileNotFoundError):  # such a child leaves no results.json
        run_job(settings, [], tmp_path / "job", "2026-11-25-10-00-00")
    assert not (tmp_path / "job/checkpoints").exists(), "a broken run's"
