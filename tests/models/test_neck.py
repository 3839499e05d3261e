"""The neck: its output and its coordinates."""

import torch

from crislit.models.cris import CRIS
from crislit.models.neck import coordinates
from tests.models.networks import WIDTH, random_images, sentences


def test_coordinates_run_from_minus_one_to_one_with_x_first() -> None:
    result = coordinates(torch.zeros(2, 5, 2, 3))
    assert result.shape == (2, 2, 2, 3)
    assert result[1, 0].tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert result[1, 1].tolist() == [[-1, -1, -1], [1, 1, 1]]


def test_the_fused_map_has_a_sixteenth_of_the_input_size(model: CRIS) -> None:
    images, tokens = random_images(2, 64, 96), sentences(3, 5)
    with torch.no_grad():
        _, sentence = model.text_encoder(tokens)
        fused = model.neck(*model.image_encoder(images), sentence)
    assert fused.shape == (2, WIDTH, 4, 6)
