"""Benchmarks of training on an accelerator, run on the CPU."""

from typing import Any

import pytest
import torch

from crislit.benchmarks import accelerated_training
from crislit.benchmarks.accelerated_training import BATCH, KINDS, MIXED, MeasuredKind
from crislit.benchmarks.inference import SENTENCES, build_network
from crislit.benchmarks.options import Options
from crislit.benchmarks.timing import Machine
from crislit.benchmarks.training import Kind, Step
from crislit.transforms.tokenizer import tokenize
from tests.benchmarks.conftest import CPU


@pytest.fixture
def _tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerated_training, "has_tf32", lambda device: True)


def test_kinds_are_all_precisions_and_in_16_mixed_all_savings() -> None:
    plain, *others = KINDS.values()
    assert plain == Kind(reference=True)
    assert [kind.precision for kind in others[:4]] == ["float32", "TF32", "float16", "bfloat16"]
    assert len(set(KINDS.values())) == len(KINDS)
    assert {kind.precision for kind in others[4:]} == {"float16"}
    for name, kind in KINDS.items():
        assert kind.optimized == ("rearrange" in name)
        assert kind.recomputed == ("recompute" in name)
        assert kind.sentences == (4 if "4 sentences" in name else 1)
        assert kind.compiled == ("compiled" in name)
        assert (kind.precision == "float16") == ("16-mixed" in name and "bf16" not in name)


@pytest.mark.usefixtures("_tf32", "eager_compiler")
def test_kinds_of_steps_are_measured_with_their_memory(
    options: Options, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["plain", "default", "default, TF32", "16-mixed", "recompute, 16-mixed"]
    names += ["rearrange, 4 sentences an image, 16-mixed", "compiled, 16-mixed"]
    monkeypatch.setattr(accelerated_training, "KINDS", {name: KINDS[name] for name in names})
    peaks = iter(range(len(names), 0, -1))
    monkeypatch.setattr(
        accelerated_training, "measure_peak", lambda work, device: (work(), float(next(peaks)))[1]
    )
    rows = list(accelerated_training.measure_kinds(options, machine, CPU))
    timed = {row.candidate: row for row in rows if row.part == "training"}
    memory = {row.candidate: row for row in rows if row.part == "memory"}
    assert list(timed) == list(memory) == names
    for row in timed.values():
        assert row.value > 0
        assert row.unit == "s per sentence"
        assert row.ratio == timed["plain"].value / row.value
    default, mixed = timed["default"].floor, timed["16-mixed"].floor
    assert default is not None
    assert mixed == pytest.approx(default * machine.flops / machine.rate("float16"))
    assert timed["compiled, 16-mixed"].floor == timed["16-mixed"].floor
    assert memory["default"].ratio == len(names) / (len(names) - 1)
    assert memory["plain"].unit == "GB"


def test_a_scaled_loss_leaves_the_gradients_that_the_optimizer_sees() -> None:
    gradients = []
    model = build_network("tiny", overrides=["decoder.dropout=0"]).train()
    for scale in (1.0, 128.0):
        step = Step(MIXED, model, 64)
        step.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        step.prepare()
        loss = step.differentiate()
        largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
        step.scaler.unscale_(step.optimizer)
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
        assert float(loss) < 10, "the loss itself is not scaled"
        assert float(largest / gradients[-1].abs().max()) == pytest.approx(scale)
        assert not torch.is_autocast_enabled("cpu")
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.02


def test_only_16_mixed_scales_its_loss() -> None:
    model = build_network("tiny")
    scaled = [name for name, kind in KINDS.items() if Step(kind, model, 32).scaler.is_enabled()]
    assert scaled == [name for name in KINDS if name.endswith("16-mixed") and "bf16" not in name]


def test_a_batch_larger_than_the_sentences_repeats_them() -> None:
    model = build_network("tiny")
    step = Step(Kind(sentences=4), model, 64, batch=8)
    assert torch.equal(step.tokens, tokenize([*SENTENCES, SENTENCES[0]], model.max_tokens))
    assert step.images.shape == (2, 3, 64, 64)
    assert step.masks.shape == (8, 1, 64, 64)


@pytest.mark.parametrize("lost", ["plain", "default"])
def test_kinds_that_do_not_fit_are_reported_and_left_out(
    lost: str,
    options: Options,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(kind: Kind, *_: Any) -> MeasuredKind:
        if kind == KINDS[lost]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return MeasuredKind([2.0, 4.0, 3.0], (1.0, 2.0), 6.0)

    monkeypatch.setattr(accelerated_training, "measure_kind", measure)
    rows = list(accelerated_training.measure_kinds(options, machine, CPU))
    assert capsys.readouterr().err == f"training, {lost}: not run, out of memory\n"
    names = [name for name in KINDS if name != lost and "TF32" not in name]
    assert [row.candidate for row in rows if row.part == "training"] == names
    assert {row.value for row in rows if row.part == "training"} == {3.0 / BATCH}
    assert {row.ratio for row in rows} == ({None} if lost == "plain" else {1.0})


def test_a_device_without_a_record_of_its_memory_has_no_rows_of_it(
    options: Options,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind = MeasuredKind([2.0], (1.0, 2.0), None)
    monkeypatch.setattr(accelerated_training, "measure_kind", lambda *_: kind)
    rows = list(accelerated_training.measure_kinds(options, machine, CPU))
    assert {row.part for row in rows} == {"training"}
    assert capsys.readouterr().err == (
        "memory: not measured, as the device does not record its peak\n"
    )


def test_losses_in_mixed_precision_are_those_of_the_baseline(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerated_training, "LOSS_STEPS", 2)
    rows = accelerated_training.compare_losses(options, CPU)
    differences = {row.candidate: row.difference for row in rows}
    assert list(differences) == ["plain", "rearrange recompute", "16-mixed", "bf16-mixed"]
    assert differences["plain"] == 0
    assert all(x is not None and x < 0.05 for x in differences.values())
    assert differences["rearrange recompute"] < 1e-3  # type: ignore[operator]
