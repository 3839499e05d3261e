"""Memory of a GPU: bounds for the paper's network, and none lost from step to step."""

import gc
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from crislit.config import compose_config
from crislit.models import recompute_activations
from crislit.training import run as steps
from crislit.training import text_to_pixel_contrastive_loss
from crislit.training.build import build_model
from crislit.training.task import CRISTask
from crislit.transforms import tokenize
from tests.training.gpu import support
from tests.training.gpu.support import AfterSteps, build_training, fit_and_look

pytestmark = support.MARKS

GB, MB = 1e9, 1e6


def free_memory() -> None:
    """Free what earlier tests have left on the device."""
    gc.collect()
    torch.cuda.empty_cache()


# -- RN50 at 416 pixels


def peak_of_steps(recompute: bool) -> float:
    """Take three steps with four sentences in float32; return the peak in bytes."""
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    config = compose_config(["model=rn50", "dataset=refcoco", "model.clip_weights=null"])
    task = CRISTask(build_model(config)).to(support.DEVICE).train()
    recompute_activations(task.model, recompute)
    optimizer = task.configure_optimizers()["optimizer"]
    images = torch.randn(4, 3, 416, 416, device=support.DEVICE)
    masks = (torch.rand(4, 1, 416, 416, device=support.DEVICE) > 0.9).float()
    tokens = tokenize(["the man in red"] * 4, task.model.max_tokens).to(support.DEVICE)
    for _ in range(3):
        optimizer.zero_grad()
        loss = text_to_pixel_contrastive_loss(task.model(images, tokens), masks)
        torch.autograd.backward(loss)
        optimizer.step()
    assert optimizer.state
    return float(torch.cuda.max_memory_allocated() - before)


def test_recomputing_activations_saves_memory_and_both_stay_within_their_bounds() -> None:
    # 147 million parameters with their gradients and Adam's moments take 2.35 GB. Autograd keeps
    # activations of 3.00 GB, and of 0.78 GB with recompute=true. Up to 1.2 GB are for cuDNN and
    # cuBLAS, for what an operation computes, and for the part that is being recomputed.
    default, recomputed = peak_of_steps(False), peak_of_steps(True)
    print(f"default {default / GB:.2f} GB, recompute {recomputed / GB:.2f} GB")
    assert 2.3 * GB < recomputed < 4.4 * GB
    assert recomputed < 0.8 * default
    assert default < 6.6 * GB


# -- Step after step


def memory_now(*_: Any) -> int:
    """Return the bytes of living tensors."""
    return int(torch.cuda.memory_allocated())


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_training_keeps_no_memory_from_step_to_step(
    precision: str, small_shapes: Path, tmp_path: Path
) -> None:
    free_memory()
    # The NaN guard keeps two numbers of each step until its next check, 512 bytes each.
    options = (f"trainer.precision={precision}", "trainer.max_steps=10", "recipe.epochs=1")
    training = build_training(small_shapes, tmp_path, *options)
    used = fit_and_look(training, memory_now)
    assert len(used) == 10
    parameters = sum(x.numel() for x in training.task.model.parameters())
    assert used[2] > 12 * parameters, "weights and Adam's moments are on the device"
    assert max(used[2:]) - min(used[2:]) < 0.1 * MB, used


class AfterTestBatches(AfterSteps):
    """Calls the function after each batch of an evaluation instead."""

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any
    ) -> None:
        """Look after a batch."""
        self.seen.append(self.look(trainer, pl_module))


def test_evaluation_keeps_no_memory_from_batch_to_batch(small_shapes: Path, tmp_path: Path) -> None:
    free_memory()
    options = ("image_size=128", "eval_batch_size=2", "trainer.max_steps=1", "recipe.epochs=1")
    training = build_training(small_shapes, tmp_path, *options)
    steps.fit(training)
    after = AfterTestBatches(memory_now)
    training.trainer.callbacks.append(after)  # type: ignore[attr-defined]
    results = steps.evaluate(training)
    assert len(after.seen) >= sum(split["samples"] for split in results["splits"].values()) / 2
    # Two images and two maps of probabilities take 0.23 MB; 54 batches would add up to 12 MB.
    assert max(after.seen[2:]) - min(after.seen[2:]) < 1 * MB, after.seen
