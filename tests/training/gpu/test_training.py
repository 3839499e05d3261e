"""Training on a GPU: the automatic choices, mixed precision, and refused steps."""

import functools
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from crislit.errors import InputError
from crislit.training import nan_guard
from crislit.training import run as steps
from crislit.training.task import CRISTask
from tests.runs import run
from tests.training.gpu import support
from tests.training.gpu.support import (
    SHORT,
    build_training,
    copy_weights,
    fit_and_look,
    read_losses,
    same,
)

pytestmark = support.MARKS


# -- Automatic choices


def test_the_default_trainer_uses_the_gpu_in_mixed_precision(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {}

    build = L.Trainer.__init__

    @functools.wraps(build)
    def record(trainer: L.Trainer, **options: Any) -> None:
        arguments.update(options)
        build(trainer, **options)

    monkeypatch.setattr(support, "TRAINER", "auto")
    monkeypatch.setattr(L.Trainer, "__init__", record)
    devices = "trainer.devices=auto"
    trainer = build_training(small_shapes, tmp_path, devices, "batch_size=8").trainer
    assert (arguments["precision"], arguments["sync_batchnorm"]) == ("16-mixed", True)
    assert trainer.strategy.root_device.type == support.DEVICE
    assert isinstance(trainer.precision_plugin, MixedPrecision)
    assert trainer.precision_plugin.scaler is not None
    assert trainer.precision_plugin.scaler.is_enabled()
    if torch.cuda.device_count() == 1:
        assert (trainer.num_devices, trainer.world_size) == (1, 1)


def test_results_name_the_gpu(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run(monkeypatch, tmp_path, f"data_root={small_shapes}", *SHORT, "trainer.max_steps=2")
    assert results["config"]["trainer"]["accelerator"] == "auto"
    assert results["hardware"].startswith(f"{torch.cuda.device_count()} x ")
    assert torch.cuda.get_device_name() in results["hardware"]


# -- Mixed precision

OVERFIT = (
    *("experiment=overfit", "image_size=128", "dataset.max_images=2", "recipe.epochs=150"),
    *("recipe.optimizer.milestones=[120]", "trainer.check_val_every_n_epoch=150"),
    "trainer.log_every_n_steps=1",
)
"""The sentences of two images, in 150 steps.

On a CPU, the loss falls to 0.125 within 20 steps, as the share of the targets is learned, and then
to 0.0277 in float32 and 0.0272 in bfloat16, as the targets are; their mIoU is 0.40 and 0.38.
"""


@pytest.fixture(scope="module")
def float32_run(
    small_shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], float]:
    """Losses and mIoU of the run in float32."""
    with pytest.MonkeyPatch.context() as patch:
        return overfit(small_shapes, tmp_path_factory.mktemp("float32"), "32-true", patch)


def overfit(
    root: Path, folder: Path, precision: str, patch: pytest.MonkeyPatch
) -> tuple[list[float], float]:
    options = (f"trainer={support.TRAINER}", f"trainer.precision={precision}", f"data_root={root}")
    results = run(patch, folder, *OVERFIT, *options)
    return list(read_losses(folder).values()), results["splits"]["train"]["mIoU"]


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_learns_as_float32_does(
    precision: str,
    float32_run: tuple[list[float], float],
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses, miou = overfit(small_shapes, tmp_path, precision, monkeypatch)
    last, expected = mean(losses[-10:]), mean(float32_run[0][-10:])
    print(f"{precision}: loss {last:.4f}, mIoU {miou:.3f}; float32: {expected:.4f}")
    assert len(losses) == 150
    assert last < 0.4 * mean(losses[10:20])
    # Initial weights, batches and their order are the same.
    assert last == pytest.approx(expected, rel=0.25)
    assert miou > 0.2


def test_a_step_that_overflows_is_skipped_and_training_goes_on_at_half_the_scale(
    small_shapes: Path, tmp_path: Path
) -> None:
    options = ("trainer.precision=16-mixed", "recipe.epochs=4", "trainer.max_steps=40")
    training = build_training(small_shapes, tmp_path, *options)
    plugin: Any = training.trainer.precision_plugin
    # The gradient of a logit is about scale / (2 x 4 x 16 x 16), and float16 ends at 65504.
    plugin.scaler = torch.amp.GradScaler(support.DEVICE, init_scale=2.0**30)
    weights, scales = [copy_weights(training.task)], [2.0**30]

    def look(trainer: L.Trainer, task: L.LightningModule) -> tuple[bool, float]:
        weights.append(copy_weights(task))
        scales.append(plugin.scaler.get_scale())
        return same(weights.pop(0), weights[0]), scales[-1] / scales[-2]

    seen = fit_and_look(training, look)
    assert len(seen) == 40
    assert seen[0] == (True, 0.5), "the first step overflows"
    # The scale grows after 2,000 steps only.
    assert set(seen) == {(True, 0.5), (False, 1.0)}, "exactly the skipped steps halve the scale"
    taken = sum(not skipped for skipped, _ in seen)
    print(f"{40 - taken} of 40 steps were skipped")
    assert taken >= 15, "on a CPU, the scale has to be halved 16 times"
    [optimizer] = training.trainer.optimizers
    counts = {int(state["step"]) for state in optimizer.state.values()}
    assert counts == {taken}, "Adam counts the steps that were taken"
    assert not hasattr(optimizer, "found_inf"), "nothing is left that would skip later steps"


# -- Refused steps


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_step_with_nan_changes_no_weight_and_reaches_no_checkpoint(
    precision: str, small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nan_guard, "CHECK_EVERY", 5)
    loss, taken = CRISTask.loss, []
    devices: set[str] = set()

    def spoiled(self: CRISTask, batch: Any) -> torch.Tensor:
        taken.append(copy_weights(self.model))
        value = loss(self, batch)
        devices.add(value.device.type)
        return value * torch.nan if len(taken) == 3 else value

    monkeypatch.setattr(CRISTask, "loss", spoiled)
    training = build_training(small_shapes, tmp_path, f"trainer.precision={precision}")
    with pytest.raises(InputError, match=r"step 3 was not taken \(epoch 1, batch 3\): loss"):
        steps.fit(training)
    assert len(taken) >= 5
    assert devices == {support.DEVICE}
    assert same(taken[2], taken[3]), "the third step changed no weight"
    if precision != "16-mixed":  # there, the scaler takes the steps after it; the run ends anyway
        later = (taken[4], copy_weights(training.task.model))
        assert all(same(taken[2], weights) for weights in later)
        assert not same(taken[1], taken[2]), "the second step was taken"
    assert not list(tmp_path.glob("checkpoints/*.ckpt"))
