"""CRIS, CLIP-driven referring image segmentation: masks from sentences, as a PyTorch Lightning module library."""

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crislit.checkpoints.released import load_released
    from crislit.inference.segmenter import Segmenter, load
    from crislit.models.cris import CRIS
    from crislit.transforms.tokenizer import tokenize

try:
    __version__ = version("crislit")
except PackageNotFoundError:  # src/ on the path, and nothing installed
    __version__ = "0+unknown"
__all__ = ["CRIS", "Segmenter", "__version__", "load", "load_released", "tokenize"]

os.environ.setdefault(
    "NO_ALBUMENTATIONS_UPDATE", "1"
)  # else its import asks a server for the newest version

_HOMES = {
    "CRIS": "crislit.models.cris",
    "Segmenter": "crislit.inference.segmenter",
    "load": "crislit.inference.segmenter",
    "load_released": "crislit.checkpoints.released",
    "tokenize": "crislit.transforms.tokenizer",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and only then: `import crislit` alone stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'crislit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
