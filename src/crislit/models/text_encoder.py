"""CLIP's text transformer (section 3.1). Symbols: see ``cris.py``."""

import torch
from open_clip.model import CLIP
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """Features of every word and of the whole sentence.

    Args:
        clip: A CLIP model of open_clip, whose text tower is taken over, not copied.
    """

    attn_mask: Tensor
    logit_scale: Tensor

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.token_embedding: nn.Embedding = clip.token_embedding
        self.positional_embedding: nn.Parameter = clip.positional_embedding  # (context, text width)
        self.transformer = clip.transformer
        self.ln_final: nn.LayerNorm = clip.ln_final
        self.text_projection: nn.Parameter = clip.text_projection  # (text width, E)
        self.register_buffer("attn_mask", clip.attn_mask, persistent=False)  # (context, context), causal
        # CLIP's temperature: nothing uses it; it is kept so that weights return to the released format bit for bit.
        self.register_buffer("logit_scale", clip.logit_scale.detach().clone())

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode sentences.

        Args:
            tokens: (B, L) ids, zero after [EOS]; [EOS] is the largest id. L is at most the context length.

        Returns:
            ``words`` (B, L, text width), the last layer norm's output, and ``sentence`` (B, E), its row at [EOS] projected.

        Raises:
            ValueError: If the sentences are longer than the context.
        """
        context, length = len(self.positional_embedding), tokens.shape[1]
        if length > context:
            raise ValueError(f"sentences of {length} tokens do not fit the text encoder's context of {context}")
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        words = self.ln_final(self.transformer(x, attn_mask=self.attn_mask[:length, :length]))
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        sentence = words[rows, end_of_sentence(tokens)] @ self.text_projection
        return words, sentence


def end_of_sentence(tokens: Tensor) -> Tensor:
    """Return the position of [EOS], the largest id of each sentence: (B, L) -> (B,)."""
    return tokens.argmax(dim=-1)


def padding_mask(tokens: Tensor) -> Tensor:
    """Return where a sentence is padded, that is, after [EOS]: (B, L) -> (B, L) bool."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return positions > end_of_sentence(tokens)[:, None]
