"""Building networks: sizes, numbers of parameters, activations, and sizes that do not fit."""

import math
import socket
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import nn

from crislit.errors import InputError
from crislit.models.build import build_clip, build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import count_parameters
from tests.models.networks import CLIP, random_images, sentences, tiny

# -- Numbers of parameters

NO_CON_NO_DEC = {"RN50": 131_857_249, "RN101": 147_439_969}
# One decoder layer: two attentions, five norms, the norm over the hidden width, two linear layers.
LAYER = sum(
    [
        2 * (4 * 512 * 512 + 4 * 512),
        5 * 2 * 512,
        2 * 2048,
        512 * 2048 + 2048,
        2048 * 512 + 512,
    ]
)
FINAL_NORM = 2 * 512
# The text projector replaces one learned convolution of 256 channels, 3 x 3.
CON = {"RN50": 1024 * (256 * 9 + 1), "RN101": 512 * (256 * 9 + 1)}
# Rows of table 1: contrastive, layers, and millions of parameters as printed for RN50.
ROWS = {
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
def test_every_row_of_table_1_has_the_printed_number_of_parameters(clip: str, row: str) -> None:
    contrastive, layers, printed = ROWS[row]
    config = CRISConfig(clip=f"{clip}-quickgelu", contrastive=contrastive, decoder_layers=layers)
    with torch.device("meta"):  # shapes without memory
        model = build_cris(config)
    decoder = layers * LAYER + bool(layers) * FINAL_NORM
    expected = NO_CON_NO_DEC[clip] + contrastive * CON[clip] + decoder
    assert count_parameters(model) == expected
    if clip == "RN50":
        assert f"{expected / 1e6:.2f}" == printed


@pytest.mark.parametrize(("clip", "released"), [("RN50", 146_849_122), ("RN101", 161_251_682)])
def test_the_released_networks_have_one_more_parameter_that_is_unused(
    clip: str, released: int
) -> None:
    assert NO_CON_NO_DEC[clip] + CON[clip] + 3 * LAYER + FINAL_NORM == released - 1


# -- Sizes


def test_zero_decoder_layers_build_no_decoder() -> None:
    network = tiny(decoder_layers=0)
    assert network.decoder is None
    assert not [name for name, _ in network.named_parameters() if name.startswith("decoder")]
    tiny(decoder_layers=0, neck=(32, 48, 128))  # the width may differ from the text encoder's


def test_the_config_of_a_network_builds_the_same_network() -> None:
    network = tiny(contrastive=False, kernel_size=1, decoder_layers=1)
    copy = build_cris(CRISConfig.from_dict(network.config.to_dict()))
    copy.load_state_dict(network.state_dict())
    images, tokens = random_images(2), sentences(3, 5)
    with torch.no_grad():
        assert torch.equal(copy.eval()(images, tokens), network.eval()(images, tokens))


BAD_SIZES = {
    "decoder_layers": (-1, "abc", 1.5, None),
    "kernel_size": (2, 4, 0, -1, -3, "abc", 2.5),
    "decoder_heads": (3, 0, -4, "abc"),
    "decoder_ffn": (-1, "abc"),
    "decoder_dropout": (1.5, -0.1, "abc"),
    "neck": ((32, 128, 128), (32, 48, 128), (32, 64), (32, 64, 128, 8), (32,), (32, 64, "abc"), 5),
    "clip": ("RN-nonsense", "ViT-B-32", "convnext_base", "RN50x4", {"embed_dim": 128}, None),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD_SIZES.items() for value in values],
    ids=str,
)
def test_bad_sizes_raise_input_error(name: str, value: Any) -> None:
    with torch.device("meta"), pytest.raises(InputError):
        tiny(**{name: value})


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("ViT-B-32", "must be one of CLIP's ResNets, and 'ViT-B-32' is not"),
        ("RN-nonsense", "open_clip has no model 'RN-nonsense'"),
    ],
)
def test_an_unsuitable_clip_is_rejected_by_name(clip: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(clip=clip)


def test_a_decoder_that_does_not_fit_the_words_is_rejected_with_both_widths() -> None:
    with pytest.raises(InputError, match="decoder's width 48 must be the text encoder's 64"):
        tiny(neck=(32, 48, 128))


TIMM = {"timm_model_name": "hf-hub:someone/model", "timm_model_pretrained": True}


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("hf-hub:someone/model", "open_clip has no model"),
        ("local-dir:somewhere", "open_clip has no model"),
        ({"vision_cfg": TIMM}, "vision_cfg has unknown keys timm_model"),
        ({"text_cfg": {"hf_model_name": "someone/model"}}, "text_cfg has unknown keys hf_model"),
    ],
    ids=str,
)
def test_sizes_never_download_a_model(
    clip: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("tried to connect"))
    if isinstance(clip, dict):
        vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}
        clip = {
            "embed_dim": 32,
            "vision_cfg": vision | clip.get("vision_cfg", {}),
            "text_cfg": {"layers": 1} | clip.get("text_cfg", {}),
        }
    with pytest.raises(InputError, match=message):
        build_cris(CRISConfig(clip=clip))


# -- QuickGELU


@pytest.mark.parametrize("keys", [{}, {"quick_gelu": False}], ids=["no key", "GELU"])
def test_quick_gelu_is_used_whatever_the_mapping_contains(keys: dict[str, Any]) -> None:
    assert_quick_gelu(build_clip(CLIP | keys), layers=2)


def test_quick_gelu_is_used_by_a_model_that_is_defined_with_gelu() -> None:
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
