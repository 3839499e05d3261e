"""Weights & Biases and TensorBoard beyond scalars: configuration, samples, checkpoints."""

import csv
import logging
import netrc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure

from crislit.checkpoints.clip_weights import unreachable
from crislit.io.images import Image

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
    if os.environ.get("WANDB_MODE"):  # the user's choice
        return
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    has_key = os.environ.get("WANDB_API_KEY") or has_wandb_key(server)
    reason = unreachable(server) if has_key else "no WANDB_API_KEY"
    if reason:
        os.environ["WANDB_MODE"] = "offline"
        log.warning(
            "%s: Weights & Biases logs offline; `wandb sync %s/wandb/offline-run-*` uploads later",
            reason,
            folder,
        )


def has_wandb_key(server: str) -> bool:
    """Whether `wandb login` has stored a key for a server, in ``$NETRC`` or the home folder."""
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    host = urlsplit(server).hostname or server
    for file in files:
        try:
            if netrc.netrc(str(file.expanduser())).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


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
    text = file.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1].splitlines()  # the last line may be truncated
    rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(complete)]
    validated = [any(name.endswith("/mIoU") for name in row) for row in rows]
    return [
        row
        for row, is_last in zip(rows, validated, strict=True)
        if int(row["step"]) < steps - is_last
    ]


def log_config(loggers: Sequence[Logger], config: Mapping[str, Any], parameters: int) -> None:
    """Log the whole configuration and the number of parameters."""
    for logger in loggers:
        logger.log_hyperparams({**config, "parameters": parameters})


def log_samples(loggers: Sequence[Logger], samples: Sequence[Sample], step: int) -> None:
    """Log samples: in Weights & Biases with masks to switch on and off, in TensorBoard as plots."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _log_wandb_samples(logger, samples)
        elif isinstance(logger, TensorBoardLogger):
            for sample in samples:
                name = f"samples/{sample.number:05d}"
                logger.experiment.add_figure(name, sample.figure, global_step=step)


def _log_wandb_samples(logger: WandbLogger, samples: Sequence[Sample]) -> None:
    import wandb

    table = wandb.Table(columns=["sample", "sentence", "image", "IoU"])
    images, figures = [], []
    for sample in samples:
        masks = {"target": sample.target, "prediction": sample.prediction}
        overlays = {}
        for label, (name, mask) in enumerate(masks.items(), start=1):  # labels of one table differ
            data = mask.astype(np.uint8) * label
            overlays[name] = {"mask_data": data, "class_labels": {0: "background", label: name}}
        image = wandb.Image(sample.image, caption=sample.sentence, masks=overlays)
        table.add_data(sample.number, sample.sentence, image, sample.iou)
        images.append(image)
        caption = f"{sample.sentence} ({sample.iou:.2f})"
        figures.append(wandb.Image(sample.figure, caption=caption))
    logger.experiment.log({"samples": table, "overlays": images, "figures": figures})


def log_checkpoint(
    loggers: Sequence[Logger], checkpoint: Path, metadata: Mapping[str, Any]
) -> None:
    """Upload the run's checkpoint to Weights & Biases as an artifact, if it is online."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and not logger.experiment.offline:
            import wandb

            name = f"crislit-{logger.experiment.id}"
            artifact = wandb.Artifact(name, type="model", metadata=dict(metadata))
            artifact.add_file(str(checkpoint))
            logger.experiment.log_artifact(artifact)


def close_loggers(loggers: Sequence[Logger]) -> None:
    """Close loggers that would otherwise wait for the end of the process."""
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
