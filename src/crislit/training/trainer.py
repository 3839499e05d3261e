"""Builds the trainer and the logger of a run, and decides settings that are ``auto``."""

import contextlib
import logging
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger

from crislit.config import settings_of_choice
from crislit.data import ReferDataModule
from crislit.errors import InputError, first_line, require, see
from crislit.training.callbacks import ProcessGuard
from crislit.training.checkpointing import AtomicCheckpointIO
from crislit.training.launch import check_size
from crislit.training.loggers import choose_wandb_mode, earlier_rows, earlier_wandb_run
from crislit.training.overfit import RepeatedBatches
from crislit.training.progress import RunProgress
from crislit.training.settings import Config
from crislit.training.time_limit import TimeLimit
from crislit.training.trainer_options import check_trainer, parse_time

log = logging.getLogger(__name__)

TRAINER_DEFAULTS = settings_of_choice("trainer", "auto")["trainer"]
"""Values without overrides."""


class Loggers(list[Logger]):
    """The loggers of a run, none for ``logger=none``."""

    def log_hyperparams(self, values: dict[str, Any]) -> None:
        """Log the configuration with every logger."""
        for logger in self:
            logger.log_hyperparams(values)


def build_trainer(
    config: Config, folder: Path, callbacks: list[L.Callback], logger: list[Logger] | Literal[False]
) -> L.Trainer:
    """Build the trainer; the machine decides settings that are ``auto``.

    Raises:
        InputError: If the requested device, strategy or precision is not available, or if
            Lightning cannot use another argument.
    """
    options = dict(config["trainer"])
    check_trainer(options)
    cuda = torch.cuda.is_available() and options["accelerator"] in ("auto", "gpu", "cuda")
    # PyTorch synchronizes BatchNorm on GPUs only.
    automatic = {"precision": "16-mixed" if cuda else "32-true", "sync_batchnorm": cuda}
    options |= {
        **{name: value for name, value in automatic.items() if options[name] == "auto"},
        **{"default_root_dir": folder, "use_distributed_sampler": False},
        "enable_model_summary": False,
    }
    own: list[L.Callback] = [ProcessGuard()]
    if options.get("enable_progress_bar", True):
        own.append(RunProgress())
    if overfit := options.pop("overfit_batches", None):
        options["limit_train_batches"] = overfit
        own.append(RepeatedBatches())
    if max_time := options.pop("max_time", None):
        own.append(TimeLimit(parse_time(max_time)))
    try:
        # We handle Slurm's signals: Lightning would bypass our checkpoints and requeue the job.
        slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
        options["plugins"] = [AtomicCheckpointIO(), *slurm]
        trainer = L.Trainer(**options, callbacks=[*own, *callbacks], logger=logger)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        # Lightning raises RuntimeErrors for what Slurm was asked for.
        devices = ("accelerator", "devices", "strategy", "precision")
        added = (name for name in config["trainer"] if name not in TRAINER_DEFAULTS)
        lacks_gpu = options.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available()
        requested = ", ".join(f"trainer.{name}={options.get(name)}" for name in (*devices, *added))
        raise InputError(
            f"this machine cannot run {requested}: {str(error).rstrip('. ')}. It has "
            f"{torch.cuda.device_count()} GPUs{see('no-gpu') if lacks_gpu else ''}"
        ) from error
    check_size(trainer.world_size, config["trainer"])
    return trainer


def choose_devices(config: Config, data: ReferDataModule) -> Config:
    """Return the configuration with ``trainer.devices=auto`` decided on a machine with GPUs."""
    available = torch.cuda.device_count()
    trainer = config["trainer"]
    if trainer["devices"] != "auto" or trainer["accelerator"] == "cpu" or available < 2:
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


def build_logger(config: Config, folder: Path, resumed_steps: int = 0) -> Loggers:
    """Build the loggers; Weights & Biases logs offline where it cannot be online.

    Args:
        config: The run's configuration.
        folder: The run's folder.
        resumed_steps: Where an interrupted run of this folder continues; its record is kept until
            there.

    Raises:
        InputError: If a logger cannot start.
    """
    loggers = Loggers()
    for name, options in logger_options(config).items():
        try:
            loggers.append(_build_one(options, folder, resumed_steps))
        except (InstantiationException, ImportError) as error:
            hint = see("tensorboard") if name == "tensorboard" else ""
            raise InputError(
                f"logger.{name} cannot start: {first_line(error.__cause__ or error)}{hint}"
            ) from error
    return loggers


def logger_options(config: Config) -> dict[str, Config]:
    """Return the options of each logger by its name; in version 0.1 there was only one.

    Raises:
        InputError: If they are not dictionaries with the class of the logger.
    """
    options = config.get("logger") or {}
    if isinstance(options, dict) and "_target_" in options:
        options = {str(options["_target_"]).rpartition(".")[2]: options}
    require(isinstance(options, dict), f"logger={options} is not a choice: csv, wandb, ... or none")
    for name, values in options.items():
        require(
            isinstance(values, dict) and isinstance(values.get("_target_"), str),
            f"logger.{name} is not a logger: it needs _target_, the class of the logger. "
            "logger=[csv,wandb] chooses several",
        )
    return options


def _build_one(options: Config, folder: Path, resumed_steps: int) -> Logger:
    resumed: dict[str, str] = {}
    if "Wandb" in options["_target_"]:
        choose_wandb_mode(folder)
        if resumed_steps and (run := earlier_wandb_run(folder)):
            resumed = {"id": run, "resume": "allow"}
    logger: Logger = instantiate(options, save_dir=str(folder), **resumed)
    rows = earlier_rows(folder / "metrics.csv", resumed_steps) if resumed_steps else []
    if rows and isinstance(logger, CSVLogger):
        logger.experiment.metrics = rows
        logger.save()
    return logger
