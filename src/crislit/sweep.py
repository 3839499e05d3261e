"""The jobs of a sweep: each in a fresh process of its own, and none that is recorded already.

Whatever launcher Hydra uses, a job starts ``python -m crislit.train`` with the job's own overrides and waits for it. In one
process, several jobs would share CUDA's memory, random states and Lightning's process group, and with several devices Lightning
would start the whole sweep again in each of its children.
"""

import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from crislit.config import FULL_ERROR, SWEEP_JOB
from crislit.errors import InputError
from crislit.record import add_run, find_run, identify

log = logging.getLogger(__name__)


def run_job(settings: Mapping[str, Any], arguments: Sequence[str], folder: Path, group: str) -> float:
    """Run a job of a sweep, unless it is recorded; return its selecting split's mIoU.

    Args:
        settings: The job's configuration.
        arguments: The command line of a single run with this configuration.
        folder: The job's folder.
        group: The sweep's name, under which Weights & Biases shows its runs together.

    Raises:
        InputError: If the job fails; what it printed says why.
    """
    record = Path(settings["record"]).expanduser() if settings["record"] else None
    select = settings["dataset"]["select_split"]
    if record and (rows := find_run(record, settings)):
        value = next((float(row["mIoU"]) for row in rows if row["split"] == select), 0.0)
        log.info("recorded in %s already, and not run again: %s mIoU %.4f (record=null runs it)", record, select, value)
        return value
    results = folder / "results.json"
    first = not int(os.environ.get("SLURM_PROCID", "0"))  # of a job's processes on several nodes
    if results.is_file():
        return keep(results, settings, record if first else None)
    if (folder / "checkpoints").is_dir() and first and settings["resume"] != "auto":
        log.warning("%s holds a broken run, without results: it is run again", folder)
        shutil.rmtree(folder / "checkpoints")
    command = [sys.executable, "-m", "crislit.train", *arguments, f"hydra.run.dir={quoted(folder)}", "hydra.output_subdir=null"]
    environment = os.environ | {SWEEP_JOB: str(folder), "WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP", group)}
    environment["HYDRA_FULL_ERROR"] = os.environ.get(FULL_ERROR, "0")
    with subprocess.Popen(command, env=environment) as child, ends_with_us(child):
        code = wait_for(child)
    if code:
        raise InputError(f"the job in {folder} failed with exit code {code}; what it printed says why")
    if not first:
        return 0.0  # the job's first process has the results
    return keep(results, settings, record)


def keep(results: Path, settings: Mapping[str, Any], record: Path | None) -> float:
    """Record what a job measured; return its selecting split's mIoU.

    Raises:
        InputError: If the results are damaged, or another run's.
    """
    try:
        measured = json.loads(results.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{results} is damaged: remove its folder, and the job runs again") from error
    if measured.get("experiment") != identify(settings)["experiment"]:
        raise InputError(f"{results.parent} holds another run; choose another hydra.sweep.dir, nothing is written over")
    if record:
        add_run(record, measured)
        log.info("recorded in %s", record)
    return float(measured["splits"].get(settings["dataset"]["select_split"], {}).get("mIoU", 0.0))


def wait_for(child: subprocess.Popen[Any]) -> int:
    """Wait for a job; in a launcher's worker, end it when the sweep that started the worker is gone."""
    worker = multiprocessing.current_process().name != "MainProcess"
    sweep = os.getppid()
    while True:
        try:
            return child.wait(timeout=1 if worker else None)
        except subprocess.TimeoutExpired:
            if os.getppid() != sweep:
                raise InputError("the sweep has ended, and its jobs with it") from None


def quoted(path: Path) -> str:
    """Quote a path for Hydra's grammar: = and , have a meaning, and a backslash before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), str(path))
    return f"'{escaped}'"


@contextmanager
def ends_with_us(child: subprocess.Popen[Any]) -> Iterator[None]:
    """See to it that a child does not outlive us when we are told to end."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    # A launcher's own handler stays: submitit's starts a preempted job anew.
    here = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    before = signal.signal(signal.SIGTERM, end) if here else None
    try:
        yield
    except KeyboardInterrupt:
        child.wait()  # Ctrl-C reaches the child too, which saves what it has
        raise
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
        if here:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
