"""Trains a network from Python, with the checks of the command and without Hydra's run folders."""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from crislit.config import compose_complete
from crislit.errors import InputError
from crislit.io import read_json
from crislit.training import processes, run_folder
from crislit.training import run as steps
from crislit.training.launch import check_launch
from crislit.training.resume import AUTO
from crislit.training.settings import check_settings
from crislit.training.terminal import quiet_lightning
from crislit.training.trainer_options import check_trainer


def train_network(overrides: Sequence[str], folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Train and evaluate a network, as ``python -m crislit.train`` does.

    Args:
        overrides: As on the command line, ``["dataset=custom", "dataset.file=own/data.jsonl"]``.
        folder: Receives checkpoints, metrics, figures and ``results.json``. It must be new, unless
            ``resume=auto`` continues its run.

    Returns:
        The content of ``results.json``: the metrics of each split in [0, 1], and what it takes to
        repeat the run.

    Raises:
        InputError: If a setting or the data cannot be used, or if the folder holds another run.
        SystemExit: If a signal or ``trainer.max_time`` ends the training; ``resume=auto``
            continues it.
    """
    config = compose_complete(overrides)
    check_settings(config)
    check_trainer(config["trainer"])
    check_launch(config["trainer"])
    watch_processes()
    quiet_lightning()
    target, threads = Path(folder).expanduser(), torch.get_num_threads()
    reserved = reserve_new(target, config) if processes.is_main_process() else None
    is_refused = True
    try:
        started = steps.start(config, target)
        is_refused = False
        if isinstance(started, float):
            return read_json(target / "results.json")  # type: ignore[no-any-return]
        training = steps.build(started)
        steps.fit(training)
        results = steps.evaluate(training)
        steps.write(training, results, overrides)
        return json.loads(json.dumps(results))  # type: ignore[no-any-return]
    finally:
        torch.set_num_threads(threads)
        if reserved is not None:
            reserved.release(is_refused)


def reserve_new(folder: Path, config: dict[str, Any]) -> run_folder.ReservedFolder:
    """Reserve a folder that is new, or whose run continues.

    Raises:
        InputError: If it holds something else.
    """
    reserved = run_folder.reserve(folder, "folder")
    if config["resume"] != AUTO and {path.name for path in folder.iterdir()} > {run_folder.LOCK}:
        reserved.release()
        raise InputError(
            f"{folder} is not empty: choose a new folder, or continue its run with resume=auto"
        )
    return reserved


watch_processes = functools.cache(processes.start_watchdog)
