"""A tiny network and random inputs for it, shared by tests."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS

CONTEXT, SOS, EOS = 24, 98, 99
WIDTH, EMBED = 64, 128
CLIP: dict[str, Any] = {
    "embed_dim": EMBED,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64},
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": EOS + 1,
        "width": WIDTH,
        "heads": 1,
        "layers": 2,
    },
}
SIZES: dict[str, Any] = {
    "clip": CLIP,
    "neck": (32, WIDTH, 128),
    "decoder_layers": 2,
    "decoder_heads": 4,
    "decoder_ffn": 96,
}
ABLATIONS: list[dict[str, Any]] = [
    {"contrastive": True, "decoder_layers": 2, "kernel_size": 3},
    {"contrastive": True, "decoder_layers": 0, "kernel_size": 1},
    {"contrastive": False, "decoder_layers": 0, "kernel_size": 3},
    {"contrastive": False, "decoder_layers": 1, "kernel_size": 1},
]


def tiny(**changes: Any) -> CRIS:
    """Build the tiny network, always with the same weights."""
    torch.manual_seed(0)
    return build_cris(CRISConfig(**SIZES | changes))


def with_statistics(model: CRIS) -> CRIS:
    """Update the BatchNorms on random inputs, and return the network in evaluation mode."""
    with torch.no_grad():
        for _ in range(20):
            model.train()(random_images(4), sentences(1, 3, 5, 6))
    return model.eval()


def sentences(*lengths: int, padded_to: int = 12) -> Tensor:
    """Return token ids of random sentences with the given numbers of words: (B, padded_to)."""
    generator = torch.Generator().manual_seed(len(lengths))
    rows = []
    for length in lengths:
        words = torch.randint(1, SOS, (length,), generator=generator)
        row = torch.cat([torch.tensor([SOS]), words, torch.tensor([EOS])])
        rows.append(F.pad(row, (0, padded_to - length - 2)))
    return torch.stack(rows)


def random_images(count: int, height: int = 64, width: int = 64) -> Tensor:
    """Return normalized images of noise: (count, 3, height, width)."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def bytes_of(images: Tensor) -> Tensor:
    """Convert normalized images to uint8."""
    return (64 * images + 128).clamp(0, 255).to(torch.uint8)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compare with a tolerance of 1e-5 of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
