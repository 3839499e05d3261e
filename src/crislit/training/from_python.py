"""Trains a network from Python, with the checks of the command and without Hydra's run folders."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crislit.config import compose_complete
from crislit.errors import require
from crislit.io import read_json
from crislit.training import run_folder
from crislit.training.processes import is_main_process
from crislit.training.resume import AUTO
from crislit.training.run import run
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
    """
    config = compose_complete(overrides)
    check_settings(config)
    check_trainer(config["trainer"])
    quiet_lightning()
    target = Path(folder).expanduser()
    reserved = run_folder.reserve(target, "folder") if is_main_process() else None
    try:
        is_new = {path.name for path in target.iterdir()} <= {run_folder.LOCK}
        require(
            is_new or config["resume"] == AUTO or reserved is None,
            f"{target} is not empty: choose a new folder, or continue its run with resume=auto",
        )
        run(config, target, overrides)
    finally:
        if reserved is not None:
            reserved.release()
    results: dict[str, Any] = read_json(target / "results.json")
    return results
