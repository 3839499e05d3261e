"""The benchmark's baseline: the released implementation's forward pass, applied to our layers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from crislit.models import (
    CRIS,
    Decoder,
    DecoderLayer,
    ImageEncoder,
    ImageProjector,
    Neck,
    PixelClassifier,
    SpatialAttentionPool,
    TextEncoder,
    TextProjector,
    sine_positions,
    sine_positions_2d,
)


def reference_logits(model: CRIS, images: Tensor, tokens: Tensor) -> Tensor:
    """Predict logits like ``CRIS.forward``, with one sentence per image.

    Args:
        model: The network whose layers are applied.
        images: (B, 3, H, W), normalized.
        tokens: (B, L).

    Returns:
        (B, 1, H/4, W/4).
    """
    c3, c4, c5 = encode_images(model.image_encoder, images)
    ends = tokens.argmax(dim=-1)
    words, sentence = encode_text(model.text_encoder, tokens, ends)
    fused = fuse(model.neck, c3, c4, c5, sentence)
    if model.decoder is not None:
        padding = torch.arange(tokens.shape[1], device=tokens.device) > ends[:, None]
        fused = decode(model.decoder, fused, words, padding)
    return classify(model.image_projector, model.head, fused, sentence)


def encode_images(encoder: ImageEncoder, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encode images to c3, c4 and c5."""
    resnet = encoder.resnet
    c3 = resnet.layer2(resnet.layer1(resnet.stem(images)))
    c4 = resnet.layer3(c3)
    return c3, c4, pool(encoder.pool, resnet.layer4(c4))


def pool(attention: SpatialAttentionPool, stage4: Tensor) -> Tensor:
    """Apply the attention pooling over all positions to the last stage; return c5."""
    b, c, h, w = stage4.shape
    grid = attention.positional_embedding[1:]
    side = round(len(grid) ** 0.5)
    positions = F.interpolate(
        grid.T.reshape(1, -1, side, side), size=(h, w), mode="bicubic", align_corners=False
    )
    x = (stage4 + positions).flatten(2).permute(2, 0, 1)  # (N, B, C)
    q, k, v, out = attention.q_proj, attention.k_proj, attention.v_proj, attention.c_proj
    x, _ = F.multi_head_attention_forward(
        query=x,
        key=x,
        value=x,
        embed_dim_to_check=c,
        num_heads=attention.heads,
        in_proj_weight=None,
        in_proj_bias=torch.cat([q.bias, k.bias, v.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=out.weight,
        out_proj_bias=out.bias,
        need_weights=False,
        use_separate_proj_weight=True,
        q_proj_weight=q.weight,
        k_proj_weight=k.weight,
        v_proj_weight=v.weight,
    )
    x = x.permute(1, 2, 0).reshape(b, -1, h, w)
    return F.relu(x + attention.shortcut(stage4))


def encode_text(encoder: TextEncoder, tokens: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Encode tokens to word features and sentence features."""
    length = tokens.shape[1]
    x = encoder.token_embedding(tokens) + encoder.positional_embedding[:length]
    words = encoder.ln_final(encoder.transformer(x, attn_mask=encoder.attn_mask[:length, :length]))
    rows = torch.arange(len(tokens), device=tokens.device)
    return words, words[rows, ends] @ encoder.text_projection


def fuse(neck: Neck, c3: Tensor, c4: Tensor, c5: Tensor, sentence: Tensor) -> Tensor:
    """Fuse the maps with the sentence."""
    t = neck.project_sentence(sentence)[:, :, None, None]
    f5 = neck.normalise_product(neck.project_c5(c5) * t)
    f5_up = F.interpolate(f5, scale_factor=2, mode="bilinear", align_corners=False)
    f4 = neck.fuse_f4(torch.cat([neck.project_c4(c4), f5_up], dim=1))
    f3 = neck.fuse_f3(torch.cat([F.avg_pool2d(neck.project_c3(c3), 2), f4], dim=1))
    f5 = neck.smooth_f5(f5)
    f5_up = F.interpolate(f5, scale_factor=2, mode="bilinear", align_corners=False)
    fused = neck.aggregate(torch.cat([neck.smooth_f3(f3), neck.smooth_f4(f4), f5_up], dim=1))
    b, _, h, w = fused.shape
    across = torch.linspace(-1, 1, w, device=fused.device).expand(b, 1, h, w)
    down = torch.linspace(-1, 1, h, device=fused.device)[:, None].expand(b, 1, h, w)
    refined: Tensor = neck.refine(neck.locate(torch.cat([fused, across, down], dim=1)))
    return refined


def decode(decoder: Decoder, fused: Tensor, words: Tensor, padding: Tensor) -> Tensor:
    """Decode the fused map with the words."""
    b, c, h, w = fused.shape
    cells = fused.flatten(2).transpose(1, 2)
    cell_positions = sine_positions_2d(h, w, c).to(cells)
    keys = words + sine_positions(torch.arange(words.shape[1]), c).to(words)
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        x = layer.self_norm_in(cells)
        q = x + cell_positions
        x = layer.self_attention(q, q, x, need_weights=False)[0]
        cells = cells + layer.dropout(layer.self_norm_out(x))
        q = layer.cross_norm_in(cells) + cell_positions
        x = layer.cross_attention(q, keys, words, key_padding_mask=padding, need_weights=False)[0]
        cells = cells + layer.dropout(layer.cross_norm_out(x))
        cells = cells + layer.dropout(layer.ffn(layer.ffn_norm_in(cells)))
    decoded: Tensor = decoder.norm(cells)
    return decoded.transpose(1, 2).reshape(b, c, h, w)


def classify(
    projector: ImageProjector, head: torch.nn.Module, fused: Tensor, sentence: Tensor
) -> Tensor:
    """Compute the logits by one grouped convolution with the sentences' kernels."""
    pixels = fused
    for part in projector:
        pixels = part(pixels)
    if isinstance(head, PixelClassifier):
        logits: Tensor = head.conv(pixels)
        return logits
    assert isinstance(head, TextProjector)
    b, c, h, w = pixels.shape
    z_t, k = head.linear(sentence), head.kernel_size
    kernels = z_t[:, :-1].reshape(b, c, k, k)
    pixels = pixels.reshape(1, b * c, h, w)
    return F.conv2d(pixels, kernels, z_t[:, -1], padding=k // 2, groups=b).transpose(0, 1)
