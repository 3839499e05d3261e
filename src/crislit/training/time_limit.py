"""Ends a training after a time, as a scheduler's signal does."""

import logging
import signal
import time
from datetime import timedelta
from typing import Any

import lightning as L

from crislit.training.checkpointing import LastCheckpoint

log = logging.getLogger(__name__)


class TimeLimit(L.Callback):
    """Ends a run when its time is over, as a SIGTERM would: it saves its state.

    Lightning's own timer ends a training as if it were complete. The time counts from the start of
    this process's training, so a run that continues gets it once more.

    Args:
        limit: The time.
    """

    def __init__(self, limit: timedelta) -> None:
        self.limit = limit
        self._end = float("inf")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the time."""
        self._end = time.monotonic() + self.limit.total_seconds()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look at the time."""
        self._look(trainer)

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at the time."""
        self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        if time.monotonic() >= self._end and trainer.state.fn == "fit":
            self._end = float("inf")  # once
            log.warning("trainer.max_time=%s is over: saving", self.limit)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, LastCheckpoint):
                    callback.request_stop(signal.SIGTERM)
