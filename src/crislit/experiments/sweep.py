"""The jobs of a sweep: each in a fresh process, and none that is recorded already.

Whatever launcher Hydra uses, a job runs ``python -m crislit.train`` with its overrides and waits
for it. In one process, jobs would share CUDA's memory, random states and Lightning's process
group, and with several devices Lightning would start the whole sweep again in each child.
"""

import json
import logging
import multiprocessing
import os
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

from crislit.checkpoints import read_checkpoint
from crislit.errors import DamagedFileError, InputError, require, see
from crislit.experiments.records import add_run, check_record, find_run
from crislit.training import (
    FULL_ERROR,
    SWEEP_JOB,
    build_data,
    check_values,
    fingerprint,
    is_main_process,
    quote_value,
    reserve,
    stored_fingerprint,
)

log = logging.getLogger(__name__)


def check_job(config: dict[str, Any], folder: Path) -> None:
    """Check the values of a job before the sweep starts, and that its folder holds no other run.

    Whether its data have changed is checked when its turn comes.

    Raises:
        InputError: If a value cannot be used, or the folder holds another run.
    """
    check_values(config)
    if (folder / "results.json").is_file():
        read_results(folder / "results.json", config)
    else:
        check_checkpoints(folder, config)


def run_job(config: Mapping[str, Any], arguments: Sequence[str], folder: Path, group: str) -> float:
    """Run a job of a sweep unless it is recorded; return its selecting split's mIoU.

    Args:
        config: The job's configuration.
        arguments: The command line of a single run with this configuration.
        folder: The job's folder.
        group: The sweep's name, under which Weights & Biases groups its runs.

    Raises:
        InputError: If the job fails.
    """
    plain = dict(config)
    record = Path(config["record"]).expanduser() if config["record"] else None
    if record:
        check_record(record)
    prints, selected = fingerprint(plain, data_digest(plain)), config["dataset"]["select_split"]
    experiment = prints["experiment"]
    if record and (rows := find_run(record, config, experiment, prints["data"])):
        score = next((float(row["mIoU"]) for row in rows if row["split"] == selected), 0.0)
        log.info(
            "recorded in %s already, not run again: %s mIoU %.4f (record=null runs it)",
            record,
            selected,
            score,
        )
        return score
    results = folder / "results.json"
    is_main = is_main_process()  # of a job on several nodes
    if not results.is_file():
        if is_main:
            clear_interrupted(folder, config, prints["data"])
        code = run_process(arguments, folder, group)
        require(code == 0, f"the job in {folder} failed with exit code {code}{see('sweep-job')}")
        if not is_main:
            return 0.0  # the job's main process has the results
    measured = read_results(results, config, prints["data"])
    if record and is_main:
        add_run(record, measured)
        log.info("recorded in %s", record)
    return float(measured["splits"].get(selected, {}).get("mIoU", 0.0))


def data_digest(config: dict[str, Any]) -> str:
    """Return the digest of a job's sentences and masks.

    Raises:
        InputError: If the data cannot be used.
    """
    data = build_data(config)
    data.prepare_data()
    return data.index.digest


def clear_interrupted(folder: Path, config: Mapping[str, Any], data: str) -> None:
    """Remove the checkpoints that an interrupted run of the same job left, unless it continues.

    Args:
        folder: The job's folder.
        config: The job's configuration.
        data: The digest of its data.

    Raises:
        InputError: If the folder is in use, or holds the checkpoints of another run.
    """
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        return
    reserved = reserve(folder, "hydra.sweep.dir")  # its process does so again
    try:
        check_checkpoints(folder, config, data)
        if config["resume"] != "auto":
            log.warning("%s holds an interrupted run without results: running it again", folder)
            shutil.rmtree(checkpoints)
    finally:
        reserved.release()


def check_checkpoints(folder: Path, config: Mapping[str, Any], data: str | None = None) -> None:
    """Check that the checkpoints in a job's folder are its own.

    Args:
        folder: The job's folder.
        config: The job's configuration.
        data: The digest of its data; None takes the ones that are stored.

    Raises:
        InputError: If one is of another run, or not a checkpoint of crislit.
    """
    for path in sorted((folder / "checkpoints").glob("*.ckpt")):
        try:
            checkpoint = read_checkpoint(path)
        except DamagedFileError:  # the process was killed while it wrote
            continue
        require(
            is_same_run(checkpoint.fingerprint, checkpoint.config, config, data),
            f"{folder} holds another run, see {path}; choose another hydra.sweep.dir, nothing is "
            "overwritten",
        )


def read_results(path: Path, config: Mapping[str, Any], data: str | None = None) -> dict[str, Any]:
    """Read what a job measured.

    Args:
        path: Its ``results.json``.
        config: The job's configuration.
        data: The digest of its data; None takes the one that is stored.

    Raises:
        InputError: If the file is damaged, or another run's.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: remove its folder, and the job runs again") from error
    require(
        "config" in results and is_same_run(results, results["config"], config, data),
        f"{path.parent} holds another run; choose another hydra.sweep.dir, nothing is overwritten",
    )
    return results


def is_same_run(
    stored: Mapping[str, Any],
    stored_config: Mapping[str, Any],
    config: Mapping[str, Any],
    data: str | None,
) -> bool:
    """Whether what a run has stored is of a configuration, on the same data if they are given."""
    data = stored.get("data", "") if data is None else data
    before = stored_fingerprint(stored, stored_config, data)
    return bool(before["experiment"] == fingerprint(config, data)["experiment"])


def run_process(arguments: Sequence[str], folder: Path, group: str) -> int:
    """Run a job in a process of its own; return its exit code."""
    overrides = [
        *arguments,
        f"hydra.run.dir={quote_value(str(folder))}",
        "hydra.output_subdir=null",
    ]
    command = [sys.executable, "-m", "crislit.train", *overrides]
    environment = {
        "WANDB_RUN_GROUP": group,
        **os.environ,
        SWEEP_JOB: str(folder),
        "HYDRA_FULL_ERROR": os.environ.get(FULL_ERROR, "0"),
    }
    with subprocess.Popen(command, env=environment) as child, terminate_with_parent(child):
        return wait_for(child)


def wait_for(child: subprocess.Popen[Any]) -> int:
    """Wait for a job; in a launcher's worker, stop when the sweep is gone.

    Raises:
        InputError: If the sweep has ended.
    """
    is_worker = multiprocessing.current_process().name != "MainProcess"
    sweep = os.getppid()
    while True:
        try:
            return child.wait(timeout=1 if is_worker else None)
        except subprocess.TimeoutExpired:
            if os.getppid() != sweep:
                raise InputError("the sweep has ended, and its jobs with it") from None


@contextmanager
def terminate_with_parent(child: subprocess.Popen[Any]) -> Iterator[None]:
    """Terminate the child process when this process is terminated."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    # A launcher's own handler stays: submitit's requeues a preempted job.
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    before = signal.signal(signal.SIGTERM, end) if is_ours else None
    try:
        yield
    except KeyboardInterrupt:
        child.wait()  # Ctrl-C reaches the child, too, which saves its state
        raise
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
        if is_ours:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
