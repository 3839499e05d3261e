"""Where a run continues from."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from crislit.checkpoints import Checkpoint, read_checkpoint
from crislit.errors import DamagedFileError, InputError, require
from crislit.models import CRISConfig
from crislit.training.checkpointing import LAST, NEXT, PREVIOUS
from crislit.training.provenance import fingerprint

log = logging.getLogger(__name__)

AUTO = "auto"
"""Value of ``resume``: continue where the run's own folder left off."""


def finished_score(config: Mapping[str, Any], experiment: str, folder: Path) -> float:
    """Return the selecting split's mIoU of a run that has finished before.

    Raises:
        InputError: If the results are damaged, or another run's.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(
            f"{path} is damaged: remove it, and the run continues from its last checkpoint"
        ) from error
    require(
        results.get("experiment") == experiment,
        f"{folder} holds a run with other settings; resume=auto continues only one run",
    )
    log.info("resume=auto: finished before, nothing is left to do in %s", folder)
    return float(results["splits"].get(config["dataset"]["select_split"], {}).get("mIoU", 0.0))


def find_checkpoint(resume: str | None, folder: Path) -> Checkpoint | None:
    """Read the checkpoint to continue from, if any.

    Args:
        resume: A path; ``auto`` for the latest checkpoint of the run's folder; None for none.
        folder: The run's folder.

    Raises:
        InputError: If there is none at the path, or it is damaged.
    """
    if resume is None:
        return None
    if resume == AUTO:
        return latest_checkpoint(folder)
    path = Path(resume).expanduser()
    require(
        path.is_file() or not path.exists(),
        f"resume={path} is not a file: a run keeps its checkpoints as RUN/checkpoints/last.ckpt",
    )
    try:
        return read_without_weights(path)
    except DamagedFileError as error:
        previous = path.with_name(PREVIOUS)
        hint = f"; resume={previous} is the one before it" if previous.is_file() else ""
        raise InputError(f"{error}{hint}") from error


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the latest intact checkpoint of a run's folder; None if it has none at all.

    Raises:
        InputError: If all of them are damaged, or one cannot be read at all.
    """
    paths = [
        path for name in (NEXT, LAST, PREVIOUS) if (path := folder / "checkpoints" / name).is_file()
    ]
    for path in paths:
        try:
            return read_without_weights(path)
        except DamagedFileError as error:
            log.warning("%s; using the checkpoint before it", error)
    require(
        not paths,
        f"every checkpoint in {folder / 'checkpoints'} is damaged; without the folder, a run "
        "starts from the beginning",
    )
    log.info("resume=auto: no checkpoint in %s, starting from the beginning", folder)
    return None


def read_without_weights(path: Path) -> Checkpoint:
    """Read a checkpoint and drop its weights, which Lightning loads with everything else."""
    return replace(read_checkpoint(path), weights={})


def check_resume(
    checkpoint: Checkpoint, config: Mapping[str, Any], network: CRISConfig, experiment: str
) -> None:
    """Check that a run can continue from a checkpoint.

    Args:
        checkpoint: The checkpoint.
        config: The run's configuration.
        network: The run's network.
        experiment: The run's fingerprint.

    Raises:
        InputError: If it belongs to another network or, with ``resume=auto``, to another run, or
            if another learning rate is requested.
    """
    path, saved, wanted = checkpoint.source, checkpoint.network.to_dict(), network.to_dict()
    different = ", ".join(
        f"{name}={saved[name]} instead of {wanted[name]}"
        for name in wanted
        if saved[name] != wanted[name]
    )
    require(
        not different,
        f"{path} is a checkpoint of another model: it has {different}. Resume with the overrides "
        "of its own run",
    )
    require(
        config["resume"] != AUTO or fingerprint(checkpoint.config)["experiment"] == experiment,
        f"{path} belongs to a run with other settings; resume=auto continues only one run",
    )
    before, now = (
        settings["recipe"]["optimizer"]["learning_rate"]
        for settings in (checkpoint.config or config, config)
    )
    require(
        before == now,
        f"{path} continues at its optimizer's rate: recipe.optimizer.learning_rate={now} must "
        f"be {before}, as in its own run. recipe.optimizer.milestones and gamma lower it",
    )
    log.info("continuing from %s at step %d", path, checkpoint.steps)
