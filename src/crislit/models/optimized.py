"""Faster, mathematically equivalent forms of the network.

Linear operations are reordered so that they work on smaller maps, and for inference BatchNorms are
folded into the layers before them. Symbols: see ``cris.py``.
"""

import copy
import functools
import itertools
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from crislit.models.cris import CRIS
from crislit.models.neck import Maps, Neck, coordinates, repeat_for_sentences, upsample2
from crislit.models.projector import ImageProjector, TextProjector, sum_of_taps

LARGE_MAP = 2**18
"""With this many elements of z_v per sentence, several sentences at once overflow a CPU's cache.
RN50 at 416 pixels has 2.8 million."""


def optimize_for_training(model: CRIS, network_class: type[CRIS] = CRIS) -> CRIS:
    """Return a network that is equivalent to a model, with fewer multiplications.

    It consists of the same modules under the same names, so training one network trains the other.
    Boxes that other classes replace stay as they are.
    """

    def is_own(box: str) -> bool:
        return box not in model.config.boxes

    return network_class(
        image_encoder=model.image_encoder,
        text_encoder=model.text_encoder,
        neck=OptimizedNeck(model.neck) if is_own("neck") else model.neck,
        decoder=model.decoder,
        image_projector=OptimizedImageProjector(model.image_projector)
        if is_own("image_projector")
        else model.image_projector,
        head=model.head,
        config=model.config,
    ).train(model.training)


@torch.no_grad()
def optimize_for_inference(model: CRIS) -> CRIS:
    """Return an equivalent network for evaluation only.

    In addition to ``optimize_for_training``, BatchNorms are folded into the layers before them,
    and the image projector's last convolution into the text projector. Weights that stay the same
    are shared with the model, the others are copies: call this again after the model has changed.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    network = optimize_for_training(copy.deepcopy(model, shared), SentenceWiseCRIS).eval()
    for name, part in network.named_children():
        if name not in model.config.boxes:  # whose layers may be called in any order
            fold_batchnorms(part)
    projector = network.image_projector
    is_own = not model.config.boxes.keys() & {"head", "image_projector"}
    if is_own and isinstance(network.head, TextProjector):
        network.head = FoldedTextProjector(network.head, cast(nn.Conv2d, projector[-1]))
        projector[-1] = nn.Identity()
    return network


def fold_batchnorms(module: nn.Module) -> None:
    """Fold each BatchNorm into the convolution or linear layer registered right before it."""
    for parent in list(module.modules()):
        for (name, layer), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(norm, _BatchNorm) and isinstance(layer, (nn.Conv2d, nn.Linear)):
                folded = (
                    fuse_conv_bn_eval(layer, norm)
                    if isinstance(layer, nn.Conv2d)
                    else fuse_linear_bn_eval(layer, norm)
                )
                setattr(parent, name, folded)
                setattr(parent, norm_name, nn.Identity())


class SentenceWiseCRIS(CRIS):
    """A network that decodes large maps one sentence at a time, so that they stay in the cache."""

    def decode_mask(
        self, fused: Tensor, words: Tensor, padding: Tensor, sentence: Tensor
    ) -> Tensor:
        """Decode the fused map and compute the logits: see ``CRIS.decode_mask``."""
        is_small = 8 * fused[0].numel() < LARGE_MAP  # z_v has D/2 channels and 16 N pixels
        if is_small or fused.device.type != "cpu" or torch.compiler.is_compiling():
            return super().decode_mask(fused, words, padding, sentence)
        parts = zip(*(torch.split(x, 1) for x in (fused, words, padding, sentence)), strict=True)
        return torch.cat([super(SentenceWiseCRIS, self).decode_mask(*part) for part in parts])


class OptimizedNeck(Neck):
    """The neck, with each convolution over concatenated maps computed as a sum of a term per map.

    The terms of v3 and v4 are computed once per image instead of once per sentence. Those of f5 are
    computed at H/32 and then upsampled, because a 1 x 1 convolution and upsampling commute.

    Args:
        neck: The neck, whose modules are used, not copied.
    """

    def __init__(self, neck: Neck) -> None:
        nn.Module.__init__(self)
        for name, child in neck.named_children():
            self.add_module(name, child)

    def project_maps(self, c3: Tensor, c4: Tensor, c5: Tensor) -> Maps:
        """Compute everything that does not depend on the sentences, once per image.

        Returns:
            The term of v3 in f3 and that of v4 in f4, (P, b, h, w') each, and ``v5``
            (P, c, H/32, W/32).
        """
        v3, v4, v5 = super().project_maps(c3, c4, c5)
        return convolve_part(self.fuse_f3, v3, 0), convolve_part(self.fuse_f4, v4, 0), v5

    def fuse(self, maps: Maps, sentence: Tensor, image_indices: Tensor | None = None) -> Tensor:
        """Fuse projected maps with the sentences: see ``Neck.fuse``."""
        t = self.project_sentence(sentence)[:, :, None, None]  # (B, c, 1, 1)
        f3_v3, f4_v4, v5 = (repeat_for_sentences(v, sentence.shape[0], image_indices) for v in maps)
        b, c = f4_v4.shape[1], v5.shape[1]
        f5 = self.normalise_product(v5 * t)  # (B, c, H/32, W/32), eq. 1
        f4_f5 = upsample2(convolve_part(self.fuse_f4, f5, -c))
        f4 = self.fuse_f4[1:](f4_v4 + f4_f5)  # (B, b, h, w'), eq. 2
        f3 = self.fuse_f3[1:](f3_v3 + convolve_part(self.fuse_f3, f4, -b))  # (B, b, h, w'), eq. 2
        smooth = torch.cat([self.smooth_f3(f3), self.smooth_f4(f4)], dim=1)
        fused_f5 = upsample2(convolve_part(self.aggregate, self.smooth_f5(f5), -b))
        fused = self.aggregate[1:](convolve_part(self.aggregate, smooth, 0) + fused_f5)  # eq. 3
        places = convolve_part(self.locate, coordinates(fused[:1]), -2)  # (1, b, h, w')
        located = self.locate[1:](convolve_part(self.locate, fused, 0) + places)  # eq. 4
        refined: Tensor = self.refine(located)  # (B, D, h, w')
        return refined


def convolve_part(conv_bn_relu: nn.Sequential, x: Tensor, start: int) -> Tensor:
    """Compute the term of one map in a convolution over concatenated maps.

    Args:
        conv_bn_relu: The convolution, with what follows it.
        x: (B, C, h, w), one of the concatenated maps.
        start: Index of its first channel in the concatenation; negative counts from the end. The
            convolution's bias is part of the first map's term.

    Returns:
        (B, C', h, w).
    """
    conv = cast(nn.Conv2d, conv_bn_relu[0])
    start %= conv.in_channels
    weight = conv.weight[:, start : start + x.shape[1]]
    return F.conv2d(x, weight, conv.bias if start == 0 else None, padding=conv.padding)


class OptimizedImageProjector(ImageProjector):
    """The image projector, with each upsampling done after the next convolution's channel mixing.

    Args:
        projector: The image projector, whose modules are used, not copied.
    """

    def __init__(self, projector: ImageProjector) -> None:
        nn.Sequential.__init__(self, *projector)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w') -> (B, D/2, H/4, W/4)."""
        _, block1, _, block2, last = self
        blocks = [functools.partial(upsample2_conv_bn_relu, block) for block in (block1, block2)]
        return self.run_each([*blocks, last], x)


def upsample2_conv_bn_relu(block: nn.Module, x: Tensor) -> Tensor:
    """Upsample a map and apply a block of convolution, BatchNorm and ReLU to it."""
    conv, norm, _ = block.children()
    assert isinstance(conv, nn.Conv2d)
    return F.relu_(norm(upsample2_and_convolve(x, conv.weight, conv.bias)))


def upsample2_and_convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Double the height and width of a map, bilinearly, and convolve it.

    Each tap of a kernel mixes channels, and upsampling mixes cells, so the two commute. Mixing
    channels first, on the small map, takes a quarter of the multiplications. Columns and then rows
    are upsampled afterwards, and shifted by the position of their tap.

    Args:
        x: (B, C, h, w).
        weight: (C', C, k, k), k odd.
        bias: (C',).

    Returns:
        (B, C', 2h, 2w).
    """
    (b, c, h, w), (out, _, k, _) = x.shape, weight.shape
    taps = weight.permute(3, 0, 2, 1).reshape(-1, c, 1, 1)  # (k C' k, C, 1, 1), columns first
    mixed = F.conv2d(x.contiguous(), taps).reshape(b, k, out * k * h, w)
    wide = mixed.transpose(1, 2).flatten(2) @ upsampling_matrix(w, k, x)  # (B, C' k h, 2w)
    high = upsampling_matrix(h, k, x).T @ wide.reshape(b, out, k * h, 2 * w)  # (B, C', 2h, 2w)
    return high if bias is None else high + bias[:, None, None]


def upsampling_matrix(n: int, k: int, like: Tensor) -> Tensor:
    """Return the matrix that upsamples and adds up the products of k taps with n cells.

    The products of each tap are upsampled to 2n cells, with zeros outside, and shifted by the
    position of the tap.

    Args:
        n: Number of cells in a row or column.
        k: Number of taps in a row or column of the kernel.
        like: Tensor that gives type and device.

    Returns:
        (k n, 2n).
    """
    cells = torch.eye(n, dtype=like.dtype, device=like.device)[None]
    doubled = F.interpolate(cells, scale_factor=2, mode="linear", align_corners=False)[0]  # (n, 2n)
    padded = F.pad(doubled, [k // 2] * 2)  # (n, 2n + k - 1)
    return torch.cat([padded[:, i : i + 2 * n] for i in range(k)])


class FoldedTextProjector(nn.Module):
    """The text projector with the image projector's last convolution folded into its kernels.

    Args:
        head: The text projector.
        last: The last convolution of the image projector, 1 x 1 with bias, of C channels.
    """

    def __init__(self, head: TextProjector, last: nn.Conv2d) -> None:
        super().__init__()
        assert last.bias is not None
        self.taps = head.kernel_size**2
        # The bias becomes a last column, so that one product transforms both.
        linear = torch.cat([head.linear.weight, head.linear.bias[:, None]], dim=1)
        kernels = linear[:-1].reshape(-1, self.taps, linear.shape[1])  # (C, k k, E + 1)
        folded = torch.einsum("oi,oke->ike", last.weight[:, :, 0, 0], kernels)  # (C, k k, E + 1)
        tap_biases = torch.einsum("o,oke->ke", last.bias, kernels)  # (k k, E + 1)
        linear = torch.cat([folded.flatten(0, 1), tap_biases, linear[-1:]])
        self.linear = nn.Linear(head.linear.in_features, len(linear))
        self.linear.weight = nn.Parameter(linear[:, :-1].contiguous())
        self.linear.bias = nn.Parameter(linear[:, -1].contiguous())

    def forward(self, pixels: Tensor, sentence: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            pixels: The input of the folded convolution, (B, C, H/4, W/4).
            sentence: (B, E).

        Returns:
            (B, 1, H/4, W/4).
        """
        z_t = self.linear(sentence)  # (B, (C + 1) k k + 1)
        kernels = z_t[:, :-1].reshape(z_t.shape[0], -1, self.taps).mT  # (B, k k, C + 1)
        products = kernels[..., :-1] @ pixels.flatten(2) + kernels[..., -1:]  # (B, k k, H/4 W/4)
        return sum_of_taps(products.unflatten(2, pixels.shape[-2:]), z_t[:, -1])
