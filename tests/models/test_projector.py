"""The image projector, the text projector and the pixel classifier."""

import pytest
import torch
import torch.nn.functional as F

from crislit.models.projector import ImageProjector, PixelClassifier, TextProjector
from crislit.models.text_encoder import padding_mask
from tests.models.networks import (
    WIDTH,
    assert_close,
    random_images,
    sentences,
    tiny,
    with_statistics,
)


def test_a_kernel_of_size_one_computes_the_dot_product_of_equation_9_and_a_bias() -> None:
    network = with_statistics(tiny(kernel_size=1))
    images, tokens = random_images(2), sentences(3, 5)
    assert network.decoder is not None
    assert isinstance(network.head, TextProjector)
    with torch.no_grad():
        words, sentence = network.text_encoder(tokens)
        fused = network.neck(*network.image_encoder(images), sentence)
        z_v = network.image_projector(network.decoder(fused, words, padding_mask(tokens)))
        z_t = sentence @ network.head.linear.weight.T + network.head.linear.bias
        logits = network(images, tokens)
    assert z_v.shape == (2, WIDTH // 2, 16, 16)
    assert z_t.shape == (2, WIDTH // 2 + 1)
    expected = torch.empty(2, 1, 16, 16)
    for i in range(2):
        for y in range(16):
            for x in range(16):
                expected[i, 0, y, x] = z_t[i, :-1] @ z_v[i, :, y, x] + z_t[i, -1]
    assert_close(logits, expected)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_each_sample_has_its_own_kernel_ordered_as_channel_row_column_then_bias(
    k: int, generator: torch.Generator
) -> None:
    torch.manual_seed(0)
    head = TextProjector(embed=7, channels=3, kernel_size=k)
    pixels = torch.randn(4, 3, 6, 8, generator=generator)
    sentence = torch.randn(4, 7, generator=generator)
    with torch.no_grad():
        logits, z_t = head(pixels, sentence), head.linear(sentence)
    assert logits.shape == (4, 1, 6, 8)
    for i in range(4):
        kernel, bias = z_t[i, :-1].reshape(1, 3, k, k), z_t[i, -1:]
        expected = F.conv2d(pixels[i, None], kernel, bias, padding=k // 2)
        torch.testing.assert_close(logits[i, None], expected)


def test_a_kernel_with_a_single_one_shifts_its_channel_and_pads_with_zeros() -> None:
    head = TextProjector(embed=1, channels=2, kernel_size=3)
    z_t = torch.zeros(2 * 9 + 1)
    z_t[9 + 0 * 3 + 1] = 1  # channel 1, row 0, column 1: the cell above
    z_t[-1] = 10
    with torch.no_grad():
        head.linear.weight.copy_(z_t[:, None])
        head.linear.bias.zero_()
        pixels = torch.arange(12.0).reshape(1, 2, 3, 2)
        logits = head(pixels, torch.ones(1, 1))
    assert logits[0, 0].tolist() == [[10, 10], [16, 17], [18, 19]]


def test_the_pixel_classifier_does_not_use_the_sentence(generator: torch.Generator) -> None:
    head = PixelClassifier(channels=4, kernel_size=3)
    pixels = torch.randn(2, 4, 6, 8, generator=generator)
    logits = head(pixels, torch.zeros(2, 7))
    assert logits.shape == (2, 1, 6, 8)
    assert torch.equal(logits, head(pixels, torch.randn(2, 7, generator=generator)))


def test_the_image_projector_quadruples_the_size_and_halves_the_channels() -> None:
    assert ImageProjector(8).eval()(torch.zeros(2, 8, 3, 5)).shape == (2, 4, 12, 20)
