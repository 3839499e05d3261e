"""What processes that load or write data do first."""

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
    """Seed what augmentations may draw from, by the loader's own seed, and keep each worker to one thread."""
    ignore_run_signals()
    ignore_lost_connections()
    cv2.setNumThreads(0)
    seed = torch.initial_seed() % 2**32  # differs between workers and epochs
    np.random.seed(seed)
    random.seed(seed)


def ignore_lost_connections() -> None:
    """Report no lost connection: a worker's only ones are to the process that takes its batches, and that has ended then."""
    report = sys.excepthook

    def report_others(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, (ConnectionError, EOFError)):
            report(kind, error, trace)

    sys.excepthook = report_others


def ignore_run_signals() -> None:
    """Let a worker go on where a terminal or a cluster signals all of a run: it is the run that ends, and then the worker."""
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(
        signal, "sigtimedwait"
    ):  # tells who has sent a signal: SIGTERM is also how the loader ends its workers
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_loader, args=(os.getppid(),), daemon=True).start()


def _exit_with_loader(loader: int) -> None:
    while True:
        heard = signal.sigtimedwait({signal.SIGTERM}, 1)
        # Where the loader's process was killed, a worker may wait for ever for room in a queue that nobody reads.
        if os.getppid() != loader or (heard is not None and heard.si_pid == loader):
            os._exit(0)
