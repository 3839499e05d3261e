"""The text-to-pixel contrastive loss (section 3.3, equations 9 and 10)."""

import torch.nn.functional as F
from torch import Tensor


def text_to_pixel_contrastive_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Pull the sentence towards the pixels that it means, and push it from the others.

    Args:
        logits: (B, 1, H/4, W/4), the similarity of z_t and each pixel's z_v.
        masks: (B, 1, H, W) in [0, 1], soft at the edges; resized to the logits' size by nearest neighbour.

    Returns:
        The mean over all pixels of -log sigma over what the sentence means and -log(1 - sigma) over the rest.
    """
    targets = F.interpolate(masks, size=logits.shape[-2:], mode="nearest")
    return F.binary_cross_entropy_with_logits(logits, targets)
