"""The names that the authors' released network gives its parameters, and ours."""

from collections.abc import Mapping

from torch import Tensor

PREFIXES = (  # released, ours; the first that fits counts
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
INNER = (  # within a decoder layer
    (".norm1.", ".self_norm_in."),
    (".norm2.", ".cross_norm_in."),
    (".norm3.", ".ffn_norm_in."),
    (".self_attn.", ".self_attention."),
    (".self_attn_norm.", ".self_norm_out."),
    (".multihead_attn.", ".cross_attention."),
    (".cross_attn_norm.", ".cross_norm_out."),
)
UNUSED = "backbone.logit_scale"
"""CLIP's temperature: in every released checkpoint, and used by nothing."""


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released state dict's entries to ours, and leave out CLIP's unused logit scale.

    Raises:
        KeyError: If a name belongs to no part of the released network.
    """
    return {rename_released(name): value for name, value in state.items() if name != UNUSED}


def rename_released(name: str) -> str:
    """Return our name of a released parameter or buffer."""
    for released, ours in PREFIXES:
        if name.startswith(released):
            name = ours + name.removeprefix(released)
            if ours == "decoder.":
                for theirs, inner in INNER:
                    name = name.replace(theirs, inner)
            return name
    raise KeyError(f"{name!r} is no parameter of the released CRIS network")
