"""CRIS: the five boxes of the paper's figure 3, put together.

Symbols, everywhere under ``models/``: B batch, L tokens of a sentence, H W size of the input (multiples of 32), w width of
CLIP's ResNet (64), E CLIP's joint embedding (1024 for RN50, 512 for RN101), D width of the decoder (512),
h = H/16 and w' = W/16 the fused map, N = h w' its cells, n layers of the decoder, k side of the text projector's kernel.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg
from torch import Tensor, nn

from crislit.errors import InputError, check_whole
from crislit.models.decoder import Decoder
from crislit.models.image_encoder import ImageEncoder
from crislit.models.neck import Maps, Neck
from crislit.models.projector import ImageProjector, PixelClassifier, TextProjector
from crislit.models.text_encoder import TextEncoder, padding_mask

VOCABULARY = 49_408
"""Tokens that CLIP's tokenizer has."""


class CRIS(nn.Module):
    """CLIP-driven referring image segmentation.

    Args:
        image_encoder: Pictures to c3, c4, c5.
        text_encoder: Sentences to words and sentence features.
        neck: Fuses both.
        decoder: None for the rows of table 1 without "Dec." (n = 0).
        image_projector: The decoded map to z_v.
        head: The text projector, or a ``PixelClassifier`` for the rows of table 1 without "Con.".
        settings: What :func:`build_cris` was given, kept for checkpoints.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        neck: Neck,
        decoder: Decoder | None,
        image_projector: ImageProjector,
        head: nn.Module,
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.neck = neck
        self.decoder = decoder
        self.image_projector = image_projector
        self.head = head
        self.settings = dict(settings)

    @property
    def max_words(self) -> int:
        """L, tokens of the longest sentence that the network is made for."""
        return int(self.settings["max_words"])

    def forward(self, images: Tensor, tokens: Tensor, owners: Tensor | None = None) -> Tensor:
        """Predict where each sentence's referent is.

        Args:
            images: (P, 3, H, W), normalised with CLIP's mean and standard deviation; H and W multiples of 32. Sentences
                about the same image share its encoding.
            tokens: (B, L) ids as :func:`crislit.tokenize` gives them.
            owners: (B,) long, the number of each sentence's image. None: each image has B/P sentences, the first image the
                first ones.

        Returns:
            Logits, (B, 1, H/4, W/4), in training and in evaluation alike.

        Raises:
            ValueError: If a side is not a multiple of 32, the sentences do not divide over the images, or they are longer
                than the context.
        """
        return self.ground(self.encode_images(images), tokens, owners)

    def encode_images(self, images: Tensor) -> Maps:
        """Compute everything about images that no sentence changes, (P, 3, H, W) -> the maps of :meth:`Neck.project_maps`.

        Raises:
            ValueError: If a side is not a multiple of 32.
        """
        if images.shape[-2] % 32 or images.shape[-1] % 32:
            raise ValueError(f"image sides must be multiples of 32, got {tuple(images.shape[-2:])}")
        return self.neck.project_maps(*self.image_encoder(images))

    def ground(self, maps: Maps, tokens: Tensor, owners: Tensor | None = None) -> Tensor:
        """Predict from what :meth:`encode_images` computed, see :meth:`forward`.

        Raises:
            ValueError: If sentences do not divide over the images, or are longer than the context.
        """
        if owners is None and len(tokens) % len(maps[0]):
            raise ValueError(f"{len(tokens)} sentences do not divide over {len(maps[0])} images")
        words, sentence = self.text_encoder(tokens)  # (B, L, D), (B, E)
        fused = self.neck.fuse(maps, sentence, owners)  # (B, D, h, w')
        return self.classify_pixels(fused, words, padding_mask(tokens), sentence)

    def classify_pixels(self, fused: Tensor, words: Tensor, padding: Tensor, sentence: Tensor) -> Tensor:
        """Predict from the fused map, (B, D, h, w') -> (B, 1, H/4, W/4)."""
        if self.decoder is not None:
            fused = self.decoder(fused, words, padding)
        pixels = self.image_projector(fused)  # (B, D/2, H/4, W/4)
        logits: Tensor = self.head(pixels, sentence)
        return logits


def build_cris(
    *,
    clip: str | Mapping[str, Any],
    neck: Sequence[int] = (256, 512, 1024),
    decoder_layers: int = 3,
    decoder_heads: int = 8,
    decoder_ffn: int = 2048,
    decoder_dropout: float = 0.1,
    contrastive: bool = True,
    kernel_size: int = 3,
    max_words: int = 17,
) -> CRIS:
    """Build a network with random weights.

    Args:
        clip: The two encoders: a model of open_clip by name (``RN50-quickgelu``), or a mapping in open_clip's format
            (``embed_dim``, ``vision_cfg``, ``text_cfg``). The activation is QuickGELU whatever the mapping says.
        neck: Widths (a, b, c) of the neck; b is the decoder's width and must be the text encoder's.
        decoder_layers: n; 0 leaves the decoder out.
        decoder_heads: Attention heads of the decoder.
        decoder_ffn: Hidden width of its feed-forward networks.
        decoder_dropout: Its dropout rate.
        contrastive: Whether the sentence makes the last convolution ("Con." of table 1).
        kernel_size: k, side of that convolution.
        max_words: L, tokens of the longest sentence it is made for, [SOS] and [EOS] included (``CRIS.max_words``).

    Raises:
        InputError: If the sizes do not fit, or open_clip knows no such model.
    """
    settings = dict(locals())
    if not isinstance(clip, (str, Mapping)):
        raise InputError(f"model.clip must be a model's name or a mapping in open_clip's format, got {clip!r}")
    if isinstance(neck, str) or not isinstance(neck, Sequence) or len(neck) != 3:
        raise InputError(f"model.neck must be three widths, got {neck!r}")
    settings |= {"clip": clip if isinstance(clip, str) else _plain(clip), "neck": list(neck)}
    check_whole("decoder.layers", decoder_layers, 0)  # 0 for no decoder
    check_whole("decoder.heads", decoder_heads, 1)
    check_whole("decoder.ffn", decoder_ffn, 1)
    check_whole("projector.kernel_size", kernel_size, 1)
    check_whole("max_words", max_words, 3)
    if not isinstance(decoder_dropout, (int, float)) or not 0 <= decoder_dropout < 1:
        raise InputError(f"decoder.dropout must be a rate in [0, 1), got {decoder_dropout!r}")
    for width in neck:
        check_whole("each width of model.neck", width, 1)
    try:
        towers = build_clip(clip)
        embed = towers.visual.attnpool.c_proj.out_features
        width = neck[1]
        if decoder_layers and towers.ln_final.normalized_shape[0] != width:
            raise ValueError(f"the decoder's width {width} must be the text encoder's {towers.ln_final.normalized_shape[0]}")
        if max_words > len(towers.positional_embedding):
            raise ValueError(f"max_words={max_words} exceeds the text encoder's context of {len(towers.positional_embedding)}")
        stage4 = towers.visual.attnpool.c_proj.in_features
        return CRIS(
            image_encoder=ImageEncoder(towers.visual),
            text_encoder=TextEncoder(towers),
            neck=Neck((stage4 // 4, stage4 // 2, embed), neck),
            decoder=Decoder(width, decoder_layers, decoder_heads, decoder_ffn, decoder_dropout) if decoder_layers else None,
            image_projector=ImageProjector(width),
            head=TextProjector(embed, width // 2, kernel_size) if contrastive else PixelClassifier(width // 2, kernel_size),
            settings=settings,
        )
    except (ValueError, AssertionError) as error:  # attention asserts that its heads divide its width
        raise InputError(f"cannot build this network: {error}") from error


VISION_KEYS = {"image_size", "layers", "width", "patch_size", "head_width"}
TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers"}
"""What a description of the towers may hold. open_clip knows more keys, some of which fetch other people's models."""


def build_clip(clip: str | Mapping[str, Any]) -> CLIP:
    """Build CLIP's towers, at their native size and always with QuickGELU, with random weights that CRIS can start from.

    Where open_clip's initialisation serves CLIP's own training but not CRIS's, it is changed: residual branches of the
    ResNet contribute from the first step (open_clip starts them at zero), and sentence features start small. At their usual
    size they make the text projector's kernels, and so the first logits, so large that training begins by silencing them.
    """
    if isinstance(clip, str) and clip not in open_clip.list_models():  # open_clip would ask the network for some others
        raise ValueError(f"open_clip knows no model {clip!r}; see open_clip.list_models()")
    config = open_clip.get_model_config(clip) if isinstance(clip, str) else _plain(clip)
    assert config is not None
    missing = [name for name in ("embed_dim", "vision_cfg", "text_cfg") if name not in config]
    if missing:
        raise ValueError(f"the two encoders need {', '.join(missing)} too, in open_clip's format")
    if not isinstance(config["vision_cfg"].get("layers"), list):
        raise ValueError(f"the image encoder must be one of CLIP's ResNets, and {clip!r} is not")
    for tower, known in (("vision_cfg", VISION_KEYS), ("text_cfg", TEXT_KEYS)):
        if unknown := sorted(set(config[tower]) - known):
            raise ValueError(f"{tower} has {', '.join(unknown)}, and a ResNet CLIP only {', '.join(sorted(known))}")
    stages, blocks = config["vision_cfg"]["layers"], config["text_cfg"].get("layers", CLIPTextCfg.layers)
    if len(stages) != 4 or not all(isinstance(stage, int) and stage >= 1 for stage in stages):
        raise ValueError(f"CLIP's ResNet has four stages of at least one block, got {stages}")
    if not isinstance(blocks, int) or blocks < 1:
        raise ValueError(f"the text encoder has at least one layer, got {blocks}")
    towers = CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=True)
    for name, parameter in towers.visual.named_parameters():
        if name.startswith("layer") and name.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    with torch.no_grad():
        towers.text_projection.mul_(0.1)
    return towers


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: _plain(v) if isinstance(v, Mapping) else list(v) if isinstance(v, (list, tuple)) else v for k, v in config.items()
    }


def check_words(model: CRIS, max_words: int) -> None:
    """Raise an :class:`InputError` if a network's text encoder cannot take so many tokens, or not all of CLIP's."""
    context, known = len(model.text_encoder.positional_embedding), model.text_encoder.token_embedding.num_embeddings
    if max_words > context:
        raise InputError(f"dataset.max_words={max_words} does not fit the text encoder's context of {context}")
    if known < VOCABULARY:
        raise InputError(f"the text encoder knows {known} tokens, and CLIP's tokenizer has {VOCABULARY}: expected CLIP's")


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers the optimizer can train (table 1's "Params")."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
