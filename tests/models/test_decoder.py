"""The decoder: what it attends to, dropout, and position encodings."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crislit.models.decoder import Decoder, sine_positions, sine_positions_2d


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(width=16, layers=2, heads=2, ffn=24).eval()


def random_inputs(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a fused map (batch, 16, 3, 4) and words (batch, length, 16)."""
    fused = torch.randn(batch, 16, 3, 4, generator=generator)
    return fused, torch.randn(batch, length, 16, generator=generator)


def test_padded_words_do_not_influence_the_decoder(
    decoder: Decoder, generator: torch.Generator
) -> None:
    fused, words = random_inputs(2, 6, generator)
    padding = torch.tensor([[False] * 4 + [True] * 2, [False] * 2 + [True] * 4])
    noise = torch.where(padding[..., None], 100 * torch.randn(2, 6, 16, generator=generator), words)
    with torch.no_grad():
        expected = decoder(fused, words, padding)
        torch.testing.assert_close(decoder(fused, noise, padding), expected)
        unmasked = decoder(fused, noise, torch.zeros_like(padding))
    assert not torch.allclose(unmasked, expected, atol=1e-2), "because of the mask"


def test_every_word_that_is_not_padding_influences_the_decoder(
    decoder: Decoder, generator: torch.Generator
) -> None:
    fused, words = random_inputs(1, 4, generator)
    padding = torch.tensor([[False, False, False, True]])
    with torch.no_grad():
        before = decoder(fused, words, padding)
        for position in range(3):
            changed = words.clone()
            changed[0, position] += torch.randn(16, generator=generator)
            assert (decoder(fused, changed, padding) - before).abs().max() > 1e-3, position


def test_the_order_of_words_influences_the_decoder(
    decoder: Decoder, generator: torch.Generator
) -> None:
    fused, words = random_inputs(1, 4, generator)
    padding = torch.zeros(1, 4, dtype=torch.bool)
    with torch.no_grad():
        difference = decoder(fused, words.flip(1), padding) - decoder(fused, words, padding)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("silenced", ["cross_norm_out", "self_norm_out"])
def test_both_attentions_use_the_positions_of_cells(
    silenced: str, generator: torch.Generator
) -> None:
    torch.manual_seed(0)
    decoder = Decoder(width=16, layers=1, heads=2, ffn=24).eval()
    norm: Any = getattr(decoder.layers[0], silenced)
    nn.init.zeros_(norm.weight)  # leaves only the other attention
    fused, words = random_inputs(1, 4, generator)
    padding = torch.zeros(1, 4, dtype=torch.bool)
    with torch.no_grad():
        mirrored = decoder(fused.flip(3), words, padding).flip(3)
        assert (mirrored - decoder(fused, words, padding)).abs().max() > 1e-3


def test_dropout_acts_at_its_four_places_and_only_in_training() -> None:
    torch.manual_seed(0)
    decoder = Decoder(width=16, layers=1, heads=2, ffn=24, dropout=0.25)
    inputs = torch.randn(1, 16, 2, 2), torch.randn(1, 3, 16), torch.zeros(1, 3, dtype=torch.bool)
    layer: Any = decoder.layers[0]
    attention_rates = [layer.self_attention.dropout, layer.cross_attention.dropout]
    other_rates = [module.p for module in layer.modules() if isinstance(module, nn.Dropout)]
    assert attention_rates + other_rates == [0.25] * 4
    assert not torch.equal(decoder.train()(*inputs), decoder(*inputs))
    assert torch.equal(decoder.eval()(*inputs), decoder(*inputs))


def test_sine_positions_agree_with_values_computed_by_hand() -> None:
    # Width 4: frequencies 1 and 10000^(-2/4) = 1/100, sine and cosine interleaved.
    positions = [0, 1, 2, 70]
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in positions]
    encoded = sine_positions(torch.tensor(positions), 4)
    torch.testing.assert_close(encoded, torch.tensor(expected))
    assert encoded[0].tolist() == [0, 1, 0, 1]


def test_2d_positions_encode_x_in_the_first_half_of_channels_and_y_in_the_second() -> None:
    h, w, width = 3, 5, 8
    grid = sine_positions_2d(h, w, width).reshape(h, w, width)
    for y in range(h):
        for x in range(w):
            expected = [
                function(position / scale)
                for position in (x, y)
                for scale in (1, 100)
                for function in (math.sin, math.cos)
            ]
            assert grid[y, x].tolist() == pytest.approx(expected, abs=1e-6), (y, x)
