"""The cross-modal neck (section 3.1, equations 1 to 4). Symbols: see ``cris.py``."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Maps = tuple[Tensor, Tensor, Tensor]
"""Three maps of a picture, the finest first."""


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Return a convolution that keeps the map's size, without bias, then BatchNorm and ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def upsample2(x: Tensor) -> Tensor:
    """Double a map's height and width, bilinearly."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Neck(nn.Module):
    """Fuses the three maps and the sentence into one map at a sixteenth of the picture's size.

    Args:
        in_channels: Channels of c3, c4 and c5; those of c5 are the joint embedding's.
        out_channels: The neck's own widths (a, b, c), 256, 512 and 1024 in the paper; b is the decoder's width D.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int]) -> None:
        super().__init__()
        c3, c4, c5 = in_channels
        a, b, c = out_channels
        self.project_sentence = nn.Sequential(nn.Linear(c5, c, bias=False), nn.BatchNorm1d(c), nn.ReLU(inplace=True))
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

    def forward(self, c3: Tensor, c4: Tensor, c5: Tensor, sentence: Tensor, owners: Tensor | None = None) -> Tensor:
        """Fuse the maps with the sentence.

        Args:
            c3: (B, 8w, H/8, W/8); or fewer, like the other two, where sentences share a picture.
            c4: (B, 16w, H/16, W/16).
            c5: (B, E, H/32, W/32).
            sentence: (B, E).
            owners: (B,) the number of each sentence's picture; None: each picture has equally many, in order.

        Returns:
            (B, D, H/16, W/16).
        """
        return self.fuse(self.project_maps(c3, c4, c5), sentence, owners)

    def project_maps(self, c3: Tensor, c4: Tensor, c5: Tensor) -> Maps:
        """Compute what no sentence changes, once a picture: v3 (P, a, h, w'), v4 (P, b, h, w'), v5 (P, c, H/32, W/32)."""
        return F.avg_pool2d(self.project_c3(c3), 2), self.project_c4(c4), self.project_c5(c5)

    def fuse(self, maps: Maps, sentence: Tensor, owners: Tensor | None = None) -> Tensor:
        """Fuse projected maps with the sentences, (B, E) -> (B, D, h, w')."""
        t = self.project_sentence(sentence)[:, :, None, None]  # (B, c, 1, 1)
        v3, v4, v5 = (for_each_sentence(v, sentence.shape[0], owners) for v in maps)
        f5 = self.normalise_product(v5 * t)  # (B, c, H/32, W/32), eq. 1
        f4 = self.fuse_f4(torch.cat([v4, upsample2(f5)], dim=1))  # (B, b, H/16, W/16), eq. 2
        f3 = self.fuse_f3(torch.cat([v3, f4], dim=1))  # (B, b, H/16, W/16), eq. 2
        smooth = [self.smooth_f3(f3), self.smooth_f4(f4), upsample2(self.smooth_f5(f5))]
        fused = self.aggregate(torch.cat(smooth, dim=1))  # eq. 3
        located = self.locate(torch.cat([fused, coordinates(fused)], dim=1))  # eq. 4
        refined: Tensor = self.refine(located)
        return refined


def for_each_sentence(x: Tensor, sentences: int, owners: Tensor | None) -> Tensor:
    """Repeat pictures' maps for the sentences that share them: (P, C, h, w) -> (B, C, h, w)."""
    if owners is not None:
        return x[owners]
    if x.shape[0] == sentences:
        return x
    return x.repeat_interleave(sentences // x.shape[0], dim=0).contiguous(memory_format=torch.channels_last)


def coordinates(x: Tensor) -> Tensor:
    """Return each cell's x, then y, from -1 at the first to 1 at the last: (B, C, h, w) -> (B, 2, h, w)."""
    h, w = x.shape[-2:]
    across = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).expand(h, w)
    down = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype)[:, None].expand(h, w)
    return torch.stack([across, down]).expand(x.shape[0], -1, -1, -1)
