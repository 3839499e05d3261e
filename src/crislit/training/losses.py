"""The text-to-pixel contrastive loss (section 3.3, equations 9 and 10), and others to choose.

A loss is called with logits, (B, 1, H/4, W/4), and masks, (B, 1, H, W) in [0, 1] and soft at the
edges, and returns a scalar.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from crislit.errors import InputError, first_line, require, see

Loss = Callable[[Tensor, Tensor], Tensor]


def text_to_pixel_contrastive_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Pull the sentence toward the pixels it refers to, and push it away from all others.

    Args:
        logits: (B, 1, H/4, W/4), the similarity of z_t and each pixel's z_v.
        masks: (B, 1, H, W) in [0, 1], soft at the edges; resized to the logits' size by nearest
            neighbor.

    Returns:
        Scalar: -log sigma over the target's pixels and -log(1 - sigma) over the rest, averaged.
    """
    return F.binary_cross_entropy_with_logits(logits, resize_masks(masks, logits))


def resize_masks(masks: Tensor, logits: Tensor) -> Tensor:
    """Resize masks, (B, 1, H, W), to the size of the logits by nearest neighbor."""
    return F.interpolate(masks, size=logits.shape[-2:], mode="nearest")


class BCEDiceLoss:
    """Cross-entropy of every pixel and the Dice loss of every mask, added (Milletari et al., 2016).

    The Dice loss, 1 - 2 sum(p t) / (sum(p) + sum(t)), counts a small target as much as a large one.

    Args:
        dice_weight: Factor of the Dice loss, at least 0.

    Raises:
        InputError: If the factor is out of its range.
    """

    def __init__(self, dice_weight: float = 1.0) -> None:
        require(
            isinstance(dice_weight, (int, float)) and dice_weight >= 0,
            f"loss.dice_weight must be a number, at least 0, got {dice_weight!r}",
        )
        self.dice_weight = dice_weight

    def __call__(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Return the loss, a scalar: see ``text_to_pixel_contrastive_loss``."""
        targets = resize_masks(masks, logits)
        p, t = logits.float().sigmoid().flatten(1), targets.float().flatten(1)
        # One pixel is added to both, so that an empty mask has a gradient, too.
        dice = (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
        entropy = F.binary_cross_entropy_with_logits(logits, targets)
        return entropy + self.dice_weight * (1 - dice.mean())


class FocalLoss:
    """Cross-entropy in which pixels that are right already count less (Lin et al., 2017).

    Args:
        gamma: Exponent of (1 - p) for a pixel whose right answer has probability p, at least 0.
        alpha: Weight of the target's pixels, in [0, 1]; the others have 1 - alpha.

    Raises:
        InputError: If a value is out of its range.
    """

    def __init__(self, gamma: float = 2.0, alpha: float = 0.25) -> None:
        is_number = isinstance(gamma, (int, float)) and isinstance(alpha, (int, float))
        require(
            is_number and gamma >= 0 and 0 <= alpha <= 1,
            f"loss.gamma must be at least 0 and loss.alpha in [0, 1], got {gamma!r} and {alpha!r}",
        )
        self.gamma, self.alpha = gamma, alpha

    def __call__(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Return the loss, a scalar: see ``text_to_pixel_contrastive_loss``."""
        targets = resize_masks(masks, logits)
        entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        p = logits.sigmoid()
        wrong = p + targets - 2 * p * targets  # 1 - p of the right answer
        weight = self.alpha * targets + (1 - self.alpha) * (1 - targets)
        return (weight * wrong**self.gamma * entropy).mean()


def check_loss(loss: Loss, name: str) -> None:
    """Try a loss on a batch of two.

    Args:
        loss: The loss.
        name: Its class, for the message.

    Raises:
        InputError: If it fails, or returns no scalar that depends on the logits.
    """
    logits = torch.linspace(-1, 1, 512).reshape(2, 1, 16, 16).requires_grad_()
    masks = (torch.arange(8192) % 2).reshape(2, 1, 64, 64).float()
    expected = (
        "expected: called with logits, (B, 1, H/4, W/4), and masks, (B, 1, H, W) in [0, 1], it "
        f"returns a scalar that depends on the logits{see('boxes')}"
    )
    try:
        value = loss(logits, masks)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(f"loss: {name} fails: {first_line(error)}; {expected}") from error
    is_scalar = isinstance(value, Tensor) and value.ndim == 0
    found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    require(
        is_scalar and value.requires_grad,
        f"loss: {name} returns {found if not is_scalar else 'a constant'}; {expected}",
    )
