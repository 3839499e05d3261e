"""Timing, cost and memory against values worked out by hand."""

import gc

import numpy as np
import pytest
import torch

from crislit.benchmarks import timing
from crislit.benchmarks.devices import Precision
from crislit.benchmarks.reference import reference_logits
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.optimized import optimize_for_inference
from tests.models.networks import CLIP, sentences


def test_candidates_are_run_in_turn_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    seconds = timing.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        2,
        prepare=lambda name: calls.append(f"for {name}"),
    )
    assert calls == ["for a", "a", "for b", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_an_accelerator_is_waited_for_before_and_after_each_of_more_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    device = torch.device("cuda", 1)
    monkeypatch.setattr(
        torch.accelerator, "synchronize", lambda x: calls.append("wait" if x == device else "no")
    )
    seconds = timing.interleave(
        {"a": lambda: calls.append("a")}, 2, lambda name: calls.append("for a"), device
    )
    assert calls == ["for a", "wait", "a", "wait"] * (timing.WARM_UPS + 2 * timing.ROUNDS_FACTOR)
    assert len(seconds["a"]) == 2 * timing.ROUNDS_FACTOR
    assert gc.get_freeze_count() == 0


def test_a_machine_has_a_rate_for_every_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    precisions: tuple[Precision, ...] = ("float32", "TF32", "float16", "bfloat16")
    products: list[tuple[torch.dtype, bool]] = []
    multiply = torch.Tensor.__matmul__

    def record(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        products.append((a.dtype, torch.backends.cudnn.allow_tf32))
        return multiply(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", record)
    machine = timing.measure_machine(torch.device("cpu"), 32, 1, 1, precisions)
    types = [torch.float32, torch.float32, torch.float16, torch.bfloat16]
    assert products == 2 * list(zip(types, [False, True, False, False], strict=True))
    assert machine.name == "cpu"
    assert set(machine.rates) == {"TF32", "float16", "bfloat16"}
    assert machine.rate("float32") == machine.flops
    assert timing.Cost(10, 20).floor(machine, "float16") == 10 / machine.rates["float16"]


def test_a_cpu_is_measured_in_float32_only() -> None:
    machine = timing.measure_machine(size=32, megabytes=1, rounds=1)
    assert machine.rates == {}
    assert machine.flops > 0
    assert machine.bytes > 0


def test_a_product_costs_two_operations_per_multiplication_and_its_three_matrices() -> None:
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    moved = 4 * (5 * 7 + 7 * 3 + 5 * 3)
    assert timing.count_cost(lambda: a @ b) == timing.Cost(2 * 5 * 7 * 3, moved)
    assert timing.count_cost(lambda: a.T) == timing.Cost(0, 0), "a view moves nothing"
    assert timing.Cost(10, 20).floor(timing.Machine(5.0, 4.0)) == 2.0
    assert timing.Cost(10, 20).moved(timing.Machine(5.0, 4.0)) == 5.0


def test_attention_is_counted_forward_and_backward() -> None:
    attend = torch.nn.functional.scaled_dot_product_attention
    product = 2 * (2 * 5 * 5 * 8)
    q = torch.randn(1, 2, 5, 8)
    with torch.no_grad():
        assert timing.count_cost(lambda: attend(q, q, q)).flops == 2 * product
    q.requires_grad_()
    trained = timing.count_cost(
        lambda: torch.autograd.backward(attend(q, q, q).sum()), training=True
    )
    assert trained.flops == (2 + 5) * product, "backward computes the scores again"


def test_a_training_step_costs_three_products() -> None:
    layer, x = torch.nn.Linear(7, 3, bias=False), torch.randn(5, 7, requires_grad=True)
    cost = timing.count_cost(lambda: layer(x).sum().backward(), training=True)
    assert cost.flops == 3 * (2 * 5 * 7 * 3), "the product, and the gradients of both its factors"


def test_the_optimized_network_multiplies_less() -> None:
    model = build_cris(CRISConfig(clip=CLIP, neck=(32, 64, 128), decoder_heads=4)).eval()
    images, tokens = torch.randn(1, 3, 128, 128), sentences(1, 3, 4, 5, 6, 8, 9)
    optimized = optimize_for_inference(model)
    with torch.no_grad():
        reference = timing.count_cost(
            lambda: [reference_logits(model, images, row[None]) for row in tokens]
        )
        cost = timing.count_cost(lambda: optimized(images, tokens))
    assert cost.flops < reference.flops / 2


def peaks_around_allocation() -> tuple[float, float]:
    """Return the peak in GB before and after allocating and freeing half a GB."""
    before = timing.peak_memory()
    np.ones(500_000_000, np.uint8)
    return before, timing.peak_memory()


def test_a_new_process_has_a_peak_of_its_own_even_if_a_large_one_starts_it() -> None:
    large = np.ones(2_000_000_000, np.uint8)
    before, after = timing.run_in_new_process(peaks_around_allocation)
    assert timing.peak_memory() > large.nbytes / 1e9
    assert before < 1.5, "more than the libraries take"
    assert after > before + 0.4
