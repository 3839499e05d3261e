"""Checkpoints that are not the authors' are refused, with the names of the tensors at fault."""

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from crislit.checkpoints.checkpoint import checkpoint_metadata
from crislit.checkpoints.released import LOGIT_SCALE, infer_config, load_released, to_released
from crislit.errors import InputError
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS
from tests.checkpoints.test_released import CONTEXT, HEADS, SIZES, WORDS, State, filled, write

NAMES = re.compile(r"\b(?:module|backbone|neck|decoder|proj|extra)\.[\w.]*\w")
"""Released names in a message."""


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
    """The network's weights by their released names."""
    return to_released(network.state_dict())


# -- Refusals: names and shapes


# Weights from which sizes are inferred.
SIZE_WEIGHTS = (
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
    "at the end of the decoder": ("decoder.norm.weight", "decoder.norm.bias"),
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
    "names", [*MISSING.values(), *((name,) for name in SIZE_WEIGHTS)], ids=lambda names: names[0]
)
def test_only_missing_keys_are_named(names: tuple[str, ...], weights: State) -> None:
    message = refusal(without(weights, *names))
    assert "missing" in message
    assert named(message) == set(names)


@pytest.mark.parametrize(
    "names",
    [
        SIZE_WEIGHTS,
        ("neck.txt_proj.0.weight", "backbone.positional_embedding"),
        ("proj.txt.weight", "decoder.norm.weight"),
        ("backbone.visual.layer1.0.conv1.weight", "backbone.visual.conv1.weight"),
    ],
    ids=lambda names: names[0],
)
def test_all_missing_keys_are_named_if_sizes_depend_on_some(
    names: tuple[str, ...], weights: State
) -> None:
    assert named(refusal(without(weights, *names))) == set(names)


def test_an_unexpected_key_is_named_if_a_size_depends_on_a_missing_one(
    weights: State,
) -> None:
    message = refusal(
        without(weights, "proj.txt.weight") | {"proj.text.weight": weights["proj.txt.weight"]}
    )
    assert named(message) == {"proj.txt.weight", "proj.text.weight"}


def test_a_missing_middle_decoder_layer_is_named(weights: State) -> None:
    layer = {name for name in weights if name.startswith("decoder.layers.1.")}
    message = refusal(without(weights, *layer))
    assert len(layer & named(message.split("unexpected")[0])) >= 20  # long lists are shortened


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_missing_stage_is_named(stage: int, weights: State) -> None:
    prefix = f"backbone.visual.layer{stage}."
    message = refusal(without(weights, *(name for name in weights if name.startswith(prefix))))
    assert any(name.startswith(prefix) for name in named(message))


def test_a_text_encoder_without_layers_is_named(weights: State) -> None:
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
def test_only_unexpected_keys_are_named(names: tuple[str, ...], weights: State) -> None:
    message = refusal(weights | {name: torch.zeros(3) for name in names})
    assert "unexpected" in message
    assert named(message) == set(names)


def test_missing_unexpected_and_misshapen_keys_are_distinguished(weights: State) -> None:
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
    """Return tensors of other shapes."""
    longer = torch.zeros(value.shape[0] + 1, *value.shape[1:]) if value.ndim else torch.zeros(1)
    shapes = {
        "longer": longer,
        "empty": torch.zeros(0),
        "one more dimension": value[None],
        "a number": torch.zeros(()),
    }
    return {kind: other for kind, other in shapes.items() if other.shape != value.shape}


@pytest.mark.parametrize("name", MISSHAPEN)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(name: str, weights: State) -> None:
    for other in reshaped(weights[name]).values():
        message = refusal(weights | {name: other})
        actual, expected = (
            " x ".join(map(str, value.shape)) or "one number" for value in (other, weights[name])
        )
        assert f"of another shape {name} ({actual} instead of {expected})" in message
        assert named(message) == {name}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "name", [name for name in SIZE_WEIGHTS if "embedding" not in name]
)  # whose rows are free
def test_a_size_that_disagrees_with_other_weights_is_an_input_error(
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
def test_impossible_sizes_are_explained_by_a_name(name: str, rows: int, weights: State) -> None:
    other = torch.zeros(rows, *weights[name].shape[1:])
    assert named(refusal(weights | {name: other}))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("backbone.token_embedding.weight", (50, 200)),  # not a multiple of the heads
        ("backbone.visual.attnpool.c_proj.weight", (0,)),
        ("backbone.visual.attnpool.positional_embedding", (0,)),
        ("backbone.visual.layer1.0.conv1.weight", (0,)),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_damaged_weight_that_a_size_depends_on_is_an_input_error(
    name: str, shape: tuple[int, ...], weights: State
) -> None:
    assert name in refusal(weights | {name: torch.zeros(shape)})


# -- Refusals: arguments


@pytest.mark.parametrize("words", [CONTEXT + 1, 77, 2, 0, -1])
def test_more_tokens_than_the_context_are_an_input_error(
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
    """Creates a file when plain ``pickle`` or ``torch.load`` reads a pickle of it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


PLACES: dict[str, Callable[[State, Evil], Any]] = {
    "the entire file": lambda state, evil: evil,
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


def test_no_message_advises_to_run_the_code_of_a_file(weights: State, tmp_path: Path) -> None:
    path = tmp_path / "hostile.pth"
    torch.save({"state_dict": weights, "epoch": Evil(tmp_path / "mark")}, path)
    with pytest.raises(InputError) as caught:
        load_released(path, WORDS, HEADS)
    message = str(caught.value)
    assert message.isprintable()
    assert "can still be loaded" not in message
    assert "weights_only" not in message


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_missing_file_is_an_input_error(suffix: str, tmp_path: Path) -> None:
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
    content = path.read_bytes()
    size = len(content)
    for length in (0, 1, 2, 7, 8, 9, 100, 5000, size // 2, size - 25, size - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=rf"cannot read {re.escape(str(path))}: it is damaged"):
            load_released(path, WORDS, HEADS)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_another_kind_is_an_input_error(suffix: str, tmp_path: Path) -> None:
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


def test_one_entry_other_than_a_tensor_is_an_input_error(weights: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(weights | {"backbone.input_resolution": 224}, path)
    with pytest.raises(InputError, match="holds no state dict"):
        load_released(path, WORDS, HEADS)


def test_an_empty_safetensors_file_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({}, path)
    with pytest.raises(InputError, match="holds no state dict"):
        load_released(path, WORDS)


def test_a_checkpoint_of_crislit_is_an_input_error(network: CRIS, tmp_path: Path) -> None:
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


def test_the_weights_of_clip_are_an_input_error(weights: State, tmp_path: Path) -> None:
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


def test_a_vision_transformer_is_an_input_error_that_says_so(weights: State) -> None:
    transformer = {
        "backbone.visual.class_embedding": torch.zeros(8),
        "backbone.visual.conv1.weight": torch.zeros(8, 3, 4, 4),
    }
    assert "holds a CLIP with a vision transformer" in refusal(weights | transformer)
