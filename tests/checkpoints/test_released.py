"""Checkpoints of the authors' code: every form is read, and sizes are inferred from the weights."""

import json
import logging
import math
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
from crislit.io.tensors import read_state_dict
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS
from crislit.training.losses import text_to_pixel_contrastive_loss

# The same examples on every run, and no failure on a busy machine.
relaxed = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)

State = dict[str, Tensor]

# All sizes differ, so that none can be mistaken for another.
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


def filled(model: CRIS, seed: int = 0) -> CRIS:
    """Give every parameter and buffer random values, none of which come from building alone."""
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
    """Return the logits of random input: three images of 64 x 96 pixels with their sentences."""
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
    """Compare configurations, tensors and logits."""
    assert ours.config == expected.config
    assert_same_tensors(ours.state_dict(), expected.state_dict())
    words = min(ours.max_tokens, 9)
    assert torch.equal(logits(ours, words), logits(expected, words))


def assert_same_tensors(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


@pytest.fixture(scope="module")
def network() -> CRIS:
    return filled(build_cris(CRISConfig(**SIZES)))


@pytest.fixture(scope="module")
def weights(network: CRIS) -> State:
    """The network's weights by their released names."""
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


def test_the_golden_checkpoint_has_the_recorded_sizes(
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


def test_the_golden_checkpoint_can_be_trained_with_the_released_loss(
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
    """Return what the authors' code saves: weights, epoch, scores, optimizer and scheduler."""
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


def with_versions(state: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    """Return a state dict with the versions that ``nn.Module.state_dict`` attaches."""
    versioned = OrderedDict(state)
    versioned._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return versioned


FORMS: dict[str, tuple[str, Callable[[State], Any]]] = {
    "safetensors": (".safetensors", dict),
    "safetensors, module.": (".safetensors", with_module),
    "bare": (".pth", dict),
    "bare, module.": (".pth", with_module),
    "bare, .pt": (".pt", with_versions),
    "state_dict": (".pth", lambda state: {"state_dict": with_versions(state)}),
    "state_dict, module., .pt": (".pt", lambda state: {"state_dict": with_module(state)}),
    "training": (".pth", training_checkpoint),
    "parameters": (
        ".pth",
        lambda state: {k: nn.Parameter(v, v.is_floating_point()) for k, v in state.items()},
    ),
    "another order": (".pth", lambda state: dict(reversed(state.items()))),
}


def write(state: State, form: str, folder: Path, zipped: bool = True) -> Path:
    """Write released weights in one of the forms in which they are found."""
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
def test_files_from_before_pytorch_1_6_give_the_same_network(
    form: str, network: CRIS, weights: State, tmp_path: Path
) -> None:
    path = write(weights, form, tmp_path, zipped=False)
    assert not path.read_bytes().startswith(b"PK")
    assert_same_network(load_released(str(path), WORDS, HEADS), network)


def test_later_changes_of_the_file_do_not_change_the_network(
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
    """Draw the sizes of a small network that the released format can hold."""
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
def test_all_sizes_are_inferred_from_the_weights(
    sizes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = filled(build_cris(CRISConfig(**sizes)))
    path = tmp_path_factory.mktemp("sizes") / "weights.safetensors"
    save_file(to_released(expected.state_dict()), path)
    options = (sizes["max_tokens"], sizes["decoder_heads"], sizes["decoder_dropout"])
    assert_same_network(load_released(path, *options), expected)
    path.unlink()


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_decoder_layers_and_kernel_size_are_inferred_from_the_weights(
    layers: int, kernel_size: int
) -> None:
    sizes = CRISConfig(**SIZES | {"decoder_layers": layers, "kernel_size": kernel_size})
    state = to_released(build_cris(sizes).state_dict())
    inferred = infer_config(state, "weights.pth", WORDS, HEADS)
    assert (inferred.decoder_layers, inferred.kernel_size) == (layers, kernel_size)


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


# CLIP's sizes, and the number of parameters of the authors' networks.
FULL: dict[str, tuple[dict[str, Any], int]] = {
    "RN50": ({"embed_dim": 1024, "layers": [3, 4, 6, 3]}, 146_849_122),
    "RN101": ({"embed_dim": 512, "layers": [3, 4, 23, 3]}, 161_251_682),
}


def full_size(clip: str, **changes: Any) -> State:
    """Return a full-size network by its released names, with shapes but without memory."""
    with torch.device("meta"):
        return to_released(build_cris(CRISConfig(clip=f"{clip}-quickgelu", **changes)).state_dict())


@pytest.mark.parametrize("clip", FULL)
def test_a_full_size_network_has_as_many_parameters_as_the_released_one(clip: str) -> None:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert (
        sum(v.numel() for name, v in full_size(clip).items() if not name.endswith(buffers))
        == FULL[clip][1]
    )


@pytest.mark.parametrize("clip", FULL)
def test_the_sizes_of_full_size_networks_are_inferred_from_their_weights(clip: str) -> None:
    sizes, _ = FULL[clip]
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    assert infer_config(full_size(clip), "weights.pth", 17) == CRISConfig(
        clip={
            "embed_dim": sizes["embed_dim"],
            "vision_cfg": {"layers": sizes["layers"], "width": 64, "image_size": 224},
            "text_cfg": text,
        },
        neck=[256, 512, 1024],
        decoder_layers=3,
        decoder_heads=8,
        decoder_ffn=2048,
        decoder_dropout=0.1,
        contrastive=True,
        kernel_size=3,
        max_tokens=17,
    )


def test_clips_larger_resnets_are_supported() -> None:
    state = full_size("RN50x4", neck=(256, 640, 1024))
    clip: Any = infer_config(state, "weights.pth", 17).clip
    assert clip["vision_cfg"] == {"layers": [4, 6, 10, 6], "width": 80, "image_size": 288}
    assert (clip["text_cfg"]["width"], clip["text_cfg"]["heads"]) == (640, 10)


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


def test_golden_names_are_restored_from_ours(golden: Path) -> None:
    names = golden_names(golden)
    assert len(names) > 300
    for name in names:
        assert rename_ours(rename_released(name)) == name
    assert len({rename_released(name) for name in names}) == len(names)


@pytest.mark.parametrize("clip", FULL)
def test_our_names_are_restored_from_released_ones(clip: str) -> None:
    with torch.device("meta"):
        names = list(build_cris(CRISConfig(clip=f"{clip}-quickgelu")).state_dict())
    assert len(names) > 600
    for name in names:
        assert rename_released(rename_ours(name)) == name
    assert len({rename_ours(name) for name in names}) == len(names)


@pytest.mark.parametrize("clip", FULL)
def test_a_full_size_network_has_the_golden_names_with_other_numbers(
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
def test_an_unreleased_part_has_no_released_name(name: str) -> None:
    with pytest.raises(KeyError, match="is not a parameter of CRIS"):
        rename_ours(name)


def test_a_network_without_con_cannot_be_written_in_the_released_format() -> None:
    state = build_cris(CRISConfig(**SIZES | {"contrastive": False})).state_dict()
    with pytest.raises(
        InputError, match=r"^the released format cannot hold this network: 'head\.conv\.weight'"
    ):
        to_released(state)


# -- The logit scale


def test_the_logit_scale_is_kept_and_is_not_a_parameter(weights: State, tmp_path: Path) -> None:
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


def test_a_complete_checkpoint_loads_without_a_warning(
    weights: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="crislit"):
        load_released(write(weights, "training", tmp_path), WORDS, HEADS)
    assert not caplog.records


# -- The loaded network


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
def test_the_dropout_rate_applies_everywhere_in_the_decoder(
    rate: float | None, weights: State, tmp_path: Path
) -> None:
    path = write(weights, "bare", tmp_path)
    options = {} if rate is None else {"decoder_dropout": rate}
    model = load_released(path, WORDS, HEADS, **options)
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


def test_an_invalid_dropout_rate_is_an_input_error(weights: State, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"decoder\.dropout must be a rate in \[0, 1\), got 1\.5"):
        load_released(write(weights, "bare", tmp_path), WORDS, HEADS, decoder_dropout=1.5)


def test_eight_decoder_heads_are_the_default(weights: State, tmp_path: Path) -> None:
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


def test_the_package_exports_load_released() -> None:
    assert crislit.load_released is load_released
    assert "load_released" in crislit.__all__


# -- Reading for conversion


def test_the_default_number_of_tokens_is_that_of_refcoco_or_a_shorter_context(
    weights: State,
) -> None:
    assert infer_config(full_size("RN50"), "weights.pth", None).max_tokens == 17
    assert parse_released(weights, "weights.pth", None, HEADS)[0].max_tokens == CONTEXT


def test_reading_changes_names_and_nothing_else(
    network: CRIS, weights: State, tmp_path: Path
) -> None:
    half = {
        name: value.half() if value.is_floating_point() else value
        for name, value in weights.items()
    }
    path = write(half, "state_dict", tmp_path)
    config, state = parse_released(read_state_dict(path), str(path), WORDS, HEADS)
    assert_same_tensors(state, from_released(half))
    assert set(state) == set(network.state_dict())
    assert config == CRISConfig(**SIZES)
    json.dumps(config.to_dict())  # for config.json


def test_numpy_numbers_beside_the_weights_are_allowed(
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


def test_our_weights_are_not_taken_for_the_authors(network: CRIS, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    expected = r"model\.safetensors was written by crislit, not by the authors' code"
    with pytest.raises(InputError, match=expected):
        load_released(tmp_path / "model.safetensors", WORDS)


def test_a_path_may_start_with_the_home_folder(
    weights: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(weights, tmp_path / "cris.pth")
    assert not load_released("~/cris.pth", WORDS, HEADS).training
