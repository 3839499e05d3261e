"""What a run shows in Weights & Biases and TensorBoard beyond its scalars: configuration, samples with masks, checkpoint."""

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

from crislit.data.letterbox import Image
from crislit.models.clip_weights import unreachable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """An evaluated sample, to be looked at.

    Attributes:
        number: Its number in its split.
        sentence: What was asked for.
        image: The picture, (h, w, 3) uint8 RGB.
        truth: (h, w), 0 or 1.
        prediction: (h, w), 0 or 1.
        iou: How well they agree.
        figure: All of it drawn.
    """

    number: int
    sentence: str
    image: Image
    truth: npt.NDArray[Any]
    prediction: npt.NDArray[Any]
    iou: float
    figure: Figure


def choose_wandb_mode(folder: Path) -> None:
    """Let Weights & Biases log offline where nobody is logged in or its server is out of reach, and say so in a line."""
    if os.environ.get("WANDB_MODE"):  # the user's own choice
        return
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    key = os.environ.get("WANDB_API_KEY") or knows_key(server)
    reason = unreachable(server) if key else "no WANDB_API_KEY"
    if reason:
        os.environ["WANDB_MODE"] = "offline"
        log.warning("%s: Weights & Biases logs offline; `wandb sync %s/wandb/offline-run-*` sends it later", reason, folder)


def knows_key(server: str) -> bool:
    """Whether `wandb login` has left a key for a server: in the file that NETRC names, or in the home folder's."""
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


def earlier_run(folder: Path) -> str | None:
    """Return the id under which Weights & Biases knows a folder's run that was interrupted."""
    runs = sorted(folder.glob("wandb/*run-*-*"), key=lambda path: path.name.split("run-", 1)[1])
    return runs[-1].name.rsplit("-", 1)[1] if runs else None


def earlier_rows(file: Path, steps: int) -> list[dict[str, str]]:
    """Return the rows of an interrupted run's ``metrics.csv`` until the checkpoint that it goes on from.

    A validation after the checkpoint's step is measured again, and its row left out.

    Args:
        file: The file.
        steps: Optimizer steps that the checkpoint has seen.
    """
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1].splitlines()  # the end of the last line may be missing
    known = [{name: value for name, value in row.items() if value} for row in csv.DictReader(whole)]
    validated = [any(name.endswith("/mIoU") for name in row) for row in known]
    return [row for row, again in zip(known, validated, strict=True) if int(row["step"]) < steps - again]


def log_configuration(loggers: Sequence[Logger], settings: Mapping[str, Any], parameters: int) -> None:
    """Tell every logger the whole configuration and the number of parameters."""
    for logger in loggers:
        logger.log_hyperparams({**settings, "parameters": parameters})


def log_samples(loggers: Sequence[Logger], samples: Sequence[Sample], step: int) -> None:
    """Show samples: in Weights & Biases a table whose masks can be switched on and off, in TensorBoard the drawn figures."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            table = wandb.Table(columns=["sample", "sentence", "picture", "IoU"])
            pictures = []
            for sample in samples:
                masks = {"truth": sample.truth, "prediction": sample.prediction}
                overlays = {
                    name: {"mask_data": mask.astype(np.uint8) * label, "class_labels": {0: "background", label: name}}
                    for label, (name, mask) in enumerate(masks.items(), start=1)  # a table has one list of labels for all
                }
                picture = wandb.Image(sample.image, caption=sample.sentence, masks=overlays)
                table.add_data(sample.number, sample.sentence, picture, sample.iou)
                pictures.append(picture)
            drawn = [wandb.Image(sample.figure, caption=f"{sample.sentence} ({sample.iou:.2f})") for sample in samples]
            logger.experiment.log({"samples": table, "overlays": pictures, "figures": drawn})
        elif isinstance(logger, TensorBoardLogger):
            for sample in samples:
                logger.experiment.add_figure(f"samples/{sample.number:05d}", sample.figure, global_step=step)


def log_checkpoint(loggers: Sequence[Logger], checkpoint: Path, metadata: Mapping[str, Any]) -> None:
    """Hand the run's checkpoint to Weights & Biases as an artifact, where it is online."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and not logger.experiment.offline:
            import wandb

            artifact = wandb.Artifact(f"crislit-{logger.experiment.id}", type="model", metadata=dict(metadata))
            artifact.add_file(str(checkpoint))
            logger.experiment.log_artifact(artifact)


def close_loggers(loggers: Sequence[Logger]) -> None:
    """Close what would otherwise wait for the process's end."""
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
