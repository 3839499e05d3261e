"""The processes of one run on one machine: where one has ended, none of the others goes on alone or waits for it.

Lightning's first process starts the others. A collective notices that another process is gone only where it waits for just that
one, and evaluation has none for hours; so the first process waits for those that it started, and they look whether it is there.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

FIRST = "CRISLIT_FIRST_PROCESS"
"""Environment variable: the process that starts the others, for these."""
PATIENCE = 10.0
"""Seconds that a process which has failed leaves another to say first what the reason was."""

_alone = threading.Event()
_ending = threading.Lock()
_started: list["subprocess.Popen[bytes]"] = []


def begin() -> None:
    """Make the first process known to those that it will start; in one of these, end when the first one ends."""
    if "LOCAL_RANK" not in os.environ:
        os.environ[FIRST] = str(os.getpid())
    elif os.environ["LOCAL_RANK"] != "0" and FIRST in os.environ and os.name == "posix":  # else torchrun ends it, or Slurm
        threading.Thread(target=_follow, args=(int(os.environ[FIRST]),), daemon=True).start()


def _follow(first: int) -> None:
    while os.getppid() == first:
        time.sleep(0.5)
    if not _alone.is_set():
        if os.environ["LOCAL_RANK"] == "1":  # one says it for all
            print("error: the first process of this run has ended, and the others end with it", file=sys.stderr, flush=True)
        os._exit(1)


def go_alone() -> None:
    """Let a process that needs the first one no more come to its own end."""
    _alone.set()


def watch(started: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End this process and the others that it started when one of them fails."""
    _started.extend(started)
    for rank, process in enumerate(started, start=1):
        threading.Thread(target=_wait, args=(process, rank), daemon=True).start()


def _wait(process: "subprocess.Popen[bytes]", rank: int) -> None:
    code = process.wait()
    if code == 0 or not _ending.acquire(blocking=False):
        return
    end_the_others()
    if code < 0:  # else it has said itself what was wrong
        reason = f"{signal.strsignal(-code)}{', as when memory runs out' if code == -signal.SIGKILL else ''}"
        sys.stdout.flush()
        print(
            f"error: process {rank} of {len(_started) + 1}, counted from 0 on this machine, was ended by a signal ({reason}), "
            "and the others end with it; a training goes on from its last checkpoint with resume=auto hydra.run.dir=FOLDER",
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)


def end_the_others() -> bool:
    """End the processes that this one started, as it is about to end itself and has said why, or will.

    Returns:
        Whether there were any.
    """
    _ending.acquire(blocking=False)  # for good: who watches one of them shall not take its end for the reason
    for process in _started:
        process.kill()
    return bool(_started)


def await_the_first() -> bool:
    """Wait until the first process ends, who has said then what was wrong; return whether it is still there after a while."""
    go_alone()
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if FIRST in os.environ and os.getppid() != int(os.environ[FIRST]):
            return False
        time.sleep(0.1)
    return True
