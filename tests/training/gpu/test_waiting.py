"""Training steps on a GPU do not wait for it, except where the NaN guard reads their numbers."""

import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from crislit.training.nan_guard import CHECK_EVERY
from tests.training.gpu import support
from tests.training.gpu.support import build_training, fit_and_look

pytestmark = support.MARKS

WARNING = "called a synchronizing CUDA operation"


@pytest.fixture
def waits() -> Iterator[list[str]]:
    """Where operations that wait for the device were called, as PyTorch reports them."""
    places: list[str] = []

    def remember(message: Warning | str, *context: Any, **options: Any) -> None:
        if WARNING in str(message):
            stack = traceback.extract_stack()[:-1]
            frames = [frame for frame in stack if not frame.filename.endswith("warnings.py")]
            ours = [frame for frame in frames if "src/crislit" in frame.filename]
            last, innermost = (ours or frames)[-1], frames[-1]
            places.append(
                f"{last.filename}:{last.lineno}, in {innermost.filename}:{innermost.lineno}"
            )

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = remember
        torch.cuda.set_sync_debug_mode("warn")  # itself warns that it may miss operations
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_waits_are_noticed(waits: list[str]) -> None:
    float(torch.ones(3, device=support.DEVICE).sum())
    assert len(waits) == 1
    assert "test_waiting.py" in waits[0]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_steps_wait_for_the_gpu_only_where_they_are_checked(
    precision: str, small_shapes: Path, tmp_path: Path, waits: list[str]
) -> None:
    options = (
        *(f"trainer.precision={precision}", f"trainer.max_steps={2 * CHECK_EVERY + 1}"),
        *("recipe.epochs=2", "trainer.check_val_every_n_epoch=9"),
    )
    training = build_training(small_shapes, tmp_path, *options)

    def look(trainer: L.Trainer, task: L.LightningModule) -> tuple[int, list[str]]:
        found = list(waits)
        waits.clear()
        return trainer.global_step, found

    seen = fit_and_look(training, look)
    # The first step makes the optimizer's state and the scaler, and the last one is saved. The NaN
    # guard reads its numbers after CHECK_EVERY steps and after an epoch, which has 12: that counts
    # for the next step.
    checked = {1, CHECK_EVERY, 13, 2 * CHECK_EVERY + 1}
    assert [step for step, _ in seen] == list(range(1, 2 * CHECK_EVERY + 2))
    assert any(found for step, found in seen if step == CHECK_EVERY), "the NaN guard reads"
    unexpected = {step: found for step, found in seen if found and step not in checked}
    listed = "\n".join(f"step {step}: {found}" for step, found in unexpected.items())
    assert not unexpected, f"operations that waited for the GPU:\n{listed}"
