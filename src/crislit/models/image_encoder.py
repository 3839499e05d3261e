"""CLIP's modified ResNet with three output maps (section 3.1). Symbols: see ``cris.py``."""

import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from torch import Tensor, nn

from crislit.models.recompute import Recomputable


class ImageEncoder(Recomputable):
    """Returns the maps of stages 2 and 3, and that of stage 4 after CLIP's attention pooling.

    Args:
        resnet: An image encoder of open_clip, built at its native size. Its modules are used, not
            copied.
    """

    def __init__(self, resnet: ModifiedResNet) -> None:
        super().__init__()
        self.pool = SpatialAttentionPool(resnet.attnpool)
        resnet.attnpool = None
        self.resnet = resnet

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode images.

        Args:
            images: (P, 3, H, W), normalized with CLIP's mean and standard deviation.

        Returns:
            ``c3`` (P, 8w, H/8, W/8), ``c4`` (P, 16w, H/16, W/16) and ``c5`` (P, E, H/32, W/32).
        """
        x = self.run(self.resnet.stem, images)  # (P, w, H/4, W/4)
        x = self.run_each(self.resnet.layer1, x)  # (P, 4w, H/4, W/4)
        c3 = self.run_each(self.resnet.layer2, x)  # (P, 8w, H/8, W/8)
        c4 = self.run_each(self.resnet.layer3, c3)  # (P, 16w, H/16, W/16)
        x = self.run_each(self.resnet.layer4, c4)  # (P, 32w, H/32, W/32)
        c5 = self.run(self.pool, x)  # (P, E, H/32, W/32)
        return c3, c4, c5


class SpatialAttentionPool(nn.Module):
    """CLIP's attention pooling, with one output per cell.

    CLIP attends from the mean of all cells to every cell. Here every cell is a query, so that the
    output is a map again, and a shortcut is added.

    Args:
        pool: The pooling of an open_clip model. Its modules are used, not copied.
    """

    def __init__(self, pool: AttentionPool2d) -> None:
        super().__init__()
        self.heads: int = pool.num_heads
        # (1 + M, 32w): the mean's position, then the M cells of the native grid.
        self.positional_embedding: nn.Parameter = pool.positional_embedding
        self.q_proj, self.k_proj, self.v_proj = pool.q_proj, pool.k_proj, pool.v_proj
        self.c_proj: nn.Linear = pool.c_proj
        width, embed = self.c_proj.in_features, self.c_proj.out_features  # 32w, E
        self.shortcut = nn.Sequential(nn.Conv2d(width, embed, 1, bias=False), nn.BatchNorm2d(embed))

    def forward(self, stage4: Tensor) -> Tensor:
        """Attend from every cell to every cell.

        Args:
            stage4: (P, 32w, h, w), a map of any size.

        Returns:
            (P, E, h, w).
        """
        h, w = stage4.shape[-2:]
        x = stage4.flatten(2).transpose(1, 2) + self.positions(h, w)  # (P, h w, 32w)
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (P, heads, h w, 64)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v)  # (P, heads, h w, 64)
        x = self.c_proj(x.transpose(1, 2).flatten(2))  # (P, h w, E)
        x = x.transpose(1, 2).reshape(x.shape[0], -1, h, w)  # (P, E, h, w)
        return F.relu(x + self.shortcut(stage4))

    def positions(self, h: int, w: int) -> Tensor:
        """Resize the position embedding, without the mean's position, to a grid: (h w, 32w)."""
        native = self.positional_embedding[1:]
        side = round(len(native) ** 0.5)
        if (h, w) == (side, side):
            return native
        grid = native.T.reshape(1, -1, side, side)  # (1, 32w, side, side)
        return F.interpolate(grid, (h, w), mode="bicubic", align_corners=False)[0].flatten(1).T
