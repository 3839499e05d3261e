"""The cross-modal neck (section 3.1, equations 1 to 4). Symbols: see ``cris.py``."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Maps = tuple[Tensor, Tensor, Tensor]
"""Three maps per image, the finest first."""


class Neck(nn.Module):
    """Fuses three feature maps and the sentence feature into one map, at 1/16 of the input's size.

    Args:
        in_channels: Channels of c3, c4 and c5: 8w, 16w and E.
        out_channels: Widths (a, b, c) of the neck, (256, 512, 1024) in the paper. b is D.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int]) -> None:
        super().__init__()
        (c3, c4, c5), (a, b, c) = in_channels, out_channels
        self.project_sentence = nn.Sequential(
            nn.Linear(c5, c, bias=False), nn.BatchNorm1d(c), nn.ReLU(inplace=True)
        )
        self.project_c5 = conv_bn_relu(c5, c, 1)
        self.normalise_product = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True))
        self.project_c4 = conv_bn_relu(c4, b, 3)
        self.fuse_f4 = conv_bn_relu(b + c, b, 1)
        self.project_c3 = conv_bn_relu(c3, a, 3)
        self.fuse_f3 = conv_bn_relu(a + b, b, 1)
        self.smooth_f3 = conv_bn_relu(b, b, 3)
        self.smooth_f4 = conv_bn_relu(b, b, 3)
        self.smooth_f5 = conv_bn_relu(c, b, 3)
        self.aggregate = conv_bn_relu(3 * b, b, 1)
        self.locate = conv_bn_relu(b + 2, b, 3)
        self.refine = conv_bn_relu(b, b, 3)

    def forward(
        self,
        c3: Tensor,
        c4: Tensor,
        c5: Tensor,
        sentence: Tensor,
        image_indices: Tensor | None = None,
    ) -> Tensor:
        """Fuse the feature maps with the sentences.

        Args:
            c3: (P, 8w, H/8, W/8).
            c4: (P, 16w, H/16, W/16).
            c5: (P, E, H/32, W/32).
            sentence: (B, E).
            image_indices: (B,) long, the index of each sentence's image. None if each image has
                B/P sentences, in the order of the images.

        Returns:
            (B, D, h, w').
        """
        return self.fuse(self.project_maps(c3, c4, c5), sentence, image_indices)

    def project_maps(self, c3: Tensor, c4: Tensor, c5: Tensor) -> Maps:
        """Compute everything that does not depend on the sentences, once per image.

        Args:
            c3: (P, 8w, H/8, W/8).
            c4: (P, 16w, H/16, W/16).
            c5: (P, E, H/32, W/32).

        Returns:
            ``v3`` (P, a, h, w'), ``v4`` (P, b, h, w') and ``v5`` (P, c, H/32, W/32).
        """
        return F.avg_pool2d(self.project_c3(c3), 2), self.project_c4(c4), self.project_c5(c5)

    def fuse(self, maps: Maps, sentence: Tensor, image_indices: Tensor | None = None) -> Tensor:
        """Fuse projected maps with the sentences.

        Args:
            maps: The output of ``project_maps``.
            sentence: (B, E).
            image_indices: (B,), or None.

        Returns:
            (B, D, h, w').
        """
        t = self.project_sentence(sentence)[:, :, None, None]  # (B, c, 1, 1)
        v3, v4, v5 = (repeat_for_sentences(v, sentence.shape[0], image_indices) for v in maps)
        f5 = self.normalise_product(v5 * t)  # (B, c, H/32, W/32), eq. 1
        f4 = self.fuse_f4(torch.cat([v4, upsample2(f5)], dim=1))  # (B, b, h, w'), eq. 2
        f3 = self.fuse_f3(torch.cat([v3, f4], dim=1))  # (B, b, h, w'), eq. 2
        smooth = [self.smooth_f3(f3), self.smooth_f4(f4), upsample2(self.smooth_f5(f5))]
        fused = self.aggregate(torch.cat(smooth, dim=1))  # (B, b, h, w'), eq. 3
        located = self.locate(torch.cat([fused, coordinates(fused)], dim=1))  # eq. 4
        refined: Tensor = self.refine(located)  # (B, D, h, w')
        return refined


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Return a convolution without bias that keeps the map's size, BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def upsample2(x: Tensor) -> Tensor:
    """Double the height and width of a map, bilinearly."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def repeat_for_sentences(x: Tensor, sentences: int, image_indices: Tensor | None) -> Tensor:
    """Repeat the maps of images for their sentences.

    Args:
        x: (P, C, h, w).
        sentences: B.
        image_indices: (B,) long. None if each image has B/P sentences, in the order of the images.

    Returns:
        (B, C, h, w).
    """
    if image_indices is not None:
        return x[image_indices]
    if x.shape[0] == sentences:
        return x
    return x.repeat_interleave(sentences // x.shape[0], dim=0).contiguous(
        memory_format=torch.channels_last
    )


def coordinates(x: Tensor) -> Tensor:
    """Return the x and y of each cell, from -1 to 1: (B, C, h, w) -> (B, 2, h, w)."""
    ys, xs = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[-2:])
    return torch.stack(torch.meshgrid(xs, ys, indexing="xy")).expand(x.shape[0], -1, -1, -1)
