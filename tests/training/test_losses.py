"""The loss of equations 9 and 10, compared with values computed by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from crislit.errors import InputError
from crislit.training.losses import (
    BCEDiceLoss,
    FocalLoss,
    check_loss,
    text_to_pixel_contrastive_loss,
)


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


# -- Losses that are not in the paper


def test_the_dice_loss_is_that_of_a_hand_computed_pair_and_is_added() -> None:
    # sigma is 3/4, 1/2, 1/4 and 1/2; the target's are the first two.
    logits = to_map([[math.log(3), 0.0], [-math.log(3), 0.0]])
    masks = to_map([[1.0, 1.0], [0.0, 0.0]])
    dice = (2 * (3 / 4 + 1 / 2) + 1) / ((3 / 4 + 1 / 2 + 1 / 4 + 1 / 2) + 2 + 1)
    entropy = text_to_pixel_contrastive_loss(logits, masks).item()
    for weight in (0.0, 1.0, 0.5):
        loss = BCEDiceLoss(weight)(logits, masks).item()
        assert loss == pytest.approx(entropy + weight * (1 - dice), rel=1e-6)


def test_the_dice_loss_is_the_mean_over_samples() -> None:
    logits = torch.linspace(-3, 3, 32).reshape(2, 1, 4, 4)
    masks = (torch.arange(32) % 3 == 0).float().reshape(2, 1, 4, 4)
    loss = BCEDiceLoss()
    parts = [loss(logits[[i]], masks[[i]]).item() for i in range(2)]
    assert loss(logits, masks).item() == pytest.approx(sum(parts) / 2, rel=1e-6)


def test_the_focal_loss_is_that_of_hand_computed_pixels() -> None:
    # sigma is 3/4 for a pixel of the target, and 1/4 for one of the background.
    logits, masks = to_map([[math.log(3), -math.log(3)]]), to_map([[1.0, 0.0]])
    right = -((1 / 4) ** 2) * math.log(3 / 4)
    expected = (0.25 * right + 0.75 * right) / 2
    assert FocalLoss()(logits, masks).item() == pytest.approx(expected, rel=1e-12)
    half = 0.5 * text_to_pixel_contrastive_loss(logits, masks).item()
    assert FocalLoss(gamma=0, alpha=0.5)(logits, masks).item() == pytest.approx(half, rel=1e-12)


@pytest.mark.parametrize("loss", [BCEDiceLoss(), FocalLoss()])
def test_other_losses_fall_along_their_gradient_and_resize_masks(loss: FocalLoss) -> None:
    logits = torch.zeros(2, 1, 4, 4, requires_grad=True)
    masks = torch.zeros(2, 1, 16, 16)
    masks[0, :, :8] = 1  # and an empty one
    (gradient,) = torch.autograd.grad(loss(logits, masks), logits)
    assert (gradient[0, :, :2] < 0).all()
    assert (gradient[0, :, 2:] > 0).all()
    assert (gradient[1] > 0).all()
    check_loss(loss, "a loss")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BCEDiceLoss(-1), "loss.dice_weight must be a number, at least 0, got -1"),
        (lambda: FocalLoss(gamma=-1), "loss.gamma must be at least 0 and loss.alpha in"),
        (lambda: FocalLoss(alpha=2), "loss.gamma must be at least 0 and loss.alpha in"),
    ],
)
def test_a_value_of_a_loss_that_is_out_of_its_range_is_one_error(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x, y: x, r"returns shape \(2, 1, 16, 16\); expected"),
        (lambda x, y: 1.0, "returns float; expected"),
        (lambda x, y: y.mean(), "returns a constant; expected"),
        (lambda x: x, "fails: .*takes 1 positional argument"),
        (lambda x, y: (x - y).mean(), "fails: The size of tensor"),
    ],
)
def test_a_loss_that_does_not_return_a_scalar_is_one_error(loss: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^loss: mine.Loss {message}"):
        check_loss(loss, "mine.Loss")
