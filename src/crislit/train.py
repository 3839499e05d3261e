"""``python -m crislit.train``: train a network and evaluate every split."""

import contextlib
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig, OmegaConf

from crislit import processes
from crislit.callbacks import (
    Companions,
    Narrator,
    Pictures,
    commit,
    describe_run,
    measure_fps,
    print_results,
    split_results,
    write_results,
)
from crislit.checkpoint import Checkpoint, damage, read_checkpoint
from crislit.config import program
from crislit.data.datamodule import ReferDataModule, Skips
from crislit.data.dataset import ReferEvaluationSet
from crislit.errors import InputError, check_whole
from crislit.finite import FiniteNumbers
from crislit.loggers import (
    choose_wandb_mode,
    close_loggers,
    earlier_rows,
    earlier_run,
    log_checkpoint,
    log_configuration,
)
from crislit.memory import keep_memory
from crislit.metrics import reachable_iou
from crislit.models.clip_weights import find_weights, load_clip_weights
from crislit.models.cris import CRIS, build_cris, count_parameters
from crislit.models.rearranged import rearrange
from crislit.models.recompute import recompute_activations
from crislit.record import identify
from crislit.resume import PREVIOUS, LastCheckpoint, StepSeeds, Stopped, WholeCheckpoints, newest
from crislit.sweep import run_job
from crislit.task import CRISTask

log = logging.getLogger(__name__)

# Lightning's internals; a folder that is not empty because Hydra has just written into it; a resumed run's new folder.
warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
warnings.filterwarnings("ignore", message="Experiment logs directory")
warnings.filterwarnings("ignore", message="Checkpoint directory")
warnings.filterwarnings("ignore", message="The dirpath has changed")
# It is: its sampler leaves out what the run has trained on.
warnings.filterwarnings(
    "ignore", message="You're resuming from a checkpoint that ended before the epoch ended and your dataloader"
)
# Our metrics are the same in every process before they are logged.
warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
# Advertisements, and a notice about a default at every checkpoint.
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip: " not in record.getMessage())
logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector").setLevel(logging.WARNING)

CHILDS_OWN = ("hydra.searchpath", "hydra/job_logging", "hydra.job_logging", "hydra.verbose")
"""Settings of Hydra's that a sweep's jobs are started with too: they change what is composed, or what is said."""

Settings = dict[str, Any]
AUTO = "auto"
"""Value of ``resume``: go on where the run's own folder left off."""


def build_model(settings: Settings) -> CRIS:
    """Build the network that a configuration describes."""
    return build_cris(
        clip=settings["model"]["clip"],
        neck=settings["model"]["neck"],
        decoder_layers=settings["decoder"]["layers"],
        decoder_heads=settings["decoder"]["heads"],
        decoder_ffn=settings["decoder"]["ffn"],
        decoder_dropout=settings["decoder"]["dropout"],
        contrastive=settings["loss"]["contrastive"],
        kernel_size=settings["projector"]["kernel_size"],
        max_words=settings["dataset"]["max_words"],
    )


def initialise(model: CRIS, settings: Settings) -> str:
    """Give the encoders CLIP's weights, if the configuration says so; return what the network starts from."""
    source = settings["model"]["clip_weights"]
    if source is not None:
        return load_clip_weights(model, str(source))
    if not settings["dataset"]["embedded"]:
        log.warning("the encoders start from random weights, the paper's from CLIP's: model.clip_weights=openai, or a path")
    return "random"


def prepare_training(model: CRIS, settings: Settings) -> CRIS:
    """Give a network the form in which the configuration trains it: the same weights under the same names.

    Raises:
        InputError: If a setting is neither true nor false.
    """
    for name in ("rearrange", "recompute"):
        if not isinstance(settings[name], bool):
            raise InputError(f"{name} must be true or false, got {settings[name]!r}")
    network = rearrange(model) if settings["rearrange"] else model
    recompute_activations(network, settings["recompute"])  # of the boxes that are trained
    return network


def build_data(settings: Settings) -> ReferDataModule:
    """Build the data module that a configuration describes; its blind control and its name are the programs' business."""
    dataset = {key: value for key, value in settings["dataset"].items() if key not in ("name", "blind_control")}
    names = ("batch_size", "batch_size_per_device", "eval_batch_size", "image_size", "protocol", "workers", "seed")
    given = {name: settings[name] for name in names if name in settings}
    try:
        return ReferDataModule(root=Path(str(settings["data_root"])).expanduser(), **dataset, **given)
    except TypeError as error:  # of a checkpoint that somebody else made; Hydra knows the keys of one's own
        raise InputError(f"these are no settings of a data set: {error}") from error


def build_trainer(settings: Settings, folder: Path, callbacks: list[L.Callback], logger: Logger | bool) -> L.Trainer:
    """Build the trainer; ``auto`` settings are decided by what the machine has.

    Raises:
        InputError: If the machine has not what was asked for.
    """
    options = dict(settings["trainer"])
    check_whole("trainer.max_epochs", options["max_epochs"], 0)
    check_whole("trainer.max_steps", options["max_steps"], -1)
    for name in ("check_val_every_n_epoch", "log_every_n_steps"):
        check_whole(f"trainer.{name}", options[name], 1)
    cuda = torch.cuda.is_available() and options["accelerator"] in ("auto", "gpu", "cuda")
    if options["precision"] == "auto":
        options["precision"] = "16-mixed" if cuda else "32-true"
    if options["sync_batchnorm"] == "auto":
        options["sync_batchnorm"] = cuda  # elsewhere PyTorch has none
    plugins: list[Any] = [WholeCheckpoints()]
    if SLURMEnvironment.detect():  # its signals are ours: Lightning would save past our checkpoints and queue the job again
        plugins.append(SLURMEnvironment(auto_requeue=False))
    options |= {"default_root_dir": folder, "use_distributed_sampler": False, "plugins": plugins}
    try:
        return L.Trainer(**options, callbacks=[Companions(), *callbacks], logger=logger)
    except (MisconfigurationException, ValueError, TypeError) as error:
        asked = ", ".join(f"trainer.{name}={options[name]}" for name in ("accelerator", "devices", "strategy", "precision"))
        raise InputError(f"this machine cannot run {asked}: {error}. It has {torch.cuda.device_count()} GPUs") from error


def fitting_devices(available: int, data: ReferDataModule) -> int:
    """Return the largest number of devices over which a batch divides, or all of them if over none."""
    for devices in range(available, 0, -1):
        with contextlib.suppress(InputError):
            data.accumulation(devices)
            return devices
    return available


def build_logger(settings: Settings, folder: Path, steps: int = 0) -> Logger | bool:
    """Build the logger; Weights & Biases goes offline where it cannot be online.

    Args:
        settings: The run's configuration.
        folder: The run's.
        steps: Where an interrupted run of this folder goes on, whose record is kept until there.
    """
    if settings["logger"] is None:
        return False
    known: dict[str, str] = {}
    if "Wandb" in settings["logger"]["_target_"]:
        choose_wandb_mode(folder)
        if steps and (run := earlier_run(folder)):
            known = {"id": run, "resume": "allow"}
    rows = earlier_rows(folder / "metrics.csv", steps) if steps else []
    try:
        logger: Logger = instantiate(settings["logger"], save_dir=str(folder), **known)
        if rows and isinstance(logger, CSVLogger):
            logger.experiment.metrics = rows
            logger.save()
    except InstantiationException as error:
        raise InputError(
            f"this logger cannot start: {error}. pip install 'crislit[tensorboard]' brings TensorBoard's"
        ) from error
    return logger


@program("train")
def main(config: DictConfig) -> float:
    """Train, evaluate every split with the best checkpoint, and write results; return the selecting split's mIoU."""
    settings: Settings = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    if hydra.mode == RunMode.MULTIRUN:
        places = [
            part
            for source in hydra.runtime.config_sources
            if source.provider == "command-line"
            for part in ("--config-dir", source.path)
        ]
        if hydra.job.config_name != "train":
            places += ["--config-name", str(hydra.job.config_name)]
        kept = [override for override in hydra.overrides.hydra if override.lstrip("+").startswith(CHILDS_OWN)]
        group = "-".join(folder.parts[-3:-1])  # date and time, by default
        return run_job(settings, [*places, *kept, *hydra.overrides.task], folder, group)
    return run(settings, folder)


def run(settings: Settings, folder: Path) -> float:
    """Train and evaluate a configuration in this process, and leave everything in a folder."""
    start = time.perf_counter()
    keep_memory()
    commit()
    check_whole("checkpoint_every", settings["checkpoint_every"], 1)
    if settings["resume"] == AUTO and (folder / "results.json").is_file():
        return finished(settings, folder)
    source = find_resume(settings, folder)
    if settings["model"]["clip_weights"] is not None and source is None:
        find_weights(settings["model"]["clip"], str(settings["model"]["clip_weights"]))  # before long work, not after
    data = prepare(settings)
    model = build_model(settings)
    resume = check_resume(source, settings, model)
    initial_weights = resume.initial_weights if resume else initialise(model, settings)
    model = prepare_training(model, settings)
    selects, blind = data.select_split, blind_splits(settings, data)
    task = CRISTask(
        model,
        **settings["recipe"]["optimizer"],
        threshold=settings["threshold"],
        splits=[*data.splits, *(f"{split}-blind" for split in blind)],
        select_split=selects,
        config=settings,
        initial_weights=initial_weights,
    )
    best = ModelCheckpoint(
        folder / "checkpoints", filename="best", monitor=f"{selects}/mIoU", mode="max", enable_version_counter=False
    )
    last = LastCheckpoint(folder / "checkpoints", settings["checkpoint_every"])
    skips = [Skips(data)] if data.on_error == "skip" else []
    seeds = StepSeeds(settings["seed"])
    callbacks: list[L.Callback] = [*skips, best, last, seeds, FiniteNumbers(seeds, last.folder), Narrator(selects)]
    goes_on = resume is not None and source is not None and source.parent == folder / "checkpoints"
    logger = build_logger(settings, folder, resume.steps if goes_on and resume else 0)
    if isinstance(logger, Logger):
        callbacks.append(LearningRateMonitor("epoch"))
        log_configuration([logger], settings, count_parameters(model))
    if settings["trainer"]["devices"] == "auto" and torch.cuda.device_count() > 1:
        devices = fitting_devices(torch.cuda.device_count(), data)
        log.info("training on %d of %d devices, over which the batch divides", devices, torch.cuda.device_count())
        settings["trainer"]["devices"] = devices
    trainer = build_trainer(settings, folder, callbacks, logger)
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    try:
        trainer.fit(task, data, ckpt_path=source)
    except Stopped as stop:
        processes.go_alone()  # all of them end, each by itself
        if not trainer.is_global_zero:
            raise SystemExit(0) from stop  # the first process's is the run's exit code, and a failure would end it at once
        log.warning("%s; go on with resume=auto hydra.run.dir=%s, or resume=%s", stop, folder, last.path)
        raise SystemExit(128 + stop.number) from stop

    steps = trainer.global_step
    done = resume.steps if resume else 0
    if steps == done and settings["resume"] != AUTO:
        limits = {name: settings["trainer"][name] for name in ("max_epochs", "max_steps")}
        raise InputError(f"no step was taken beyond step {done} with {limits}: nothing to evaluate")
    # Not best.best_model_path: in a resumed run that is the earlier run's until the first validation.
    checkpoint = folder / "checkpoints" / "best.ckpt"
    if not checkpoint.is_file():
        checkpoint = last.path
        log.warning("the run ended before a validation: there is no best.ckpt, and the last weights are evaluated")
    model.load_state_dict(read_checkpoint(checkpoint).weights)
    results = evaluate_splits(trainer, task, data, settings, folder, blind)
    results |= {
        "steps": steps,
        "checkpoint": str(checkpoint),
        "initial_weights": initial_weights,
        "seconds": time.perf_counter() - start,
    }
    if skips:
        results["skipped"] = [{"sample": sample, "reason": reason} for sample, reason in skips[0].found.items()]
    finish(trainer, results, folder)
    if trainer.is_global_zero:
        log_checkpoint(trainer.loggers, checkpoint, {"results": results["splits"], "commit": results["commit"]})
        close_loggers(trainer.loggers)
    return float(results["splits"][selects]["mIoU"] if selects in results["splits"] else best.best_model_score or 0.0)


def prepare(settings: Settings) -> ReferDataModule:
    """Seed everything, and build the data module with its data written and indexed.

    Raises:
        InputError: If the data or a setting cannot be used.
    """
    check_whole("seed", settings["seed"], 0, most=2**32 - 1)  # NumPy's
    check_whole("callbacks.pictures", settings["callbacks"]["pictures"], 0)
    L.seed_everything(settings["seed"], workers=True, verbose=False)
    data = build_data(settings)
    data.prepare_data()
    return data


def blind_splits(settings: Settings, data: ReferDataModule) -> list[str]:
    """Return the splits whose blind control is evaluated: the selecting one, where the data set asks for it."""
    return [data.select_split] if settings["dataset"].get("blind_control") and data.select_split in data.splits else []


def finished(settings: Settings, folder: Path) -> float:
    """Say that a run has ended before, as one that is started again by a cluster may have; return its mIoU.

    Raises:
        InputError: If the folder holds another run.
    """
    try:
        results = json.loads((folder / "results.json").read_text())
    except ValueError as error:
        raise InputError(
            f"{folder / 'results.json'} is damaged: remove it, and the run goes on from its last checkpoint"
        ) from error
    if results.get("experiment") != identify(settings)["experiment"]:
        raise InputError(f"{folder} holds a run with other settings: resume=auto goes on with a run, not with another one")
    log.info("resume=auto: finished before, nothing is left to do in %s", folder)
    return float(results["splits"].get(settings["dataset"]["select_split"], {}).get("mIoU", 0.0))


def find_resume(settings: Settings, folder: Path) -> Path | None:
    """Return the checkpoint to go on from: the one named, or with ``resume=auto`` the newest of the run's own folder.

    Raises:
        InputError: If it is damaged.
    """
    if settings["resume"] is None:
        return None
    if settings["resume"] != AUTO:
        path = Path(settings["resume"]).expanduser()
        if path.exists() and not path.is_file():
            raise InputError(f"resume={path} is no file: a run keeps its checkpoints as RUN/checkpoints/last.ckpt")
        if path.is_file() and (reason := damage(path)):
            before = path.with_name(PREVIOUS)
            onward = f"; resume={before} is the one before it" if before.is_file() else ""
            raise InputError(f"{path} is damaged ({reason}){onward}")
        return path
    found = newest(folder)
    if not found:
        log.info("resume=auto: nothing to go on from in %s, from the beginning", folder)
    return found


def check_resume(path: Path | None, settings: Settings, model: CRIS) -> Checkpoint | None:
    """Check that a run can go on from a checkpoint, if there is one, and return it.

    Raises:
        InputError: If the checkpoint cannot be read or belongs to another network, or, with ``resume=auto``, to another run;
            or if another learning rate is asked for.
    """
    if path is None:
        return None
    checkpoint = read_checkpoint(path)
    saved = checkpoint.settings
    different = [name for name in model.settings if model.settings[name] != saved.get(name)]
    if different:
        found = ", ".join(f"{name}={saved.get(name)} instead of {model.settings[name]}" for name in different)
        raise InputError(f"{path} is a checkpoint of another model: it has {found}. Resume with the overrides of its own run")
    if settings["resume"] == AUTO and identify(checkpoint.config)["experiment"] != identify(settings)["experiment"]:
        raise InputError(f"{path} is of a run with other settings: resume=auto goes on with a run, not with another one")
    rates = [config["recipe"]["optimizer"]["learning_rate"] for config in (checkpoint.config or settings, settings)]
    if rates[0] != rates[1]:
        raise InputError(
            f"{path} goes on at the rate of its optimizer: recipe.optimizer.learning_rate={rates[1]} must be {rates[0]}, as in "
            "its own run. recipe.optimizer.milestones and gamma lower it from an epoch on"
        )
    log.info("going on from %s at step %d", path, checkpoint.steps)
    return checkpoint


def evaluate_splits(
    trainer: L.Trainer, task: CRISTask, data: ReferDataModule, settings: Settings, folder: Path, blind: list[str]
) -> dict[str, Any]:
    """Evaluate every split at the pictures' own sizes, draw samples, and return what ``results.json`` holds."""
    data.blind_splits = blind
    drawn = data.splits.index(data.select_split) if data.select_split in data.splits else 0
    pictures = Pictures(folder / "figures", settings["callbacks"]["pictures"], drawn, data.evaluation_set(data.splits[drawn]))
    trainer.callbacks.append(pictures)  # type: ignore[attr-defined]
    trainer.test(task, data, verbose=False)
    logged = trainer.callback_metrics
    splits = {split: split_results(logged, split) for split in data.splits}
    for split in splits:
        report_empty(splits[split], data.evaluation_set(split), split)
    return {
        "config": settings,
        "overrides": list(HydraConfig.get().overrides.task),
        "seed": settings["seed"],
        **identify(settings),
        **describe_run(task.model),
        "fps": measure_fps(task.model, trainer.strategy.root_device, data.image_size, data.max_words),
        "threshold": task.threshold,
        "protocol": data.protocol,
        "splits": splits,
        "blind": {split: split_results(logged, f"{split}-blind") for split in blind},
        "ceiling": {split: {"mIoU": ceiling(data, split, task.threshold)} for split in data.splits},
    }


def report_empty(results: dict[str, float], data: ReferEvaluationSet, split: str) -> None:
    """List the samples of a split whose truth has no pixel: they cannot be met, and counted as IoU 0."""
    if results["empty"]:
        names = [data.name(number) for number in range(len(data)) if not data.truth(number).any()]
        log.warning("%s: %d samples have a truth without pixels, counted as IoU 0: %s", split, len(names), ", ".join(names))


def ceiling(data: ReferDataModule, split: str, threshold: float) -> float:
    """Return the mIoU that a perfect prediction at the network's resolution would reach on a split."""
    samples = data.evaluation_set(split)
    refs, counts = torch.unique(torch.from_numpy(samples.samples[:, 0]), return_counts=True)
    reached = [reachable_iou(data.index.mask(ref), data.image_size, threshold) for ref in refs.tolist()]
    return float((torch.tensor(reached) * counts).sum() / counts.sum())


def finish(trainer: L.Trainer, results: dict[str, Any], folder: Path) -> None:
    """Write and print the results, in the first process."""
    if trainer.is_global_zero:
        write_results(folder / "results.json", results)
        print_results(results)
        print(f"results, checkpoints and figures are in {folder}")


if __name__ == "__main__":
    main()
