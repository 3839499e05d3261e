"""Initializes processes that load or write data."""

import os
import random
import signal
import sys
import threading
from types import TracebackType

import cv2
import numpy as np
import torch


def init_worker(_: int) -> None:
    """Seed NumPy and Python from the loader's seed, use one thread, ignore the run's signals."""
    ignore_run_signals()
    ignore_lost_connections()
    cv2.setNumThreads(0)
    seed = torch.initial_seed() % 2**32  # differs between workers and epochs
    np.random.seed(seed)
    random.seed(seed)


def ignore_lost_connections() -> None:
    """Ignore connection errors: they only mean that the main process has exited."""
    hook = sys.excepthook

    def report_other_errors(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, (ConnectionError, EOFError)):
            hook(kind, error, trace)

    sys.excepthook = report_other_errors


def ignore_run_signals() -> None:
    """Ignore signals that a terminal or a cluster sends to all processes of a run.

    The main process handles them, and then ends its workers.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # The main process ends its workers by SIGTERM: sigtimedwait tells who has sent one.
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent sends SIGTERM or dies."""
    while True:
        received = signal.sigtimedwait({signal.SIGTERM}, 1)
        # If the parent was killed, a worker could wait forever for space in a full queue.
        if os.getppid() != parent or (received is not None and received.si_pid == parent):
            os._exit(0)
