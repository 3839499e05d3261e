"""Trains and evaluates one configuration: start, build, fit, evaluate, write."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor
from tqdm.contrib.logging import logging_redirect_tqdm

from crislit.checkpoints import Checkpoint, read_checkpoint
from crislit.data import ReferDataModule
from crislit.errors import require
from crislit.models import check_compiler, count_parameters
from crislit.training import processes
from crislit.training.allocator import keep_freed_memory
from crislit.training.build import (
    apply_training_form,
    build_callbacks,
    build_model,
    build_task,
    check_values,
    find_initial_weights,
    load_initial_weights,
    prepare_data,
)
from crislit.training.callbacks import SkippedSamples, ValidationLogger
from crislit.training.checkpointing import (
    BEST,
    LAST,
    BestCheckpoint,
    LastCheckpoint,
    StepSeeds,
    StoppedBySignal,
)
from crislit.training.evaluation import (
    check_test_share,
    describe_run,
    evaluate_splits,
    public_part,
    report_results,
)
from crislit.training.loggers import close_loggers, log_checkpoint
from crislit.training.nan_guard import NanGuard
from crislit.training.progress import StartSummary
from crislit.training.provenance import commit, fingerprint
from crislit.training.resume import (
    AUTO,
    check_resume,
    find_checkpoint,
    finished_score,
    keep_best,
    stored_weights,
)
from crislit.training.settings import Config
from crislit.training.task import CRISTask
from crislit.training.threads import choose_threads
from crislit.training.trainer import build_logger, build_trainer, choose_devices

log = logging.getLogger(__name__)


def run(config: Config, folder: Path, overrides: Sequence[str] = ()) -> float:
    """Train and evaluate one configuration in this process.

    Args:
        config: The configuration, see ``conf/train.yaml``.
        folder: Receives checkpoints, metrics, figures and ``results.json``.
        overrides: The command line's overrides, for the record.

    Returns:
        The selecting split's mIoU, in [0, 1].

    Raises:
        InputError: If the configuration or its data cannot be used.
    """
    started = start(config, folder)
    if isinstance(started, float):
        return started
    training = build(started)
    fit(training)
    results = evaluate(training)
    return write(training, results, overrides)


@dataclass(frozen=True)
class Start:
    """A checked run, before its network is built.

    Attributes:
        config: Its configuration.
        folder: Its folder.
        fingerprint: Digests of its configuration and data, see ``fingerprint``.
        resume: The checkpoint that it continues from.
        data: Its data, written and indexed.
        time: When it started, in seconds of a monotonic clock.
    """

    config: Config
    folder: Path
    fingerprint: dict[str, str]
    resume: Checkpoint | None
    data: ReferDataModule
    time: float


@dataclass(frozen=True)
class Training:
    """A run's parts; the task's metadata has its configuration and initial weights."""

    start: Start
    task: CRISTask
    trainer: L.Trainer
    last: LastCheckpoint


def start(config: Config, folder: Path) -> Start | float:
    """Check everything that can be checked before long work; return the score if finished."""
    began = time.perf_counter()
    keep_freed_memory()
    commit()
    check_values(config)
    require(
        config["init_from"] is None or config["resume"] in (None, AUTO),
        "resume=PATH continues a run and init_from=NETWORK starts one: set one of them",
    )
    is_finished = config["resume"] == AUTO and (folder / "results.json").is_file()
    resume = None if is_finished else find_checkpoint(config["resume"], folder)
    if resume is None and not is_finished:
        find_initial_weights(config)
    data = prepare_data(config)
    prints = fingerprint(config, data.index.digest, stored_weights(resume, config))
    if is_finished:
        return finished_score(config, prints, folder)
    return Start(config, folder, prints, resume, data, began)


def build(started: Start) -> Training:
    """Build network, task, callbacks, logger and trainer."""
    folder, data, resume = started.folder / "checkpoints", started.data, started.resume
    config = choose_devices(started.config, data)
    check_test_share(config["trainer"], data)
    model = build_model(config)
    prepare: Callable[[], None] | None = None
    if resume is None:
        initial_weights = load_initial_weights(model, config)
    else:
        check_resume(resume, config, model.config, started.fingerprint)
        prepare = partial(keep_best, resume, config, started.fingerprint, folder)
        initial_weights = resume.initial_weights
    task = build_task(
        apply_training_form(model, config), data, config, initial_weights, started.fingerprint
    )

    last = LastCheckpoint(folder, config["checkpoint_every"], started.time)
    seeds, metric = StepSeeds(config["seed"]), f"{data.select_split}/mIoU"
    callbacks: list[L.Callback] = [
        *([SkippedSamples(data)] if data.on_error == "skip" else []),
        BestCheckpoint(folder, metric, prepare),
        last,
        seeds,
        NanGuard(seeds, folder),
        ValidationLogger(data.select_split),
        StartSummary(data, resume.source if resume else initial_weights, started.folder),
    ]
    callbacks += build_callbacks(config)
    resumed_steps = resume.steps if resume and Path(resume.source).parent == folder else 0
    logger = build_logger(config, started.folder, resumed_steps)
    if logger:
        callbacks.append(LearningRateMonitor("epoch"))
        logger.log_hyperparams({**config, "parameters": count_parameters(task.model)})
    trainer = build_trainer(config, started.folder, callbacks, logger)
    choose_threads(model, trainer.strategy.root_device)
    if config["compile"]:
        check_compiler(trainer.strategy.root_device)
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    return Training(started, task, trainer, last)


def fit(training: Training) -> None:
    """Train; a signal saves and ends the process.

    Raises:
        InputError: If no step was taken.
    """
    trainer, started = training.trainer, training.start
    path, done = (started.resume.source, started.resume.steps) if started.resume else (None, 0)
    try:
        with logging_redirect_tqdm():
            trainer.fit(training.task, started.data, ckpt_path=path)
    except StoppedBySignal as stop:
        processes.detach()  # every process ends on its own
        if not trainer.is_global_zero:
            raise SystemExit(0) from stop  # the main process's exit code is the run's
        log.warning(
            "%s; continue with resume=auto hydra.run.dir=%s, or resume=%s",
            stop,
            started.folder,
            started.folder / "checkpoints" / LAST,
        )
        raise SystemExit(128 + stop.number) from stop
    for stopping in trainer.early_stopping_callbacks:
        if stopping.stopped_epoch:
            log.info(
                "stopped early, after %s had not improved for %d validations",
                *(stopping.monitor, stopping.patience),
            )
    limits = started.config["trainer"]
    require(
        trainer.global_step != done or started.config["resume"] == AUTO,
        f"no step was taken beyond step {done}: raise recipe.epochs={limits['max_epochs']} or "
        f"trainer.max_steps={limits['max_steps']}",
    )


def evaluate(training: Training) -> dict[str, Any]:
    """Evaluate every split with the best checkpoint, or the last one if there is none."""
    trainer, started = training.trainer, training.start
    checkpoint = started.folder / "checkpoints" / BEST
    if not checkpoint.is_file():
        checkpoint = checkpoint.with_name(LAST)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.warning(
                "the run ended before a validation: there is no best.ckpt, evaluating the last "
                "weights"
            )
    training.task.model.load_state_dict(read_checkpoint(checkpoint).weights)
    figures, count = started.folder / "figures", started.config["callbacks"]["pictures"]
    results = {
        **evaluate_splits(trainer, training.task, started.data, figures, count),
        "checkpoint": str(checkpoint),
        "steps": trainer.global_step,
    }
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SkippedSamples):
            results["skipped"] = [
                {"sample": name, "reason": reason} for name, reason in callback.reasons.items()
            ]
    return results


def write(training: Training, results: dict[str, Any], overrides: Sequence[str]) -> float:
    """Write and print the results; return the selecting split's mIoU."""
    started, task, trainer = training.start, training.task, training.trainer
    results |= {
        **describe_run(task.metadata["config"], overrides, task.model),
        **public_part(started.fingerprint),
        "initial_weights": task.metadata["initial_weights"],
        "seconds": training.last.seconds(),
    }
    if trainer.is_global_zero:
        report_results(results, started.folder)
        log_checkpoint(
            trainer.loggers,
            Path(results["checkpoint"]),
            {"results": results["splits"], "commit": results["commit"]},
        )
        close_loggers(trainer.loggers)
    best = trainer.checkpoint_callback.best_model_score or 0.0  # type: ignore[union-attr]
    return float(results["splits"].get(started.data.select_split, {}).get("mIoU", best))
