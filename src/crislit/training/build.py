"""Builds model, data, trainer and logger from a configuration.

The configuration is read here and in ``run.py``, ``resume.py``, ``evaluation.py`` and
``provenance.py``. Network, data and task get typed values.
"""

import contextlib
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger

from crislit.checkpoints import checkpoint_metadata, load_clip_weights
from crislit.data import ReferDataModule, build_source
from crislit.errors import InputError, check_integer, require
from crislit.models import (
    CRIS,
    CRISConfig,
    build_cris,
    optimize_for_training,
    recompute_activations,
)
from crislit.training.callbacks import ProcessGuard
from crislit.training.checkpointing import AtomicCheckpointIO
from crislit.training.loggers import choose_wandb_mode, earlier_rows, earlier_wandb_run
from crislit.training.task import CRISTask
from crislit.transforms.augmentation import Augmentation

log = logging.getLogger(__name__)

Config = dict[str, Any]
"""A resolved configuration, as plain dictionaries and lists."""

DATASET_KEYS = (
    *("max_words", "evaluation_splits", "select_split", "sentences_per_image", "max_images"),
    "on_error",
)
LOADER_KEYS = (
    *("batch_size", "batch_size_per_device", "eval_batch_size", "image_size", "protocol"),
    *("workers", "seed"),
)
SOURCE_KEYS = ("folder", "refs", "embedded", "file", "sentences", "images")


def build_model(config: Config) -> CRIS:
    """Build the network with random weights.

    Raises:
        InputError: If its sizes do not fit.
    """
    return build_cris(CRISConfig.from_run_config(config))


def initialize_encoders(model: CRIS, config: Config) -> str:
    """Load CLIP's weights into the encoders if configured; return what the network starts from."""
    source = config["model"]["clip_weights"]
    if source is not None:
        return load_clip_weights(model, str(source))
    if not config["dataset"]["embedded"]:
        log.warning(
            "the encoders start from random weights, the paper's from CLIP's: set "
            "model.clip_weights=openai, or a path"
        )
    return "random"


def apply_training_form(model: CRIS, config: Config) -> CRIS:
    """Return the form of the network that is trained: same weights, same names.

    Raises:
        InputError: If ``rearrange`` or ``recompute`` is neither true nor false.
    """
    for name in ("rearrange", "recompute"):
        require(
            isinstance(config[name], bool), f"{name} must be true or false, got {config[name]!r}"
        )
    network = optimize_for_training(model) if config["rearrange"] else model
    recompute_activations(network, config["recompute"])
    return network


def build_data(config: Config) -> ReferDataModule:
    """Build the data module.

    Raises:
        InputError: If a setting is unknown or out of its range.
    """
    dataset = config["dataset"]
    check_keys("dataset", dataset, (*DATASET_KEYS, *SOURCE_KEYS, "name", "blind_control"))
    options = {
        **{name: dataset[name] for name in DATASET_KEYS if name in dataset},
        **{name: config[name] for name in LOADER_KEYS if name in config},
    }
    if "max_words" in options:
        options["max_tokens"] = options.pop("max_words")
    return ReferDataModule(
        build_source(dataset, Path(str(config["data_root"])).expanduser()),
        **options,
        augmentation=build_augmentation(config),
    )


def build_augmentation(config: Config) -> Augmentation | None:
    """Build the augmentation of the group ``augment``; None without one.

    Raises:
        InputError: If a transform cannot be built.
    """
    if config.get("augment") is None:
        return None
    augment = config["augment"]
    check_keys("augment", augment, ("flip", "transforms"))
    try:
        transforms = [instantiate(transform) for transform in augment.get("transforms") or []]
    except InstantiationException as error:
        raise InputError(f"cannot build augment.transforms: {error}") from error
    return Augmentation(augment.get("flip", 0.0), transforms)


def prepare_data(config: Config) -> ReferDataModule:
    """Seed everything, build the data module, and write and index its data.

    Raises:
        InputError: If the data or a setting cannot be used.
    """
    check_integer("seed", config["seed"], 0, maximum=2**32 - 1)  # NumPy's limit
    check_integer("callbacks.pictures", config["callbacks"]["pictures"], 0)
    L.seed_everything(config["seed"], workers=True, verbose=False)
    data = build_data(config)
    data.prepare_data()
    if config["dataset"].get("blind_control") and data.select_split in data.splits:
        data.blind_splits = [data.select_split]
    return data


def build_task(
    model: CRIS, data: ReferDataModule, config: Config, initial_weights: str
) -> CRISTask:
    """Build the LightningModule that trains a network.

    Raises:
        InputError: If a setting is unknown or out of its range.
    """
    optimizer = config["recipe"]["optimizer"]
    known = ("learning_rate", "encoder_factor", "encoder_from", "milestones", "gamma")
    check_keys("recipe.optimizer", optimizer, known)
    return CRISTask(
        model,
        **optimizer,
        threshold=config["threshold"],
        splits=loader_names(data),
        select_split=data.select_split,
        metadata=checkpoint_metadata(model.config, config, initial_weights),
    )


def loader_names(data: ReferDataModule) -> list[str]:
    """Return the names of the test loaders, in their order: splits, then blind controls."""
    return [*data.splits, *(f"{split}-blind" for split in data.blind_splits)]


def build_trainer(
    config: Config, folder: Path, callbacks: list[L.Callback], logger: Logger | bool
) -> L.Trainer:
    """Build the trainer; the machine decides settings that are ``auto``.

    Raises:
        InputError: If the requested device, strategy or precision is not available.
    """
    options = dict(config["trainer"])
    for name, minimum in {
        **{"max_epochs": 0, "max_steps": -1},
        **{"check_val_every_n_epoch": 1, "log_every_n_steps": 1},
    }.items():
        check_integer(f"trainer.{name}", options[name], minimum)
    cuda = torch.cuda.is_available() and options["accelerator"] in ("auto", "gpu", "cuda")
    # PyTorch synchronizes BatchNorm on GPUs only.
    automatic = {"precision": "16-mixed" if cuda else "32-true", "sync_batchnorm": cuda}
    # We handle Slurm's signals: Lightning would bypass our checkpoints and requeue the job.
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    options |= {
        **{name: value for name, value in automatic.items() if options[name] == "auto"},
        **{"default_root_dir": folder, "use_distributed_sampler": False},
        "plugins": [AtomicCheckpointIO(), *slurm],
    }
    try:
        return L.Trainer(**options, callbacks=[ProcessGuard(), *callbacks], logger=logger)
    except (MisconfigurationException, ValueError, TypeError) as error:
        requested = ", ".join(
            f"trainer.{name}={options[name]}"
            for name in ("accelerator", "devices", "strategy", "precision")
        )
        raise InputError(
            f"this machine cannot run {requested}: {error}. It has {torch.cuda.device_count()} GPUs"
        ) from error


def choose_devices(config: Config, data: ReferDataModule) -> Config:
    """Return the configuration with ``trainer.devices=auto`` decided on a machine with GPUs."""
    available = torch.cuda.device_count()
    if config["trainer"]["devices"] != "auto" or available < 2:
        return config
    devices = usable_devices(available, data)
    log.info("training on %d of %d devices, over which the batch divides", devices, available)
    return config | {"trainer": config["trainer"] | {"devices": devices}}


def usable_devices(available: int, data: ReferDataModule) -> int:
    """Return the largest number of devices over which a batch divides, or all if over none."""
    for devices in range(available, 0, -1):
        with contextlib.suppress(InputError):
            data.accumulation(devices)
            return devices
    return available


def build_logger(config: Config, folder: Path, resumed_steps: int = 0) -> Logger | Literal[False]:
    """Build the logger; Weights & Biases logs offline where it cannot be online.

    Args:
        config: The run's configuration.
        folder: The run's folder.
        resumed_steps: Where an interrupted run of this folder continues; its record is kept until
            there.

    Raises:
        InputError: If the logger cannot start.
    """
    if config["logger"] is None:
        return False
    options: dict[str, str] = {}
    if "Wandb" in config["logger"]["_target_"]:
        choose_wandb_mode(folder)
        if resumed_steps and (run := earlier_wandb_run(folder)):
            options = {"id": run, "resume": "allow"}
    rows = earlier_rows(folder / "metrics.csv", resumed_steps) if resumed_steps else []
    try:
        logger: Logger = instantiate(config["logger"], save_dir=str(folder), **options)
        if rows and isinstance(logger, CSVLogger):
            logger.experiment.metrics = rows
            logger.save()
    except InstantiationException as error:
        raise InputError(
            f"the logger cannot start: {error}. pip install 'crislit[tensorboard]' installs "
            "TensorBoard"
        ) from error
    return logger


def check_keys(group: str, values: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise an :class:`InputError` if a group of the configuration has an unknown key."""
    if unknown := sorted(set(values) - set(known)):
        raise InputError(
            f"{group}.{unknown[0]} is not a setting; {group} has {', '.join(sorted(known))}"
        )
