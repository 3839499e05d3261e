"""Builds the trainer and the logger of a run, and decides settings that are ``auto``."""

import contextlib
import logging
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger

from crislit.data import ReferDataModule
from crislit.errors import InputError, check_integer
from crislit.training.callbacks import ProcessGuard
from crislit.training.checkpointing import AtomicCheckpointIO
from crislit.training.loggers import choose_wandb_mode, earlier_rows, earlier_wandb_run
from crislit.training.progress import RunProgress
from crislit.training.settings import Config

log = logging.getLogger(__name__)


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
    options.setdefault("enable_model_summary", False)  # one line of StartSummary says as much
    progress = [RunProgress()] if options.get("enable_progress_bar", True) else []
    try:
        return L.Trainer(
            **options, callbacks=[ProcessGuard(), *progress, *callbacks], logger=logger
        )
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
