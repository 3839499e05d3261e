"""Checkpoints of the authors' code: read in every form, all sizes off their weights, and refused by name where they are not."""

import json
import logging
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import crislit
from crislit.checkpoints.checkpoint import checkpoint_metadata
from crislit.checkpoints.released import (
    LOGIT_SCALE,
    from_released,
    infer_config,
    load_released,
    parse_released,
    rename_ours,
    rename_released,
    to_released,
)
from crislit.errors import InputError
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS
from crislit.training.losses import text_to_pixel_contrastive_loss

# The same examples on every run, and no complaint about a busy machine.
relaxed = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)

State = dict[str, Tensor]

# All sizes differ, so that none can be taken for another.
SIZES: dict[str, Any] = {
    "clip": {
        "embed_dim": 20,
        "vision_cfg": {"layers": [1, 2, 1, 1], "width": 4, "image_size": 96},
        "text_cfg": {"context_length": 14, "vocab_size": 50, "width": 32, "heads": 1, "layers": 2},
    },
    "neck": [12, 32, 24],
    "decoder_layers": 3,
    "decoder_heads": 4,
    "decoder_ffn": 40,
    "decoder_dropout": 0.1,
    "contrastive": True,
    "kernel_size": 3,
    "max_tokens": 9,
}
HEADS, WORDS, CONTEXT = 4, 9, 14
NAMES = re.compile(r"\b(?:module|backbone|neck|decoder|proj|extra)\.[\w.]*\w")
"""Released names in a message."""


def filled(model: CRIS, seed: int = 0) -> CRIS:
    """Give every parameter and buffer random values, so that none is what building alone makes it."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            value.copy_(torch.randint(1, 1000, value.shape, generator=generator))
        elif name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        else:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model.eval()


def logits(model: CRIS, words: int = WORDS) -> Tensor:
    """Return a network's logits on random input: three pictures of 64 x 96, and sentences of all its words."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.text_encoder.token_embedding.num_embeddings
    images = torch.randn(3, 3, 64, 96, generator=generator)
    tokens = torch.randint(1, vocabulary - 1, (3, words), generator=generator)
    tokens[:, 2] = vocabulary - 1  # [EOS]
    tokens[1, 3:] = 0
    with torch.no_grad():
        result: Tensor = model(images, tokens)
    return result


def assert_same_network(ours: CRIS, expected: CRIS) -> None:
    """Agree in settings, in every tensor, and in what is computed."""
    assert ours.config == expected.config
    assert_same_tensors(ours.state_dict(), expected.state_dict())
    words = min(ours.max_tokens, 9)
    assert torch.equal(logits(ours, words), logits(expected, words))


def assert_same_tensors(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


def named(message: str) -> set[str]:
    return set(NAMES.findall(message))


def refusal(state: Mapping[str, Any], heads: int = HEADS) -> str:
    """Return why a released state dict is refused."""
    with pytest.raises(InputError) as caught:
        infer_config(state, "weights.pth", WORDS, heads)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def network() -> CRIS:
    return filled(build_cris(CRISConfig(**SIZES)))


@pytest.fixture(scope="module")
def weights(network: CRIS) -> State:
    """The network's weights under their released names."""
    return to_released(network.state_dict())


# -- The golden checkpoint


@pytest.fixture(scope="module")
def facts(golden: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((golden / "tiny_a.json").read_text())
    return facts


@pytest.fixture(scope="module")
def activations(golden: Path) -> State:
    return load_file(golden / "tiny_a.activations.safetensors")


def test_the_golden_checkpoint_gives_the_released_networks_logits(
    golden_checkpoint: Path, activations: State
) -> None:
    model = load_released(golden_checkpoint, max_words=12, decoder_heads=4)
    with torch.no_grad():
        ours = model(activations["in.image"], activations["in.tokens"])
    expected = activations["out.logits"]
    assert ours.shape == expected.shape
    assert (ours - expected).norm() / expected.norm() < 1e-5


def test_the_golden_checkpoints_sizes_are_those_of_its_record(
    golden_checkpoint: Path, facts: dict[str, Any]
) -> None:
    sizes = facts["config"]
    model = load_released(str(golden_checkpoint), sizes["word_len"], sizes["nhead"])
    assert model.config.clip == {
        "embed_dim": sizes["embed"],
        "vision_cfg": {
            "layers": sizes["layers"],
            "width": sizes["width"],
            "image_size": sizes["res"],
        },
        "text_cfg": {
            "context_length": sizes["ctx"],
            "vocab_size": sizes["vocab"],
            "width": sizes["tw"],
            "heads": 1,
            "layers": sizes["tl"],
        },
    }
    config = model.config
    assert config.neck == sizes["fpn_out"]
    assert (config.decoder_layers, config.decoder_heads) == (sizes["n"], sizes["nhead"])
    assert (config.decoder_ffn, config.kernel_size) == (sizes["ffn"], 3)
    assert config.contrastive
    assert model.max_tokens == sizes["word_len"]


def test_the_golden_checkpoint_can_train_on_with_the_released_loss(
    golden_checkpoint: Path, facts: dict[str, Any], activations: State
) -> None:
    model = load_released(golden_checkpoint, 12, 4, decoder_dropout=0.0).train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    loss = text_to_pixel_contrastive_loss(
        model(activations["in.image"], activations["in.tokens"]), activations["in.mask"]
    )
    assert loss.item() == pytest.approx(facts["losses"][0], rel=1e-4)
    torch.autograd.backward(loss)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_our_tensors_are_the_golden_ones_bit_for_bit(golden_checkpoint: Path) -> None:
    model = load_released(golden_checkpoint, 12, 4)
    assert_same_tensors(to_released(model.state_dict()), load_file(golden_checkpoint))


# -- Forms of files


def with_module(state: Mapping[str, Tensor]) -> State:
    return {f"module.{name}": value for name, value in state.items()}


def training_checkpoint(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the authors' program saves: the weights among epoch, scores, optimizer and scheduler."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([{"params": [parameter], "initial_lr": 1e-4}], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[35], gamma=0.1)
    torch.autograd.backward(parameter.sum())
    optimizer.step()
    scheduler.step()
    assert optimizer.state_dict()["state"]
    return {
        "epoch": 41,
        "cur_iou": 0.68,
        "best_iou": torch.tensor(0.69),
        "prec": {"Pr@50": 0.79, "Pr@90": 0.14},
        "state_dict": with_module(state),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }


def as_pytorch_keeps_it(state: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    """Return a state dict with the versions that ``nn.Module.state_dict`` attaches to it."""
    kept = OrderedDict(state)
    kept._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return kept


FORMS: dict[str, tuple[str, Callable[[State], Any]]] = {
    "safetensors": (".safetensors", dict),
    "safetensors, module.": (".safetensors", with_module),
    "bare": (".pth", dict),
    "bare, module.": (".pth", with_module),
    "bare, .pt": (".pt", as_pytorch_keeps_it),
    "state_dict": (".pth", lambda state: {"state_dict": as_pytorch_keeps_it(state)}),
    "state_dict, module., .pt": (".pt", lambda state: {"state_dict": with_module(state)}),
    "training": (".pth", training_checkpoint),
    "parameters": (
        ".pth",
        lambda state: {k: nn.Parameter(v, v.is_floating_point()) for k, v in state.items()},
    ),
    "another order": (".pth", lambda state: dict(reversed(state.items()))),
}


def write(state: State, form: str, folder: Path, zipped: bool = True) -> Path:
    """Write released weights in one of the forms that they are found in."""
    suffix, wrap = FORMS[form]
    path = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in wrap(state).items()}, path)
    else:
        torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_file_gives_the_same_network(
    form: str, network: CRIS, weights: State, tmp_path: Path
) -> None:
    assert_same_network(load_released(write(weights, form, tmp_path), WORDS, HEADS), network)


@pytest.mark.parametrize(
    "form", [form for form, (suffix, _) in FORMS.items() if suffix != ".safetensors"]
)
def test_files_from_before_pytorch_1_6_give_it_too(
    form: str, network: CRIS, weights: State, tmp_path: Path
) -> None:
    path = write(weights, form, tmp_path, zipped=False)
    assert not path.read_bytes().startswith(b"PK")
    assert_same_network(load_released(str(path), WORDS, HEADS), network)


def test_what_becomes_of_the_file_later_does_not_change_the_network(
    network: CRIS, weights: State, tmp_path: Path
) -> None:
    path = write(weights, "bare", tmp_path)
    model = load_released(path, WORDS, HEADS)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    path.unlink()
    assert_same_network(model, network)


# -- Sizes


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes of any small network that can be written in the released format."""
    text_width = draw(st.sampled_from([4, 8, 12, 32, 64, 96, 128, 192]))
    layers = draw(st.integers(0, 3))
    width = text_width if layers else draw(st.integers(2, 40))
    context = draw(st.integers(4, 30))
    return {
        "clip": {
            "embed_dim": draw(st.integers(1, 40)),
            "vision_cfg": {
                "layers": draw(st.lists(st.integers(1, 3), min_size=4, max_size=4)),
                "width": 2 * draw(st.integers(1, 6)),
                "image_size": 32 * draw(st.integers(1, 7)),
            },
            "text_cfg": {
                "context_length": context,
                "vocab_size": draw(st.integers(4, 200)),
                "width": text_width,
                "heads": max(text_width // 64, 1),
                "layers": draw(st.integers(1, 3)),
            },
        },
        "neck": [draw(st.integers(1, 30)), width, draw(st.integers(1, 30))],
        "decoder_layers": layers,
        "decoder_heads": draw(
            st.sampled_from([heads for heads in (1, 2, 4, 8) if text_width % heads == 0])
        ),
        "decoder_ffn": draw(st.integers(1, 50)) if layers else 2048,
        "decoder_dropout": draw(st.sampled_from([0.0, 0.1, 0.3])),
        "contrastive": True,
        "kernel_size": draw(st.sampled_from([1, 3, 5])),
        "max_tokens": draw(st.integers(4, context)),
    }


@given(sizes=sizes())
@settings(relaxed, max_examples=20)
def test_all_sizes_are_read_off_the_weights(
    sizes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = filled(build_cris(CRISConfig(**sizes)))
    path = tmp_path_factory.mktemp("sizes") / "weights.safetensors"
    save_file(to_released(expected.state_dict()), path)
    told = (sizes["max_tokens"], sizes["decoder_heads"], sizes["decoder_dropout"])
    assert_same_network(load_released(path, *told), expected)
    path.unlink()


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_decoder_layers_and_kernel_size_are_read_off_the_weights(
    layers: int, kernel_size: int
) -> None:
    state = to_released(
        build_cris(
            CRISConfig(**SIZES | {"decoder_layers": layers, "kernel_size": kernel_size})
        ).state_dict()
    )
    found = infer_config(state, "weights.pth", WORDS, HEADS)
    assert (found["decoder_layers"], found["kernel_size"]) == (layers, kernel_size)


def test_the_encoders_heads_follow_the_released_rule() -> None:
    clip = SIZES["clip"] | {
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 12, "image_size": 64},
        "text_cfg": SIZES["clip"]["text_cfg"] | {"width": 128, "heads": 2},
    }
    state = to_released(
        build_cris(CRISConfig(**SIZES | {"clip": clip, "neck": [12, 128, 24]})).state_dict()
    )
    model = build_cris(infer_config(state, "weights.pth", WORDS, HEADS))
    assert model.image_encoder.pool.heads == 6  # 32 w / 64
    heads = [
        module.num_heads
        for module in model.text_encoder.modules()
        if isinstance(module, nn.MultiheadAttention)
    ]
    assert heads == [2, 2]


FULL: dict[
    str, tuple[dict[str, Any], int]
] = {  # numbers in parameters, as the authors' networks count them
    "RN50": ({"embed_dim": 1024, "layers": [3, 4, 6, 3]}, 146_849_122),
    "RN101": ({"embed_dim": 512, "layers": [3, 4, 23, 3]}, 161_251_682),
}


def full_size(clip: str, **changes: Any) -> State:
    """Return a full-size network's released names, with shapes but no memory."""
    with torch.device("meta"):
        return to_released(build_cris(CRISConfig(clip=f"{clip}-quickgelu", **changes)).state_dict())


@pytest.mark.parametrize("clip", FULL)
def test_a_full_size_network_has_as_many_numbers_as_the_released_one(clip: str) -> None:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert (
        sum(v.numel() for name, v in full_size(clip).items() if not name.endswith(buffers))
        == FULL[clip][1]
    )


@pytest.mark.parametrize("clip", FULL)
def test_full_size_networks_sizes_are_read_off_their_weights(clip: str) -> None:
    sizes, _ = FULL[clip]
    assert infer_config(full_size(clip), "weights.pth", 17) == {
        "clip": {
            "embed_dim": sizes["embed_dim"],
            "vision_cfg": {"layers": sizes["layers"], "width": 64, "image_size": 224},
            "text_cfg": {
                "context_length": 77,
                "vocab_size": 49408,
                "width": 512,
                "heads": 8,
                "layers": 12,
            },
        },
        "neck": [256, 512, 1024],
        "decoder_layers": 3,
        "decoder_heads": 8,
        "decoder_ffn": 2048,
        "decoder_dropout": 0.1,
        "contrastive": True,
        "kernel_size": 3,
        "max_tokens": 17,
    }


def test_clips_larger_resnets_are_read_too() -> None:
    state = full_size("RN50x4", neck=(256, 640, 1024))
    found = infer_config(state, "weights.pth", 17)["clip"]
    assert found["vision_cfg"] == {"layers": [4, 6, 10, 6], "width": 80, "image_size": 288}
    assert (found["text_cfg"]["width"], found["text_cfg"]["heads"]) == (640, 10)


@pytest.mark.slow
def test_a_full_size_checkpoint_loads(tmp_path: Path) -> None:
    expected = build_cris(CRISConfig(clip="RN50-quickgelu")).eval()
    path = write(to_released(expected.state_dict()), "training", tmp_path)
    model = load_released(path, 17)
    path.unlink()
    assert_same_tensors(model.state_dict(), expected.state_dict())
    assert torch.equal(logits(model), logits(expected))


# -- Names


def golden_names(golden: Path) -> list[str]:
    return list(json.loads((golden / "tiny_a.shapes.json").read_text()))


def test_our_names_lead_back_to_the_golden_ones(golden: Path) -> None:
    names = golden_names(golden)
    assert len(names) > 300
    for name in names:
        assert rename_ours(rename_released(name)) == name
    assert len({rename_released(name) for name in names}) == len(names)


@pytest.mark.parametrize("clip", FULL)
def test_released_names_lead_back_to_ours(clip: str) -> None:
    with torch.device("meta"):
        names = list(build_cris(CRISConfig(clip=f"{clip}-quickgelu")).state_dict())
    assert len(names) > 600
    for name in names:
        assert rename_released(rename_ours(name)) == name
    assert len({rename_ours(name) for name in names}) == len(names)


@pytest.mark.parametrize("clip", FULL)
def test_a_full_size_networks_released_names_are_the_golden_ones_with_other_numbers(
    clip: str, golden: Path
) -> None:
    def pattern(name: str) -> str:
        block = re.sub(r"(layer\d|layers|resblocks)\.\d+", r"\1.*", name)
        return re.sub(r"layer2\.\*", "layer*.*", re.sub(r"layer\d\.\*", "layer*.*", block))

    assert {pattern(name) for name in full_size(clip)} == {
        pattern(name) for name in golden_names(golden)
    }


@pytest.mark.parametrize(
    "name",
    ["head.conv.weight", "weight", "", "text_encode.ln_final.weight", "model.decoder.norm.bias"],
)
def test_a_part_that_was_never_released_has_no_released_name(name: str) -> None:
    with pytest.raises(KeyError, match="is no parameter of CRIS"):
        rename_ours(name)


def test_a_network_without_con_cannot_be_written_in_the_released_format() -> None:
    state = build_cris(CRISConfig(**SIZES | {"contrastive": False})).state_dict()
    with pytest.raises(
        InputError, match=r"^the released format cannot hold this network: 'head\.conv\.weight'"
    ):
        to_released(state)


# -- The logit scale


def test_the_logit_scales_value_survives_and_is_no_parameter(
    weights: State, tmp_path: Path
) -> None:
    value = torch.tensor(4.60517)
    model = load_released(write(weights | {LOGIT_SCALE: value}, "bare", tmp_path), WORDS, HEADS)
    assert torch.equal(model.state_dict()["text_encoder.logit_scale"], value)
    assert torch.equal(to_released(model.state_dict())[LOGIT_SCALE], value)
    assert not [name for name, _ in model.named_parameters() if "logit_scale" in name]


def test_a_checkpoint_without_logit_scale_loads_with_a_warning(
    network: CRIS, weights: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(
        {name: value for name, value in weights.items() if name != LOGIT_SCALE},
        "state_dict",
        tmp_path,
    )
    with caplog.at_level(logging.WARNING):
        model = load_released(path, WORDS, HEADS)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"{path} lacks {LOGIT_SCALE}" in warning.getMessage()
    ours, expected = model.state_dict(), network.state_dict()
    assert ours.pop("text_encoder.logit_scale").item() == pytest.approx(math.log(1 / 0.07))
    del expected["text_encoder.logit_scale"]
    assert_same_tensors(ours, expected)


def test_a_whole_checkpoint_loads_without_a_warning(
    weights: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="crislit"):
        load_released(write(weights, "training", tmp_path), WORDS, HEADS)
    assert not caplog.records


# -- What the loaded network is


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_load_as_float32(
    dtype: torch.dtype, network: CRIS, weights: State, tmp_path: Path
) -> None:
    state = {name: v.to(dtype) if v.is_floating_point() else v for name, v in weights.items()}
    model = load_released(write(state, "state_dict", tmp_path), WORDS, HEADS)
    expected = {
        k: v.float() if v.is_floating_point() else v for k, v in from_released(state).items()
    }
    assert_same_tensors(model.state_dict(), expected)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
    assert logits(model).dtype == torch.float32


def test_the_network_is_in_evaluation_mode(weights: State, tmp_path: Path) -> None:
    model = load_released(write(weights, "bare", tmp_path), WORDS, HEADS)
    assert not [name for name, module in model.named_modules() if module.training]


@pytest.mark.parametrize("rate", [None, 0.0, 0.25])
def test_the_dropout_rate_arrives_everywhere_in_the_decoder(
    rate: float | None, weights: State, tmp_path: Path
) -> None:
    path = write(weights, "bare", tmp_path)
    given = {} if rate is None else {"decoder_dropout": rate}
    model = load_released(path, WORDS, HEADS, **given)
    assert model.decoder is not None
    rates = [module.p for module in model.decoder.modules() if isinstance(module, nn.Dropout)]
    rates += [
        module.dropout
        for module in model.decoder.modules()
        if isinstance(module, nn.MultiheadAttention)
    ]
    assert len(rates) == 3 * (2 + 2)
    assert set(rates) == {0.1 if rate is None else rate}
    assert model.config.decoder_dropout == rates[0]


def test_a_rate_that_is_none_is_an_input_error(weights: State, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"decoder\.dropout must be a rate in \[0, 1\), got 1\.5"):
        load_released(write(weights, "bare", tmp_path), WORDS, HEADS, decoder_dropout=1.5)


def test_eight_decoder_heads_are_taken_unless_others_are_given(
    weights: State, tmp_path: Path
) -> None:
    path = write(weights, "bare", tmp_path)
    for argument, heads in (({}, 8), ({"decoder_heads": 2}, 2)):
        model = load_released(path, WORDS, **argument)
        assert model.decoder is not None
        attentions = [
            module
            for module in model.decoder.modules()
            if isinstance(module, nn.MultiheadAttention)
        ]
        assert [attention.num_heads for attention in attentions] == [heads] * 6


def test_loading_is_exported() -> None:
    assert crislit.load_released is load_released
    assert "load_released" in crislit.__all__


# -- Refusals: names and shapes


TELLING = (  # the weights that sizes are read from
    "backbone.visual.layer1.0.conv1.weight",
    "backbone.visual.attnpool.c_proj.weight",
    "backbone.visual.attnpool.positional_embedding",
    "backbone.positional_embedding",
    "backbone.token_embedding.weight",
    "neck.f3_v_proj.0.weight",
    "neck.f2_v_proj.0.weight",
    "neck.txt_proj.0.weight",
    "proj.vis.4.weight",
    "proj.txt.weight",
    "decoder.layers.0.ffn.0.weight",
)
MISSING: dict[str, tuple[str, ...]] = {
    "a convolution": ("backbone.visual.conv1.weight",),
    "a counter": ("neck.norm_layer.0.num_batches_tracked",),
    "a statistic": ("proj.vis.3.1.running_var",),
    "of the middle decoder layer": ("decoder.layers.1.cross_attn_norm.weight",),
    "of the last decoder layer": ("decoder.layers.2.norm1.bias", "decoder.layers.2.ffn.3.weight"),
    "of the decoder's end": ("decoder.norm.weight", "decoder.norm.bias"),
    "of the text encoder": (
        "backbone.ln_final.bias",
        "backbone.transformer.resblocks.1.mlp.c_fc.weight",
    ),
    "of every part": (
        "backbone.text_projection",
        "neck.aggr.0.weight",
        "decoder.layers.0.norm3.bias",
        "proj.txt.bias",
    ),
}


def without(state: State, *names: str) -> State:
    assert set(names) <= set(state)
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    "names", [*MISSING.values(), *((name,) for name in TELLING)], ids=lambda names: names[0]
)
def test_missing_keys_are_named_and_no_others(names: tuple[str, ...], weights: State) -> None:
    message = refusal(without(weights, *names))
    assert "missing" in message
    assert named(message) == set(names)


@pytest.mark.parametrize(
    "names",
    [
        TELLING,
        ("neck.txt_proj.0.weight", "backbone.positional_embedding"),
        ("proj.txt.weight", "decoder.norm.weight"),
        ("backbone.visual.layer1.0.conv1.weight", "backbone.visual.conv1.weight"),
    ],
    ids=lambda names: names[0],
)
def test_missing_keys_are_all_named_also_where_sizes_are_read_from_some(
    names: tuple[str, ...], weights: State
) -> None:
    assert named(refusal(without(weights, *names))) == set(names)


def test_an_unexpected_key_is_named_also_where_one_that_tells_a_size_is_missing(
    weights: State,
) -> None:
    message = refusal(
        without(weights, "proj.txt.weight") | {"proj.text.weight": weights["proj.txt.weight"]}
    )
    assert named(message) == {"proj.txt.weight", "proj.text.weight"}


def test_a_middle_decoder_layer_that_is_missing_altogether_is_named(weights: State) -> None:
    layer = {name for name in weights if name.startswith("decoder.layers.1.")}
    message = refusal(without(weights, *layer))
    assert len(layer & named(message.split("unexpected")[0])) >= 20  # long lists are cut short


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_stage_that_is_missing_altogether_is_named(stage: int, weights: State) -> None:
    prefix = f"backbone.visual.layer{stage}."
    message = refusal(without(weights, *(name for name in weights if name.startswith(prefix))))
    assert any(name.startswith(prefix) for name in named(message))


def test_a_text_encoder_whose_layers_are_all_missing_is_named(weights: State) -> None:
    prefix = "backbone.transformer.resblocks."
    message = refusal(without(weights, *(name for name in weights if name.startswith(prefix))))
    assert any(name.startswith(f"{prefix}0.") for name in named(message))


@pytest.mark.parametrize(
    "names",
    [
        ("extra.weight",),
        ("backbone.visual.layer1.0.conv9.weight", "backbone.visual.proj"),
        ("decoder.layers.1.norm9.weight",),
        ("neck.f9_v_proj.0.weight", "neck.f1_v_proj.0.bias"),
        ("proj.txt.scale", "proj.vis.5.weight"),
        ("extra.state_dict", "decoder.query"),
    ],
    ids=lambda names: names[0],
)
def test_unexpected_keys_are_named_and_no_others(names: tuple[str, ...], weights: State) -> None:
    message = refusal(weights | {name: torch.zeros(3) for name in names})
    assert "unexpected" in message
    assert named(message) == set(names)


def test_missing_unexpected_and_misshapen_keys_are_told_apart(weights: State) -> None:
    changed = without(weights, "neck.aggr.0.weight") | {
        "neck.aggregate.0.weight": weights["neck.aggr.0.weight"]
    }
    message = refusal(changed | {"decoder.norm.bias": torch.zeros(7)})
    assert re.search(
        r"missing neck\.aggr\.0\.weight\b.*unexpected neck\.aggregate\.0\.weight\b", message
    )
    assert re.search(r"shape decoder\.norm\.bias \(7 instead of 32\)", message)


@pytest.mark.parametrize("form", ["bare, module.", "training", "safetensors, module."])
def test_names_in_messages_are_the_released_ones_without_module(
    form: str, weights: State, tmp_path: Path
) -> None:
    changed = without(weights, "decoder.norm.weight", "neck.aggr.0.weight") | {
        "extra.weight": torch.zeros(1)
    }
    path = write(changed, form, tmp_path)
    with pytest.raises(InputError) as caught:
        load_released(path, WORDS, HEADS)
    message = str(caught.value)
    assert str(path) in message
    assert named(message.replace(str(path), "")) == {
        "decoder.norm.weight",
        "neck.aggr.0.weight",
        "extra.weight",
    }


MISSHAPEN = (
    "backbone.visual.conv1.weight",
    "backbone.visual.layer2.1.bn3.running_mean",
    "backbone.visual.attnpool.connect.0.weight",
    "backbone.text_projection",
    "backbone.transformer.resblocks.1.attn.in_proj_weight",
    LOGIT_SCALE,
    "neck.f4_proj3.0.weight",
    "neck.norm_layer.0.num_batches_tracked",
    "decoder.layers.1.multihead_attn.out_proj.weight",
    "decoder.layers.2.ffn.3.bias",
    "proj.vis.1.0.weight",
    "proj.txt.bias",
)


def reshaped(value: Tensor) -> dict[str, Tensor]:
    """Return what a tensor could have been instead."""
    longer = torch.zeros(value.shape[0] + 1, *value.shape[1:]) if value.ndim else torch.zeros(1)
    shapes = {
        "longer": longer,
        "empty": torch.zeros(0),
        "one more dimension": value[None],
        "a number": torch.zeros(()),
    }
    return {what: other for what, other in shapes.items() if other.shape != value.shape}


@pytest.mark.parametrize("name", MISSHAPEN)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(name: str, weights: State) -> None:
    for other in reshaped(weights[name]).values():
        message = refusal(weights | {name: other})
        found, expected = (
            " x ".join(map(str, value.shape)) or "one number" for value in (other, weights[name])
        )
        assert f"of another shape {name} ({found} instead of {expected})" in message
        assert named(message) == {name}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "name", [name for name in TELLING if "embedding" not in name]
)  # whose rows are free
def test_a_weight_that_tells_a_size_and_disagrees_with_the_others_is_an_input_error(
    name: str, weights: State
) -> None:
    value = weights[name]
    for other in (
        torch.zeros(value.shape[0] + 1, *value.shape[1:]),
        torch.zeros(()),
        value[None],
        value.flatten(),
    ):
        refusal(weights | {name: other})


@pytest.mark.parametrize(
    ("name", "rows"),
    [("neck.f2_v_proj.0.weight", 33), ("proj.txt.weight", 1), ("proj.vis.4.weight", 33)],
)
def test_sizes_that_make_no_network_are_explained_by_a_name(
    name: str, rows: int, weights: State
) -> None:
    other = torch.zeros(rows, *weights[name].shape[1:])
    assert named(refusal(weights | {name: other}))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("backbone.token_embedding.weight", (50, 200)),  # no multiple of its heads
        ("backbone.visual.attnpool.c_proj.weight", (0,)),
        ("backbone.visual.attnpool.positional_embedding", (0,)),
        ("backbone.visual.layer1.0.conv1.weight", (0,)),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_damaged_weight_that_tells_a_size_is_an_input_error(
    name: str, shape: tuple[int, ...], weights: State
) -> None:
    assert name in refusal(weights | {name: torch.zeros(shape)})


# -- Refusals: arguments


@pytest.mark.parametrize("words", [CONTEXT + 1, 77, 2, 0, -1])
def test_words_beyond_the_context_are_an_input_error(
    words: int, weights: State, tmp_path: Path
) -> None:
    path = write(weights, "bare", tmp_path)
    assert load_released(path, CONTEXT, HEADS).max_tokens == CONTEXT
    with pytest.raises(InputError, match=f"max_words.*{words}"):
        load_released(path, words, HEADS)


@pytest.mark.parametrize("heads", [3, 5, 64, 0, -4])
def test_decoder_heads_that_do_not_divide_the_width_are_an_input_error(
    heads: int, weights: State, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"heads.*{heads}"):
        load_released(write(weights, "bare", tmp_path), WORDS, heads)


# -- Refusals: files


class Evil:
    """Leaves a file behind when a pickle of it is read by plain ``pickle`` or ``torch.load``."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


PLACES: dict[str, Callable[[State, Evil], Any]] = {
    "the whole": lambda state, evil: evil,
    "a weight": lambda state, evil: state | {"proj.txt.bias": evil},
    "beside the weights": lambda state, evil: {"state_dict": state, "epoch": evil},
    "a key": lambda state, evil: {evil: 1, "state_dict": state},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(
    place: str, zipped: bool, weights: State, tmp_path: Path
) -> None:
    path, mark = tmp_path / "hostile.pth", tmp_path / "mark"
    torch.save(PLACES[place](weights, Evil(mark)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=rf"cannot read {re.escape(str(path))}"):
        load_released(path, WORDS, HEADS)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file would have run code"


def test_a_bare_pickle_is_refused_and_runs_none(tmp_path: Path) -> None:
    path, mark = tmp_path / "hostile.pt", tmp_path / "mark"
    path.write_bytes(pickle.dumps({"state_dict": Evil(mark)}))
    with pytest.raises(InputError, match="cannot read"):
        load_released(path, WORDS)
    assert not mark.exists()


def test_nobody_is_advised_to_run_a_files_code(weights: State, tmp_path: Path) -> None:
    path = tmp_path / "hostile.pth"
    torch.save({"state_dict": weights, "epoch": Evil(tmp_path / "mark")}, path)
    with pytest.raises(InputError) as caught:
        load_released(path, WORDS, HEADS)
    message = str(caught.value)
    assert message.isprintable()
    assert "can still be loaded" not in message
    assert "weights_only" not in message


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_what_is_no_file_is_an_input_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    for _ in ("absent", "a folder"):
        with pytest.raises(InputError, match=rf"no weights at {re.escape(str(path))}"):
            load_released(path, WORDS)
        path.mkdir(exist_ok=True)


@pytest.mark.parametrize("form", ["bare", "training", "safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_an_input_error(
    form: str, zipped: bool, weights: State, tmp_path: Path
) -> None:
    path = write(weights, form, tmp_path, zipped)
    whole = path.read_bytes()
    for length in (0, 1, 2, 7, 8, 9, 100, 5000, len(whole) // 2, len(whole) - 25, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"cannot read {re.escape(str(path))}: it is damaged"):
            load_released(path, WORDS, HEADS)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_something_else_is_an_input_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    for content in (
        b"<!DOCTYPE html>\n<html></html>\n",
        bytes(1000),
        b"\x80\x02" + b"x" * 50,
        b"PK\x03\x04" + bytes(60),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(str(path))):
            load_released(path, WORDS)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"state_dict": {}},
        {"state_dict": None},
        {"state_dict": [1, 2]},
        {"epoch": 3},
        torch.zeros(3),
        "weights",
        None,
        {"proj.txt.bias": [0.0, 1.0]},
        {"state_dict": {"proj.txt.bias": torch.zeros(2), "epoch": 3}},
    ],
    ids=str,
)
def test_a_file_without_a_state_dict_is_an_input_error(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(
        InputError, match=rf"{re.escape(str(path))} holds no state dict: expected tensors by name"
    ):
        load_released(path, WORDS)


def test_one_entry_that_is_no_tensor_is_an_input_error(weights: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(weights | {"backbone.input_resolution": 224}, path)
    with pytest.raises(InputError, match="holds no state dict"):
        load_released(path, WORDS, HEADS)


def test_an_empty_safetensors_file_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({}, path)
    with pytest.raises(InputError, match="holds no state dict"):
        load_released(path, WORDS)


def test_a_checkpoint_of_our_own_is_an_input_error(network: CRIS, tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    content = {
        "state_dict": {f"model.{name}": value for name, value in network.state_dict().items()},
        "crislit": checkpoint_metadata(
            network.config, {"image_size": 64, "threshold": 0.35}, "random"
        ),
        "global_step": 3,
    }
    torch.save(content, path)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_released(path, WORDS, HEADS)
    path = tmp_path / "model.safetensors"
    save_file(network.state_dict(), path)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_released(path, WORDS, HEADS)


def test_clips_own_weights_are_an_input_error(weights: State, tmp_path: Path) -> None:
    path = tmp_path / "RN50.pt"
    start = "backbone."
    torch.save(
        {
            name.removeprefix(start): value
            for name, value in weights.items()
            if name.startswith(start)
        },
        path,
    )
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}.*missing .*backbone\.visual\."):
        load_released(path, WORDS, HEADS)


def test_a_vision_transformer_is_an_input_error_of_its_own(weights: State) -> None:
    transformer = {
        "backbone.visual.class_embedding": torch.zeros(8),
        "backbone.visual.conv1.weight": torch.zeros(8, 3, 4, 4),
    }
    assert "holds a CLIP with a vision transformer" in refusal(weights | transformer)


# -- What conversion uses


def test_without_a_number_of_words_refcocos_is_taken_or_the_context_where_that_is_shorter(
    weights: State, tmp_path: Path
) -> None:
    assert infer_config(full_size("RN50"), "weights.pth", None).max_tokens == 17
    assert parse_released(weights, "bare", None, HEADS)[0].max_tokens == CONTEXT


def test_reading_changes_names_and_nothing_else(
    network: CRIS, weights: State, tmp_path: Path
) -> None:
    half = {
        name: value.half() if value.is_floating_point() else value
        for name, value in weights.items()
    }
    found, state = parse_released(write(half, "state_dict", tmp_path), WORDS, HEADS)
    assert_same_tensors(state, from_released(half))
    assert set(state) == set(network.state_dict())
    assert found == SIZES
    json.dumps(found)  # config.json keeps it


def test_numpy_numbers_beside_the_weights_do_not_hinder_reading(
    network: CRIS, weights: State, tmp_path: Path
) -> None:
    content = {
        "best_iou": np.float64(0.7),
        "epoch": np.int64(3),
        "rate": np.float32(0.1),
        "state_dict": weights,
    }
    torch.save(content, tmp_path / "best.pth")
    assert_same_network(load_released(tmp_path / "best.pth", WORDS, HEADS), network)


def test_our_own_weights_are_told_apart_from_the_authors(network: CRIS, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(
        InputError, match=r"model\.safetensors is crislit's own, not of the authors' code"
    ):
        load_released(tmp_path / "model.safetensors", WORDS)


def test_a_home_folder_is_found(
    weights: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(weights, tmp_path / "cris.pth")
    assert not load_released("~/cris.pth", WORDS, HEADS).training
