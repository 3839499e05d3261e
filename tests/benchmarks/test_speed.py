"""Benchmarks of inference: an accelerator's candidates, run on the CPU."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from crislit.benchmarks import agreement, inference, speed
from crislit.benchmarks.inference import SENTENCES, Candidate, accelerated, build_network
from crislit.benchmarks.options import Options
from crislit.benchmarks.timing import Machine
from crislit.checkpoints.checkpoint import Checkpoint
from crislit.config import compose_config
from crislit.experiments.paper import TABLE1
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS
from crislit.training.mask_counter import MaskCounter
from tests.benchmarks.conftest import CPU
from tests.models.networks import CLIP

NAMES = ["plain", "channels last", *inference.ACCELERATED]
TOLERANCE = {"float16": 0.02, "bfloat16": 0.1}
"""Relative difference of the logits of an untrained network in mixed precision."""


@pytest.fixture(scope="module")
def network() -> CRIS:
    return build_network("tiny")


@pytest.fixture
def _tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "has_tf32", lambda device: True)


@pytest.mark.usefixtures("_tf32")
def test_every_form_on_an_accelerator_computes_the_networks_logits(
    network: CRIS, eager_compiler: list[Any]
) -> None:
    candidates = accelerated(network, CPU)
    assert list(candidates) == NAMES
    inputs = speed.make_inputs(2, SENTENCES[:2], 64, CPU)
    with torch.inference_mode():
        expected = network(*inputs)
        for name, candidate in candidates.items():
            tolerance = TOLERANCE.get(candidate.precision, 1e-4)
            assert speed.relative_error(candidate(*inputs), expected) < tolerance, name
            assert candidate.precision == inference.ACCELERATED.get(name, ("float32",))[0]
            assert candidate.eager is not None
            assert (candidate.eager is candidate.compute) == ("compiled" not in name)
    assert len(eager_compiler) == 2


def test_forms_in_tf32_and_unwanted_ones_are_left_out(
    network: CRIS, eager_compiler: list[Any]
) -> None:
    names = [name for name in NAMES if "TF32" not in name]  # the CPU has none
    assert list(accelerated(network, CPU)) == names
    names.remove("for inference, bfloat16")
    assert list(accelerated(network, CPU, without=["for inference, bfloat16"])) == names


@pytest.mark.usefixtures("_tf32", "eager_compiler")
@pytest.mark.parametrize("part", ["evaluation", "latency"])
def test_an_accelerators_rows_have_their_precisions_floor_and_difference(
    part: str, network: CRIS, options: Options, machine: Machine
) -> None:
    candidates = accelerated(network, CPU)
    rows = {
        row.candidate: row
        for row in speed.measure_inference(part, candidates, options, machine, CPU)
    }
    counted = ["for inference, counted at image size"] if part == "evaluation" else []
    names = [name for name in NAMES if name != "for inference, bfloat16"]
    compiled = [name for name in names if name.endswith("compiled")]
    eager = [name for name in names if name not in compiled]
    assert list(rows) == [*eager, *counted, *compiled]
    for name, row in rows.items():
        assert row.difference is not None
        assert row.difference < (0.02 if "float16" in name else 1e-4)
        assert (row.part, row.unit, row.rounds) == (part, "s per sentence", 1)
    floor = rows["for inference"].floor
    assert floor is not None
    for name, precision in {"TF32": "TF32", "float16": "float16", "compiled": "float32"}.items():
        ratio = machine.flops / machine.rate(precision)  # type: ignore[arg-type]
        assert rows[f"for inference, {name}"].floor == pytest.approx(floor * ratio), name
    assert rows["for inference, float16, compiled"].floor == rows["for inference, float16"].floor


def test_masks_are_counted_for_every_batch_of_a_run(
    network: CRIS, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[tuple[int, ...]] = []

    class Counter(MaskCounter):
        def add(self, squares: torch.Tensor, batch: Any) -> None:
            added.append((*squares.shape, len(batch.targets), *batch.targets[0].shape))
            super().add(squares, batch)

        def finish(self) -> Any:
            intersections, unions, empty = super().finish()
            assert len(intersections) == len(unions) == len(empty) == 4
            assert all(empty)
            return intersections, unions, empty

    monkeypatch.setattr(speed, "MaskCounter", Counter)
    plain = inference.reference_network(network)
    inputs = speed.make_inputs(2, SENTENCES[:2], 64, CPU)
    run = speed.with_masks(speed.Run(Candidate(plain, plain), inputs, 4))
    with torch.inference_mode():
        assert torch.equal(run(), plain(*inputs))
    assert added == [(4, 64, 64, 4, 480, 640)]
    assert (run.sentences, run.cost) == (4, None)


@pytest.mark.usefixtures("eager_compiler")
def test_all_forms_are_measured_for_the_rows_of_table_1(
    options: Options, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "TABLE1", {"con_dec1": TABLE1["con_dec1"]})
    monkeypatch.setattr(
        speed, "row_candidates", lambda model, device: accelerated(model, CPU, speed.NOT_IN_ROWS)
    )
    rows = list(speed.measure_table1_rows(options, machine, CPU))
    operations = {row.candidate: row.value for row in rows if row.unit == "GFLOP"}
    rates = {row.candidate: row for row in rows if row.unit == "images/s"}
    forms = ["plain", "channels last", "for inference", "for inference, float16"]
    forms.append("for inference, float16, compiled")
    assert list(rates) == [f"con_dec1, {name}" for name in forms]
    assert list(operations) == ["con_dec1, plain", "con_dec1, for inference"]
    for name, row in rates.items():
        assert row.difference is not None
        assert row.difference < (0.02 if "float16" in name else 1e-4)
    plain = rates["con_dec1, plain"]
    assert plain.floor == pytest.approx(machine.flops / operations["con_dec1, plain"] / 1e9)
    assert rates["con_dec1, channels last"].ratio == pytest.approx(
        rates["con_dec1, channels last"].value / plain.value
    )


def test_without_the_baseline_nothing_is_compared(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*inputs: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    inputs = speed.make_inputs(1, SENTENCES[:1], 64, CPU)
    run = speed.Run(Candidate(too_large, too_large), inputs, 1)
    assert not list(speed.time_runs("latency", {"plain": run}, 1, machine, CPU))
    assert capsys.readouterr().err == "latency, plain: not run, out of memory\n"


@pytest.mark.usefixtures("eager_compiler")
def test_forms_that_the_device_cannot_run_are_left_out_of_the_agreement(
    small_shapes: Path,
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CRISLIT_DATA", str(small_shapes))
    clip: dict[str, Any] = CLIP | {"text_cfg": CLIP["text_cfg"] | {"vocab_size": 49408}}
    config = CRISConfig(
        clip=clip, neck=(32, 64, 128), decoder_layers=1, decoder_heads=4, decoder_ffn=96
    )
    weights, run = build_cris(config).state_dict(), compose_config(["image_size=64"])
    checkpoint = Checkpoint(config, weights, 64, 0.35, "random", config=run)

    def too_small(*inputs: torch.Tensor) -> torch.Tensor:
        return torch.full((len(inputs[1]), 1, 16, 16), torch.nan, dtype=torch.float16)

    candidates = accelerated(checkpoint.build(), CPU)
    candidates["for inference, float16"] = Candidate(too_small, None, "float16")
    monkeypatch.setattr(agreement, "all_candidates", lambda *arguments: candidates)
    monkeypatch.setattr(agreement, "read_any", lambda path: checkpoint)
    rows = {row.candidate: row for row in agreement.measure_agreement(options, CPU, Path())}
    assert "agreement, for inference, float16: not run" in capsys.readouterr().err
    names = [name for name in NAMES if name != "for inference, float16" and "TF32" not in name]
    assert list(rows) == names
    for row in rows.values():
        assert math.isclose(row.value, rows["plain"].value, abs_tol=0.02)
        assert row.difference == row.value - rows["plain"].value
