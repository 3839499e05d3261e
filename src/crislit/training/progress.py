"""Progress of a run: what it starts with, a bar for its training, one per evaluated split."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from crislit.data import ReferDataModule, TrainBatch
from crislit.errors import counted
from crislit.models import count_parameters
from crislit.training.provenance import hardware

log = logging.getLogger(__name__)

LOG_SECONDS = 300.0
"""Time between two log lines of a training whose output is not a terminal."""


class StartSummary(L.Callback):
    """Logs device, data, network, steps and folder when a training starts.

    Args:
        data: The run's data.
        initial_weights: What the network starts from.
        folder: The run's folder.
    """

    def __init__(self, data: ReferDataModule, initial_weights: str, folder: Path) -> None:
        self.data, self.initial_weights, self.folder = data, initial_weights, folder

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log five lines."""
        if not trainer.is_global_zero:
            return
        data, processes = self.data, trainer.world_size
        sentences = len(data.train_set()) * data.sentences_per_image
        parameters = count_parameters(pl_module.model) / 1e6  # type: ignore[arg-type]
        log.info("device: %s%s", hardware(), f", {processes} processes" if processes > 1 else "")
        log.info(
            "data: %s, %s per epoch, validated on %s",
            data.source.name,
            counted(sentences, "training sentence"),
            data.select_split,
        )
        log.info(
            "network: %.1f million parameters, starts from %s", parameters, self.initial_weights
        )
        log.info(
            "steps: %s of %s, %s",
            trainer.estimated_stepping_batches,
            counted(data.batch_size, "sentence"),
            counted(trainer.max_epochs or 0, "epoch"),
        )
        log.info("folder: %s", self.folder)


class RunProgress(ProgressBar):
    """Shows the steps of the whole training with the time left, and the batches of evaluations.

    A bar needs a terminal. Elsewhere, logs a line every five minutes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bar: Any = None
        self.validation_bar: Any = None
        self.is_enabled = True
        self._logged = self._started = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Show nothing; Lightning calls this in all processes but the main one."""
        self.is_enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self.is_enabled = True

    # -- Training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the bar at the step that the run continues from."""
        self._first_step = trainer.global_step
        self._started = self._logged = time.monotonic()
        if self.is_enabled:
            total = int(trainer.estimated_stepping_batches)
            self.bar = open_bar("training", total, "step", self._first_step)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: TrainBatch,
        batch_idx: int,
    ) -> None:
        """Advance after each optimizer step."""
        if not self.is_enabled:
            return
        self.bar.update(trainer.global_step - self.bar.n)
        now = time.monotonic()
        # Reading the loss waits for the device, so not after every step.
        if now >= self._logged + (LOG_SECONDS if self.bar.disable else 1):
            self._logged = now
            loss = float(outputs["loss"])
            epoch = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
            self.bar.set_postfix_str(f"{epoch}, loss {loss:.3f}", refresh=False)
            if self.bar.disable:
                self._log_step(trainer, epoch, loss, now)

    def _log_step(self, trainer: L.Trainer, epoch: str, loss: float, now: float) -> None:
        done, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        per_step = (now - self._started) / max(done - self._first_step, 1)
        left = format_seconds((total - done) * per_step)
        log.info("%s, step %d of %d: loss %.3f, %s left", epoch, done, total, loss, left)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar before an error is printed."""
        self._close()

    # -- Evaluation

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the batches of a validation below the training's steps."""
        if self.is_enabled and not trainer.sanity_checking:
            total = int(sum(trainer.num_val_batches))
            self.validation_bar = open_bar("validating", total, "batch", leave=False)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance by one batch."""
        if self.validation_bar is not None:
            self.validation_bar.update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the validation's bar."""
        if self.validation_bar is not None:
            self.validation_bar.close()
            self.validation_bar = None

    def on_test_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Start a bar with each split."""
        if batch_idx == 0:
            self._close()
            name: str = pl_module.splits[dataloader_idx]  # type: ignore[index, assignment]
            is_blind = name.endswith("-blind")
            text = f"{name.removesuffix('-blind')}, blind control" if is_blind else name
            total = int(trainer.num_test_batches[dataloader_idx])
            if self.is_enabled:
                self.bar = open_bar(f"evaluating {text}", total, "batch")

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance by one batch."""
        if self.is_enabled:
            self.bar.update()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        for bar in (self.validation_bar, self.bar):
            if bar is not None:
                bar.close()
        self.bar = self.validation_bar = None


def open_bar(name: str, total: int, unit: str, done: int = 0, leave: bool = True) -> Any:
    """Return a bar, which is disabled unless the output is a terminal."""
    return tqdm(None, name, total, leave, unit=unit, initial=done, disable=None, dynamic_ncols=True)


def format_seconds(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds: ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
