"""Where a run continues from."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from crislit.checkpoints import Checkpoint, read_checkpoint
from crislit.errors import DamagedFileError, InputError, require, see
from crislit.io import shipped_networks, write_files
from crislit.models import CRISConfig
from crislit.training.checkpointing import BEST, LAST, NEXT, PREVIOUS
from crislit.training.provenance import stored_fingerprint

log = logging.getLogger(__name__)

PLACES = ("data_root", "resume", "record", "workers", "checkpoint_every", "eval_batch_size")
"""Settings that may differ between the starts of one run."""
SCORE_SETTINGS = ("threshold", "protocol", "image_size")
"""Settings without which scores of two runs cannot be compared."""
AUTO = "auto"
"""Value of ``resume``: continue where the run's own folder left off."""


def finished_score(config: Mapping[str, Any], prints: Mapping[str, str], folder: Path) -> float:
    """Return the selecting split's mIoU of a run that has finished before.

    Args:
        config: The run's configuration.
        prints: Its fingerprint.
        folder: Its folder.

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
    check_same_run(prints, config, results, results.get("config", {}), f"{folder} holds")
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
    last = path / "checkpoints" / LAST
    require(not last.is_file(), f"resume={path} is the folder of a run: resume={last}")
    is_shipped = not path.exists() and str(path) in shipped_networks()
    require(
        not (is_shipped or path.is_dir() or path.suffix == ".safetensors"),
        f"resume={path} is not the checkpoint of a run, which is RUN/checkpoints/last.ckpt. To "
        f"start a new run from a network's weights: init_from={path}",
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
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    network: CRISConfig,
    prints: Mapping[str, str],
) -> None:
    """Check that a run can continue from a checkpoint.

    Args:
        checkpoint: The checkpoint.
        config: The run's configuration.
        network: The run's network.
        prints: The run's fingerprint.

    Raises:
        InputError: If it belongs to another network or data set or, with ``resume=auto``, to
            another run; or if another learning rate or fewer epochs are requested.
    """
    if config["resume"] != AUTO:
        check_same_data(checkpoint, config, prints)
    path, saved, wanted = checkpoint.source, checkpoint.network.to_dict(), network.to_dict()
    different = ", ".join(
        f"{name}={saved.get(name)} instead of {wanted.get(name)}"
        for name in dict.fromkeys([*wanted, *saved])
        if saved.get(name) != wanted.get(name)
    )
    require(
        not different,
        f"{path} is a checkpoint of another model: it has {different}. Resume with the overrides "
        f"of its own run{see('resume-refused')}",
    )
    trained = checkpoint.config or config
    if config["resume"] == AUTO:
        check_same_run(prints, config, checkpoint.fingerprint, trained, f"{path} belongs to")
    before, now = (
        settings["recipe"]["optimizer"]["learning_rate"] for settings in (trained, config)
    )
    require(
        before == now,
        f"{path} continues at its optimizer's rate: recipe.optimizer.learning_rate={now} must "
        f"be {before}, as in its own run. recipe.optimizer.milestones and gamma lower it"
        f"{see('resume-refused')}",
    )
    counted_before, counted_now = (
        "steps" if settings["recipe"]["optimizer"].get("cooldown") else "epochs"
        for settings in (trained, config)
    )
    require(
        counted_before == counted_now,
        f"{path} counts its schedule in {counted_before}, and recipe.optimizer.cooldown="
        f"{config['recipe']['optimizer'].get('cooldown')} in {counted_now}: set it as in its run"
        f"{see('resume-refused')}",
    )
    epochs = config["trainer"]["max_epochs"]
    require(
        checkpoint.epochs <= epochs,
        f"{path} has trained {checkpoint.epochs} epochs, and recipe.epochs={epochs} asks for "
        "fewer: raise it, or evaluate the checkpoint",
    )
    log.info("continuing from %s at step %d", path, checkpoint.steps)


def check_same_run(
    prints: Mapping[str, str],
    config: Mapping[str, Any],
    stored: Mapping[str, Any],
    stored_config: Mapping[str, Any],
    found: str,
) -> None:
    """Check that ``resume=auto`` continues its own run, on the data that it has trained on.

    Args:
        prints: The run's fingerprint.
        config: Its configuration.
        stored: The fingerprint that was stored; without a digest of the data in version 0.1.
        stored_config: The configuration that was stored.
        found: The beginning of the message.

    Raises:
        InputError: If settings or data differ.
    """
    stored = stored_fingerprint(stored, stored_config, prints["data"])
    require(
        stored["data"] == prints["data"],
        f"{found} a run on other sentences or masks (digest {stored['data']}, here "
        f"{prints['data']}): choose another hydra.run.dir, or restore the data"
        f"{see('resume-refused')}",
    )
    require(
        stored["experiment"] == prints["experiment"],
        f"{found} a run with other settings{name_differences(stored_config, config)}; resume=auto "
        "continues only one run. To change it: resume=RUN/checkpoints/last.ckpt in another folder"
        f"{see('resume-refused')}",
    )


def name_differences(stored: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return up to three settings that differ, for messages."""
    before, now = flatten(stored), flatten(config)
    different = [
        f"{name}={before.get(name)}, here {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in PLACES
    ]
    return f" ({'; '.join(different[:3])})" if different else ""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dictionaries by their full names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        full = f"{prefix}{name}"
        flat |= flatten(value, f"{full}.") if isinstance(value, Mapping) else {full: value}
    return flat


def check_same_data(
    checkpoint: Checkpoint, config: Mapping[str, Any], prints: Mapping[str, str]
) -> None:
    """Check that ``resume=PATH`` stays with its data set; warn if its content has changed.

    Raises:
        InputError: If the checkpoint belongs to another data set.
    """
    before, now = (
        settings.get("dataset", {}).get("name") for settings in (checkpoint.config, config)
    )
    require(
        before in (None, now),
        f"{checkpoint.source} was trained on {before}, not on {now}, and a run continues on its "
        f"own data. To start a new run from its weights: init_from={checkpoint.source}",
    )
    stored = checkpoint.fingerprint.get("data", prints["data"])
    if stored != prints["data"]:
        log.warning(
            "the sentences or masks have changed since %s was saved (digest %s, here %s): the run "
            "continues on the new ones",
            checkpoint.source,
            stored,
            prints["data"],
        )


def keep_best(
    checkpoint: Checkpoint, config: Mapping[str, Any], prints: Mapping[str, str], folder: Path
) -> None:
    """Copy the best checkpoint so far to a run that continues in another folder.

    Only where the scores of both can be compared, and not from a later step.

    Args:
        checkpoint: The checkpoint that the run continues from.
        config: The run's configuration.
        prints: Its fingerprint.
        folder: Its folder of checkpoints.
    """
    best, copy = Path(checkpoint.source).with_name(BEST), folder / BEST
    if copy.exists() or not best.is_file() or checkpoint.fingerprint.get("data") != prints["data"]:
        return
    trained = checkpoint.config
    is_comparable = all(trained[name] == config[name] for name in SCORE_SETTINGS) and all(
        trained["dataset"][name] == config["dataset"][name]
        for name in ("select_split", "max_words", "max_images")
    )
    try:
        if is_comparable and read_checkpoint(best).steps <= checkpoint.steps:
            write_files({copy: lambda part: shutil.copyfile(best, part)})
    except DamagedFileError as error:
        log.warning("%s; the best checkpoint is chosen among later ones", error)


def stored_weights(
    checkpoint: Checkpoint | None, config: Mapping[str, Any]
) -> Mapping[str, str] | None:
    """Return the fingerprint of a checkpoint whose run names the same initial weights.

    A run that continues needs their files no longer.
    """
    if checkpoint is None or not checkpoint.fingerprint:
        return None
    before = checkpoint.config
    is_same = before.get("init_from") == config["init_from"] and (
        before["model"].get("clip_weights") == config["model"]["clip_weights"]
    )
    return checkpoint.fingerprint if is_same else None
