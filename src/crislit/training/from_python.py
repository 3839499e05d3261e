"""Trains a network from Python, with the checks of the command and without Hydra's run folders."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crislit.config import load_config
from crislit.errors import InputError, require
from crislit.io import read_json
from crislit.training import processes, run_folder
from crislit.training import run as steps
from crislit.training.command_line import (
    check_options,
    expand_home,
    explain_error,
    explain_null,
    is_null_group,
)
from crislit.training.launch import check_launch
from crislit.training.resume import AUTO
from crislit.training.settings import check_settings
from crislit.training.terminal import log_to, quiet_lightning
from crislit.training.trainer_options import check_trainer


def train_network(overrides: Sequence[str], folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Train and evaluate a network, as ``python -m crislit.train`` does.

    Messages are logged to ``train.log`` in the folder and, unless the program sets up logging
    itself, to the terminal.

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
    config = compose(overrides)
    check_settings(config)
    check_trainer(config["trainer"])
    check_launch(config["trainer"])
    watch_processes()
    quiet_lightning()
    target, threads = Path(folder).expanduser(), torch.get_num_threads()
    reserved = reserve_new(target, config) if processes.is_main_process() else None
    is_refused = False
    try:
        with log_to(target / "train.log" if reserved else None):
            steps.run(config, target, overrides)
        return read_json(target / "results.json")  # type: ignore[no-any-return]
    except InputError:
        is_refused = True
        raise
    finally:
        torch.set_num_threads(threads)
        if reserved is not None:
            reserved.release(is_refused)


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose the configuration of a training, with the messages of the command.

    Raises:
        InputError: If an override cannot be used, or a value is missing.
    """
    require(
        not isinstance(overrides, str)
        and isinstance(overrides, Sequence)
        and all(isinstance(text, str) for text in overrides),
        f'overrides must be a list of strings, such as ["model=tiny"], got {overrides!r:.80}',
    )
    try:
        check_options(overrides, "train")
        config = load_config(expand_home(overrides))
        return OmegaConf.to_container(  # type: ignore[return-value]
            config, resolve=True, throw_on_missing=True
        )
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain_error(error, "train")) from error
    except ValueError as error:
        if not is_null_group(error):
            raise
        raise InputError(explain_null(overrides)) from error


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
