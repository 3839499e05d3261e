"""The loss of equations 9 and 10, compared with values computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from crislit.training.losses import text_to_pixel_contrastive_loss


def to_map(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def test_the_loss_is_the_mean_over_pixels_of_equation_9() -> None:
    # sigma is 3/4, 1/2, 1/4 and 9/10.
    logits = to_map([[math.log(3), 0.0], [-math.log(3), math.log(9)]])
    masks = to_map([[1.0, 1.0], [0.0, 0.0]])
    expected = -(math.log(3 / 4) + math.log(1 / 2) + math.log(1 - 1 / 4) + math.log(1 - 9 / 10)) / 4
    loss = text_to_pixel_contrastive_loss(logits, masks)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_mean_is_over_the_pixels_of_all_samples() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, 3.0]).reshape(2, 1, 1, 2)
    masks = torch.tensor([1.0, 0.0, 0.0, 1.0]).reshape(2, 1, 1, 2)
    loss = text_to_pixel_contrastive_loss(logits, masks)
    assert loss.shape == ()
    losses = [
        text_to_pixel_contrastive_loss(logits[i, None], masks[i, None]).item() for i in range(2)
    ]
    assert loss.item() == pytest.approx(sum(losses) / 2)


def test_a_soft_target_weights_both_terms() -> None:
    loss = text_to_pixel_contrastive_loss(to_map([[math.log(3)]]), to_map([[0.25]]))
    expected = -(0.25 * math.log(3 / 4) + 0.75 * math.log(1 / 4))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_nearest_resizing_takes_the_first_pixel_of_each_block(factor: int) -> None:
    # PyTorch's "nearest" from 8 pixels to 2 takes those at 0 and 4, without averaging.
    masks = torch.zeros(1, 1, 2 * factor, 2 * factor)
    masks[..., 0, factor] = 1
    logits = torch.tensor([[10.0, -10.0], [10.0, 10.0]])[None, None].requires_grad_()
    torch.autograd.backward(text_to_pixel_contrastive_loss(logits, masks))
    assert logits.grad is not None
    # The gradient is (sigma - target) / 4, and all four predictions are wrong.
    expected = torch.tensor([[0.25, -0.25], [0.25, 0.25]])[None, None]
    torch.testing.assert_close(logits.grad, expected, atol=1e-4, rtol=0)


def test_other_pixels_of_a_block_are_ignored() -> None:
    logits = torch.zeros(1, 1, 2, 2)
    masks = torch.ones(1, 1, 8, 8)
    masks[..., ::4, ::4] = 0
    loss = text_to_pixel_contrastive_loss(logits - 20, masks)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_gradient_descent_raises_target_logits_and_lowers_the_others() -> None:
    logits = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    masks = torch.zeros(2, 1, 4, 4)
    masks[:, :, :2, 1:] = 1
    torch.autograd.backward(text_to_pixel_contrastive_loss(logits, masks))
    assert logits.grad is not None
    assert (logits.grad[masks == 1] < 0).all()
    assert (logits.grad[masks == 0] > 0).all()


def test_confident_logits_give_a_finite_loss() -> None:
    logits = to_map([[1000.0, -1000.0]])
    assert text_to_pixel_contrastive_loss(logits, to_map([[1.0, 0.0]])).item() == 0
    assert text_to_pixel_contrastive_loss(logits, to_map([[0.0, 1.0]])).item() == 1000
