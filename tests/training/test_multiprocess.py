"""Several processes, signals and real sizes: what only complete runs can show."""

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

from crislit.training.checkpointing import PREVIOUS
from crislit.training.metrics import METRICS
from crislit.training.resume import latest_checkpoint
from tests.refer_data import count_refs
from tests.runs import command, environment, execute, run

pytestmark = pytest.mark.slow

NO_PLOTS = "callbacks.pictures=0"
"""Plots take longer than the rest of a short run."""
SMALL = (
    "dataset=shapes",
    "image_size=64",
    "batch_size=8",
    "model.neck=[16,64,32]",
    "decoder.layers=1",
    "workers=0",
    NO_PLOTS,
)


def read_results(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def assert_success(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def checkpoint(small_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network after three steps."""
    folder = tmp_path_factory.mktemp("one") / "run"
    options = ("trainer=cpu", "trainer.max_steps=3", f"data_root={small_shapes}")
    with pytest.MonkeyPatch.context() as patch:
        return Path(run(patch, folder, *SMALL, *options)["checkpoint"])


# -- Evaluation by several processes


def evaluate_with(
    processes: int, checkpoint: Path, root: Path, folder: Path, *overrides: str
) -> dict[str, dict[str, float]]:
    """Evaluate G-Ref with several processes and return the metrics of each split."""
    options = [
        f"checkpoint={checkpoint}",
        "dataset=grefcoco",
        f"data_root={root}",
        "workers=0",
        # After three steps all probabilities are between 0.25 and 0.5, a quarter above 0.3.
        "threshold=0.3",
        *overrides,
    ]
    if processes == 1:
        with pytest.MonkeyPatch.context() as patch:
            run(patch, folder / "by1", *options, "trainer=cpu", program="evaluate")
    else:
        trainer = ["trainer=ddp_cpu", f"trainer.devices={processes}"]
        place = f"hydra.run.dir=by{processes}"
        assert_success(execute("evaluate", *options, *trainer, place, cwd=folder))
    splits: dict[str, dict[str, float]] = read_results(folder / f"by{processes}")["splits"]
    return splits


def assert_same_metrics(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    for split, values in expected.items():
        assert ours[split]["samples"] == values["samples"]
        for metric in METRICS:
            assert ours[split][metric] == pytest.approx(values[metric], abs=1e-4)


@pytest.mark.parametrize(
    ("processes", "overrides", "samples"),
    [
        # Shares and batches are uneven.
        (3, ("eval_batch_size=2",), {"val": 11, "test": 8}),
        # There are fewer samples than processes.
        (4, ("dataset.max_images=1", "protocol=first_sentence"), {"val": 3, "test": 3}),
    ],
)
def test_several_processes_count_every_sentence_once(
    processes: int,
    overrides: tuple[str, ...],
    samples: dict[str, int],
    checkpoint: Path,
    generated_root: Path,
    tmp_path: Path,
) -> None:
    alone, together = (
        evaluate_with(count, checkpoint, generated_root, tmp_path, *overrides)
        for count in (1, processes)
    )
    assert {split: values["samples"] for split, values in alone.items()} == samples
    assert alone["val"]["mIoU"] > 0.01, "equality of zeros would show little"
    assert_same_metrics(together, alone)


# -- Processes that fail


def processes_of(main: "subprocess.Popen[str]") -> dict[int, int]:
    """Return the ids of a run's processes by rank: the main process and those that it started."""
    ids = {0: main.pid}
    for child in Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split():
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"LOCAL_RANK="):
                ids.setdefault(int(entry.split(b"=")[1]), int(child))
    return ids


@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="finds processes in Linux's /proc"
)
@pytest.mark.parametrize(
    ("program", "processes", "killed"), [("train", 2, 1), ("train", 2, 0), ("evaluate", 3, 2)]
)
def test_if_one_process_is_killed_the_others_end_within_a_minute(
    program: str, processes: int, killed: int, checkpoint: Path, small_shapes: Path, tmp_path: Path
) -> None:
    overrides = [
        "trainer=ddp_cpu",
        f"trainer.devices={processes}",
        f"data_root={small_shapes}",
        "hydra.run.dir=run",
    ]
    if program == "train":
        overrides += [*SMALL, "recipe.epochs=1000", "checkpoint_every=2"]
        first_output = tmp_path / "run/checkpoints" / PREVIOUS
    else:
        overrides += [f"checkpoint={checkpoint}", "eval_batch_size=1", "callbacks.pictures=36"]
        first_output = tmp_path / "run/figures/sample_00000.png"
    running = subprocess.Popen(
        command(program, *overrides),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not first_output.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ids = processes_of(running)
    assert sorted(ids) == list(range(processes))
    os.kill(ids[killed], signal.SIGKILL)
    _, stderr = running.communicate(timeout=60)  # returns when no process is left that could write
    assert running.returncode == (1 if killed else -signal.SIGKILL)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    main_process = "error: the main process of this run"
    assert errors[0].startswith(
        f"error: process {killed} of {processes}," if killed else main_process
    )
    assert "Traceback" not in stderr
    assert program != "train" or latest_checkpoint(tmp_path / "run")


NAN_IMAGES = """
from dataclasses import replace
from crislit.data.dataset import ReferTrainSet
from crislit.train import main

original = ReferTrainSet.__getitems__

def read(self, keys):
    batch = original(self, keys)
    if any(key.position == 5 for key in keys):
        return replace(batch, images=batch.images * float("nan"))
    return batch

ReferTrainSet.__getitems__ = read
main()
"""


def test_nan_in_one_process_ends_all_processes_with_one_error(
    small_shapes: Path, tmp_path: Path
) -> None:
    (tmp_path / "nan_images.py").write_text(NAN_IMAGES)
    options = [
        *SMALL,
        "trainer=ddp_cpu",
        "batch_size=16",
        "batch_size_per_device=4",
        f"data_root={small_shapes}",
        "hydra.run.dir=run",
    ]
    done = subprocess.run(
        [sys.executable, "nan_images.py", *options],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1
    errors = re.findall(r"^error: .*", done.stderr, re.MULTILINE)
    assert len(errors) == 1
    place = r"epoch 1, batch \d+, process [01]"
    expected = rf"step \d was not taken \({place}\): loss nan, .*First not finite: image_encoder"
    assert re.search(expected, errors[0])
    assert errors[0].count(" of ref ") == 4
    assert "Traceback" not in done.stderr


# -- Complete runs


def test_training_in_two_processes_completes(small_shapes: Path, tmp_path: Path) -> None:
    options = ("trainer=ddp_cpu", "recipe.epochs=2", "callbacks.pictures=12", "hydra.run.dir=run")
    overrides = (*SMALL, *options, f"data_root={small_shapes}")
    # `crislit train` forwards to `crislit.train`, which starts the second process.
    forwarding = [sys.executable, "-m", "crislit", "train", *overrides]
    ended = subprocess.run(
        forwarding, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert_success(ended)
    splits = read_results(tmp_path / "run")["splits"]
    samples = {split: values["samples"] for split, values in splits.items()}
    assert samples == {"val": 36, "testA": 36, "testB": 36}
    assert (tmp_path / "run/checkpoints/best.ckpt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert len(list((tmp_path / "run/figures").glob("*.png"))) == 12


@pytest.mark.parametrize(
    ("dataset", "splits"), [("refcoco+", ["val", "testA", "testB"]), ("grefcoco", ["val", "test"])]
)
def test_refer_data_train_and_evaluate_on_all_their_splits(
    refer_root: Path,
    tmp_path: Path,
    dataset: str,
    splits: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = (
        f"dataset={dataset}",
        f"data_root={refer_root}",
        "batch_size=4",
        "image_size=96",
        "recipe.epochs=1",
    )
    assert list(run(monkeypatch, tmp_path / "run", *options)["splits"]) == splits


def test_the_google_partition_evaluates(
    refer_root: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        f"checkpoint={checkpoint}",
        "dataset=grefcoco_google",
        f"data_root={refer_root}",
    )
    splits = run(monkeypatch, tmp_path / "google", *options, program="evaluate")["splits"]
    _, sentences, _ = count_refs(refer_root, "refcocog", "refs(google).p")["val"]
    assert splits["val"]["samples"] == sentences == 18


def test_a_network_of_the_papers_size_trains_and_evaluates(
    generated_root: Path, tmp_path: Path
) -> None:
    options = (
        "model=rn101",
        "model.clip_weights=null",
        "dataset=grefcoco",
        f"data_root={generated_root}",
        "dataset.max_images=2",
        "protocol=first_sentence",
        "dataset.evaluation_splits=[val]",
        "trainer.max_steps=1",
        "batch_size=2",
        NO_PLOTS,
        "hydra.run.dir=run",
    )
    assert_success(execute("train", *options, cwd=tmp_path, seconds=600, threads=2))
    assert read_results(tmp_path / "run")["parameters"] == 161_251_681
