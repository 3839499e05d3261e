"""Data sets: reading, drawing and serving them."""

from typing import TYPE_CHECKING

from crislit import import_on_use
from crislit.data.custom import (
    draw_sheets,
    find_remarks,
    measure_targets,
    read_custom,
    read_images,
    summarize,
    tabulate,
)
from crislit.data.refer_annotations import parse_segmentation, rasterize
from crislit.data.refer_index import ReferIndex
from crislit.data.samplers import NO_SAMPLE, TrainKey, evaluation_share
from crislit.data.scenes import encode_segmentation
from crislit.data.shapes import SETS, make_scene
from crislit.data.shapes import VERSION as SHAPES_VERSION
from crislit.data.sources import DataSource, build_source

if TYPE_CHECKING:
    from crislit.data.datamodule import ReferDataModule, completed_batches
    from crislit.data.dataset import EvaluationBatch, ReferEvaluationSet, TrainBatch, read_image

__all__ = [
    "NO_SAMPLE",
    "SETS",
    "SHAPES_VERSION",
    "DataSource",
    "EvaluationBatch",
    "ReferDataModule",
    "ReferEvaluationSet",
    "ReferIndex",
    "TrainBatch",
    "TrainKey",
    "build_source",
    "completed_batches",
    "draw_sheets",
    "encode_segmentation",
    "evaluation_share",
    "find_remarks",
    "make_scene",
    "measure_targets",
    "parse_segmentation",
    "rasterize",
    "read_custom",
    "read_image",
    "read_images",
    "summarize",
    "tabulate",
]

__getattr__ = import_on_use(
    __name__,
    {
        "completed_batches": "datamodule",
        "EvaluationBatch": "dataset",
        "read_image": "dataset",
        "ReferDataModule": "datamodule",
        "ReferEvaluationSet": "dataset",
        "TrainBatch": "dataset",
    },
)
