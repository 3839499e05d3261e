"""Several processes, signals, sweeps and real photographs: what only whole runs can show."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from crislit.metrics import METRICS
from crislit.resume import PREVIOUS, newest
from tests.runs import command, environment, execute, run

pytestmark = pytest.mark.slow

PLAIN = "callbacks.pictures=0"
"""No pictures, which take longer than all else."""
SMALL = ("dataset=shapes", "image_size=64", "batch_size=8", "model.neck=[16,64,32]", "decoder.layers=1", "workers=0", PLAIN)


def results_of(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def finished(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def checkpoint(small_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network after three steps."""
    folder = tmp_path_factory.mktemp("one")
    options = ("trainer=cpu", "trainer.max_steps=3", f"data_root={small_shapes}", "hydra.run.dir=run")
    finished(execute("train", *SMALL, *options, cwd=folder))
    return Path(results_of(folder / "run")["checkpoint"])


def test_two_and_four_processes_count_every_sentence_once(checkpoint: Path, minirefer: Path, tmp_path: Path) -> None:
    found = {}
    for processes in (1, 2, 4):  # 11 sentences and 8: shares are uneven, and so are batches
        options = ["trainer=ddp_cpu", f"trainer.devices={processes}"] if processes > 1 else ["trainer=cpu"]
        overrides = [f"checkpoint={checkpoint}", "dataset=grefcoco", f"data_root={minirefer}", "eval_batch_size=2", "workers=0"]
        overrides += ["threshold=0.3"]  # three steps leave all probabilities between 0.25 and 0.5: about a quarter is above
        finished(execute("evaluate", *overrides, *options, f"hydra.run.dir=by{processes}", cwd=tmp_path))
        found[processes] = results_of(tmp_path / f"by{processes}")["splits"]
    assert {split: values["samples"] for split, values in found[1].items()} == {"val": 11, "test": 8}
    assert found[1]["val"]["mIoU"] > 0.01  # else equality would say little
    for several in (found[2], found[4]):
        for split, values in found[1].items():
            assert several[split]["samples"] == values["samples"]
            for metric in METRICS:
                assert several[split][metric] == pytest.approx(values[metric], abs=1e-4)


def test_fewer_samples_than_processes_are_counted_once_too(checkpoint: Path, minirefer: Path, tmp_path: Path) -> None:
    found = {}
    for processes in (1, 4):
        options = ["trainer=ddp_cpu", f"trainer.devices={processes}"] if processes > 1 else ["trainer=cpu"]
        overrides = [f"checkpoint={checkpoint}", "dataset=grefcoco", f"data_root={minirefer}", "workers=0", "threshold=0.3"]
        overrides += ["dataset.max_images=1", "protocol=first_sentence"]
        finished(execute("evaluate", *overrides, *options, f"hydra.run.dir=by{processes}", cwd=tmp_path))
        found[processes] = results_of(tmp_path / f"by{processes}")["splits"]
    assert all(0 < values["samples"] < 4 for values in found[1].values())
    for split, values in found[1].items():
        assert found[4][split]["samples"] == values["samples"]
        for metric in METRICS:
            assert found[4][split][metric] == pytest.approx(values[metric], abs=1e-4)


def processes_of(first: "subprocess.Popen[str]") -> dict[int, int]:
    """Return a run's processes by rank: the one that it was started as, and those that it has started for that."""
    found = {0: first.pid}
    for child in Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split():
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"LOCAL_RANK="):
                found.setdefault(int(entry.split(b"=")[1]), int(child))
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by Linux's /proc")
@pytest.mark.parametrize(("program", "processes", "killed"), [("train", 2, 1), ("train", 2, 0), ("evaluate", 4, 3)])
def test_where_one_process_is_killed_the_others_end_within_a_minute(
    program: str, processes: int, killed: int, checkpoint: Path, small_shapes: Path, tmp_path: Path
) -> None:
    overrides = ["trainer=ddp_cpu", f"trainer.devices={processes}", f"data_root={small_shapes}", "hydra.run.dir=run"]
    if program == "train":
        overrides += [*SMALL, "recipe.epochs=1000", "checkpoint_every=2"]
        sign = tmp_path / "run/checkpoints" / PREVIOUS
    else:
        overrides += [f"checkpoint={checkpoint}", "eval_batch_size=1", "callbacks.pictures=36"]
        sign = tmp_path / "run/figures/sample_00000.png"
    running = subprocess.Popen(
        command(program, *overrides), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while not sign.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    there = processes_of(running)
    assert sorted(there) == list(range(processes))
    os.kill(there[killed], signal.SIGKILL)
    _, errors = running.communicate(timeout=60)  # ends when none is left that could write
    assert running.returncode == (1 if killed else -signal.SIGKILL)
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert told[0].startswith(f"error: process {killed} of {processes}," if killed else "error: the first process of this run")
    assert "Traceback" not in errors
    assert program != "train" or newest(tmp_path / "run")


SPOILT = """
from dataclasses import replace
from crislit.data.dataset import ReferTrainSet
from crislit.train import main

healthy = ReferTrainSet.__getitems__

def read(self, keys):
    batch = healthy(self, keys)
    return replace(batch, images=batch.images * float("nan")) if any(key.position == 5 for key in keys) else batch

ReferTrainSet.__getitems__ = read
main()
"""


def test_numbers_that_make_no_sense_in_one_process_end_all_with_one_error(small_shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "spoilt.py").write_text(SPOILT)
    options = [
        *SMALL,
        "trainer=ddp_cpu",
        "batch_size=16",
        "batch_size_per_device=4",
        f"data_root={small_shapes}",
        "hydra.run.dir=run",
    ]
    done = subprocess.run(
        [sys.executable, "spoilt.py", *options],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1
    told = re.findall(r"^error: .*", done.stderr, re.MULTILINE)
    assert len(told) == 1
    told_of = r"step \d was not taken \(epoch 1, batch \d+, process [01]\): loss nan, .*First not finite: image_encoder"
    assert re.search(told_of, told[0])
    assert told[0].count(" of ref ") == 4
    assert "Traceback" not in done.stderr


def test_training_in_two_processes_is_one_whole_run(small_shapes: Path, tmp_path: Path) -> None:
    options = ("trainer=ddp_cpu", "recipe.epochs=2", "callbacks.pictures=12", "hydra.run.dir=run")
    done = execute("train", *SMALL, *options, f"data_root={small_shapes}", cwd=tmp_path)
    finished(done)
    results = results_of(tmp_path / "run")
    assert {split: values["samples"] for split, values in results["splits"].items()} == {"val": 36, "testA": 36, "testB": 36}
    assert (tmp_path / "run/checkpoints/best.ckpt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert len(list((tmp_path / "run/figures").glob("*.png"))) == 12


@pytest.mark.parametrize(("dataset", "splits"), [("refcoco+", ["val", "testA", "testB"]), ("grefcoco", ["val", "test"])])
def test_photographs_train_and_evaluate_on_all_their_splits(
    minirefer: Path, tmp_path: Path, dataset: str, splits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"dataset={dataset}", f"data_root={minirefer}", "batch_size=4", "image_size=96", "recipe.epochs=1")
    assert list(run(monkeypatch, tmp_path / "run", *options)["splits"]) == splits


def test_the_google_partition_evaluates(minirefer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("dataset=refcoco", f"data_root={minirefer}", "batch_size=4", "image_size=96", "trainer.max_steps=1")
    run(monkeypatch, tmp_path / "run", *options)
    other = (f"checkpoint={tmp_path / 'run/checkpoints/last.ckpt'}", "dataset=grefcoco_google", f"data_root={minirefer}")
    assert run(monkeypatch, tmp_path / "google", *other, program="evaluate")["splits"]["val"]["samples"] == 18


def test_the_papers_network_runs_whole_on_photographs(minirefer: Path, tmp_path: Path) -> None:
    finished(
        execute(
            "train",
            "model=rn101",
            "dataset=grefcoco",
            f"data_root={minirefer}",
            "dataset.max_images=2",
            "protocol=first_sentence",
            "dataset.evaluation_splits=[val]",
            "trainer.max_steps=1",
            "batch_size=2",
            PLAIN,
            "hydra.run.dir=run",
            cwd=tmp_path,
            seconds=600,
            threads=2,
        )
    )
    assert results_of(tmp_path / "run")["parameters"] == 161_251_681
