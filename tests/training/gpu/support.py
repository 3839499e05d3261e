"""What the tests on a GPU share: marks, short trainings, and what happened at their steps."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from crislit.config import compose_config
from crislit.training import run as steps
from tests.runs import QUICK

DEVICE, TRAINER = "cuda", "gpu"
"""The device of the tests, and the choice of the group ``trainer`` that uses it."""
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # CUDA's libraries, and PyTorch's versions for them, have warnings that no CPU shows.
    pytest.mark.filterwarnings("default"),
]
SHORT = (
    *("image_size=64", "batch_size=4", "dataset.sentences_per_image=1"),
    *("model.clip_weights=null", "trainer.log_every_n_steps=1"),
)
"""A training of the tiny network whose steps take a few milliseconds."""


def build_training(root: Path, folder: Path, *overrides: str) -> steps.Training:
    """Build a short training in this process, so that a test can look into it."""
    common = (f"data_root={root}", f"trainer={TRAINER}", "logger=none", *QUICK, *SHORT)
    started = steps.start(compose_config([*common, *overrides]), folder)
    assert isinstance(started, steps.Start)
    return steps.build(started)


class AfterSteps(L.Callback):
    """Calls a function after each training step, and keeps what it returns.

    Args:
        look: Receives the trainer and the task.

    Attributes:
        seen: What it returned.
    """

    def __init__(self, look: Callable[[L.Trainer, L.LightningModule], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any
    ) -> None:
        """Look after the optimizer's step."""
        self.seen.append(self.look(trainer, pl_module))


def fit_and_look(
    training: steps.Training, look: Callable[[L.Trainer, L.LightningModule], Any]
) -> list[Any]:
    """Train, and return what a function returned after each step."""
    after = AfterSteps(look)
    training.trainer.callbacks.append(after)  # type: ignore[attr-defined]
    steps.fit(training)
    return after.seen


def copy_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of a module's parameters on the CPU, where they take no memory of the GPU."""
    return {name: value.detach().cpu().clone() for name, value in module.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def read_losses(folder: Path) -> dict[int, float]:
    """Return the loss of each step, counted from 0, from a run's metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return {int(row["step"]): float(row["train/loss"]) for row in rows}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content
