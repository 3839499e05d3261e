"""The released names of parameters, and ours."""

import pytest
import torch

from crislit.checkpoints.released import from_released, rename_released


def test_clips_unused_logit_scale_is_kept() -> None:
    renamed = from_released({"backbone.logit_scale": torch.tensor(1.0)})
    assert list(renamed) == ["text_encoder.logit_scale"]


@pytest.mark.parametrize(
    "name", ["model.weight", "backbonevisual.conv1.weight", "", "proj.other.weight"]
)
def test_a_name_that_is_not_released_raises_key_error(name: str) -> None:
    with pytest.raises(KeyError, match="parameter of the released CRIS network"):
        rename_released(name)


@pytest.mark.parametrize(
    ("released", "ours"),
    [
        ("norm1", "self_norm_in"),
        ("norm2", "cross_norm_in"),
        ("norm3", "ffn_norm_in"),
        ("self_attn", "self_attention"),
        ("self_attn_norm", "self_norm_out"),
        ("multihead_attn", "cross_attention"),
        ("cross_attn_norm", "cross_norm_out"),
        ("ffn.0", "ffn.0"),
    ],
)
def test_similar_names_in_decoder_layers_are_distinguished(released: str, ours: str) -> None:
    renamed = rename_released(f"decoder.layers.1.{released}.weight")
    assert renamed == f"decoder.layers.1.{ours}.weight"


def test_the_decoders_last_norm_keeps_its_name() -> None:
    assert rename_released("decoder.norm.weight") == "decoder.norm.weight"
