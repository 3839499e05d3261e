"""The image and text projectors (section 3.3, equations 8 and 9). Symbols: see ``cris.py``."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crislit.models.neck import conv_bn_relu
from crislit.models.recompute import Recomputable


class ImageProjector(nn.Sequential, Recomputable):
    """Projects the decoded map to z_v, at 1/4 of the input's size (section 3.4).

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            conv_bn_relu(width, width, 3),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            conv_bn_relu(width, width // 2, 3),
            nn.Conv2d(width // 2, width // 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w') -> (B, D/2, H/4, W/4)."""
        return self.run_each(self, x)


class TextProjector(nn.Module):
    """Projects each sentence to z_t, a convolution kernel and a bias, and applies it to z_v.

    With ``kernel_size=1`` the logits are the dot products of equation 9, plus a bias. The released
    network uses 3.

    Args:
        embed: E, width of the sentence feature.
        channels: C, channels of z_v.
        kernel_size: k, odd.
    """

    def __init__(self, embed: int, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.linear = nn.Linear(embed, channels * kernel_size**2 + 1)

    def forward(self, pixels: Tensor, sentence: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            pixels: z_v, (B, C, H/4, W/4).
            sentence: (B, E).

        Returns:
            (B, 1, H/4, W/4).
        """
        z_t = self.linear(sentence)  # (B, C k k + 1)
        kernels = z_t[:, :-1].reshape(z_t.shape[0], -1, self.kernel_size**2)  # (B, C, k k)
        products = kernels.mT @ pixels.flatten(2)  # (B, k k, H/4 W/4)
        return sum_of_taps(products.unflatten(2, pixels.shape[-2:]), z_t[:, -1])


class PixelClassifier(nn.Module):
    """Computes logits from z_v by one convolution, the same for all sentences.

    Replaces the text projector in the rows of table 1 without "Con.".

    Args:
        channels: C, channels of z_v.
        kernel_size: k, odd.
    """

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, pixels: Tensor, sentence: Tensor) -> Tensor:
        """Classify pixels, (B, C, H/4, W/4) -> (B, 1, H/4, W/4); the sentence is not used."""
        logits: Tensor = self.conv(pixels)
        return logits


def sum_of_taps(products: Tensor, bias: Tensor) -> Tensor:
    """Convolve each sample with its own kernel, given the dot products of each tap and each pixel.

    Args:
        products: (B, k k, h, w).
        bias: (B,).

    Returns:
        (B, 1, h, w), the sum of the taps' products, each shifted by the position of its tap.
    """
    k, (h, w) = math.isqrt(products.shape[1]), products.shape[-2:]
    products = F.pad(products, [k // 2] * 4)
    shifted = [products[:, i * k + j, i : i + h, j : j + w] for i in range(k) for j in range(k)]
    return (torch.stack(shifted).sum(dim=0) + bias[:, None, None])[:, None]
