"""Callbacks of a run: skipped samples, progress, plots of samples, and the process guard."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crislit.data import (
    EvaluationBatch,
    ReferDataModule,
    ReferEvaluationSet,
    TrainBatch,
    evaluation_share,
)
from crislit.errors import printable
from crislit.io import Image
from crislit.training import processes
from crislit.training.fonts import readable_text
from crislit.training.loggers import Sample, log_samples
from crislit.training.metrics import Mask, intersection_and_union, iou

log = logging.getLogger(__name__)


class ProcessGuard(L.Callback):
    """Ends all processes of a run when one of them dies, see ``crislit.training.processes``."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Watch the processes that Lightning has started."""
        processes.watch_children(getattr(trainer.strategy.launcher, "procs", []))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let each process end on its own after the evaluation, the last collective."""
        if stage == "test":
            processes.detach()


class SkippedSamples(L.Callback):
    """Lists the training samples that ``on_error=skip`` left out, over all workers and processes.

    Args:
        data: The data module.

    Attributes:
        reasons: Why each sample was skipped, by its name.
    """

    def __init__(self, data: ReferDataModule) -> None:
        self.reasons = dict(data.never_usable())

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: TrainBatch,
        batch_idx: int,
    ) -> None:
        """Collect the samples that a batch skipped."""
        self.reasons |= dict(batch.skipped)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store what all processes have skipped so far."""
        self.gather(trainer)
        checkpoint["skipped"] = self.reasons

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore what was skipped before."""
        self.reasons |= checkpoint.get("skipped", {})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what was skipped."""
        self.gather(trainer)
        if trainer.is_global_zero and self.reasons:
            lines = [f"\n  {sample}: {reason}" for sample, reason in self.reasons.items()]
            log.warning(
                "%d training samples could not be used and were replaced:%s",
                len(lines),
                printable("".join(lines)),
            )

    def gather(self, trainer: L.Trainer) -> None:
        """Merge what all processes have skipped; a collective."""
        parts = gather_objects(trainer, self.reasons)
        self.reasons = dict(sorted({key: part[key] for part in parts for key in part}.items()))


def gather_objects(trainer: L.Trainer, item: Any) -> list[Any]:
    """Return every process's item, in the order of their ranks; a collective."""
    items = [item] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(items, item)
    return items


class ValidationLogger(L.Callback):
    """Logs one line after every validation, which stays where a progress bar does not.

    Args:
        split: The validated split.
    """

    def __init__(self, split: str) -> None:
        self.split = split

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log epoch, step, loss and mIoU."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            metrics = trainer.callback_metrics  # a run resumed in a validation has no loss yet
            names = [name for name in ("train/loss", f"{self.split}/mIoU") if name in metrics]
            log.info(
                "epoch %d of %s, step %d: %s",
                trainer.current_epoch + 1,
                trainer.max_epochs,
                trainer.global_step,
                ", ".join(f"{name} {float(metrics[name]):.4f}" for name in names),
            )


class SamplePlots(L.Callback):
    """Plots test samples and hands them to the loggers: image, sentence, target, prediction, IoU.

    Args:
        folder: Receives the plots.
        count: Number of samples, evenly spread over the split.
        loader: Number of the test loader that they are taken from.
        data: Its samples.
    """

    def __init__(self, folder: Path, count: int, loader: int, data: ReferEvaluationSet) -> None:
        self.folder, self.count = folder, count
        self.loader, self.data = loader, data
        self.chosen: set[int] = set()
        self.samples: list[Sample] = []

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose samples among those of the main process."""
        if trainer.is_global_zero:
            share = evaluation_share(len(self.data), 0, trainer.world_size)
            places = np.linspace(0, len(share) - 1, min(self.count, len(share)), dtype=int)
            self.chosen = {share[place] for place in places}

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: EvaluationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Plot the chosen samples of a batch."""
        if dataloader_idx != self.loader or self.chosen.isdisjoint(batch.samples):
            return
        masks = pl_module.predict_masks(batch)  # type: ignore[operator]
        for number, mask, target in zip(batch.samples, masks, batch.targets, strict=True):
            if number in self.chosen:
                self.folder.mkdir(parents=True, exist_ok=True)
                image, sentence = self.data.image(number), self.data.sentence(number)
                figure = draw_sample(image, sentence, target, mask)
                figure.savefig(self.folder / f"sample_{number:05d}.png", dpi=80)
                score = iou(*intersection_and_union(mask, target))
                self.samples.append(Sample(number, sentence, image, target, mask, score, figure))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hand the samples to the loggers."""
        if trainer.is_global_zero and self.samples:
            log_samples(trainer.loggers, self.samples, trainer.global_step)


def draw_sample(image: Image, sentence: str, target: Mask, prediction: Mask) -> Figure:
    """Draw image, target and predicted mask side by side under the sentence."""
    height = 3.5 * image.shape[0] / image.shape[1] + 0.7
    figure = Figure(figsize=(10.5, height))
    title, fonts = readable_text(f"“{sentence}”")
    figure.suptitle(title, y=1 - 0.05 / height, va="top", parse_math=False, family=fonts)
    # Fixed margins take half the time of an automatic layout.
    margins = {"left": 0.005, "right": 0.995, "bottom": 0.05 / height, "top": 1 - 0.6 / height}
    left, middle, right = figure.subplots(1, 3, gridspec_kw=margins | {"wspace": 0.02})
    left.imshow(image)
    draw_mask(middle, image, target, "lime")
    draw_mask(right, image, prediction, "orange")
    score = iou(*intersection_and_union(prediction, target))
    titles = {left: "image", middle: "target", right: f"prediction, IoU {score:.2f}"}
    for axes, title in titles.items():
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    return figure


def draw_mask(axes: Axes, image: Image, mask: Mask, color: str) -> None:
    """Show an image, darkened outside a mask, with the mask's outline.

    Args:
        axes: Where to show it.
        image: (h, w, 3) uint8 RGB.
        mask: (h, w); other values than 0 belong to the mask.
        color: The outline's color, as Matplotlib names it.
    """
    mask = mask.astype(bool)
    axes.imshow((image * np.where(mask, 1.0, 0.3)[..., None]).astype(np.uint8))
    if mask.any() and not mask.all():
        axes.contour(mask, levels=[0.5], colors=color, linewidths=1.5)
