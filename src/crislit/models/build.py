"""Builds CRIS, and the CLIP model whose two encoders it contains."""

from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg
from torch import nn

from crislit.errors import InputError, check_integer, require
from crislit.models.boxes import SeparateNeck, build_box
from crislit.models.config import DECODER_SIZES, MAX_LAYERS, CRISConfig
from crislit.models.cris import CRIS
from crislit.models.decoder import Decoder
from crislit.models.image_encoder import ImageEncoder
from crislit.models.neck import Neck
from crislit.models.projector import ImageProjector, PixelClassifier, TextProjector
from crislit.models.text_encoder import TextEncoder

ENCODER_KEYS = {
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers"},
}
"""Allowed keys of the two encoders. open_clip has more, some of which download models."""


def build_cris(config: CRISConfig) -> CRIS:
    """Build a network of the given sizes, with random weights.

    Raises:
        InputError: If the sizes do not fit each other, or open_clip does not have the model.
    """
    try:
        clip = build_clip(config.clip)
        _check_fit(config, clip)
        embed, stage4 = clip.visual.attnpool.c_proj.weight.shape  # E, 32w
        text_width = clip.positional_embedding.shape[1]
        width = config.neck[1]  # D

        def build(box: str, own: type[nn.Module], **sizes: Any) -> Any:
            if spec := config.boxes.get(box):
                return build_box(box, spec, sizes | {"text_width": text_width, "embed": embed})
            return own(**sizes)

        # In this order, on which the random numbers of the weights depend.
        image_encoder, text_encoder = ImageEncoder(clip.visual), TextEncoder(clip)
        neck = build(
            "neck", Neck, in_channels=(stage4 // 4, stage4 // 2, embed), out_channels=config.neck
        )
        decoder = {name: getattr(config, f"decoder_{name}") for name in DECODER_SIZES}
        head = {"channels": width // 2, "kernel_size": config.kernel_size}
        return CRIS(
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            # A class that derives from Neck may change what is computed once per image.
            neck=neck if type(neck).forward is Neck.forward else SeparateNeck(neck),
            decoder=build("decoder", Decoder, width=width, **decoder)
            if decoder["layers"]
            else None,
            image_projector=build("image_projector", ImageProjector, width=width),
            head=build("head", TextProjector, embed=embed, **head)
            if config.contrastive or "head" in config.boxes
            else PixelClassifier(**head),
            config=config,
        )
    # open_clip asserts that the number of attention heads divides the width.
    except (ValueError, AssertionError) as error:
        if isinstance(error, InputError) and config.boxes:
            raise
        raise InputError(f"cannot build this network: {error}") from error


def _check_fit(config: CRISConfig, clip: CLIP) -> None:
    """Raise an InputError if the decoder or the sentence length does not fit the text encoder."""
    context, width = clip.positional_embedding.shape
    require(
        config.decoder_layers == 0 or config.neck[1] == width or "decoder" in config.boxes,
        f"the decoder's width {config.neck[1]} must be the text encoder's {width}",
    )
    require(
        config.max_tokens <= context,
        f"max_words={config.max_tokens} exceeds the text encoder's context of {context}",
    )


@torch.no_grad()
def build_clip(clip: str | Mapping[str, Any]) -> CLIP:
    """Build a CLIP model at its native input size, with QuickGELU and random weights.

    open_clip's initialization suits the training of CLIP, but not of CRIS. Two changes:

    - open_clip starts the residual branches of the ResNet at zero. Here they contribute from the
      first step.
    - Sentence features start at a tenth of their size. Otherwise the text projector's kernels, and
      with them the first logits, are so large that training begins by shrinking them.

    Args:
        clip: Name of an open_clip model, or its sizes in open_clip's format.

    Raises:
        ValueError: If open_clip does not have the model, or its image encoder is not a ResNet.
    """
    model = CLIP(**_clip_config(clip), quick_gelu=True)
    for name, parameter in model.visual.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    model.text_projection.mul_(0.1)
    return model


def _clip_config(clip: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of a ResNet CLIP in open_clip's format.

    Raises:
        ValueError: If there is no such model, it is not a ResNet, or its sizes are incomplete.
    """
    # Check the name first: for some names outside the list, open_clip downloads a model.
    if isinstance(clip, str) and clip not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {clip!r}; see open_clip.list_models()")
    config = open_clip.get_model_config(clip) if isinstance(clip, str) else clip
    if missing := sorted({"embed_dim", *ENCODER_KEYS} - config.keys()):
        raise ValueError(f"model.clip must have {', '.join(missing)} too, in open_clip's format")
    stages = config["vision_cfg"].get("layers")
    if not isinstance(stages, (list, tuple)):
        raise ValueError(f"the image encoder must be one of CLIP's ResNets, and {clip!r} is not")
    for encoder, allowed in ENCODER_KEYS.items():
        if unknown := sorted(set(config[encoder]) - allowed):
            raise ValueError(
                f"{encoder} has unknown keys {', '.join(unknown)}; "
                f"a ResNet CLIP has {', '.join(sorted(allowed))}"
            )
    if len(stages) != 4:
        raise ValueError(f"CLIP's ResNet has four stages, got {stages}")
    for blocks in stages:
        check_integer("each of vision_cfg.layers", blocks, 1, maximum=MAX_LAYERS)
    layers = config["text_cfg"].get("layers", CLIPTextCfg.layers)
    check_integer("text_cfg.layers", layers, 1, maximum=MAX_LAYERS)
    return {name: config[name] for name in ("embed_dim", *ENCODER_KEYS)}
