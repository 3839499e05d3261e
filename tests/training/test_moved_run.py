"""The best score belongs to a run, wherever its folder is moved or copied to."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from crislit.checkpoints.checkpoint import read_checkpoint
from crislit.training.checkpointing import BEST, LAST, BestCheckpoint, LastCheckpoint
from crislit.training.metrics import SegmentationMetric
from crislit.training.task import CRISTask
from tests.runs import run

SHORT = (
    *("dataset=shapes", "image_size=64", "batch_size=8", "model.neck=[16,64,32]", "logger=none"),
    *("decoder.layers=1", "trainer=cpu", "recipe.epochs=2", "threshold=0.15", "checkpoint_every=3"),
    "dataset.evaluation_splits=[val]",
)


@pytest.fixture
def falling_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every validation score less than the one before."""
    original = CRISTask._log

    def log(self: CRISTask, split: str, metric: SegmentationMetric) -> None:
        if self.trainer.testing:
            original(self, split, metric)
        else:
            self._counters.clear()
            self.log(f"{split}/mIoU", 1 / (1 + self.global_step))

    monkeypatch.setattr(CRISTask, "_log", log)


def same_best(a: Path, b: Path) -> bool:
    first, second = (read_checkpoint(run / "checkpoints" / BEST).weights for run in (a, b))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_continues_elsewhere_keeps_its_best_checkpoint(
    falling_scores: None, small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (*SHORT, f"data_root={small_shapes}")
    whole, copies = tmp_path / "whole", tmp_path / "copies"
    save = LastCheckpoint.save

    def save_and_copy(self: LastCheckpoint, trainer: Any) -> None:
        save(self, trainer)
        if not (copies / str(trainer.global_step)).exists():
            shutil.copytree(whole, copies / str(trainer.global_step))

    monkeypatch.setattr(LastCheckpoint, "save", save_and_copy)
    expected = run(monkeypatch, whole, *overrides, "resume=auto")
    monkeypatch.setattr(LastCheckpoint, "save", save)
    assert read_checkpoint(whole / "checkpoints" / BEST).steps == 6  # the first of two validations

    moved = shutil.copytree(copies / "9", tmp_path / "moved")  # in the second epoch
    results = run(monkeypatch, moved, *overrides, "resume=auto")
    assert same_best(moved, whole)
    assert results["splits"] == expected["splits"]

    elsewhere = tmp_path / "elsewhere"  # with a path, the run continues in a new folder
    last = copies / "12" / "checkpoints" / LAST
    results = run(monkeypatch, elsewhere, *overrides, f"resume={last}", "recipe.epochs=3")
    assert same_best(elsewhere, whole)
    assert results["splits"] == expected["splits"]

    # A damaged one does not keep the run from continuing.
    damaged = shutil.copytree(copies / "12", tmp_path / "damaged") / "checkpoints"
    (damaged / BEST).write_bytes(b"PK")
    begun = tmp_path / "begun"
    run(monkeypatch, begun, *overrides, f"resume={damaged / LAST}", "recipe.epochs=3")
    assert read_checkpoint(begun / "checkpoints" / BEST).steps == 12  # its first validation

    # Scores by another threshold cannot be compared, so the best begins anew.
    other = tmp_path / "other"
    last = copies / "9" / "checkpoints" / LAST
    run(monkeypatch, other, *overrides, f"resume={last}", "threshold=0.3")
    assert read_checkpoint(other / "checkpoints" / BEST).steps == 12


def state_of(folder: Path) -> dict[str, Any]:
    """Return what a run in this folder stores about its best checkpoint."""
    callback = ModelCheckpoint(folder, "best", "val/mIoU", mode="max", enable_version_counter=False)
    path = str(folder / BEST)
    callback.best_model_path = callback.kth_best_model_path = path
    callback.best_model_score = callback.kth_value = torch.tensor(0.5)
    callback.best_k_models = {path: torch.tensor(0.5)}
    return callback.state_dict()


def test_the_best_score_is_restored_with_its_checkpoint_only(tmp_path: Path) -> None:
    state = state_of(tmp_path / "original")
    here = tmp_path / "here"
    here.mkdir()
    without = BestCheckpoint(here, "val/mIoU")
    without.load_state_dict(state)
    assert without.best_model_score is None
    assert without.best_model_path == ""
    assert without.best_k_models == {}
    (here / BEST).touch()
    restored = BestCheckpoint(here, "val/mIoU")
    restored.load_state_dict(state)
    assert restored.best_model_score == 0.5
    # No path of the original run is left: Lightning would delete its file.
    expected = state_of(here)
    assert {**restored.state_dict(), "current_score": None} == {**expected, "current_score": None}


def test_checkpoints_of_earlier_versions_hold_the_same_key(tmp_path: Path) -> None:
    lightnings = ModelCheckpoint(tmp_path, "best", "val/mIoU", mode="max")
    assert BestCheckpoint(tmp_path, "val/mIoU").state_key == lightnings.state_key
