"""The vision-language decoder (section 3.2, equations 5 to 7). Symbols: see ``cris.py``."""

import math

import torch
from torch import Tensor, nn

from crislit.models.recompute import Recomputable


class Decoder(Recomputable):
    """Transformer decoder: the cells of the fused map attend to the words (section 3.3).

    Args:
        width: D, channels of the map and of the words.
        layers: n, at least 1 (a network with n = 0 has no ``Decoder``).
        heads: Number of attention heads; must divide the width.
        ffn: Hidden width of the feed-forward networks.
        dropout: Dropout rate of attention weights, attention outputs and feed-forward networks.

    Raises:
        ValueError: If the width is not a multiple of 4 and of ``heads``.
    """

    def __init__(
        self, width: int, layers: int = 3, heads: int = 8, ffn: int = 2048, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if width % heads or width % 4:
            raise ValueError(
                f"the decoder's width must be a multiple of 4 and of its heads, "
                f"got width {width} and {heads} heads"
            )
        self.layers = nn.ModuleList(DecoderLayer(width, heads, ffn, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, fused: Tensor, words: Tensor, padding: Tensor) -> Tensor:
        """Decode the fused map.

        Args:
            fused: (B, D, h, w').
            words: (B, L, D).
            padding: (B, L) bool, True after [EOS].

        Returns:
            (B, D, h, w').
        """
        _, width, h, w = fused.shape
        # Computed on the device: copying them to it would wait for all of its work.
        cell_positions = sine_positions_2d(h, w, width, fused.device).to(fused.dtype)  # (N, D)
        places = torch.arange(words.shape[1], device=words.device)
        word_positions = sine_positions(places, width).to(words.dtype)  # (L, D)
        cells = fused.flatten(2).transpose(1, 2)  # (B, N, D)
        decoded: Tensor = self.norm(  # (B, N, D)
            self.run_each(self.layers, cells, words, cell_positions, word_positions, padding)
        )
        return decoded.transpose(1, 2).reshape(-1, width, h, w)  # (B, D, h, w')


class DecoderLayer(nn.Module):
    """Self-attention among cells, cross-attention from cells to words, and a feed-forward network.

    Each of the three is a pre-norm residual branch. Both attentions have a second norm, after the
    attention, as in the released network.

    Args:
        width: D.
        heads: Number of attention heads.
        ffn: Hidden width of the feed-forward network.
        dropout: Dropout rate.
    """

    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_norm_in = nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.self_norm_out = nn.LayerNorm(width)
        self.cross_norm_in = nn.LayerNorm(width)
        self.cross_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.cross_norm_out = nn.LayerNorm(width)
        self.ffn_norm_in = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.LayerNorm(ffn),
            nn.Linear(ffn, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        cells: Tensor,
        words: Tensor,
        cell_positions: Tensor,
        word_positions: Tensor,
        padding: Tensor,
    ) -> Tensor:
        """Apply the layer.

        Args:
            cells: (B, N, D).
            words: (B, L, D).
            cell_positions: (N, D), added to queries, and to keys that are cells.
            word_positions: (L, D), added to keys that are words.
            padding: (B, L) bool, True after [EOS].

        Returns:
            (B, N, D).
        """
        # Equation 5: self-attention.
        x = self.self_norm_in(cells)
        q = k = x + cell_positions
        x, _ = self.self_attention(q, k, x, need_weights=False)
        cells = cells + self.dropout(self.self_norm_out(x))

        # Equation 7, first line: cross-attention to the words.
        q = self.cross_norm_in(cells) + cell_positions
        k = words + word_positions
        x, _ = self.cross_attention(q, k, words, key_padding_mask=padding, need_weights=False)
        cells = cells + self.dropout(self.cross_norm_out(x))

        # Equation 7, second line: feed-forward network.
        cells = cells + self.dropout(self.ffn(self.ffn_norm_in(cells)))
        return cells


def sine_positions(positions: Tensor, width: int) -> Tensor:
    """Encode positions by sines and cosines of decreasing frequency, interleaved.

    Args:
        positions: (M,).
        width: Number of channels, even.

    Returns:
        (M, width).
    """
    channels = torch.arange(0, width, 2, device=positions.device)
    frequencies = torch.exp(channels * (-math.log(10000.0) / width))
    angles = positions[:, None] * frequencies  # (M, width/2)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def sine_positions_2d(h: int, w: int, width: int, device: torch.device | None = None) -> Tensor:
    """Encode the cells of a grid, row by row: x in the first half of the channels, y in the second.

    Args:
        h: Rows.
        w: Columns.
        width: Number of channels, a multiple of 4.
        device: Where to make the tensor.

    Returns:
        (h w, width).
    """
    x = sine_positions(torch.arange(w, device=device), width // 2).expand(h, w, -1)
    y = sine_positions(torch.arange(h, device=device), width // 2)[:, None].expand(h, w, -1)
    return torch.cat([x, y], dim=2).flatten(0, 1)
