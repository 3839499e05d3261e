"""Sweeps: complete runs of their own, none twice, on one process or several."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from crislit.config import config_dir, load_settings
from crislit.train import build_data
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


def sweep(folder: Path, root: Path, *overrides: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a sweep in a folder of its own."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "crislit.train", "-m", *SMALL, f"data_root={root}", *overrides]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=seconds, check=False)


def runs(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("multirun/*/*/*/results.json"))]


def record(folder: Path) -> list[dict[str, str]]:
    with (folder / "results/table1.csv").open() as file:
        return list(csv.DictReader(file))


def test_two_jobs_on_two_processes_each_are_two_complete_runs(small_shapes: Path, tmp_path: Path) -> None:
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


def test_rows_of_table_1_are_recorded_and_not_run_again_and_broken_ones_are(small_shapes: Path, tmp_path: Path) -> None:
    first = sweep(tmp_path / "a", small_shapes, "ablation=baseline,con", "dataset=shapes")
    assert first.returncode == 0, first.stderr
    assert len(runs(tmp_path / "a")) == 2
    rows = record(tmp_path / "a")
    assert [(row["contrastive"], row["split"]) for row in rows] == [
        (contrastive, split) for contrastive in ("false", "true") for split in ("val", "testA", "testB")
    ]
    # In a fresh clone, which has the record and no runs; one run's row is damaged there.
    (tmp_path / "b/results").mkdir(parents=True)
    text = (tmp_path / "a/results/table1.csv").read_text().splitlines()
    (tmp_path / "b/results/table1.csv").write_text("\n".join([*text[:5], text[5][:60]]) + "\n")
    second = sweep(tmp_path / "b", small_shapes, "ablation=baseline,con,dec1", "dataset=shapes")
    assert second.returncode == 0, second.stderr
    told = second.stdout + second.stderr
    assert told.count("and not run again") == 1
    assert "holds only val, testA" in told or "broken rows are left out" in told
    assert len(runs(tmp_path / "b")) == 2  # con again, and dec1
    assert len(record(tmp_path / "b")) == 9


def test_a_job_that_fails_does_not_stop_the_others_and_the_sweep_says_so(small_shapes: Path, tmp_path: Path) -> None:
    done = sweep(tmp_path, small_shapes, "decoder.layers=-1,1")
    assert done.returncode == 1
    assert "error: decoder.layers must be a whole number" in done.stderr
    assert "failed with exit code 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(runs(tmp_path)) == 1


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_other_launchers_run_the_same_jobs(launcher: str, small_shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "hydra_plugins.hydra_joblib_launcher" if launcher == "joblib" else "hydra_plugins.hydra_submitit_launcher"
    )
    done = sweep(tmp_path, small_shapes, f"hydra/launcher={launcher}", "ablation=con,dec1", "dataset=shapes")
    assert done.returncode == 0, done.stderr
    assert len(runs(tmp_path)) == 2
    assert len(record(tmp_path)) == 6


def test_the_slurm_example_asks_for_two_nodes_of_eight() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(config_dir(), version_base="1.3"):
        overrides = ["hydra/launcher=slurm", "trainer=ddp", "trainer.devices=8", "trainer.num_nodes=2", "experiment=table2"]
        config = compose("train", overrides, return_hydra_config=True)
    launcher = config.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 8, 8)
    assert (config.trainer.num_nodes, config.trainer.devices) == (2, launcher.tasks_per_node)
    assert build_data(load_settings(overrides[1:])).accumulation(16) == 1  # four samples on each of 16 devices
