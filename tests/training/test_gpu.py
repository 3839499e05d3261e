"""Training on a GPU, and evaluation on a GPU and the CPU (make test-gpu)."""

from pathlib import Path

import pytest
import torch

from crislit.training.metrics import METRICS
from tests.runs import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_mixed_precision_training_on_a_gpu_evaluates_as_on_the_cpu(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"data_root={small_shapes}"
    gpu = run(monkeypatch, tmp_path / "gpu", "trainer=gpu", "batch_size=8", "recipe.epochs=2", data)
    assert torch.cuda.get_device_name() in gpu["hardware"]
    checkpoint = f"checkpoint={gpu['checkpoint']}"
    cpu = run(monkeypatch, tmp_path / "cpu", "trainer=cpu", checkpoint, data, program="evaluate")
    for split, values in gpu["splits"].items():
        assert cpu["splits"][split]["samples"] == values["samples"]
        for metric in METRICS:
            assert cpu["splits"][split][metric] == pytest.approx(values[metric], abs=0.02)
