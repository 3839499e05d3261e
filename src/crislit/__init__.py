"""CLIP-driven referring image segmentation (CRIS): segments what a sentence refers to."""

import importlib
from typing import TYPE_CHECKING, Any

from crislit.config import VERSION

if TYPE_CHECKING:
    from crislit.checkpoints.released import load_released
    from crislit.inference.segmenter import Segmenter, load
    from crislit.models.cris import CRIS
    from crislit.transforms.tokenizer import tokenize

__version__ = VERSION
__all__ = ["CRIS", "Segmenter", "__version__", "load", "load_released", "tokenize"]

MODULES = {
    "CRIS": "crislit.models.cris",
    "Segmenter": "crislit.inference.segmenter",
    "load": "crislit.inference.segmenter",
    "load_released": "crislit.checkpoints.released",
    "tokenize": "crislit.transforms.tokenizer",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import crislit`` alone is fast."""
    if name not in MODULES:
        raise AttributeError(f"module 'crislit' has no attribute {name!r}")
    return getattr(importlib.import_module(MODULES[name]), name)
