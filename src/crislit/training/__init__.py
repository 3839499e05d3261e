"""Training and evaluation with Lightning; ``run.py`` trains one configuration."""

from typing import TYPE_CHECKING

from crislit import import_on_use

if TYPE_CHECKING:
    from crislit.training.allocator import keep_freed_memory
    from crislit.training.build import (
        build_data,
        build_model,
        check_values,
        require_trust_of_data,
    )
    from crislit.training.callbacks import draw_mask
    from crislit.training.command_line import quote_value
    from crislit.training.evaluation import evaluate_checkpoint
    from crislit.training.fonts import readable_text
    from crislit.training.from_python import train_network
    from crislit.training.losses import (
        BCEDiceLoss,
        FocalLoss,
        text_to_pixel_contrastive_loss,
    )
    from crislit.training.metrics import METRICS, SegmentationMetric, intersection_and_union, iou
    from crislit.training.processes import is_main_process
    from crislit.training.program import FULL_ERROR, SWEEP_JOB, hydra_command
    from crislit.training.provenance import commit, fingerprint, hardware, stored_fingerprint
    from crislit.training.run_folder import reserve
    from crislit.training.task import CRISTask

__all__ = [
    "FULL_ERROR",
    "METRICS",
    "SWEEP_JOB",
    "BCEDiceLoss",
    "CRISTask",
    "FocalLoss",
    "SegmentationMetric",
    "build_data",
    "build_model",
    "check_values",
    "commit",
    "draw_mask",
    "evaluate_checkpoint",
    "fingerprint",
    "hardware",
    "hydra_command",
    "intersection_and_union",
    "iou",
    "is_main_process",
    "keep_freed_memory",
    "quote_value",
    "readable_text",
    "require_trust_of_data",
    "reserve",
    "stored_fingerprint",
    "text_to_pixel_contrastive_loss",
    "train_network",
]

__getattr__ = import_on_use(
    __name__,
    {
        **{"build_data": "build", "build_model": "build", "check_values": "build"},
        **{"draw_mask": "callbacks", "evaluate_checkpoint": "evaluation", "CRISTask": "task"},
        **{"hydra_command": "program", "FULL_ERROR": "program", "SWEEP_JOB": "program"},
        **{"commit": "provenance", "fingerprint": "provenance", "hardware": "provenance"},
        **{"METRICS": "metrics", "SegmentationMetric": "metrics", "iou": "metrics"},
        **{"is_main_process": "processes", "reserve": "run_folder"},
        "require_trust_of_data": "build",
        "intersection_and_union": "metrics",
        "keep_freed_memory": "allocator",
        "quote_value": "command_line",
        "stored_fingerprint": "provenance",
        **{"BCEDiceLoss": "losses", "FocalLoss": "losses"},
        "text_to_pixel_contrastive_loss": "losses",
        "readable_text": "fonts",
        "train_network": "from_python",
    },
)
