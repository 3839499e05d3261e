"""Timing, cost and memory against values worked out by hand."""

import numpy as np
import torch

from crislit.benchmarks import timing
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
