"""Ends all processes of a run when one of them dies, so that none hangs in a collective.

Lightning's main process starts the others. A collective notices a dead process only while it waits
for that very process, and evaluation has no collectives for hours. So the main process waits for
those that it started, and they watch the main process.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from crislit.errors import see

MAIN_PROCESS = "CRISLIT_FIRST_PROCESS"
"""Environment variable: id of the main process, for the processes that it starts."""
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Environment variables that number a run's processes and nodes, from 0 for the main process."""
PATIENCE = 10.0
"""Seconds that a failing process waits for another one to report the reason first."""

_detached = threading.Event()
_ending = threading.Lock()
_started: list["subprocess.Popen[bytes]"] = []


def is_child() -> bool:
    """Whether this process belongs to a run whose main process has started it."""
    first = os.environ.get(MAIN_PROCESS)
    return "LOCAL_RANK" in os.environ and first in (str(os.getpid()), str(os.getppid()))


def is_main_process() -> bool:
    """Whether this process writes the run's files: the first one on the first node."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def start_watchdog() -> None:
    """In the main process, announce it to its children; in a child, end when the main one ends.

    Also delays the forks of a run with several processes, see ``_let_threads_finish``.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ[MAIN_PROCESS] = str(os.getpid())
    # Children of torchrun do not have the main process's id.
    elif os.environ["LOCAL_RANK"] != "0" and MAIN_PROCESS in os.environ and os.name == "posix":
        threading.Thread(target=_exit_with_main, daemon=True).start()
    if os.name == "posix" and sys.version_info < (3, 11, 10):
        os.register_at_fork(before=_let_threads_finish)


def _let_threads_finish() -> None:
    """Wait before a data worker is forked: PyTorch's threads may still be ending a collective.

    If one of them enters Python at that moment, the worker hangs
    (github.com/python/cpython/issues/112275, fixed in Python 3.11.10). It happened in 9 of 8,000
    forks, and in none of 6,000 after this pause.
    """
    torch = sys.modules.get("torch")  # importing it takes seconds
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(0.05)


def _exit_with_main() -> None:
    while not _detached.wait(0.5):
        if os.getppid() != int(os.environ[MAIN_PROCESS]):
            if os.environ["LOCAL_RANK"] == "1":  # one message is enough
                print(
                    "error: the main process of this run has ended, and the others end with it",
                    file=sys.stderr,
                    flush=True,
                )
            os._exit(1)


def detach() -> None:
    """Let this process end on its own, whatever happens to the others."""
    _detached.set()


def watch_children(started: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End this process and all its children when one of them fails; a second call does nothing."""
    if not _started:
        _started.extend(started)
        for rank, process in enumerate(started, start=1):
            threading.Thread(target=_exit_with_child, args=(process, rank), daemon=True).start()


def _exit_with_child(process: "subprocess.Popen[bytes]", rank: int) -> None:
    code = process.wait()
    if code != 0 and _ending.acquire(blocking=False):
        kill_children()
        if code < 0:  # otherwise it has reported the reason itself
            cause = ", as when memory runs out" if code == -signal.SIGKILL else ""
            sys.stdout.flush()
            print(
                f"error: process {rank} of {len(_started) + 1}, counted from 0 on this machine, "
                f"was ended by a signal ({signal.strsignal(-code)}{cause}), and the others end "
                "with it; continue a training from its last checkpoint with resume=auto "
                f"hydra.run.dir=FOLDER{see('killed')}",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)


def kill_children() -> bool:
    """Kill the processes that this one started, before it ends itself and reports why.

    Returns:
        Whether there were any.
    """
    # Never released: their watchers must not take the end of one for the reason.
    _ending.acquire(blocking=False)
    for process in _started:
        process.kill()
    return bool(_started)


def wait_for_main_process() -> bool:
    """Wait for the main process to report an error and end; return whether it is still alive."""
    detach()
    for _ in range(round(PATIENCE / 0.1)):
        if MAIN_PROCESS in os.environ and os.getppid() != int(os.environ[MAIN_PROCESS]):
            return False
        time.sleep(0.1)
    return True
