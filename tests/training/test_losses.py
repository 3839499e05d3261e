"""Equations 9 and 10 against numbers computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from crislit.training.losses import text_to_pixel_contrastive_loss


def map_of(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def test_the_loss_is_the_mean_over_pixels_of_equation_9() -> None:
    # sigma is 3/4, 1/2, 1/4 and 9/10.
    logits = map_of([[math.log(3), 0.0], [-math.log(3), math.log(9)]])
    masks = map_of([[1.0, 1.0], [0.0, 0.0]])
    expected = -(math.log(3 / 4) + math.log(1 / 2) + math.log(1 - 1 / 4) + math.log(1 - 9 / 10)) / 4
    assert text_to_pixel_contrastive_loss(logits, masks).item() == pytest.approx(
        expected, rel=1e-12
    )


def test_the_mean_is_over_the_pixels_of_all_samples() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, 3.0]).reshape(2, 1, 1, 2)
    masks = torch.tensor([1.0, 0.0, 0.0, 1.0]).reshape(2, 1, 1, 2)
    together = text_to_pixel_contrastive_loss(logits, masks)
    assert together.shape == ()
    alone = [
        text_to_pixel_contrastive_loss(logits[i, None], masks[i, None]).item() for i in range(2)
    ]
    assert together.item() == pytest.approx(sum(alone) / 2)


def test_a_soft_target_weighs_both_terms() -> None:
    loss = text_to_pixel_contrastive_loss(map_of([[math.log(3)]]), map_of([[0.25]]))
    assert loss.item() == pytest.approx(
        -(0.25 * math.log(3 / 4) + 0.75 * math.log(1 / 4)), rel=1e-12
    )


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_nearest_resizing_takes_the_first_pixel_of_each_block(factor: int) -> None:
    # Of 8 pixels resized to 2, PyTorch's "nearest" takes those at 0 and 4, and no average.
    masks = torch.zeros(1, 1, 2 * factor, 2 * factor)
    masks[..., 0, factor] = 1
    logits = torch.tensor([[10.0, -10.0], [10.0, 10.0]])[None, None].requires_grad_()
    torch.autograd.backward(text_to_pixel_contrastive_loss(logits, masks))
    assert logits.grad is not None
    # The gradient is (sigma - target) / 4: close to a quarter where the target is missed.
    expected = torch.tensor([[0.25, -0.25], [0.25, 0.25]])[None, None]
    torch.testing.assert_close(logits.grad, expected, atol=1e-4, rtol=0)


def test_pixels_beside_the_taken_ones_do_not_count() -> None:
    logits = torch.zeros(1, 1, 2, 2)
    masks = torch.ones(1, 1, 8, 8)
    masks[..., ::4, ::4] = 0
    strong = text_to_pixel_contrastive_loss(logits - 20, masks)
    assert strong.item() == pytest.approx(0, abs=1e-6)


def test_the_gradient_pulls_the_sentences_pixels_up_and_pushes_the_others_down() -> None:
    logits = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    masks = torch.zeros(2, 1, 4, 4)
    masks[:, :, :2, 1:] = 1
    torch.autograd.backward(text_to_pixel_contrastive_loss(logits, masks))
    assert logits.grad is not None
    assert (logits.grad[masks == 1] < 0).all(), "descent raises them"
    assert (logits.grad[masks == 0] > 0).all(), "descent lowers them"


def test_confident_logits_give_a_finite_loss() -> None:
    logits = map_of([[1000.0, -1000.0]])
    assert text_to_pixel_contrastive_loss(logits, map_of([[1.0, 0.0]])).item() == 0
    assert text_to_pixel_contrastive_loss(logits, map_of([[0.0, 1.0]])).item() == 1000
