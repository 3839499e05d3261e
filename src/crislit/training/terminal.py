"""Prints and logs messages of our own, and none that a user cannot act on."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FILE_FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
"""Lines of ``train.log``, as in ``conf/hydra/job_logging/crislit.yaml``."""
IGNORED_WARNINGS = (
    ".*treespec, LeafSpec.*",  # within Lightning 2.6 on torch 2.14
    "Experiment logs directory",  # Hydra has just written to the run's folder
    "Checkpoint directory",
    "The dirpath has changed",  # a run resumed in another folder
    # It is resumable: its sampler skips what the run has trained on.
    "You're resuming from a checkpoint that ended before the epoch ended and your dataloader",
    "It is recommended to use `self.log",  # our metrics are equal in all processes
    "The '.*_dataloader' does not have many workers",  # ``workers`` decides
    "The number of training batches",  # a small data set is logged once per epoch
    "Grad strides do not match bucket view strides",  # of DistributedDataParallel
    "`ModelCheckpoint.monitor=.*could not find",  # the run says that there is no best.ckpt
)
IGNORED_MESSAGES = (
    *("Tip: ", "GPU available", "TPU available", "HPU available", "IPU available"),
    *("`Trainer.fit` stopped", "Using default `ModelCheckpoint`", "Using 16bit", "Using bfloat16"),
    *("Restoring states from the checkpoint", "Restored all states"),
    "You are using a CUDA device",
)
"""Parts of Lightning's messages; StartSummary and RunProgress replace them."""


class TerminalFormatter(logging.Formatter):
    """Formats a message with its time, and marks warnings and errors."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(mark)s%(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a message."""
        is_marked = record.levelno >= logging.WARNING
        record.mark = f"{record.levelname.lower()}: " if is_marked else ""
        return super().format(record)


@contextmanager
def log_to(path: Path | None) -> Iterator[None]:
    """Log the messages of a training to a file, and to the terminal unless a program logs itself.

    Args:
        path: The file, which is appended to; None in all processes but the main one.
    """
    logger, root = logging.getLogger("crislit"), logging.getLogger()
    level = logger.level
    with ExitStack() as cleanup:
        cleanup.callback(logger.setLevel, level)
        logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
        if path is not None:
            file = cleanup.enter_context(closing(logging.FileHandler(path, encoding="utf-8")))
            file.setFormatter(logging.Formatter(FILE_FORMAT))
            logger.addHandler(file)
            cleanup.callback(logger.removeHandler, file)
        if path is not None and not root.handlers:
            terminal = logging.StreamHandler(sys.stdout)
            terminal.setFormatter(TerminalFormatter())
            root.addHandler(terminal)  # where progress bars look for it
            cleanup.callback(root.removeHandler, terminal)
        yield


def log_warnings() -> None:
    """Log Python's warnings as messages, without the place in the library that they come from."""

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        log.warning("%s", message)

    warnings.showwarning = show


def quiet_lightning() -> None:
    """Silence messages, warnings and advertisements that a user cannot act on."""
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(text in record.getMessage() for text in IGNORED_MESSAGES)
    )
    # A notice at every checkpoint, and the numbers of the GPUs.
    for name in ("trainer.connectors.checkpoint_connector", "accelerators.cuda"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)
