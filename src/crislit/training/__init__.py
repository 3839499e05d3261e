"""Training and evaluation with Lightning; ``run.py`` trains one configuration."""

from typing import TYPE_CHECKING

from crislit import import_on_use
from crislit.training.allocator import keep_freed_memory
from crislit.training.losses import text_to_pixel_contrastive_loss
from crislit.training.metrics import METRICS, SegmentationMetric, intersection_and_union, iou
from crislit.training.provenance import commit, fingerprint, hardware

if TYPE_CHECKING:
    from crislit.training.build import build_data, build_model
    from crislit.training.callbacks import draw_mask
    from crislit.training.evaluation import evaluate_checkpoint
    from crislit.training.program import FULL_ERROR, SWEEP_JOB, hydra_command
    from crislit.training.task import CRISTask

__all__ = [
    "FULL_ERROR",
    "METRICS",
    "SWEEP_JOB",
    "CRISTask",
    "SegmentationMetric",
    "build_data",
    "build_model",
    "commit",
    "draw_mask",
    "evaluate_checkpoint",
    "fingerprint",
    "hardware",
    "hydra_command",
    "intersection_and_union",
    "iou",
    "keep_freed_memory",
    "text_to_pixel_contrastive_loss",
]

__getattr__ = import_on_use(
    __name__,
    {
        "build_data": "build",
        "build_model": "build",
        "CRISTask": "task",
        "draw_mask": "callbacks",
        "evaluate_checkpoint": "evaluation",
        "FULL_ERROR": "program",
        "hydra_command": "program",
        "SWEEP_JOB": "program",
    },
)
