"""The authors' released network: parameter names, sizes and files."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crislit.errors import InputError, require, see
from crislit.io import check_finite, check_names, format_shape, join_names, read_state_dict
from crislit.models import CRIS, CRISConfig, build_cris

log = logging.getLogger(__name__)
PREFIXES = (
    ("backbone.visual.attnpool.connect.", "image_encoder.pool.shortcut."),
    ("backbone.visual.attnpool.", "image_encoder.pool."),
    ("backbone.visual.", "image_encoder.resnet."),
    ("backbone.", "text_encoder."),
    ("neck.txt_proj.", "neck.project_sentence."),
    ("neck.f1_v_proj.", "neck.project_c5."),
    ("neck.norm_layer.", "neck.normalise_product."),
    ("neck.f2_v_proj.", "neck.project_c4."),
    ("neck.f2_cat.", "neck.fuse_f4."),
    ("neck.f3_v_proj.", "neck.project_c3."),
    ("neck.f3_cat.", "neck.fuse_f3."),
    ("neck.f4_proj3.", "neck.smooth_f3."),
    ("neck.f4_proj4.", "neck.smooth_f4."),
    ("neck.f4_proj5.", "neck.smooth_f5."),
    ("neck.aggr.", "neck.aggregate."),
    ("neck.coordconv.0.conv1.", "neck.locate."),
    ("neck.coordconv.1.", "neck.refine."),
    ("decoder.", "decoder."),
    ("proj.vis.", "image_projector."),
    ("proj.txt.", "head.linear."),
)
"""Released prefixes and ours; the first match counts, in both directions."""
INNER = (
    (".norm1.", ".self_norm_in."),
    (".norm2.", ".cross_norm_in."),
    (".norm3.", ".ffn_norm_in."),
    (".self_attn.", ".self_attention."),
    (".self_attn_norm.", ".self_norm_out."),
    (".multihead_attn.", ".cross_attention."),
    (".cross_attn_norm.", ".cross_norm_out."),
)
"""Released names and ours within a decoder layer."""
LOGIT_SCALE = "backbone.logit_scale"
"""CLIP's temperature: stored in every released checkpoint, but never used."""
CLIP_SIZE_WEIGHTS = {
    "stem": "visual.layer1.0.conv1.weight",
    "joint": "visual.attnpool.c_proj.weight",
    "grid": "visual.attnpool.positional_embedding",
    "context": "positional_embedding",
    "vocabulary": "token_embedding.weight",
}
"""The weights of CLIP, under OpenAI's names, that determine its sizes."""


def rename_released(name: str) -> str:
    """Return our name of a released parameter or buffer.

    Raises:
        KeyError: If it belongs to no part of the released network.
    """
    return _rename(name, PREFIXES, INNER, "the released CRIS network")


def rename_ours(name: str) -> str:
    """Return the released name of a parameter or buffer of ours.

    Raises:
        KeyError: If the released network has no such part (table 1's rows without "Con.").
    """
    return _rename(
        name,
        [(ours, theirs) for theirs, ours in PREFIXES],
        [(ours, theirs) for theirs, ours in INNER],
        "CRIS",
    )


def _rename(
    name: str, prefixes: Sequence[tuple[str, str]], inner: Sequence[tuple[str, str]], network: str
) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            if new == "decoder.":
                for old_part, new_part in inner:
                    name = name.replace(old_part, new_part)
            return name
    raise KeyError(f"{name!r} is not a parameter of {network}")


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released state dict's entries to ours."""
    return {rename_released(name): value for name, value in state.items()}


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our state dict's entries to the released ones.

    Raises:
        InputError: If the network has a part that was never released.
    """
    try:
        return {rename_ours(name): value for name, value in state.items()}
    except KeyError as error:
        raise InputError(
            f"the released format cannot hold this network: {error.args[0]}"
        ) from error


def load_released(
    path: str | Path, max_words: int, decoder_heads: int = 8, decoder_dropout: float = 0.1
) -> CRIS:
    """Load a checkpoint of the authors' code; all other sizes are inferred from its weights.

    Args:
        path: A ``.pth``, ``.pt`` or ``.safetensors`` file: tensors by name, alone or under
            ``state_dict``, with or without DistributedDataParallel's ``module.``. Reading it runs
            no code.
        max_words: L, tokens per sentence it was trained with: 17 for RefCOCO and RefCOCO+, 22 for
            G-Ref (section 4.2).
        decoder_heads: Attention heads of the decoder. Cannot be inferred from the weights; 8 in
            all released checkpoints. The encoders' heads have 64 channels each, as CLIP's.
        decoder_dropout: Cannot be inferred either; matters in training only.

    Returns:
        The network in evaluation mode, float32.

    Raises:
        InputError: If there is no such file, or it does not hold exactly the released network's
            parameters, with the names of those missing, unexpected or of another shape.
    """
    network, weights = parse_released(
        read_state_dict(Path(path).expanduser()), str(path), max_words, decoder_heads
    )
    check_finite(weights, str(path))
    model = build_cris(replace(network, decoder_dropout=decoder_dropout))
    model.load_state_dict(weights)
    return model.eval()


def parse_released(
    state: dict[str, Tensor], source: str, max_tokens: int | None, decoder_heads: int = 8
) -> tuple[CRISConfig, dict[str, Tensor]]:
    """Return the network that a released state dict belongs to, and its weights by our names.

    See ``load_released``. ``max_tokens=None`` means RefCOCO's 17, or the text encoder's context
    if that is shorter.
    """
    require(
        not any(name.removeprefix("model.").startswith("image_encoder.") for name in state),
        f"{source} was written by crislit, not by the authors' code: "
        "`python -m crislit.convert` and evaluate read it",
    )
    network = infer_config(state, source, max_tokens, decoder_heads)
    if LOGIT_SCALE not in state:
        log.warning(
            "%s lacks %s, which is never used; it is set to CLIP's initial value",
            source,
            LOGIT_SCALE,
        )
        state = state | {LOGIT_SCALE: torch.tensor(math.log(1 / 0.07))}
    return network, from_released(state)


def infer_config(
    state: Mapping[str, Tensor], source: str, max_tokens: int | None, decoder_heads: int = 8
) -> CRISConfig:
    """Infer a network's sizes from its state dict under the released names.

    Args:
        state: The weights.
        source: Their file's name, for errors.
        max_tokens: See ``parse_released``.
        decoder_heads: Attention heads of the decoder.

    Raises:
        InputError: If the weights are not exactly those of such a network.
    """
    state = {LOGIT_SCALE: torch.zeros(()), **state}  # may be missing: nothing uses it
    layers = count_blocks(state, "decoder.layers.")
    needed = {
        "a": "neck.f3_v_proj.0.weight",
        "b": "neck.f2_v_proj.0.weight",
        "c": "neck.txt_proj.0.weight",
        "z_v": "proj.vis.4.weight",
        "z_t": "proj.txt.weight",
        **({"ffn": "decoder.layers.0.ffn.0.weight"} if layers else {}),
    }
    deciding = [*needed.values(), *(f"backbone.{name}" for name in CLIP_SIZE_WEIGHTS.values())]
    if any(name not in state for name in deciding):
        check_parts(state, source)  # names everything missing, not only what determines a size
    clip = clip_sizes(state, source, "backbone.")
    size = {name: shape[0] for name, shape in _shapes(state, needed, source).items()}
    complaint = f"{source} is not the released CRIS network"
    try:
        network = CRISConfig(
            clip=clip,
            neck=[size["a"], size["b"], size["c"]],
            decoder_layers=layers,
            decoder_heads=decoder_heads,
            decoder_ffn=size.get("ffn", CRISConfig.decoder_ffn),
            kernel_size=round((max(size["z_t"] - 1, 0) / max(size["z_v"], 1)) ** 0.5),
            max_tokens=(
                min(17, clip["text_cfg"]["context_length"]) if max_tokens is None else max_tokens
            ),
        )
        with torch.device("meta"):  # shapes only
            expected = to_released(build_cris(network).state_dict())
    except InputError as error:
        found = ", ".join(f"{name} ({format_shape(state[name])})" for name in deciding)
        raise InputError(
            f"{complaint}: {error}; sizes are inferred from {found}{see('keys')}"
        ) from error
    check_names(state, expected, complaint)
    return network


def check_parts(state: Mapping[str, Tensor], source: str) -> None:
    """Check the names of a released state dict, whatever its sizes.

    They are compared with those of a tiny network with the same number of blocks.

    Raises:
        InputError: With the names that are missing or unexpected.
    """
    stages, text_layers = _clip_layers(state, source, "backbone.")
    vision = {"layers": stages, "width": 2, "image_size": 32}
    text = {"context_length": 3, "vocab_size": 1, "width": 4, "heads": 1, "layers": text_layers}
    tiny = CRISConfig(
        clip={"embed_dim": 1, "vision_cfg": vision, "text_cfg": text},
        neck=(1, 4, 1),
        decoder_layers=count_blocks(state, "decoder.layers."),
        decoder_heads=1,
        decoder_ffn=1,
        max_tokens=3,
    )
    with torch.device("meta"):
        names = to_released(build_cris(tiny).state_dict())
    check_names(
        state,
        {name: state.get(name, value) for name, value in names.items()},  # of any shape
        f"{source} is not the released CRIS network",
    )


def clip_sizes(state: Mapping[str, Tensor], source: str, prefix: str = "") -> dict[str, Any]:
    """Infer CLIP's sizes from its weights, as a mapping in open_clip's format.

    Args:
        state: The weights, under OpenAI's names after a prefix.
        source: Their file's name, for errors.
        prefix: The prefix.

    Raises:
        InputError: If they are not a CLIP with a ResNet, or lack one that determines a size.
    """
    stages, text_layers = _clip_layers(state, source, prefix)
    shapes = _shapes(state, {key: prefix + name for key, name in CLIP_SIZE_WEIGHTS.items()}, source)
    require(
        all(len(shapes[key]) >= 2 for key in ("context", "vocabulary")),
        f"{source} is damaged: its embeddings have no width",
    )
    vocab_size, width = shapes["vocabulary"][:2]
    return {
        "embed_dim": shapes["joint"][0],
        "vision_cfg": {
            "layers": stages,
            "width": shapes["stem"][0],
            "image_size": 32 * round((shapes["grid"][0] - 1) ** 0.5),
        },
        "text_cfg": {
            "context_length": shapes["context"][0],
            "vocab_size": vocab_size,
            "width": width,
            "heads": max(width // 64, 1),  # CLIP's rule
            "layers": text_layers,
        },
    }


def count_blocks(state: Mapping[str, Any], prefix: str) -> int:
    """Return the number of numbered blocks under a prefix."""
    return len({x.removeprefix(prefix).split(".")[0] for x in state if x.startswith(prefix)})


def _clip_layers(state: Mapping[str, Tensor], source: str, prefix: str) -> tuple[list[int], int]:
    """Return the blocks per ResNet stage and the text encoder's layers, at least one of each.

    Raises:
        InputError: If there is a vision transformer instead of the ResNet.
    """
    require(
        f"{prefix}visual.class_embedding" not in state,
        f"{source} holds a CLIP with a vision transformer; CRIS needs one with a ResNet, such as "
        f"RN50{see('wrong-clip')}",
    )
    stages = [count_blocks(state, f"{prefix}visual.layer{stage}.") for stage in (1, 2, 3, 4)]
    text_layers = count_blocks(state, f"{prefix}transformer.resblocks.")
    return [max(blocks, 1) for blocks in stages], max(text_layers, 1)


def _shapes(
    state: Mapping[str, Tensor], needed: Mapping[str, str], source: str
) -> dict[str, tuple[int, ...]]:
    missing = [name for name in needed.values() if name not in state]
    require(
        not missing, f"{source} does not hold the expected network: missing {join_names(missing)}"
    )
    empty = [name for name in needed.values() if not state[name].ndim or not state[name].numel()]
    require(
        not empty,
        f"{source} is damaged: {join_names(empty)} should have dimensions, none of them zero",
    )
    return {key: tuple(state[name].shape) for key, name in needed.items()}
