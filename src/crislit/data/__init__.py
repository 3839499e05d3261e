"""Data sets: reading, drawing and serving them."""

import importlib
from typing import TYPE_CHECKING, Any

from crislit.data.custom import read_custom
from crislit.data.custom_check import find_notes, find_unreadable, summarize
from crislit.data.refer_annotations import parse_segmentation, rasterize
from crislit.data.refer_index import ReferIndex
from crislit.data.samplers import NO_SAMPLE, TrainKey, evaluation_share
from crislit.data.scenes import encode_segmentation
from crislit.data.shapes import SETS, make_scene
from crislit.data.sources import build_source

if TYPE_CHECKING:
    from crislit.data.datamodule import ReferDataModule, completed_batches
    from crislit.data.dataset import EvaluationBatch, ReferEvaluationSet, TrainBatch, read_image

__all__ = [
    "NO_SAMPLE",
    "SETS",
    "EvaluationBatch",
    "ReferDataModule",
    "ReferEvaluationSet",
    "ReferIndex",
    "TrainBatch",
    "TrainKey",
    "build_source",
    "completed_batches",
    "encode_segmentation",
    "evaluation_share",
    "find_notes",
    "find_unreadable",
    "make_scene",
    "parse_segmentation",
    "rasterize",
    "read_custom",
    "read_image",
    "summarize",
]
MODULES = {
    "completed_batches": "datamodule",
    "EvaluationBatch": "dataset",
    "read_image": "dataset",
    "ReferDataModule": "datamodule",
    "ReferEvaluationSet": "dataset",
    "TrainBatch": "dataset",
}


def __getattr__(name: str) -> Any:
    """Import Lightning and Albumentations, which take seconds, on first use."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
