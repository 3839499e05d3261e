"""Checkpoints during training: atomic writes, ``last.ckpt``, signals, and per-step seeds.

A training that is killed at any moment continues and ends with the weights it would have had. A
step depends on weights, optimizer and schedule, which a checkpoint stores, and on seed, epoch,
batch and process, which choose its samples, sentences and dropout. No random state is stored.
"""

import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from crislit.checkpoints import read_checkpoint
from crislit.data import completed_batches
from crislit.errors import InputError, require
from crislit.io import sync, write_files

LAST, PREVIOUS, NEXT = "last.ckpt", "previous.ckpt", "next.ckpt"
"""The last checkpoint, the one before it, and briefly the one that replaces it."""
BEST = "best.ckpt"
"""The checkpoint with the highest score so far."""
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
"""What ends a run in order: Ctrl-C, a scheduler's request, and Slurm's warnings before a limit."""


class StoppedBySignal(Exception):  # noqa: N818 - not an error
    """A run was interrupted by a signal and has saved its state.

    Attributes:
        number: Number of the signal.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name} at step {step}")
        self.number = number


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint completely, or not at all."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            InputError: If it cannot be written; an existing file stays as it was.
        """
        path = Path(path)

        def write(part: Path) -> None:
            with part.open("wb") as file:
                torch.save(checkpoint, file)

        for leftover in path.parent.glob(f".{path.name}.*.part"):  # of a killed run
            leftover.unlink(missing_ok=True)
        try:
            write_files({path: write})
        except InputError as error:
            raise InputError(
                f"{error}. Files saved before are intact; make room and continue with resume=auto"
            ) from error


def is_intact(path: Path) -> bool:
    """Whether a checkpoint can be read and is not damaged."""
    try:
        read_checkpoint(path)
    except InputError:
        return False
    return True


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the highest score.

    The score belongs to the ``best.ckpt`` in the run's folder, wherever the folder has been moved
    or copied to. Lightning drops it where the path differs, and replaces the best by a worse one.

    Args:
        folder: The folder of the checkpoints.
        metric: The score, such as ``val/mIoU``.
        prepare: Puts an earlier best checkpoint into the folder before states are restored.
    """

    def __init__(
        self, folder: Path, metric: str, prepare: Callable[[], None] | None = None
    ) -> None:
        name = BEST.removesuffix(".ckpt")
        super().__init__(folder, name, metric, mode="max", enable_version_counter=False)
        self.prepare = prepare

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prepare the folder in one process, before any process looks at it."""
        super().setup(trainer, pl_module, stage)
        if self.prepare is not None and stage == "fit":
            if trainer.is_global_zero:
                self.prepare()
            trainer.strategy.barrier()

    @property
    def state_key(self) -> str:
        """The key of checkpoints of version 0.1, which used Lightning's class."""
        return super().state_key.replace(type(self).__qualname__, "ModelCheckpoint", 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score if the folder holds its checkpoint."""
        best = Path(str(self.dirpath)) / BEST
        if state_dict["best_model_path"] and best.is_file():
            self.best_model_path = self.kth_best_model_path = str(best)
            self.best_model_score = self.kth_value = state_dict["best_model_score"]
            self.best_k_models = {str(best): state_dict["best_model_score"]}


class LastCheckpoint(L.Callback):
    """Keeps ``last.ckpt`` and the one before it: every N steps, before validations, at the end.

    Checkpoints are taken where Lightning's loops continue exactly: after an optimizer step that
    does not end an epoch, before a validation's first batch, and after the last epoch. Signals are
    heeded at the same moments.

    Args:
        folder: The folder of the checkpoints.
        every: N, optimizer steps between two checkpoints.
        began: When this process started, by ``time.perf_counter``; None for now.

    Attributes:
        path: The last checkpoint.
    """

    def __init__(self, folder: Path, every: int, began: float | None = None) -> None:
        self.folder, self.path, self.every = folder, folder / LAST, every
        self._began = time.perf_counter() if began is None else began
        self._earlier_seconds = 0.0
        self._saved = (0, False)
        self._has_saved = False
        self._batches: int | None = None
        self._signal: int | None = None
        self._handlers = ExitStack()  # restores the earlier ones

    def state_dict(self) -> dict[str, Any]:
        """Return the batches per epoch and process, and the run's time.

        A position in an epoch depends on the batches.
        """
        return {"batches": self._batches, "seconds": self.seconds()}

    def seconds(self) -> float:
        """Return the run's time, with that of the starts that it continues from."""
        return self._earlier_seconds + time.perf_counter() - self._began

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the batches per epoch and the time of the earlier run."""
        self._batches = state_dict["batches"]
        self._earlier_seconds = state_dict.get("seconds", 0.0)  # absent in version 0.1

    # -- Moments

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install signal handlers.

        Raises:
            InputError: If a run that continues within an epoch has other batches per epoch.
        """
        batches = int(trainer.num_training_batches)
        require(
            self._batches in (None, batches) or not completed_batches(trainer),
            f"the checkpoint was saved within an epoch of {self._batches} batches, and here an "
            f"epoch has {batches}: continue with its data, batch size and number of devices",
        )
        self._batches = batches
        epochs: Any = trainer.fit_loop.epoch_progress.current
        batches_done = trainer.fit_loop.epoch_loop.batch_progress
        if epochs.ready == epochs.processed and batches_done.is_last_batch:
            # With max_steps, Lightning would continue the finished epoch, of which nothing is left.
            trainer.fit_loop.epoch_loop.restarting = False
        self._saved = (trainer.global_step, False)
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                handler = signal.signal(number, self._remember_signal) or signal.SIG_DFL
                self._handlers.callback(signal.signal, number, handler)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save if it is time, or if a signal arrived."""
        # After accumulated batches only once they have made a step.
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch:
            self._heed_signals(trainer)
            step = trainer.global_step
            if step >= self._saved[0] + self.every or step == trainer.max_steps:
                self.save(trainer)

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save before validation starts; a single process heeds signals at any batch."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            if batch_idx == 0:
                self.save(trainer)
            if batch_idx == 0 or (self._signal and trainer.world_size == 1):
                self._heed_signals(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Mark a validation that has not started: Lightning would take it for finished."""
        if trainer.validating:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts["started"] = counts["ready"]

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Finish the epoch that the last step ended: its validation may not have run."""
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        is_unfinished = batches["is_last_batch"] and epochs["processed"] < epochs["ready"]
        if is_unfinished and checkpoint["global_step"] == trainer.max_steps:
            # Lightning would end at once. A limit of epochs gives it the validation.
            trainer.fit_loop.epoch_loop.max_steps = -1
            trainer.fit_loop.max_epochs = epochs["ready"]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after the last validation.

        Where ``max_steps`` has ended an epoch early, the checkpoint of this step stays: Lightning
        counts the epoch as finished by now.
        """
        is_complete = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if is_complete or self._saved[0] != trainer.global_step:
            self.save(trainer)
        self._heed_signals(trainer)
        self._handlers.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore the signal handlers. Nothing is saved: a failed step leaves unusable weights."""
        self._handlers.close()

    # -- Saving and signals

    def request_stop(self, number: int) -> None:
        """Save and end the run at the next moment, as after this signal."""
        self._signal = number

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint, unless the one of this moment exists."""
        moment = (trainer.global_step, trainer.validating)
        if moment == self._saved:
            return
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.folder / NEXT)  # in every process: the strategy decides
        if trainer.is_global_zero:
            # Never replace an intact previous.ckpt by a damaged file.
            if self.path.exists() and (self._has_saved or is_intact(self.path)):
                self.path.replace(self.folder / PREVIOUS)
            (self.folder / NEXT).replace(self.path)
            sync(self.folder)
            self._has_saved = True
        trainer.strategy.barrier()
        self._saved = moment

    def _remember_signal(self, number: int, frame: Any) -> None:
        if self._signal == number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C ends the run at once
        self._signal = number

    def _heed_signals(self, trainer: L.Trainer) -> None:
        """Save and stop if any of the processes received a signal; a collective."""
        if trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            self.save(trainer)
            raise StoppedBySignal(self._signal or signal.SIGTERM, trainer.global_step)


class StepSeeds(L.Callback):
    """Seeds every step's random numbers from seed, epoch, batch and process only.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed PyTorch on every device, NumPy and Python."""
        entropy = [self.seed, trainer.current_epoch, batch_idx, trainer.global_rank]
        first, second = np.random.SeedSequence(entropy).generate_state(2).tolist()
        torch.manual_seed(first << 32 | second)
        np.random.seed(first)
        random.seed(second)
