"""The network's invariants, on a tiny one where sizes do not matter and without memory where they do."""

import math
import socket
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from crislit.errors import InputError
from crislit.losses import text_to_pixel_contrastive_loss
from crislit.models.cris import CRIS, build_clip, build_cris, count_parameters
from crislit.models.decoder import Decoder, sine_positions, sine_positions_2d
from crislit.models.image_encoder import SpatialAttentionPool
from crislit.models.neck import coordinates
from crislit.models.projector import ImageProjector, PixelClassifier, TextProjector
from crislit.models.released import from_released, rename_released
from crislit.models.text_encoder import end_of_sentence, padding_mask

CONTEXT, SOS, EOS = 24, 98, 99
CLIP: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": EOS + 1, "width": 64, "heads": 1, "layers": 2},
}
SIZES: dict[str, Any] = {"clip": CLIP, "neck": (32, 64, 128), "decoder_layers": 2, "decoder_heads": 4, "decoder_ffn": 96}
WIDTH, EMBED = 64, 128


def tiny(**changes: Any) -> CRIS:
    torch.manual_seed(0)
    return build_cris(**SIZES | changes)


def sentences(*lengths: int, padded_to: int = 12) -> Tensor:
    """Random sentences of so many words, bracketed and padded with 0."""
    generator = torch.Generator().manual_seed(len(lengths))
    rows = []
    for length in lengths:
        words = torch.randint(1, SOS, (length,), generator=generator)
        rows.append(F.pad(torch.cat([torch.tensor([SOS]), words, torch.tensor([EOS])]), (0, padded_to - length - 2)))
    return torch.stack(rows)


def pictures(number: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(1))


def bytes_of(images: Tensor) -> Tensor:
    """Turn pictures of numbers around 0 into some of bytes."""
    return (64 * images + 128).clamp(0, 255).to(torch.uint8)


def experienced(model: CRIS) -> CRIS:
    """Let the BatchNorms see pictures and sentences, and return the network in evaluation."""
    with torch.no_grad():
        for _ in range(20):
            model.train()(pictures(4), sentences(1, 3, 5, 6))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> CRIS:
    return experienced(tiny())


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """Agree to 1e-5 of the largest value."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# -- The table of parameters


NO_CON_NO_DEC = {"RN50": 131_857_249, "RN101": 147_439_969}
# One decoder layer: two attentions, five norms, the norm over the hidden width, two linear maps.
LAYER = 2 * (4 * 512 * 512 + 4 * 512) + 5 * 2 * 512 + 2 * 2048 + (512 * 2048 + 2048) + (2048 * 512 + 512)
FINAL_NORM = 2 * 512
# The text projector in the place of the one learned convolution of 256 channels, 3 x 3.
CON = {"RN50": 1024 * (256 * 9 + 1), "RN101": 512 * (256 * 9 + 1)}
ROWS = {  # of table 1: Con., layers, millions as the paper prints them for RN50
    "none": (False, 0, "131.86"),
    "Con.": (True, 0, "134.22"),
    "Dec. n=1": (False, 1, "136.07"),
    "Con.+Dec. n=1": (True, 1, "138.43"),
    "Con.+Dec. n=2": (True, 2, "142.64"),
    "Con.+Dec. n=3": (True, 3, "146.85"),
    "Con.+Dec. n=4": (True, 4, "151.06"),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("clip", ["RN50", "RN101"])
def test_every_row_of_table_1_has_the_parameters_that_it_prints(clip: str, row: str) -> None:
    contrastive, layers, printed = ROWS[row]
    with torch.device("meta"):  # shapes without memory
        model = build_cris(clip=f"{clip}-quickgelu", contrastive=contrastive, decoder_layers=layers)
    expected = NO_CON_NO_DEC[clip] + contrastive * CON[clip] + layers * LAYER + bool(layers) * FINAL_NORM
    assert count_parameters(model) == expected
    if clip == "RN50":
        assert f"{expected / 1e6:.2f}" == printed


def test_the_released_networks_have_one_unused_parameter_more() -> None:
    for clip, released in (("RN50", 146_849_122), ("RN101", 161_251_682)):
        assert NO_CON_NO_DEC[clip] + CON[clip] + 3 * LAYER + FINAL_NORM == released - 1


def test_frozen_parameters_are_not_counted() -> None:
    layer = nn.Linear(3, 2)
    assert count_parameters(layer) == 8
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == 6


# -- The whole network


@pytest.mark.parametrize("length", [8, 12, 17, 22])
def test_logits_do_not_depend_on_how_far_a_sentence_is_padded(model: CRIS, length: int) -> None:
    with torch.no_grad():
        expected = model(pictures(3), sentences(1, 4, 6, padded_to=8))
        assert_close(model(pictures(3), sentences(1, 4, 6, padded_to=length)), expected)


def test_a_batch_gives_what_its_samples_give_alone(model: CRIS) -> None:
    images, tokens = pictures(4), sentences(1, 3, 6, 10)
    with torch.no_grad():
        together = model(images, tokens)
        alone = torch.cat([model(images[i, None], tokens[i, None]) for i in range(4)])
    assert_close(together, alone)
    assert not torch.allclose(together[0], together[1], atol=1e-2 * together.abs().max().item()), "samples do differ"


def test_sentences_that_share_a_picture_get_what_each_would_get_alone(model: CRIS) -> None:
    images, tokens = pictures(2), sentences(1, 3, 4, 5, 6, 8)
    with torch.no_grad():
        shared = model(images, tokens)
        alone = torch.cat([model(images[i // 3, None], tokens[i, None]) for i in range(6)])
        owners = torch.tensor([1, 0, 1, 1, 1, 0])
        owned = model(images, tokens, owners)
        owned_alone = torch.cat([model(images[owner, None], tokens[i, None]) for i, owner in enumerate(owners)])
    assert_close(shared, alone)
    assert_close(owned, owned_alone)


def test_sentences_that_do_not_divide_over_the_pictures_are_a_value_error(model: CRIS) -> None:
    with pytest.raises(ValueError, match="3 sentences do not divide over 2 images"):
        model(pictures(2), sentences(1, 3, 4))
    with pytest.raises(ValueError, match="2 sentences do not divide over 4 images"):
        model(pictures(4), sentences(1, 3))


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize("layers", [0, 2])
def test_the_sentence_has_a_say(contrastive: bool, layers: int) -> None:
    network = experienced(tiny(contrastive=contrastive, decoder_layers=layers))
    image = pictures(1).expand(2, -1, -1, -1)
    with torch.no_grad():
        first, second = network(image, sentences(3, 6))
    assert (first - second).norm() > 1e-3 * first.norm()


def test_logits_have_the_same_type_and_shape_in_training_and_evaluation() -> None:
    network = tiny()
    shapes = []
    for mode in (True, False):
        logits = network.train(mode)(pictures(2, 64, 96), sentences(3, 5))
        assert isinstance(logits, Tensor)
        shapes.append((logits.shape, logits.dtype))
    assert shapes == [((2, 1, 16, 24), torch.float32)] * 2


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (32, 96), (96, 32), (160, 64), (96, 128)])
def test_any_multiple_of_32_goes_forward_and_backward(height: int, width: int) -> None:
    network = tiny().train()
    logits = network(pictures(3, height, width), sentences(2, 4, 6))
    assert logits.shape == (3, 1, height // 4, width // 4)
    torch.autograd.backward(logits.square().mean())
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert len(gradients) == len(list(network.parameters()))


@pytest.mark.parametrize(("height", "width"), [(64, 65), (48, 64), (31, 32), (416, 400)])
def test_a_side_that_is_no_multiple_of_32_is_a_value_error(model: CRIS, height: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"multiples of 32, got \({height}, {width}\)"):
        model(torch.zeros(1, 3, height, width), sentences(3))


def test_a_sentence_longer_than_the_context_is_a_value_error(model: CRIS) -> None:
    with torch.no_grad():
        model(pictures(1), sentences(3, padded_to=CONTEXT))
        with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens do not fit the text encoder's context of {CONTEXT}"):
            model(pictures(1), sentences(3, padded_to=CONTEXT + 1))


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_gradients_reach_every_parameter_in_every_ablation(contrastive: bool, layers: int, kernel_size: int) -> None:
    network = tiny(contrastive=contrastive, decoder_layers=layers, kernel_size=kernel_size).train()
    masks = (torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    torch.autograd.backward(text_to_pixel_contrastive_loss(network(pictures(4), sentences(2, 4, 6, 8)), masks))
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name != "image_encoder.pool.k_proj.bias":  # a softmax does not see what it adds to all its inputs
            assert parameter.grad.abs().max() > 0, name


def test_no_decoder_layer_means_no_decoder() -> None:
    network = tiny(decoder_layers=0)
    assert network.decoder is None
    assert not [name for name, _ in network.named_parameters() if name.startswith("decoder")]
    tiny(decoder_layers=0, neck=(32, 48, 128))  # then the width need not be the text encoder's


def test_its_own_settings_build_the_same_network_again() -> None:
    network = tiny(contrastive=False, kernel_size=1, decoder_layers=1)
    again = build_cris(**network.settings)
    again.load_state_dict(network.state_dict())
    images, tokens = pictures(2), sentences(3, 5)
    with torch.no_grad():
        assert torch.equal(again.eval()(images, tokens), network.eval()(images, tokens))


BAD_SETTINGS = {
    "decoder_layers": (-1, "abc", 1.5, None),
    "kernel_size": (2, 4, 0, -1, -3, "abc", 2.5),
    "decoder_heads": (3, 0, -4, "abc"),
    "decoder_ffn": (-1, "abc"),
    "decoder_dropout": (1.5, -0.1, "abc"),
    "neck": ((32, 128, 128), (32, 48, 128), (32, 64), (32, 64, 128, 8), (32,), (32, 64, "abc"), 5),
    "clip": ("RN-nonsense", "ViT-B-32", "convnext_base", "RN50x4", {"embed_dim": 128}, None),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_SETTINGS.items() for value in values], ids=str
)
def test_settings_that_make_no_network_are_an_input_error(name: str, value: Any) -> None:
    with torch.device("meta"), pytest.raises(InputError):
        tiny(**{name: value})


def test_a_vision_transformer_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="must be one of CLIP's ResNets, and 'ViT-B-32' is not"):
        tiny(clip="ViT-B-32")
    with pytest.raises(InputError, match="open_clip knows no model 'RN-nonsense'"):
        tiny(clip="RN-nonsense")


def test_a_decoder_that_does_not_fit_the_words_is_refused_with_both_widths() -> None:
    with pytest.raises(InputError, match="decoder's width 48 must be the text encoder's 64"):
        tiny(neck=(32, 48, 128))


# -- The image encoder


def test_the_pyramid_has_the_papers_shapes(model: CRIS) -> None:
    with torch.no_grad():
        c3, c4, c5 = model.image_encoder(pictures(2, 64, 96))
    w = 16
    assert c3.shape == (2, 8 * w, 8, 12)
    assert c4.shape == (2, 16 * w, 4, 6)
    assert c5.shape == (2, EMBED, 2, 3)
    assert (c5 >= 0).all()


def test_the_attention_pool_at_its_native_size_takes_its_positions_as_they_are(model: CRIS) -> None:
    pool = model.image_encoder.pool
    assert torch.equal(pool.positions(2, 2), pool.positional_embedding[1:])


def test_the_attention_pool_resizes_its_positions_row_by_row() -> None:
    pool = native_pool(3)
    rows = torch.tensor([5.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0])  # the class, then a grid that grows downwards
    pool.positional_embedding = nn.Parameter(rows[:, None].expand(-1, 512).clone())
    positions = pool.positions(3, 5).reshape(3, 5, 512)
    torch.testing.assert_close(positions, torch.tensor([1.0, 2.0, 3.0])[:, None, None].expand(3, 5, 512))
    larger = pool.positions(7, 4).reshape(7, 4, 512)[..., 0]
    assert (larger[1:] > larger[:-1]).all(), "still grows downwards"
    torch.testing.assert_close(larger, larger[:, :1].expand(7, 4))


def test_the_class_position_plays_no_part() -> None:
    pool = native_pool(2).eval()
    stage4 = torch.randn(1, 512, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = pool(stage4)
        pool.positional_embedding[0] = 1000
        assert torch.equal(pool(stage4), before)
        pool.positional_embedding[1] += 1
        assert not torch.equal(pool(stage4), before)


def native_pool(side: int) -> SpatialAttentionPool:
    torch.manual_seed(0)
    clip = build_clip(CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"image_size": 32 * side}})
    return SpatialAttentionPool(clip.visual.attnpool)


def test_the_pools_heads_have_64_channels(model: CRIS) -> None:
    assert model.image_encoder.pool.heads == 32 * 16 // 64


# -- The text encoder


def test_the_end_of_a_sentence_is_its_largest_id_and_what_follows_is_padding() -> None:
    tokens = torch.tensor([[98, 5, 99, 0, 0], [98, 5, 6, 7, 99], [98, 99, 0, 0, 0]])
    assert end_of_sentence(tokens).tolist() == [2, 4, 1]
    assert padding_mask(tokens).int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]


def test_a_word_changes_the_features_of_itself_and_later_words_only(model: CRIS) -> None:
    tokens = sentences(6)
    changed = tokens.clone()
    changed[0, 4] = tokens[0, 4] % 90 + 1
    with torch.no_grad():
        (words, sentence), (words_then, sentence_then) = model.text_encoder(tokens), model.text_encoder(changed)
    torch.testing.assert_close(words[0, :4], words_then[0, :4])
    assert ((words - words_then)[0, 4:8].abs().amax(dim=1) > 1e-3).all()
    assert not torch.allclose(sentence, sentence_then)


def test_the_sentences_feature_is_the_projected_row_of_its_end(model: CRIS) -> None:
    tokens = sentences(2, 6)
    with torch.no_grad():
        words, sentence = model.text_encoder(tokens)
    assert words.shape == (2, 12, WIDTH)
    torch.testing.assert_close(sentence, torch.stack([words[0, 3], words[1, 7]]) @ model.text_encoder.text_projection)


@pytest.mark.parametrize("said", [{}, {"quick_gelu": False}], ids=["nothing said", "GELU said"])
def test_quick_gelu_is_used_whatever_the_mapping_says(said: dict[str, Any]) -> None:
    assert_quick_gelu(build_clip(CLIP | said), layers=2)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("hf-hub:someone/model", "open_clip knows no model"),
        ("local-dir:somewhere", "open_clip knows no model"),
        (
            {"vision_cfg": {"timm_model_name": "hf-hub:someone/model", "timm_model_pretrained": True}},
            "vision_cfg has timm_model",
        ),
        ({"text_cfg": {"hf_model_name": "someone/model"}}, "text_cfg has hf_model_name"),
    ],
    ids=str,
)
def test_no_description_of_a_network_fetches_another_one(clip: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    if isinstance(clip, dict):
        known = {
            "embed_dim": 32,
            "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64},
            "text_cfg": {"layers": 1},
        }
        clip = {name: {**part, **clip.get(name, {})} if isinstance(part, dict) else part for name, part in known.items()}
    with pytest.raises(InputError, match=message):
        build_cris(clip=clip)


def test_quick_gelu_is_used_by_a_model_whose_name_promises_gelu() -> None:
    assert not open_clip.get_model_config("RN50").get("quick_gelu")
    with torch.device("meta"):
        clip = build_clip("RN50")
    assert_quick_gelu(clip, layers=12)


def assert_quick_gelu(clip: nn.Module, layers: int) -> None:
    activations = [module for module in clip.modules() if isinstance(module, (nn.GELU, QuickGELU))]
    assert [type(module) for module in activations] == [QuickGELU] * layers
    x = torch.tensor([-2.0, 0.5, 3.0])
    expected = [value / (1 + math.exp(-1.702 * value)) for value in x.tolist()]
    assert activations[0](x).tolist() == pytest.approx(expected, rel=1e-5)


# -- The neck


def test_coordinates_run_from_minus_one_to_one_x_first() -> None:
    found = coordinates(torch.zeros(2, 5, 2, 3))
    assert found.shape == (2, 2, 2, 3)
    assert found[1, 0].tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert found[1, 1].tolist() == [[-1, -1, -1], [1, 1, 1]]


def test_the_necks_map_is_a_sixteenth_of_the_picture(model: CRIS) -> None:
    images, tokens = pictures(2, 64, 96), sentences(3, 5)
    with torch.no_grad():
        fused = model.neck(*model.image_encoder(images), model.text_encoder(tokens)[1])
    assert fused.shape == (2, WIDTH, 4, 6)


# -- The decoder


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(width=16, layers=2, heads=2, ffn=24).eval()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_padded_words_do_not_influence_the_decoder(decoder: Decoder, generator: torch.Generator) -> None:
    fused, words = torch.randn(2, 16, 3, 4, generator=generator), torch.randn(2, 6, 16, generator=generator)
    padding = torch.tensor([[False] * 4 + [True] * 2, [False] * 2 + [True] * 4])
    noise = torch.where(padding[..., None], 100 * torch.randn(2, 6, 16, generator=generator), words)
    with torch.no_grad():
        expected = decoder(fused, words, padding)
        torch.testing.assert_close(decoder(fused, noise, padding), expected)
        assert not torch.allclose(decoder(fused, noise, torch.zeros_like(padding)), expected, atol=1e-2), "the mask does it"


def test_every_word_that_is_no_padding_influences_the_decoder(decoder: Decoder, generator: torch.Generator) -> None:
    fused, words = torch.randn(1, 16, 3, 4, generator=generator), torch.randn(1, 4, 16, generator=generator)
    padding = torch.tensor([[False, False, False, True]])
    with torch.no_grad():
        before = decoder(fused, words, padding)
        for position in range(3):
            changed = words.clone()
            changed[0, position] += torch.randn(16, generator=generator)
            assert (decoder(fused, changed, padding) - before).abs().max() > 1e-3, position


def test_the_order_of_words_matters_to_the_decoder(decoder: Decoder, generator: torch.Generator) -> None:
    fused, words = torch.randn(1, 16, 3, 4, generator=generator), torch.randn(1, 4, 16, generator=generator)
    padding = torch.zeros(1, 4, dtype=torch.bool)
    with torch.no_grad():
        assert (decoder(fused, words.flip(1), padding) - decoder(fused, words, padding)).abs().max() > 1e-3


@pytest.mark.parametrize("silenced", ["cross_norm_out", "self_norm_out"])
def test_both_attentions_know_where_cells_are(silenced: str, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    decoder = Decoder(width=16, layers=1, heads=2, ffn=24).eval()
    norm: Any = getattr(decoder.layers[0], silenced)
    nn.init.zeros_(norm.weight)  # of the two attentions, only the other one is heard
    fused, words = torch.randn(1, 16, 3, 4, generator=generator), torch.randn(1, 4, 16, generator=generator)
    padding = torch.zeros(1, 4, dtype=torch.bool)
    with torch.no_grad():
        mirrored = decoder(fused.flip(3), words, padding).flip(3)
        assert (mirrored - decoder(fused, words, padding)).abs().max() > 1e-3


def test_dropout_acts_in_training_only_and_at_its_four_places() -> None:
    torch.manual_seed(0)
    decoder = Decoder(width=16, layers=1, heads=2, ffn=24, dropout=0.25)
    inputs = torch.randn(1, 16, 2, 2), torch.randn(1, 3, 16), torch.zeros(1, 3, dtype=torch.bool)
    layer: Any = decoder.layers[0]
    rates = [layer.self_attention.dropout, layer.cross_attention.dropout]  # on the attention weights
    rates += [module.p for module in layer.modules() if isinstance(module, nn.Dropout)]  # in and after the feed-forward
    assert rates == [0.25] * 4
    assert not torch.equal(decoder.train()(*inputs), decoder(*inputs))
    assert torch.equal(decoder.eval()(*inputs), decoder(*inputs))


def test_sine_positions_are_the_ones_computed_by_hand() -> None:
    # Width 4: frequencies 1 and 10000^(-2/4) = 1/100, sine and cosine interleaved.
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in (0, 1, 2, 70)]
    found = sine_positions(torch.tensor([0, 1, 2, 70]), 4)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found[0].tolist() == [0, 1, 0, 1]


def test_the_first_half_of_2d_positions_encodes_x_and_the_second_y() -> None:
    h, w, width = 3, 5, 8
    grid = sine_positions_2d(h, w, width).reshape(h, w, width)
    for y in range(h):
        for x in range(w):
            expected = [f(position / scale) for position in (x, y) for scale in (1, 100) for f in (math.sin, math.cos)]
            assert grid[y, x].tolist() == pytest.approx(expected, abs=1e-6), (y, x)


# -- The projectors


def test_a_kernel_of_one_is_equation_9s_dot_product_and_a_bias() -> None:
    network = experienced(tiny(kernel_size=1))
    images, tokens = pictures(2), sentences(3, 5)
    with torch.no_grad():
        maps, (words, sentence) = network.image_encoder(images), network.text_encoder(tokens)
        assert network.decoder is not None
        z_v = network.image_projector(network.decoder(network.neck(*maps, sentence), words, padding_mask(tokens)))
        assert isinstance(network.head, TextProjector)
        z_t = sentence @ network.head.linear.weight.T + network.head.linear.bias
        assert z_v.shape == (2, WIDTH // 2, 16, 16)
        assert z_t.shape == (2, WIDTH // 2 + 1)
        expected = torch.empty(2, 1, 16, 16)
        for sample in range(2):
            for y in range(16):
                for x in range(16):
                    expected[sample, 0, y, x] = z_t[sample, :-1] @ z_v[sample, :, y, x] + z_t[sample, -1]
        assert_close(network(images, tokens), expected)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_each_sample_meets_its_own_kernel_read_as_channel_row_column_then_bias(k: int, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    head = TextProjector(embed=7, channels=3, kernel_size=k)
    pixels, sentence = torch.randn(4, 3, 6, 8, generator=generator), torch.randn(4, 7, generator=generator)
    with torch.no_grad():
        logits, z_t = head(pixels, sentence), head.linear(sentence)
    assert logits.shape == (4, 1, 6, 8)
    for sample in range(4):
        kernel, bias = z_t[sample, :-1].reshape(1, 3, k, k), z_t[sample, -1:]
        torch.testing.assert_close(logits[sample, None], F.conv2d(pixels[sample, None], kernel, bias, padding=k // 2))


def test_a_kernel_with_a_single_one_moves_its_channel_and_nothing_comes_from_outside() -> None:
    head = TextProjector(embed=1, channels=2, kernel_size=3)
    z_t = torch.zeros(2 * 9 + 1)
    z_t[9 + 0 * 3 + 1] = 1  # channel 1, row 0, column 1: what lies above
    z_t[-1] = 10
    with torch.no_grad():
        head.linear.weight.copy_(z_t[:, None])
        head.linear.bias.zero_()
        pixels = torch.arange(12.0).reshape(1, 2, 3, 2)
        logits = head(pixels, torch.ones(1, 1))
    assert logits[0, 0].tolist() == [[10, 10], [16, 17], [18, 19]]


def test_the_plain_classifier_does_not_look_at_the_sentence(generator: torch.Generator) -> None:
    head = PixelClassifier(channels=4, kernel_size=3)
    pixels = torch.randn(2, 4, 6, 8, generator=generator)
    logits = head(pixels, torch.zeros(2, 7))
    assert logits.shape == (2, 1, 6, 8)
    assert torch.equal(logits, head(pixels, torch.randn(2, 7, generator=generator)))


def test_the_image_projector_quadruples_the_map_and_halves_its_channels() -> None:
    assert ImageProjector(8).eval()(torch.zeros(2, 8, 3, 5)).shape == (2, 4, 12, 20)


# -- Released names


def test_clips_unused_logit_scale_is_kept_and_not_trained() -> None:
    assert list(from_released({"backbone.logit_scale": torch.tensor(1.0)})) == ["text_encoder.logit_scale"]
    model = tiny()
    assert "text_encoder.logit_scale" in model.state_dict()
    assert "text_encoder.logit_scale" not in dict(model.named_parameters())


@pytest.mark.parametrize("name", ["model.weight", "backbonevisual.conv1.weight", "", "proj.other.weight"])
def test_a_name_of_no_released_part_is_a_key_error(name: str) -> None:
    with pytest.raises(KeyError, match="no parameter of the released CRIS network"):
        rename_released(name)


def test_names_within_decoder_layers_are_told_apart() -> None:
    theirs = ["norm1", "norm2", "norm3", "self_attn", "self_attn_norm", "multihead_attn", "cross_attn_norm", "ffn.0"]
    ours = [
        "self_norm_in",
        "cross_norm_in",
        "ffn_norm_in",
        "self_attention",
        "self_norm_out",
        "cross_attention",
        "cross_norm_out",
        "ffn.0",
    ]
    renamed = [rename_released(f"decoder.layers.1.{name}.weight") for name in theirs]
    assert renamed == [f"decoder.layers.1.{name}.weight" for name in ours]
    assert rename_released("decoder.norm.weight") == "decoder.norm.weight"
