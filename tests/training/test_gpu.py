"""What needs a GPU: mixed precision, and the same masks as on the CPU (make test-gpu)."""

from pathlib import Path

import pytest
import torch

from crislit.training.metrics import METRICS
from tests.runs import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


def test_a_gpu_trains_in_mixed_precision_and_evaluates_like_the_cpu(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = run(
        monkeypatch,
        tmp_path / "gpu",
        "trainer=gpu",
        "batch_size=8",
        "recipe.epochs=2",
        f"data_root={small_shapes}",
    )
    assert torch.cuda.get_device_name() in gpu["hardware"]
    cpu = run(
        monkeypatch,
        tmp_path / "cpu",
        "trainer=cpu",
        f"checkpoint={gpu['checkpoint']}",
        f"data_root={small_shapes}",
        program="evaluate",
    )
    for split, values in gpu["splits"].items():
        assert cpu["splits"][split]["samples"] == values["samples"]
        for metric in METRICS:
            assert cpu["splits"][split][metric] == pytest.approx(values[metric], abs=0.02)
