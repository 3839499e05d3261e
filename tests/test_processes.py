"""Several processes, signals, sweeps and real photographs: what only whole runs can show."""

import json
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from crislit.metrics import METRICS
from tests.runs import execute

pytestmark = pytest.mark.slow

SMALL = ("dataset=shapes", "image_size=64", "batch_size=8", "model.neck=[16,64,32]", "decoder.layers=1", "workers=0")


def results_of(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def finished(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_and_three_processes_count_every_sentence_once(small_shapes: Path, minirefer: Path, tmp_path: Path) -> None:
    run = execute(
        "train",
        *SMALL,
        "trainer=cpu",
        "trainer.max_steps=3",
        f"data_root={small_shapes}",
        "hydra.run.dir=one",
        cwd=tmp_path,
    )
    finished(run)
    checkpoint = results_of(tmp_path / "one")["checkpoint"]
    found = {}
    for processes in (1, 2, 3):  # 11 sentences and 8: neither number divides by 2 and 3, nor by the batch
        options = ["trainer=ddp_cpu", f"trainer.devices={processes}"] if processes > 1 else ["trainer=cpu"]
        overrides = [f"checkpoint={checkpoint}", "dataset=grefcoco", f"data_root={minirefer}", "eval_batch_size=2", "workers=0"]
        overrides += ["threshold=0.3"]  # three steps leave all probabilities between 0.25 and 0.5: about a quarter is above
        finished(execute("evaluate", *overrides, *options, f"hydra.run.dir=by{processes}", cwd=tmp_path))
        found[processes] = results_of(tmp_path / f"by{processes}")["splits"]
    assert {split: values["samples"] for split, values in found[1].items()} == {"val": 11, "test": 8}
    assert found[1]["val"]["mIoU"] > 0.01  # else equality would say little
    for several in (found[2], found[3]):
        for split, values in found[1].items():
            assert several[split]["samples"] == values["samples"]
            for metric in METRICS:
                assert several[split][metric] == pytest.approx(values[metric], abs=1e-4)


def test_training_in_two_processes_is_one_whole_run(small_shapes: Path, tmp_path: Path) -> None:
    done = execute(
        "train", *SMALL, "trainer=ddp_cpu", "recipe.epochs=2", f"data_root={small_shapes}", "hydra.run.dir=run", cwd=tmp_path
    )
    finished(done)
    results = results_of(tmp_path / "run")
    assert {split: values["samples"] for split, values in results["splits"].items()} == {"val": 36, "testA": 36, "testB": 36}
    assert (tmp_path / "run/checkpoints/best.ckpt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert len(list((tmp_path / "run/figures").glob("*.png"))) == 12


def test_a_sweep_over_the_decoders_depth_makes_four_networks(small_shapes: Path, tmp_path: Path) -> None:
    done = execute(
        "train",
        "-m",
        "decoder.layers=1,2,3,4",
        "image_size=64",
        "batch_size=8",
        "workers=0",
        "trainer=cpu",
        "trainer.max_steps=1",
        f"data_root={small_shapes}",
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )
    finished(done)
    sizes = [results_of(tmp_path / "sweep" / str(job))["parameters"] for job in range(4)]
    steps = {after - before for before, after in pairwise(sizes)}
    assert len(steps) == 1
    assert steps.pop() > 0


@pytest.mark.parametrize(("dataset", "splits"), [("refcoco+", ["val", "testA", "testB"]), ("grefcoco", ["val", "test"])])
def test_photographs_train_and_evaluate_on_all_their_splits(
    minirefer: Path, tmp_path: Path, dataset: str, splits: list[str]
) -> None:
    finished(
        execute(
            "train",
            f"dataset={dataset}",
            f"data_root={minirefer}",
            "batch_size=4",
            "image_size=96",
            "recipe.epochs=1",
            "trainer=cpu",
            "hydra.run.dir=run",
            cwd=tmp_path,
        )
    )
    assert list(results_of(tmp_path / "run")["splits"]) == splits


def test_the_google_partition_evaluates(minirefer: Path, tmp_path: Path) -> None:
    finished(
        execute(
            "train",
            "dataset=refcoco",
            f"data_root={minirefer}",
            "batch_size=4",
            "image_size=96",
            "trainer.max_steps=1",
            "trainer=cpu",
            "hydra.run.dir=run",
            cwd=tmp_path,
        )
    )
    finished(
        execute(
            "evaluate",
            "checkpoint=run/checkpoints/last.ckpt",
            "dataset=grefcoco_google",
            f"data_root={minirefer}",
            "hydra.run.dir=google",
            cwd=tmp_path,
        )
    )
    assert results_of(tmp_path / "google")["splits"]["val"]["samples"] == 18


@pytest.mark.parametrize(("model", "dataset"), [("rn50", "refcoco"), ("rn101", "grefcoco")])
def test_the_papers_networks_run_whole_on_photographs(minirefer: Path, tmp_path: Path, model: str, dataset: str) -> None:
    finished(
        execute(
            "train",
            f"model={model}",
            f"dataset={dataset}",
            f"data_root={minirefer}",
            "dataset.max_images=2",
            "trainer.max_steps=1",
            "batch_size=2",
            "hydra.run.dir=run",
            cwd=tmp_path,
            seconds=600,
            threads=2,
        )
    )
    assert results_of(tmp_path / "run")["parameters"] == {"rn50": 146_849_121, "rn101": 161_251_681}[model]
