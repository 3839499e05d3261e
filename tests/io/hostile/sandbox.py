"""A process that reads hostile input with little memory: `python -m tests.io.hostile.sandbox`.

It reads a JSON list per line, the name of a case and a new folder, and answers with one JSON line:
the outcome, its cost, the files opened for writing elsewhere, and the programs started.
"""

import ctypes
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from crislit.errors import InputError
from tests.io.hostile.case import Act
from tests.io.hostile.checkpoints import checkpoints, network
from tests.io.hostile.custom import custom_data
from tests.io.hostile.images import images
from tests.io.hostile.refer import instances_files, refs_contents, refs_files, segmentations
from tests.io.hostile.sentences import segmenter, sentences

TOPICS = (
    *(refs_files, refs_contents, instances_files, segmentations),
    *(images, sentences, custom_data, checkpoints),
)
CASES = {case.name: case for topic in TOPICS for case in topic()}
MEMORY = 2**30
"""Bytes that may be allocated beyond those used at the start."""


# -- Probes of the sandbox itself


def compute(_: Path) -> None:
    """Compute for a while, then wait for a while."""
    start = time.process_time()
    while time.process_time() < start + 0.6:
        pass
    time.sleep(0.6)


PROBES: dict[str, Act] = {
    "writes outside": lambda folder: (folder.parent / "elsewhere").write_text("x"),
    "makes a folder outside": lambda folder: (folder.parent / "folder").mkdir(),
    "starts a program": lambda folder: subprocess.run(["true"], check=True).returncode,
    "takes memory": lambda folder: len(b"x" * (700 * 2**20)),
    "takes too much memory": lambda folder: len(b"x" * 2**32),
    "computes": compute,
    "ends the process": lambda folder: os._exit(3),
    "fails": lambda folder: 1 / 0,
    "hangs": lambda folder: time.sleep(10**6),
}
"""Actions that the sandbox must detect."""


# -- The process


WRITING = {
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown"),
}
STARTING = {
    *("os.system", "subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn"),
    *("os.spawn", "socket.connect"),
}
"""Audit events of Python: https://docs.python.org/3/library/audit_events.html."""
written_outside: list[str] = []
started: list[str] = []


def audit(allowed: list[Path], event: str, arguments: tuple[Any, ...]) -> None:
    """Record started programs, and files written outside the allowed folders."""
    if event in STARTING:
        started.append(f"{event} {arguments!r:.200}")
    paths: tuple[Any, ...] = arguments[:2] if event in WRITING else ()
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & writing:
        paths = arguments[:1]
    for value in paths:
        if isinstance(value, (str, bytes, os.PathLike)):
            path = Path(os.fsdecode(value)).absolute()
            is_allowed = any(path.is_relative_to(folder) for folder in allowed)
            if path != Path(os.devnull) and not is_allowed:
                written_outside.append(str(path))


def attempt(act: Act, folder: Path) -> dict[str, Any]:
    """Read a case in a new folder, and return its outcome and cost."""
    folder.mkdir()
    os.chdir(folder)
    memory, start, processor_start = reset_peak(), time.monotonic(), time.process_time()
    written_outside.clear()
    started.clear()
    outcome: dict[str, Any]
    try:
        outcome = {"value": act(folder)}
    except InputError as error:
        outcome = {"error": str(error)}
    except BaseException:
        outcome = {"crash": traceback.format_exc().rstrip()[-3000:]}
    return outcome | {
        "elapsed": time.monotonic() - start,
        "seconds": time.process_time() - processor_start,
        "megabytes": (status("VmHWM") - memory) // 2**10,
        "outside": list(written_outside),
        "started": list(started),
    }


def reset_peak() -> int:
    """Reset the peak of the process's memory, and return the memory used now in kilobytes."""
    ctypes.CDLL(None).malloc_trim(0)  # release what earlier cases left
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """Return a number from the process's status in Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    """Read the cases named on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard error from here on
    logging.disable(logging.CRITICAL)
    segmenter()
    network()
    allowed = [Path(tempfile.gettempdir())]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sys.addaudithook(lambda event, arguments: audit(allowed, event, arguments))
    for line in sys.stdin:
        name, folder = json.loads(line)
        allowed[1:] = [Path(folder)]
        act = CASES[name].act if name in CASES else PROBES[name]
        print(json.dumps(attempt(act, Path(folder))), file=answers, flush=True)


if __name__ == "__main__":
    main()
