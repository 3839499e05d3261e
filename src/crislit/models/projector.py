"""The two projectors (section 3.3, equation 8) and the plain classifier that replaces them in the ablation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crislit.models.neck import conv_bn_relu
from crislit.models.recompute import Recomputable


class ImageProjector(nn.Sequential, Recomputable):
    """Projects the decoded map to z_v at a quarter of the picture's size: (B, D, h, w') -> (B, D/2, 4h, 4w')."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            conv_bn_relu(width, width, 3),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            conv_bn_relu(width, width // 2, 3),
            nn.Conv2d(width // 2, width // 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w') -> (B, D/2, 4h, 4w')."""
        for part in self:
            x = self.run(part, x)
        return x


class TextProjector(nn.Module):
    """Projects the sentence to z_t, one convolution kernel and bias a sentence, and compares it with every pixel.

    With ``kernel_size=1`` the logits are equation 9's dot products, plus the bias; the released network uses 3.

    Args:
        embed: E, width of the sentence's feature.
        channels: Channels of z_v.
        kernel_size: Side k of the kernel, odd.

    Raises:
        ValueError: If the kernel size is not odd.
    """

    def __init__(self, embed: int, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.kernel_size = check_kernel_size(kernel_size)
        self.linear = nn.Linear(embed, channels * kernel_size**2 + 1)

    def forward(self, pixels: Tensor, sentence: Tensor) -> Tensor:
        """Return the logits, (B, C, H/4, W/4) and (B, E) -> (B, 1, H/4, W/4)."""
        z_t = self.linear(sentence)
        taps = z_t[:, :-1].reshape(z_t.shape[0], -1, self.kernel_size**2).transpose(1, 2)  # (B, k k, C)
        products = (taps @ pixels.flatten(2)).unflatten(2, pixels.shape[-2:])
        return sum_of_taps(products, z_t[:, -1])


def sum_of_taps(products: Tensor, bias: Tensor) -> Tensor:
    """Convolve with kernels that are every sample's own, given each tap's dot products with all pixels.

    Args:
        products: (B, k k, h, w).
        bias: (B,).

    Returns:
        (B, 1, h, w): the sum of the taps' maps, each shifted to where its tap is.
    """
    k, (h, w) = math.isqrt(products.shape[1]), products.shape[-2:]
    products = F.pad(products, [k // 2] * 4)
    shifted = [products[:, i * k + j, i : i + h, j : j + w] for i in range(k) for j in range(k)]
    logits: Tensor = torch.stack(shifted).sum(dim=0) + bias[:, None, None]  # (B, h, w)
    return logits[:, None]


class PixelClassifier(nn.Module):
    """Predicts from z_v by one learned convolution for all sentences: table 1's rows without "Con.".

    Args:
        channels: Channels of z_v.
        kernel_size: Side of the kernel, odd.

    Raises:
        ValueError: If the kernel size is not odd.
    """

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, check_kernel_size(kernel_size), padding=kernel_size // 2)

    def forward(self, pixels: Tensor, sentence: Tensor) -> Tensor:
        """Return the logits, (B, C, H/4, W/4) -> (B, 1, H/4, W/4); the sentence has had its say in the neck."""
        logits: Tensor = self.conv(pixels)
        return logits


def check_kernel_size(kernel_size: int) -> int:
    """Return the size if a kernel of it can keep a map's size."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"projector.kernel_size must be odd and positive, got {kernel_size}")
    return kernel_size
