"""The whole network, on tiny sizes."""

import pytest
import torch
from torch import Tensor, nn

from crislit.models.cris import CRIS, count_parameters
from crislit.training.losses import text_to_pixel_contrastive_loss
from tests.models.networks import (
    CONTEXT,
    assert_close,
    random_images,
    sentences,
    tiny,
    with_statistics,
)


@pytest.mark.parametrize("length", [8, 12, 17, 22])
def test_logits_do_not_depend_on_the_padding_of_a_sentence(model: CRIS, length: int) -> None:
    with torch.no_grad():
        expected = model(random_images(3), sentences(1, 4, 6, padded_to=8))
        assert_close(model(random_images(3), sentences(1, 4, 6, padded_to=length)), expected)


def test_a_batch_gives_the_same_logits_as_its_samples_alone(model: CRIS) -> None:
    images, tokens = random_images(4), sentences(1, 3, 6, 10)
    with torch.no_grad():
        together = model(images, tokens)
        alone = torch.cat([model(images[i, None], tokens[i, None]) for i in range(4)])
    assert_close(together, alone)
    tolerance = 1e-2 * together.abs().max().item()
    assert not torch.allclose(together[0], together[1], atol=tolerance), "samples do differ"


def test_sentences_that_share_an_image_give_the_same_logits_as_alone(model: CRIS) -> None:
    images, tokens = random_images(2), sentences(1, 3, 4, 5, 6, 8)
    image_indices = torch.tensor([1, 0, 1, 1, 1, 0])
    with torch.no_grad():
        in_order = model(images, tokens)
        alone = torch.cat([model(images[i // 3, None], tokens[i, None]) for i in range(6)])
        indexed = model(images, tokens, image_indices)
        indexed_alone = torch.cat(
            [model(images[image, None], tokens[i, None]) for i, image in enumerate(image_indices)]
        )
    assert_close(in_order, alone)
    assert_close(indexed, indexed_alone)


def test_former_names_are_accepted_with_one_log_line(
    model: CRIS, caplog: pytest.LogCaptureFixture
) -> None:
    images, tokens, image_indices = random_images(2), sentences(1, 3, 4), torch.tensor([1, 0, 1])
    with torch.no_grad():
        expected = model(images, tokens, image_indices)
        assert torch.equal(model(images, tokens, owners=image_indices), expected)
    assert model.settings == model.config.to_dict()
    assert caplog.messages == [
        "the argument owners is now image_indices",
        "CRIS.settings is now CRIS.config",
    ]


def test_sentences_that_cannot_be_divided_over_the_images_raise_value_error(model: CRIS) -> None:
    with pytest.raises(ValueError, match="cannot divide 3 sentences over 2 images"):
        model(random_images(2), sentences(1, 3, 4))
    with pytest.raises(ValueError, match="cannot divide 2 sentences over 4 images"):
        model(random_images(4), sentences(1, 3))


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize("layers", [0, 2])
def test_logits_depend_on_the_sentence_in_every_ablation(contrastive: bool, layers: int) -> None:
    network = with_statistics(tiny(contrastive=contrastive, decoder_layers=layers))
    image = random_images(1).expand(2, -1, -1, -1)
    with torch.no_grad():
        first, second = network(image, sentences(3, 6))
    assert (first - second).norm() > 1e-3 * first.norm()


def test_logits_have_the_same_type_and_shape_in_training_and_evaluation() -> None:
    network = tiny()
    shapes = []
    for mode in (True, False):
        logits = network.train(mode)(random_images(2, 64, 96), sentences(3, 5))
        assert isinstance(logits, Tensor)
        shapes.append((logits.shape, logits.dtype))
    assert shapes == [((2, 1, 16, 24), torch.float32)] * 2


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (64, 64), (32, 96), (96, 32), (160, 64), (96, 128)]
)
def test_any_multiple_of_32_goes_forward_and_backward(height: int, width: int) -> None:
    network = tiny().train()
    logits = network(random_images(3, height, width), sentences(2, 4, 6))
    assert logits.shape == (3, 1, height // 4, width // 4)
    torch.autograd.backward(logits.square().mean())
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert len(gradients) == len(list(network.parameters()))


@pytest.mark.parametrize(("height", "width"), [(64, 65), (48, 64), (31, 32), (416, 400)])
def test_a_side_that_is_not_a_multiple_of_32_raises_value_error(
    model: CRIS, height: int, width: int
) -> None:
    with pytest.raises(ValueError, match=rf"multiples of 32, got \({height}, {width}\)"):
        model(torch.zeros(1, 3, height, width), sentences(3))


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_gradients_reach_every_parameter_in_every_ablation(
    contrastive: bool, layers: int, kernel_size: int
) -> None:
    network = tiny(contrastive=contrastive, decoder_layers=layers, kernel_size=kernel_size).train()
    masks = (torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    logits = network(random_images(4), sentences(2, 4, 6, 8))
    torch.autograd.backward(text_to_pixel_contrastive_loss(logits, masks))
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias of the keys shifts all inputs of a softmax alike: its gradient is zero.
        if name != "image_encoder.pool.k_proj.bias":
            assert parameter.grad.abs().max() > 0, name


def test_a_sentence_longer_than_the_context_raises_value_error(model: CRIS) -> None:
    message = f"{CONTEXT + 1} tokens exceed the text encoder's context of {CONTEXT}"
    with torch.no_grad():
        model(random_images(1), sentences(3, padded_to=CONTEXT))
        with pytest.raises(ValueError, match=message):
            model(random_images(1), sentences(3, padded_to=CONTEXT + 1))


def test_frozen_parameters_are_not_counted() -> None:
    layer = nn.Linear(3, 2)
    assert count_parameters(layer) == 8
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == 6
