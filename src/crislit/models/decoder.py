"""The vision-language decoder (section 3.2, equations 5 to 7). Symbols: see ``cris.py``."""

import math

import torch
from torch import Tensor, nn

from crislit.models.recompute import Recomputable


class Decoder(Recomputable):
    """Carries what the words say to every cell of the fused map.

    Args:
        width: D, channels of the map and of the words.
        layers: n, at least 1 (a network without decoder has no ``Decoder``).
        heads: Attention heads; they divide the width.
        ffn: Hidden width of the feed-forward network.
        dropout: Rate after each attention and feed-forward network, and on the attention weights.

    Raises:
        ValueError: If a size does not fit.
    """

    def __init__(self, width: int, layers: int = 3, heads: int = 8, ffn: int = 2048, dropout: float = 0.1) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"a decoder has at least one layer, got {layers}")
        if width % heads or width % 4:
            raise ValueError(f"the decoder's width must be a multiple of 4 and of its heads, got {width} and {heads}")
        self.layers = nn.ModuleList(DecoderLayer(width, heads, ffn, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, fused: Tensor, words: Tensor, padding: Tensor) -> Tensor:
        """Decode the map in the light of the words.

        Args:
            fused: (B, D, h, w').
            words: (B, L, D).
            padding: (B, L) bool, true where a sentence is padded.

        Returns:
            (B, D, h, w').
        """
        h, w = fused.shape[-2:]
        cells = fused.flatten(2).transpose(1, 2)  # (B, N, D)
        cell_positions = sine_positions_2d(h, w, fused.shape[1]).to(cells)
        word_positions = sine_positions(torch.arange(words.shape[1]), words.shape[2]).to(words)
        for layer in self.layers:
            cells = self.run(layer, cells, words, cell_positions, word_positions, padding)
        decoded: Tensor = self.norm(cells)
        return decoded.transpose(1, 2).reshape(-1, fused.shape[1], h, w)


class DecoderLayer(nn.Module):
    """Self-attention over cells, cross-attention from cells to words, feed-forward; an extra norm after each attention."""

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
            nn.Linear(width, ffn), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.LayerNorm(ffn), nn.Linear(ffn, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, cells: Tensor, words: Tensor, cell_positions: Tensor, word_positions: Tensor, padding: Tensor) -> Tensor:
        """(B, N, D), (B, L, D), (N, D), (L, D), (B, L) -> (B, N, D)."""
        x = self.self_norm_in(cells)
        q = x + cell_positions
        x = self.self_attention(q, q, x, need_weights=False)[0]
        cells = cells + self.dropout(self.self_norm_out(x))  # eq. 5

        q = self.cross_norm_in(cells) + cell_positions
        x = self.cross_attention(q, words + word_positions, words, key_padding_mask=padding, need_weights=False)[0]
        cells = cells + self.dropout(self.cross_norm_out(x))  # eq. 7

        x = self.dropout(self.ffn(self.ffn_norm_in(cells)))
        cells = cells + x  # eq. 7
        return cells


def sine_positions(positions: Tensor, width: int) -> Tensor:
    """Encode positions by interleaved sines and cosines of falling frequency: (P,) -> (P, width)."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = positions[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def sine_positions_2d(h: int, w: int, width: int) -> Tensor:
    """Encode a grid's cells row by row, x in the first half of the channels and y in the second: (h w, width)."""
    across = sine_positions(torch.arange(w), width // 2).expand(h, w, -1)
    down = sine_positions(torch.arange(h), width // 2)[:, None].expand(h, w, -1)
    return torch.cat([across, down], dim=2).flatten(0, 1)
