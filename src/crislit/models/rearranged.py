"""The same network in fewer multiplications: what is linear changes places. Symbols: see ``cris.py``.

Two things, apart from each other. :func:`rearrange` keeps every weight and works in training too. :func:`for_inference` also
folds what is fixed once training has ended. Both compute the network's function, up to rounding.
"""

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from crislit.models.cris import CRIS
from crislit.models.neck import Maps, Neck, coordinates, for_each_sentence, upsample2
from crislit.models.projector import ImageProjector, TextProjector, sum_of_taps

LARGE_MAP = 2**18
"""Numbers of a sentence's z_v from which the maps of several sentences leave a CPU's cache; RN50 has 2.8 million at 416."""


class SentenceBySentence(CRIS):
    """A network that takes sentences one at a time through its last parts, where its maps are large."""

    def classify_pixels(self, fused: Tensor, words: Tensor, padding: Tensor, sentence: Tensor) -> Tensor:
        """Predict from the fused map, (B, D, h, w') -> (B, 1, H/4, W/4)."""
        small = 8 * fused[0].numel() < LARGE_MAP
        if small or fused.device.type != "cpu" or torch.compiler.is_compiling():
            return super().classify_pixels(fused, words, padding, sentence)
        parts = zip(*(torch.split(x, 1) for x in (fused, words, padding, sentence)), strict=True)
        return torch.cat([super(SentenceBySentence, self).classify_pixels(*part) for part in parts])


def rearrange(model: CRIS, kind: type[CRIS] = CRIS) -> CRIS:
    """Return a network of the same parts, under the same names, that multiplies less; training one trains the other."""
    return kind(
        image_encoder=model.image_encoder,
        text_encoder=model.text_encoder,
        neck=RearrangedNeck(model.neck),
        decoder=model.decoder,
        image_projector=RearrangedImageProjector(model.image_projector),
        head=model.head,
        settings=model.settings,
    ).train(model.training)


@torch.no_grad()
def for_inference(model: CRIS) -> CRIS:
    """Return a network for evaluation alone: rearranged, every BatchNorm in the layer before it, z_v in the text projector.

    Weights that need no change are shared, not copied, and the others are the model's of now: make it again once those change.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    network = rearrange(copy.deepcopy(model, shared), SentenceBySentence).eval()
    fold_batchnorms(network)
    if isinstance(network.head, TextProjector):
        last = network.image_projector[-1]
        assert isinstance(last, nn.Conv2d)
        network.head = FoldedTextProjector(network.head, last)
        network.image_projector[-1] = nn.Identity()
    return network


def fold_batchnorms(module: nn.Module) -> None:
    """Fold every BatchNorm that follows a convolution or linear layer into it; modules hold their parts in the order of use."""
    for parent in list(module.modules()):
        children = list(parent.named_children())
        for (name, layer), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(norm, _BatchNorm) and isinstance(layer, (nn.Conv2d, nn.Linear)):
                fused = fuse_conv_bn_eval(layer, norm) if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval(layer, norm)
                setattr(parent, name, fused)
                setattr(parent, norm_name, nn.Identity())


def take_over(box: nn.Module, other: nn.Module) -> None:
    """Make a box of another's parts."""
    nn.Module.__init__(box)
    for name, part in other.named_children():
        box.add_module(name, part)


class RearrangedNeck(Neck):
    """The neck, with every 1 x 1 convolution over a concatenation as a sum of one a part.

    So the pictures' parts are computed once a picture, and those of f5 at H/32, before they are upsampled: a 1 x 1 convolution
    and the upsampling change places.

    Args:
        neck: The neck as written, whose parts are taken over, not copied.
    """

    def __init__(self, neck: Neck) -> None:
        take_over(self, neck)

    def project_maps(self, c3: Tensor, c4: Tensor, c5: Tensor) -> Maps:
        """Compute what no sentence changes, once a picture: parts of f3 and f4, (P, b, h, w') each, and v5."""
        v3, v4, v5 = super().project_maps(c3, c4, c5)
        return convolve_part(self.fuse_f3, v3, 0), convolve_part(self.fuse_f4, v4, 0), v5

    def fuse(self, maps: Maps, sentence: Tensor, owners: Tensor | None = None) -> Tensor:
        """Fuse projected maps with the sentences, (B, E) -> (B, D, h, w')."""
        t = self.project_sentence(sentence)[:, :, None, None]  # (B, c, 1, 1)
        f3_part, f4_part, v5 = (for_each_sentence(v, sentence.shape[0], owners) for v in maps)
        f5 = self.normalise_product(v5 * t)  # (B, c, H/32, W/32), eq. 1
        b = f4_part.shape[1]
        f4 = self.fuse_f4[1:](f4_part + upsample2(convolve_part(self.fuse_f4, f5, -f5.shape[1])))  # (B, b, H/16, W/16), eq. 2
        f3 = self.fuse_f3[1:](f3_part + convolve_part(self.fuse_f3, f4, -b))  # (B, b, H/16, W/16), eq. 2
        smooth = torch.cat([self.smooth_f3(f3), self.smooth_f4(f4)], dim=1)
        f5_part = upsample2(convolve_part(self.aggregate, self.smooth_f5(f5), -b))
        fused = self.aggregate[1:](convolve_part(self.aggregate, smooth, 0) + f5_part)  # eq. 3
        places = convolve_part(self.locate, coordinates(fused[:1]), -2)  # the same for every picture
        located = self.locate[1:](convolve_part(self.locate, fused, 0) + places)  # eq. 4
        refined: Tensor = self.refine(located)
        return refined


def convolve_part(conv_bn_relu: nn.Sequential, x: Tensor, start: int) -> Tensor:
    """Return what a map adds to the convolution of a concatenation, in which its channels begin at ``start``.

    The bias is added with the first map. Negative numbers count from the end.
    """
    conv = conv_bn_relu[0]
    assert isinstance(conv, nn.Conv2d)
    start %= conv.in_channels
    weight = conv.weight[:, start : start + x.shape[1]]
    return F.conv2d(x, weight, conv.bias if start == 0 else None, padding=conv.padding)


class RearrangedImageProjector(ImageProjector):
    """The image projector, with each upsampling after the multiplications of the convolution that follows it.

    Args:
        projector: The projector as written, whose parts are taken over, not copied.
    """

    def __init__(self, projector: ImageProjector) -> None:
        take_over(self, projector)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w') -> (B, D/2, 4h, 4w')."""
        for block in (self[1], self[3]):
            x = self.run(lambda x, block=block: block[1:](upsample2_and_convolve(x, block[0].weight, block[0].bias)), x)
        return self.run(self[4], x)


def upsample2_and_convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Double a map's height and width, bilinearly, and convolve it: (B, C, h, w) -> (B, C', 2h, 2w).

    Each tap of the kernel mixes channels, and the upsampling mixes cells: they change places. Channels are mixed in the small
    map, with a quarter of the multiplications; then columns and rows are upsampled and moved to where their tap is.

    Args:
        x: The map.
        weight: (C', C, k, k), k odd.
        bias: (C',).
    """
    (b, c, h, w), (out, _, k, _) = x.shape, weight.shape
    taps = weight.permute(3, 0, 2, 1).reshape(-1, c, 1, 1)  # (k C' k, C, 1, 1): columns of the kernel first, its rows last
    mixed = F.conv2d(x.contiguous(), taps).reshape(b, k, out * k * h, w)
    wide = mixed.transpose(1, 2).flatten(2) @ upsampled_and_moved(w, k, x)  # (B, C' k h, 2w)
    high = upsampled_and_moved(h, k, x).T @ wide.reshape(b, out, k * h, 2 * w)  # (B, C', 2h, 2w)
    return high if bias is None else high + bias[:, None, None]


def upsampled_and_moved(n: int, k: int, like: Tensor) -> Tensor:
    """Return the matrix that doubles n cells, bilinearly, and moves what each of k taps gives to the middle: (k n, 2n)."""
    cells = torch.eye(n, dtype=like.dtype, device=like.device)[None]
    doubled = F.interpolate(cells, scale_factor=2, mode="linear", align_corners=False)[0]  # (n, 2n)
    padded = F.pad(doubled, [k // 2] * 2)  # the convolution sees zeros outside
    return torch.cat([padded[:, i : i + 2 * n] for i in range(k)])


class FoldedTextProjector(nn.Module):
    """The text projector and the image projector's last convolution in one: z_t made for what enters that convolution.

    Args:
        head: The text projector.
        last: A 1 x 1 convolution.
    """

    def __init__(self, head: TextProjector, last: nn.Conv2d) -> None:
        super().__init__()
        assert last.bias is not None
        self.taps = head.kernel_size**2
        mix, shift = last.weight[:, :, 0, 0], last.bias  # (C, C) and (C,)
        made = torch.cat([head.linear.weight, head.linear.bias[:, None]], dim=1)  # (C k k + 1, E + 1)
        kernels = made[:-1].reshape(-1, self.taps, made.shape[1])
        moved, constants = torch.einsum("oi,oke->ike", mix, kernels), torch.einsum("o,oke->ke", shift, kernels)
        made = torch.cat([moved.flatten(0, 1), constants, made[-1:]])
        self.linear = nn.Linear(head.linear.in_features, len(made))
        self.linear.weight, self.linear.bias = nn.Parameter(made[:, :-1].contiguous()), nn.Parameter(made[:, -1].contiguous())

    def forward(self, pixels: Tensor, sentence: Tensor) -> Tensor:
        """Return the logits, (B, C, H/4, W/4) and (B, E) -> (B, 1, H/4, W/4)."""
        z_t = self.linear(sentence)
        taps = z_t[:, : -self.taps - 1].reshape(z_t.shape[0], -1, self.taps).transpose(1, 2)  # (B, k k, C)
        products = taps @ pixels.flatten(2) + z_t[:, -self.taps - 1 : -1, None]
        return sum_of_taps(products.reshape(*products.shape[:2], *pixels.shape[-2:]), z_t[:, -1])
