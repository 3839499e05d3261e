"""Evaluation and prediction on a GPU, beside a CPU's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crislit.inference import Segmentation, Segmenter, load
from crislit.io import EXAMPLES, find_examples
from crislit.training.metrics import METRICS
from tests.runs import run
from tests.training.gpu import support

pytestmark = support.MARKS

SHIPPED = "shapes-tiny"


# -- Evaluation


def assert_same_scores(gpu: dict[str, Any], cpu: dict[str, Any]) -> None:
    """Compare the scores of every split, and of the blind control.

    Convolutions have 10 bits of mantissa on a GPU (TF32). Simulated on a CPU, that changed mIoU and
    oIoU of shapes-tiny by 0.0001 at most, and no precision.
    """
    assert gpu["splits"].keys() == cpu["splits"].keys() >= {"val", "testA", "testB"}
    for part in ("splits", "blind"):
        for split, values in gpu[part].items():
            expected = cpu[part][split]
            assert values["samples"] == expected["samples"] > 0
            for metric in METRICS:
                # A precision is a share of the samples: one of them may cross its bound.
                bound = 1.01 / values["samples"] if metric.startswith("Pr") else 0.002
                assert values[metric] == pytest.approx(expected[metric], abs=bound), (split, metric)


def test_evaluation_on_a_gpu_scores_as_on_a_cpu(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [
        run(
            *(monkeypatch, tmp_path / name, f"trainer={trainer}", f"checkpoint={SHIPPED}"),
            *(f"data_root={small_shapes}", "eval_batch_size=5"),
            program="evaluate",
        )
        for name, trainer in (("gpu", support.TRAINER), ("cpu", "cpu"))
    ]
    assert_same_scores(*results)
    assert results[0]["splits"]["testA"]["mIoU"] > 0.5, "the masks are good enough to compare"


def test_mixed_precision_training_on_a_gpu_evaluates_as_on_a_cpu(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"data_root={small_shapes}"
    gpu = run(
        *(monkeypatch, tmp_path / "gpu", data, f"trainer={support.TRAINER}"),
        *("trainer.precision=16-mixed", f"init_from={SHIPPED}", "image_size=192", "batch_size=8"),
        *("recipe.epochs=2", "recipe.optimizer.learning_rate=1e-4"),
    )
    checkpoint = f"checkpoint={gpu['checkpoint']}"
    cpu = run(monkeypatch, tmp_path / "cpu", "trainer=cpu", checkpoint, data, program="evaluate")
    assert_same_scores(gpu, cpu)


# -- Prediction


def predict(network: Segmenter) -> list[Segmentation]:
    """Segment every sentence of the example images."""
    return [mask for image, texts in find_examples(EXAMPLES) for mask in network(image, texts)]


@pytest.fixture(scope="module")
def expected() -> list[Segmentation]:
    """The masks of the example images on the CPU, in float32."""
    return predict(load(SHIPPED, device="cpu"))


@pytest.mark.parametrize(
    ("precision", "difference", "overlap"),
    [
        # On a CPU, the means over an image differ by 0.00006 (float16) and 0.0005 (bfloat16) at
        # most, and IoU is 0.996 and 0.984 at least. TF32 has the mantissa of float16.
        ("float32", 0.0003, 0.985),
        ("float16", 0.0003, 0.985),
        ("bfloat16", 0.002, 0.95),
    ],
)
def test_a_segmenter_on_a_gpu_finds_the_masks_of_a_cpu_in_every_precision(
    precision: Any, difference: float, overlap: float, expected: list[Segmentation]
) -> None:
    network = load(SHIPPED, device=support.DEVICE, precision=precision)
    assert network.device.type == support.DEVICE
    results = predict(network)
    differences = [
        float(np.abs(a.probability - b.probability).mean())
        for a, b in zip(results, expected, strict=True)
    ]
    overlaps = [
        float((a.mask & b.mask).sum() / (a.mask | b.mask).sum())
        for a, b in zip(results, expected, strict=True)
    ]
    print(f"{precision}: differences up to {max(differences)}, IoU at least {min(overlaps)}")
    assert max(differences) < difference
    assert min(overlaps) > overlap


def test_a_segmenter_chooses_the_gpu_and_float16() -> None:
    network = load(SHIPPED)
    assert (network.device.type, network.precision) == (support.DEVICE, "float16")
