"""Commit, hardware and fingerprint of a run."""

import functools
import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crislit.checkpoints import fingerprint_source, fingerprint_start
from crislit.config import VERSION
from crislit.data import SHAPES_VERSION
from crislit.errors import counted

CODE = (":/src", ":/conf", ":/pyproject.toml")
"""Paths that a run depends on, from the top of the checkout."""
NEUTRAL_TRAINER_KEYS = {
    *("accelerator", "devices", "num_nodes", "strategy", "log_every_n_steps"),
    *("num_sanity_val_steps", "profiler", "enable_progress_bar", "enable_model_summary"),
    *("enable_checkpointing", "default_root_dir", "benchmark", "deterministic"),
    *("detect_anomaly", "logger", "callbacks", "max_time"),
}
"""Trainer settings that change numbers by rounding at most."""
ADDED_KEYS: dict[tuple[str, ...], Any] = {
    ("trainer", "gradient_clip_val"): None,
    ("recipe", "optimizer", "cooldown"): 0.0,
    ("dataset", "on_error"): "raise",
}
"""Settings that early records lack, and what they stand for there."""
ADDED_GROUPS = ("augment", "neck", "image_projector", "head")
"""Groups that a configuration has only if they are chosen."""
NEUTRAL_DATASET_KEYS = {
    *("evaluation_splits", "blind_control", "file", "sentences", "images"),
    *("val_share", "mask_value"),
}
"""Data set settings that do not change what is trained; the data have a digest of their own."""


def fingerprint(
    config: Mapping[str, Any],
    data: str = "",
    weights: Mapping[str, str] | None = None,
    trained_on: str = "",
) -> dict[str, str]:
    """Return digests of what a run's numbers depend on.

    They are computed once, when a run starts, and stored in its checkpoints and results: data and
    weights on disk may have changed since. Places of data, numbers of workers and GPUs, and loggers
    change numbers by rounding at most. The number of processes on CPUs counts: without SyncBN, each
    normalizes its share of a batch.

    Args:
        config: The run's configuration.
        data: The digest of its sentences and masks, ``ReferIndex.digest``; empty if unknown.
        weights: A fingerprint of the same run that was stored; None computes the digests of its
            initial weights from their files.
        trained_on: The training's data, of an evaluation on other data.

    Returns:
        ``experiment``: digest of all settings and the data (of embedded data, the version).
        ``setting``: of those settings that the rows of one table share, without seed, data set and
        row of table 1. ``data``: the argument. ``clip_weights``, ``init_from``: digests of the
        initial weights, empty without them.
    """
    names = (
        *("model", "decoder", "loss", "projector", "recipe", "image_size", "batch_size"),
        *("batch_size_per_device", "threshold", "protocol"),
    )
    config = drop_added_keys(config)
    trainer, dataset = config.get("trainer") or {}, config["dataset"]
    on_cpus = trainer.get("accelerator") == "cpu" and isinstance(trainer.get("devices"), int)
    processes = trainer["devices"] * trainer.get("num_nodes", 1) if on_cpus else 1
    clip_weights, start = initial_weights(config, weights)
    facts: dict[str, Any] = {
        **{name: config.get(name) for name in names},
        "trainer": {k: v for k, v in trainer.items() if k not in NEUTRAL_TRAINER_KEYS},
        "processes without SyncBN": processes,
        "model": config["model"] | {"clip_weights": clip_weights},
        # A run that continues ends as if it had not been interrupted.
        "resume": None if config.get("resume") == "auto" else config.get("resume"),
    }
    # Absent unless chosen.
    facts |= {name: config[name] for name in ADDED_GROUPS if config.get(name) is not None}
    if callbacks := {k: v for k, v in config.get("callbacks", {}).items() if k != "pictures"}:
        facts["callbacks"] = callbacks
    if start is not None:
        facts["init_from"] = start
    if trained_on:
        facts["trained on"] = trained_on
    common = facts | {
        **{name: dataset.get(name) for name in ("sentences_per_image", "max_images")},
        "decoder": {k: v for k, v in config["decoder"].items() if k != "layers"},
        "loss": {k: v for k, v in config["loss"].items() if k != "contrastive"},
    }
    content = f"version {SHAPES_VERSION}" if dataset.get("embedded") else data or None
    facts["dataset"] = {
        **{name: value for name, value in dataset.items() if name not in NEUTRAL_DATASET_KEYS},
        **{"seed": config["seed"], "content": content},
    }
    return {
        **{"experiment": _digest(facts), "setting": _digest(common), "data": data},
        **{"clip_weights": clip_weights or "", "init_from": start or ""},
    }


def drop_added_keys(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a configuration without added settings of the value that early records stand for."""
    kept: dict[str, Any] = {}
    for name, value in config.items():
        here = (*path, name)
        if here in ADDED_KEYS and value == ADDED_KEYS[here]:
            continue
        kept[name] = drop_added_keys(value, here) if isinstance(value, Mapping) else value
    return kept


def initial_weights(
    config: Mapping[str, Any], stored: Mapping[str, str] | None
) -> tuple[str | None, str | None]:
    """Return digests of CLIP's weights and of the network that a run starts from."""
    if stored is not None and "clip_weights" in stored:  # absent in version 0.1
        return stored["clip_weights"] or None, stored["init_from"] or None
    start = config.get("init_from")
    return (
        fingerprint_source(config["model"].get("clip_weights")),
        None if start is None else fingerprint_start(start),
    )


def stored_fingerprint(
    stored: Mapping[str, Any], config: Mapping[str, Any], data: str
) -> Mapping[str, Any]:
    """Return the fingerprint that a run has stored, or compute the one of version 0.1.

    Args:
        stored: Its ``results.json``, or the fingerprint in its checkpoint.
        config: Its configuration.
        data: The digest of the data here, since version 0.1 did not store one.
    """
    return stored if "data" in stored else fingerprint(config, data)


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.cache
def commit() -> str:
    """Return the commit of the running checkout, or the version of an installed package.

    "-dirty" follows if its code was changed. Commands call this when they start, so that later
    changes do not count.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    commands = (
        ["rev-parse", "HEAD"],
        ["status", "--porcelain", "-uno", "--", *CODE],
        ["ls-files", "--error-unmatch", __file__],  # fails if another repository surrounds us
    )
    try:
        name, changes, _ = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return f"crislit {VERSION}"
    return name.strip() + ("-dirty" if changes else "")


def hardware() -> str:
    """Return the GPUs' name, or the processor's and the number of threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    named = re.search("^model name.*?:(.*)", info.read_text() if info.is_file() else "", re.M)
    processor = named[1].strip() if named else platform.processor() or platform.machine()
    return f"{processor}, {counted(torch.get_num_threads(), 'thread')}"
