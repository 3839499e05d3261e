"""Compiled networks compute on a GPU what eager ones compute there."""

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from crislit.inference import load
from crislit.io import EXAMPLES, find_examples
from tests.runs import run
from tests.training.gpu import support
from tests.training.gpu.support import build_training, fit_and_look

pytestmark = support.MARKS


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    """Start without compiled functions: PyTorch limits their number."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute convolutions in float32 instead of TF32, so that only the order of sums differs."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.usefixtures("_float32")
def test_a_compiled_training_has_the_same_losses(small_shapes: Path, tmp_path: Path) -> None:
    # Without dropout, whose draws differ, and at a rate so low that Adam does not amplify rounding.
    options = (
        *("trainer.precision=32-true", "decoder.dropout=0", "trainer.max_steps=6"),
        *("recipe.optimizer.learning_rate=1e-5", "recipe.epochs=1"),
    )

    def look(trainer: L.Trainer, task: L.LightningModule) -> float:
        return float(trainer.callback_metrics["train/loss"])

    expected, losses = (
        fit_and_look(
            build_training(small_shapes, tmp_path / name, f"compile={name}", *options), look
        )
        for name in ("false", "true")
    )
    print(f"relative: {max(abs(b / a - 1) for a, b in zip(expected, losses, strict=True))}")
    assert len(losses) == 6
    # On a CPU, 0.00003 at most.
    assert losses[0] == pytest.approx(expected[0], rel=1e-4)
    assert losses == pytest.approx(expected, rel=1e-3)


def test_a_compiled_training_in_mixed_precision_learns(small_shapes: Path, tmp_path: Path) -> None:
    options = ("trainer.precision=16-mixed", "compile=true", "trainer.max_steps=24")
    training = build_training(small_shapes, tmp_path, *options, "recipe.epochs=2")

    def look(trainer: L.Trainer, task: L.LightningModule) -> float:
        return float(trainer.callback_metrics["train/loss"])

    losses = fit_and_look(training, look)  # with a validation after each epoch
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    # On a CPU, from 1.21 to 0.19.
    assert np.mean(losses[-4:]) < 0.5 * losses[0]
    assert float(training.trainer.callback_metrics["val/samples"]) == 36


def test_a_compiled_evaluation_has_the_same_scores(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, compiled = (
        run(
            *(monkeypatch, tmp_path / name, f"trainer={support.TRAINER}", f"compile={name}"),
            *("checkpoint=shapes-tiny", f"data_root={small_shapes}", "eval_batch_size=5"),
            program="evaluate",
        )
        for name in ("false", "true")
    )
    for split, values in eager["splits"].items():
        assert compiled["splits"][split]["samples"] == values["samples"]
        for metric in ("mIoU", "oIoU"):
            # Simulated on a CPU, TF32 changes them by 0.0001 at most.
            assert compiled["splits"][split][metric] == pytest.approx(values[metric], abs=0.002)


@pytest.mark.usefixtures("_float32")
def test_a_compiled_segmenter_has_the_same_probabilities() -> None:
    eager, compiled = (
        load("shapes-tiny", device=support.DEVICE, precision="float32", compile=switch)
        for switch in (False, True)
    )
    differences = [
        float(np.abs(a.probability - b.probability).max())
        for image, sentences in find_examples(EXAMPLES)
        for a, b in zip(eager(image, sentences), compiled(image, sentences), strict=True)
    ]
    print(f"differences up to {max(differences)}")
    assert len(differences) == 18
    assert max(differences) < 1e-4  # on a CPU, 0.0000012
