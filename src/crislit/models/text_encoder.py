"""CLIP's text transformer (section 3.1). Symbols: see ``cris.py``."""

import torch
from open_clip.model import CLIP
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """Computes a feature per word and a feature of the sentence.

    Args:
        clip: A CLIP model of open_clip. The modules of its text encoder are used, not copied.
    """

    attn_mask: Tensor

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.token_embedding: nn.Embedding = clip.token_embedding
        self.positional_embedding: nn.Parameter = clip.positional_embedding  # (context, D)
        self.transformer = clip.transformer
        self.ln_final: nn.LayerNorm = clip.ln_final
        self.text_projection: nn.Parameter = clip.text_projection  # (D, E)
        # Causal, (context, context).
        self.register_buffer("attn_mask", clip.attn_mask, persistent=False)
        # CLIP's temperature is unused. Keeping it allows an exact export to the released format.
        self.register_buffer("logit_scale", clip.logit_scale.detach().clone())

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode sentences.

        Args:
            tokens: (B, L) long. [EOS] is the largest id, and zeros follow it.

        Returns:
            ``words`` (B, L, D), the output of the last layer norm, and ``sentence`` (B, E), the
            projection of its row at [EOS].

        Raises:
            ValueError: If L exceeds the context.
        """
        context, length = len(self.positional_embedding), tokens.shape[1]
        if length > context:
            raise ValueError(
                f"sentences of {length} tokens exceed the text encoder's context of {context}"
            )
        x = self.token_embedding(tokens) + self.positional_embedding[:length]  # (B, L, D)
        x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
        words = self.ln_final(x)  # (B, L, D)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        sentence = words[rows, end_of_sentence(tokens)] @ self.text_projection  # (B, E)
        return words, sentence


def end_of_sentence(tokens: Tensor) -> Tensor:
    """Return the position of [EOS], the largest id of each sentence: (B, L) -> (B,)."""
    return tokens.argmax(dim=-1)


def padding_mask(tokens: Tensor) -> Tensor:
    """Return True at the padding, after [EOS]: (B, L) -> (B, L) bool."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return positions > end_of_sentence(tokens)[:, None]
