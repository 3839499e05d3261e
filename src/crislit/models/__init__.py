"""The network: one file per box of the paper's figure 3, put together in ``cris.py``."""

from crislit.models.boxes import check_boxes, packages, require_trust
from crislit.models.build import build_cris
from crislit.models.compilation import check_compiler, compile_for_inference
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS, check_max_tokens, count_parameters
from crislit.models.decoder import Decoder, DecoderLayer, sine_positions, sine_positions_2d
from crislit.models.image_encoder import ImageEncoder, SpatialAttentionPool
from crislit.models.neck import Maps, Neck
from crislit.models.optimized import optimize_for_inference, optimize_for_training
from crislit.models.projector import ImageProjector, PixelClassifier, TextProjector
from crislit.models.recompute import recompute_activations
from crislit.models.text_encoder import TextEncoder

__all__ = [
    "CRIS",
    "CRISConfig",
    "Decoder",
    "DecoderLayer",
    "ImageEncoder",
    "ImageProjector",
    "Maps",
    "Neck",
    "PixelClassifier",
    "SpatialAttentionPool",
    "TextEncoder",
    "TextProjector",
    "build_cris",
    "check_boxes",
    "check_compiler",
    "check_max_tokens",
    "compile_for_inference",
    "count_parameters",
    "optimize_for_inference",
    "optimize_for_training",
    "packages",
    "recompute_activations",
    "require_trust",
    "sine_positions",
    "sine_positions_2d",
]
