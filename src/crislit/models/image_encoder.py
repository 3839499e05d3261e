"""CLIP's modified ResNet as a pyramid of three maps (section 3.1). Symbols: see ``cris.py``."""

import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from torch import Tensor, nn

from crislit.models.recompute import Recomputable


class ImageEncoder(Recomputable):
    """Maps after stages 2 and 3, and CLIP's attention pooling of stage 4 kept spatial.

    Args:
        resnet: An image tower of open_clip, built at its native size. Its parts are taken over, not copied.
    """

    def __init__(self, resnet: ModifiedResNet) -> None:
        super().__init__()
        self.pool = SpatialAttentionPool(resnet.attnpool)
        resnet.attnpool = None
        self.resnet = resnet

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode images.

        Args:
            images: (B, 3, H, W), normalised with CLIP's mean and standard deviation; H and W multiples of 32.

        Returns:
            ``c3`` (B, 8w, H/8, W/8), ``c4`` (B, 16w, H/16, W/16) and ``c5`` (B, E, H/32, W/32).
        """
        x = self.stage(self.resnet.layer1, self.run(self.resnet.stem, images))  # (B, 4w, H/4, W/4)
        c3 = self.stage(self.resnet.layer2, x)
        c4 = self.stage(self.resnet.layer3, c3)
        c5 = self.run(self.pool, self.stage(self.resnet.layer4, c4))
        return c3, c4, c5

    def stage(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        """Apply a stage of the ResNet."""
        for block in blocks:
            x = self.run(block, x)
        return x


class SpatialAttentionPool(nn.Module):
    """CLIP's attention pooling without its mean token: every position attends to every other, and a shortcut is added.

    Args:
        pool: The pooling of an open_clip tower, whose projections and position embedding are taken over.
    """

    def __init__(self, pool: AttentionPool2d) -> None:
        super().__init__()
        self.heads: int = pool.num_heads
        self.positional_embedding: nn.Parameter = pool.positional_embedding  # (1 + native grid's cells, 32w)
        self.q_proj: nn.Linear = pool.q_proj
        self.k_proj: nn.Linear = pool.k_proj
        self.v_proj: nn.Linear = pool.v_proj
        self.c_proj: nn.Linear = pool.c_proj
        width, embed = self.c_proj.in_features, self.c_proj.out_features
        self.shortcut = nn.Sequential(nn.Conv2d(width, embed, 1, bias=False), nn.BatchNorm2d(embed))

    def forward(self, stage4: Tensor) -> Tensor:
        """Attend over the map of stage 4, (B, 32w, h, w) -> (B, E, h, w)."""
        h, w = stage4.shape[-2:]
        x = stage4.flatten(2).transpose(1, 2) + self.positions(h, w)  # (B, hw, 32w)
        q, k, v = (self.split_heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, hw, 64)
        x = self.c_proj(x.transpose(1, 2).flatten(2))  # (B, hw, E)
        x = x.transpose(1, 2).reshape(x.shape[0], -1, h, w)  # (B, E, h, w)
        return F.relu(x + self.shortcut(stage4))

    def positions(self, h: int, w: int) -> Tensor:
        """Resize the position embedding, class position dropped, to a grid: (h w, 32w)."""
        grid = self.positional_embedding[1:]
        side = round(len(grid) ** 0.5)
        if (h, w) == (side, side):
            return grid
        image = grid.T.reshape(1, -1, side, side)
        return F.interpolate(image, size=(h, w), mode="bicubic", align_corners=False)[0].flatten(1).T

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)
