"""Exact resume: a training that was killed at any moment goes on, and ends with the weights it would have had.

What a step does depends on the weights, the optimizer and its schedule, which a checkpoint keeps, and on seed, epoch, batch and
process: these choose its samples, their sentences and what dropout drops. No random state has to be kept.
"""

import contextlib
import logging
import os
import random
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from crislit.checkpoint import damage
from crislit.data.datamodule import batches_done
from crislit.errors import InputError, for_want_of_room

log = logging.getLogger(__name__)

LAST, PREVIOUS, NEXT = "last.ckpt", "previous.ckpt", "next.ckpt"
"""The last checkpoint, the one before it, and, for a moment, the one that takes its place."""
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
"""What ends a run in order: Ctrl-C, a cluster's and a batch system's request, and Slurm's warnings before a limit."""


class Stopped(Exception):  # noqa: N818 - no error: it was asked for
    """A run was told to end, and has saved what it had.

    Attributes:
        number: Of the signal.
        step: Optimizer steps taken.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"told to end by {signal.Signals(number).name} at step {step}")
        self.number, self.step = number, step


# -- Checkpoints, whole or not at all -----------------------------------------------------------------------------------------


class WholeCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint under another name, makes sure that it is on the disk, and gives it its own name."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            InputError: If the disk is full, or nothing may be written; a file that was there stays.
        """
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            sync_folder(path.parent)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise InputError(
                f"cannot write {path}: {'the disk is full' if for_want_of_room(error) else error}. "
                "What was saved before stays; make room and go on with resume=auto"
            ) from error


def sync_folder(folder: Path) -> None:
    """Make sure that a folder's new names are on the disk, where the system can do that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def newest(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint of a run's folder, or None if it has none at all.

    Raises:
        InputError: If there are some, and all are damaged, or one cannot be read at all.
    """
    there = [path for name in (NEXT, LAST, PREVIOUS) if (path := folder / "checkpoints" / name).is_file()]
    for path in there:
        reason = damage(path)
        if reason is None:
            return path
        log.warning("%s is damaged (%s): the checkpoint before it is used", path, reason)
    if there:
        raise InputError(f"every checkpoint in {folder / 'checkpoints'} is damaged; without the folder, a run begins anew")
    return None


def undamaged(path: Path) -> bool:
    """Whether a checkpoint can be read and is undamaged."""
    try:
        return damage(path) is None
    except InputError:
        return False


class LastCheckpoint(L.Callback):
    """Keeps ``last.ckpt`` up to date, and the one before it: every so many steps, before each validation, and at the end.

    A checkpoint is of a moment from which Lightning's loops go on exactly: after an optimizer step that does not end an epoch,
    before a validation's first batch, and after the last epoch. A signal is heeded at such a moment too.

    Args:
        folder: Where the checkpoints are.
        every: Optimizer steps between two checkpoints.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self._saved, self._before = (0, False), 0
        self._wrote = False
        self._batches: int | None = None
        self._told: int | None = None
        self._handlers: dict[int, Any] = {}

    @property
    def path(self) -> Path:
        """The last checkpoint."""
        return self.folder / LAST

    def state_dict(self) -> dict[str, Any]:
        """Return the batches that one process sees in an epoch: a place in it means something for as many only."""
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember how many batches an epoch of the earlier run had."""
        self._batches = state_dict["batches"]

    # -- Moments

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from where a resumed run starts, and listen to signals.

        Raises:
            InputError: If a run that goes on within an epoch would be at another place of it.
        """
        batches = int(trainer.num_training_batches)
        if self._batches not in (None, batches) and batches_done(trainer):
            raise InputError(
                f"the checkpoint is from within an epoch of {self._batches} batches, and here an epoch has {batches}: "
                "go on with the data, batch size and number of devices of its run"
            )
        self._batches = batches
        self._saved = (trainer.global_step, False)
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                self._handlers[number] = signal.signal(number, self._listen)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the step, which accumulated batches do not count up."""
        self._before = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, or if the run is told to end."""
        if trainer.global_step > self._before and not trainer.is_last_batch:
            told = self._agree(trainer)
            if told or trainer.global_step >= self._saved[0] + self.every or trainer.global_step == trainer.max_steps:
                self.save(trainer)
            if told:
                raise Stopped(told, trainer.global_step)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Save what an epoch has taught, before it is validated; a single process ends at any batch."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if batch_idx == 0:
            self.save(trainer)
        told = self._agree(trainer) if batch_idx == 0 else self._told if trainer.world_size == 1 else None
        if told:
            raise Stopped(told, trainer.global_step)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before a validation, note that it is still to be run: Lightning takes one that has not started for done."""
        if trainer.validating:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts["started"] = counts["ready"]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end: after the last validation, or within an epoch where ``max_steps`` ends a run."""
        self.save(trainer)
        told = self._agree(trainer)
        self._deafen()
        if told:
            raise Stopped(told, trainer.global_step)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Listen no longer. Nothing is saved: what went wrong within a step left weights that no run would have."""
        self._deafen()

    # -- Saving and signals

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint, unless this moment's is there."""
        moment = (trainer.global_step, trainer.validating)
        if moment == self._saved:
            return
        for logger in trainer.loggers:
            logger.save()  # what was measured until here
        trainer.save_checkpoint(self.folder / NEXT)  # in every process: the strategy decides who writes
        if trainer.is_global_zero:
            if self.path.exists() and (self._wrote or undamaged(self.path)):  # what is damaged takes nothing's place
                self.path.replace(self.folder / PREVIOUS)
            (self.folder / NEXT).replace(self.path)
            sync_folder(self.folder)
            self._wrote = True
        trainer.strategy.barrier()
        self._saved = moment

    def _listen(self, number: int, frame: FrameType | None) -> None:
        if self._told == number == signal.SIGINT:
            raise KeyboardInterrupt  # asked for twice: at once
        self._told = number

    def _deafen(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._handlers = {}

    def _agree(self, trainer: L.Trainer) -> int | None:
        """Return the signal that one of the processes was sent."""
        told = self._told is not None
        if trainer.world_size > 1:
            told = trainer.strategy.reduce_boolean_decision(told, all=False)
        return (self._told or signal.SIGTERM) if told else None


class StepSeeds(L.Callback):
    """Seeds each step's random numbers, so that they depend on seed, epoch, batch and process alone.

    Args:
        seed: The run's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed PyTorch on every device, NumPy and Python."""
        place = [self.seed, trainer.current_epoch, batch_idx, trainer.global_rank]
        first, second = np.random.SeedSequence(place).generate_state(2)
        torch.manual_seed(int(first) << 32 | int(second))
        np.random.seed(int(first))
        random.seed(int(second))
