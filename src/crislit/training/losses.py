"""The text-to-pixel contrastive loss (section 3.3, equations 9 and 10)."""

import torch.nn.functional as F
from torch import Tensor


def text_to_pixel_contrastive_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Pull the sentence toward the pixels it refers to, and push it away from all others.

    Args:
        logits: (B, 1, H/4, W/4), the similarity of z_t and each pixel's z_v.
        masks: (B, 1, H, W) in [0, 1], soft at the edges; resized to the logits' size by nearest
            neighbor.

    Returns:
        Scalar: -log sigma over the target's pixels and -log(1 - sigma) over the rest, averaged.
    """
    targets = F.interpolate(masks, size=logits.shape[-2:], mode="nearest")
    return F.binary_cross_entropy_with_logits(logits, targets)
