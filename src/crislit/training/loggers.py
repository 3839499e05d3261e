"""Weights & Biases and TensorBoard beyond scalars: configuration, samples, checkpoints."""

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure

from crislit.checkpoints import unreachable
from crislit.errors import see
from crislit.io import Image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """An evaluated sample to show.

    Attributes:
        number: Its number in its split.
        sentence: Its sentence.
        image: (h, w, 3) uint8 RGB.
        target: (h, w), 0 or 1.
        prediction: (h, w), 0 or 1.
        iou: IoU of target and prediction.
        figure: All of it as a plot.
    """

    number: int
    sentence: str
    image: Image
    target: npt.NDArray[Any]
    prediction: npt.NDArray[Any]
    iou: float
    figure: Figure


def choose_wandb_mode(folder: Path) -> None:
    """Let Weights & Biases log offline without a key or without a connection to its server."""
    from requests.utils import get_netrc_auth  # comes with wandb, which looks for keys like this

    if os.environ.get("WANDB_MODE"):  # the user's choice
        return
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    has_key = os.environ.get("WANDB_API_KEY") or get_netrc_auth(server)  # from `wandb login`
    reason = unreachable(server) if has_key else "no WANDB_API_KEY"
    if reason:
        os.environ["WANDB_MODE"] = "offline"
        log.warning(
            "%s: Weights & Biases logs offline; "
            "`wandb sync %s/wandb/offline-run-*` uploads later%s",
            reason,
            folder,
            see("wandb"),
        )


def earlier_wandb_run(folder: Path) -> str | None:
    """Return the Weights & Biases id of the interrupted run in a folder."""
    runs = sorted(folder.glob("wandb/*run-*-*"), key=lambda path: path.name.split("run-", 1)[1])
    return runs[-1].name.rsplit("-", 1)[1] if runs else None


def earlier_rows(file: Path, steps: int) -> list[dict[str, str]]:
    """Return the rows of an interrupted run's ``metrics.csv`` up to a checkpoint.

    A validation after the checkpoint's step runs again, so its row is left out.

    Args:
        file: The CSV file.
        steps: Optimizer steps of the checkpoint.
    """
    if not file.is_file():
        return []
    complete, _, _ = file.read_text(encoding="utf-8").rpartition("\n")  # drops a truncated line
    rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(complete.splitlines())]
    return [
        row
        for row in rows
        if int(row["step"]) < steps - any(name.endswith("/mIoU") for name in row)
    ]


def log_samples(loggers: Sequence[Logger], samples: Sequence[Sample], step: int) -> None:
    """Log samples: in Weights & Biases with masks to switch on and off, in TensorBoard as plots."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _log_wandb_samples(logger, samples)
        elif isinstance(logger, TensorBoardLogger):
            for sample in samples:
                logger.experiment.add_figure(f"samples/{sample.number:05d}", sample.figure, step)


def _log_wandb_samples(logger: WandbLogger, samples: Sequence[Sample]) -> None:
    import wandb

    images = [
        wandb.Image(
            sample.image,
            caption=sample.sentence,
            masks={
                name: {
                    "mask_data": getattr(sample, name).astype(np.uint8) * label,
                    "class_labels": {0: "background", label: name},
                }
                for label, name in ((1, "target"), (2, "prediction"))  # labels differ in one table
            },
        )
        for sample in samples
    ]
    figures = [
        wandb.Image(sample.figure, caption=f"{sample.sentence} ({sample.iou:.2f})")
        for sample in samples
    ]
    rows = [[s.number, s.sentence, image, s.iou] for s, image in zip(samples, images, strict=True)]
    table = wandb.Table(columns=["sample", "sentence", "image", "IoU"], data=rows)
    logger.experiment.log({"samples": table, "overlays": images, "figures": figures})


def log_checkpoint(
    loggers: Sequence[Logger], checkpoint: Path, metadata: Mapping[str, Any]
) -> None:
    """Upload the run's checkpoint to Weights & Biases as an artifact, if it is online."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and not logger.experiment.offline:
            import wandb

            artifact = wandb.Artifact(
                f"crislit-{logger.experiment.id}", type="model", metadata=dict(metadata)
            )
            artifact.add_file(str(checkpoint))
            logger.experiment.log_artifact(artifact)


def close_loggers(loggers: Sequence[Logger]) -> None:
    """Close loggers that would otherwise wait for the end of the process."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
