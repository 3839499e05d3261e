"""The network: one file per box of the paper's figure 3, put together in ``cris.py``."""

from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS, count_parameters
from crislit.models.optimized import optimize_for_inference, optimize_for_training

__all__ = [
    "CRIS",
    "CRISConfig",
    "build_cris",
    "count_parameters",
    "optimize_for_inference",
    "optimize_for_training",
]
