"""DDP and SyncBatchNorm on one GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from crislit.checkpoints import read_checkpoint
from crislit.training import run as steps
from tests.training.gpu import support
from tests.training.gpu.support import build_training, fit_and_look

pytestmark = support.MARKS

DDP, NORMS = "ddp", {SyncBatchNorm}
"""The choice of the group ``trainer``, and the BatchNorms that it trains."""


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    """Undo what Lightning leaves to the process: variables, and the group of its processes."""
    environment = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


def test_ddp_on_one_gpu_trains_as_without_it_with_synchronized_batchnorms(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At a rate so low that Adam does not amplify rounding.
    options = (
        *("trainer.precision=32-true", "recipe.optimizer.learning_rate=1e-5"),
        *("trainer.max_steps=10", "recipe.epochs=1"),
    )

    wrappers: set[type] = set()

    def look(trainer: L.Trainer, task: L.LightningModule) -> tuple[float, set[type]]:
        wrappers.add(type(trainer.strategy.model))
        norms = {type(module) for module in task.modules() if isinstance(module, _BatchNorm)}
        return float(trainer.callback_metrics["train/loss"]), norms

    plain = build_training(small_shapes, tmp_path / "plain", *options)
    expected = [loss for loss, _ in fit_and_look(plain, look)]
    monkeypatch.setattr(support, "TRAINER", DDP)
    training = build_training(small_shapes, tmp_path / "ddp", *options)
    seen = fit_and_look(training, look)
    assert DistributedDataParallel in wrappers
    assert {norm for _, norms in seen for norm in norms} == NORMS
    losses = [loss for loss, _ in seen]
    print(f"relative: {max(abs(b / a - 1) for a, b in zip(expected, losses, strict=True))}")
    assert len(losses) == 10
    assert losses == pytest.approx(expected, rel=1e-3)
    # Evaluation and checkpoints have the network without what was synchronized.
    results = steps.evaluate(training)
    assert not any(isinstance(module, SyncBatchNorm) for module in training.task.modules())
    assert results["splits"].keys() == {"val", "testA", "testB"}
    weights = read_checkpoint(Path(results["checkpoint"])).weights
    assert weights.keys() == training.task.model.state_dict().keys()
