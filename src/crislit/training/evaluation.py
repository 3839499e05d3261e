"""Evaluates every split at the images' own sizes; ``results.json``."""

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from tqdm.contrib.logging import logging_redirect_tqdm

from crislit.checkpoints import Checkpoint, read_any
from crislit.data import ReferDataModule, ReferEvaluationSet
from crislit.errors import check_integer, require
from crislit.io import write_json
from crislit.models import CRIS, check_compiler, check_max_tokens, count_parameters
from crislit.training.build import (
    check_switches,
    loader_names,
    prepare_data,
    require_trust_of_data,
)
from crislit.training.callbacks import SamplePlots
from crislit.training.metrics import METRICS, reachable_iou
from crislit.training.progress import format_seconds
from crislit.training.provenance import commit, fingerprint, hardware
from crislit.training.settings import Config
from crislit.training.task import CRISTask
from crislit.training.threads import choose_threads
from crislit.training.trainer import build_trainer
from crislit.transforms import tokenize

log = logging.getLogger(__name__)

PROTOCOLS = {
    "all_sentences": "all sentences",
    "first_sentence": "first sentence of each ref, by which the released code selects checkpoints",
}


def evaluate_checkpoint(config: Config, folder: Path, overrides: Sequence[str] = ()) -> None:
    """Evaluate a trained network on a data set, by default the one that it was trained on.

    Args:
        config: The configuration, see ``conf/evaluate.yaml``.
        folder: Receives ``results.json`` and figures.
        overrides: The command line's overrides, for the record.

    Raises:
        InputError: If the checkpoint or the data cannot be used.
    """
    began = time.perf_counter()
    commit()
    for name in ("max_time", "overfit_batches"):
        require(name not in config["trainer"], f"trainer.{name} is for training: leave it out")
    check_integer("callbacks.pictures", config["callbacks"]["pictures"], 0)
    check_switches(config, "compile")
    require(
        config["checkpoint"],
        "which checkpoint? evaluate needs checkpoint=PATH, such as "
        "checkpoint=RUN/checkpoints/best.ckpt",
    )
    checkpoint = read_any(
        Path(config["checkpoint"]).expanduser(),
        default_max_tokens=config.get("dataset", {}).get("max_words"),
        trust=config["trust"],
    )
    config = complete_config(config, checkpoint)
    data = prepare_data(config)
    check_test_share(config["trainer"], data)
    model = checkpoint.build()
    check_max_tokens(model, data.max_tokens)
    task = CRISTask(
        model,
        threshold=config["threshold"],
        compile=config["compile"],
        splits=loader_names(data),
        select_split=data.select_split,
    )
    trainer = build_trainer(config, folder, callbacks=[], logger=False)
    choose_threads(model, trainer.strategy.root_device)
    if config["compile"]:
        check_compiler(trainer.strategy.root_device)
    known = training_config(config, checkpoint)
    results = {
        **evaluate_splits(trainer, task, data, folder / "figures", config["callbacks"]["pictures"]),
        **describe_run(known, overrides, model),
        **identify(known, data.index.digest, checkpoint),
        "steps": checkpoint.steps,
        "checkpoint": str(config["checkpoint"]),
        "initial_weights": checkpoint.initial_weights,
        "seconds": time.perf_counter() - began,
    }
    if trainer.is_global_zero:
        report_results(results, folder)


def identify(known: Config, data: str, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the fingerprint of an evaluation, which differs from a training on other data.

    Args:
        known: The evaluation's configuration, completed by the training's.
        data: The digest of the evaluated data.
        checkpoint: The network.
    """
    before = checkpoint.config.get("dataset", {}).get("name")
    trained = checkpoint.fingerprint.get("data", data)  # absent in version 0.1
    is_other = before is not None and (before, trained) != (known["dataset"]["name"], data)
    trained_on = f"{before} {trained}" if is_other else ""
    return public_part(fingerprint(known, data, checkpoint.fingerprint, trained_on))


def public_part(prints: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of a fingerprint that ``results.json`` holds."""
    return {name: prints[name] for name in ("experiment", "setting", "data")}


def complete_config(config: Config, checkpoint: Checkpoint) -> Config:
    """Fill settings that are null with those of the checkpoint's training.

    Raises:
        InputError: If neither names a data set.
    """
    trained = checkpoint.config
    defaults = {
        **{"protocol": "all_sentences", "eval_batch_size": 16, "seed": 0},
        **{"image_size": checkpoint.image_size, "threshold": checkpoint.threshold},
    }
    filled = {
        name: trained.get(name, default)
        for name, default in defaults.items()
        if config[name] is None
    }
    named = config.get("dataset", {})
    # A data set that is named replaces the trained one; single keys change it.
    dataset = named if "name" in named else trained.get("dataset", {}) | named
    if "name" not in named:
        require_trust_of_data(dataset, config["trust"], str(config["checkpoint"]))
    require(
        dataset,
        f"which data? {config['checkpoint']} does not store what it was trained on: "
        "dataset=refcoco, ...",
    )
    if config["split"] is not None:
        dataset["evaluation_splits"] = [config["split"]]
    return config | filled | {"dataset": dataset}


def training_config(config: Config, checkpoint: Checkpoint) -> Config:
    """Return an evaluation's configuration completed by its network's and its training's."""
    trained, asked = checkpoint.config, config["trainer"]
    limits = {x: asked[x] for x in ("limit_test_batches", "fast_dev_run") if x in asked}
    return (
        checkpoint.network.to_run_config()
        | trained
        | config
        | {"trainer": {**(trained.get("trainer") or asked), **limits}}
        | {"callbacks": trained.get("callbacks", {}) | config["callbacks"]}
        # The recipe that a data set selects is not the training's.
        | {name: trained.get(name) for name in ("recipe", "batch_size", "batch_size_per_device")}
        | {name: trained[name] for name in ("resume",) if name in trained}
    )


def check_test_share(trainer: Mapping[str, Any], data: ReferDataModule) -> None:
    """Check that a share of the evaluation's batches is at least one batch of every split.

    Raises:
        InputError: If it is less.
    """
    share = trainer.get("limit_test_batches")
    if isinstance(share, float):
        fewest = min(map(len, data.test_dataloader()))
        require(
            int(share * fewest) >= 1,
            f"trainer.limit_test_batches={share} is less than a batch: the smallest split has "
            f"{fewest} of {data.eval_batch_size} sentences. Set 1 for one batch",
        )


def evaluate_splits(
    trainer: L.Trainer, task: CRISTask, data: ReferDataModule, figures: Path, count: int
) -> dict[str, Any]:
    """Evaluate every split and blind control, and plot samples.

    Args:
        trainer: The trainer.
        task: The network.
        data: Its data.
        figures: Folder for plots.
        count: Number of samples to plot.

    Returns:
        ``splits``, ``blind`` and ``ceiling`` by split, ``fps``, ``threshold`` and ``protocol``.
    """
    shown = data.select_split if data.select_split in data.splits else data.splits[0]
    trainer.callbacks.append(  # type: ignore[attr-defined]
        SamplePlots(figures, count, data.splits.index(shown), data.evaluation_set(shown))
    )
    with logging_redirect_tqdm():
        trainer.test(task, data, verbose=False)
    logged = trainer.callback_metrics
    splits = {split: split_results(logged, split) for split in data.splits}
    for split, values in splits.items():
        if values["empty"]:
            warn_about_empty_targets(data.evaluation_set(split), split)
    return {
        "fps": measure_fps(task.model, trainer.strategy.root_device, data),
        "threshold": task.threshold,
        "protocol": data.protocol,
        "splits": splits,
        "blind": {split: split_results(logged, f"{split}-blind") for split in data.blind_splits},
        "ceiling": {split: {"mIoU": ceiling_miou(data, split, task.threshold)} for split in splits},
    }


def split_results(logged: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return one loader's metrics out of everything that Lightning logged."""
    values = {key: float(logged[f"{name}/{key}"]) for key in ("samples", *METRICS, "empty")}
    return values | {count: int(values[count]) for count in ("samples", "empty")}


def warn_about_empty_targets(data: ReferEvaluationSet, split: str) -> None:
    """List the samples of a split whose target is empty: no mask fits, they count as IoU 0."""
    names = [data.name(number) for number in range(len(data)) if not data.target(number).any()]
    message = "%s: %d samples have an empty target and count as IoU 0: %s"
    log.warning(message, split, len(names), ", ".join(names))


def ceiling_miou(data: ReferDataModule, split: str, threshold: float) -> float:
    """Return the mIoU of perfect predictions at the network's resolution."""
    refs, counts = torch.unique(
        torch.from_numpy(data.evaluation_set(split).samples[:, 0]), return_counts=True
    )
    reached = torch.tensor(
        [reachable_iou(data.index.mask(ref), data.image_size, threshold) for ref in refs.tolist()]
    )
    return float((reached * counts).sum() / counts.sum())


@torch.no_grad()
def measure_fps(model: CRIS, device: torch.device, data: ReferDataModule, runs: int = 10) -> float:
    """Return images per second (table 1's "FPS"): one image and one sentence, median of runs."""
    model.to(device).eval()
    image = torch.zeros(1, 3, data.image_size, data.image_size).to(next(model.parameters()))
    tokens = tokenize(["the man in red"], data.max_tokens).to(device)
    times = []
    for _ in range(3 + runs):
        start = time.perf_counter()
        model(image, tokens).cpu()  # waits for the device
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times[3:])


def describe_run(config: Config, overrides: Sequence[str], model: CRIS) -> dict[str, Any]:
    """Return what it takes to repeat a run: configuration, seed, commit, hardware."""
    return {
        "config": config,
        "overrides": list(overrides),
        "seed": config["seed"],
        "commit": commit(),
        "hardware": hardware(),
        "parameters": count_parameters(model),
    }


def report_results(results: dict[str, Any], folder: Path) -> None:
    """Write ``results.json``, and print the table and where everything is."""
    write_json(folder / "results.json", results)
    print_results(results)
    duration = format_seconds(results["seconds"])
    print(f"{duration} in all; results, checkpoints and figures are in {folder}")


def print_results(results: Mapping[str, Any]) -> None:
    """Print the table of a run's results, in percent."""
    method = f"threshold {results['threshold']}; {PROTOCOLS[results['protocol']]}"
    table = Table(title=f"mIoU is the paper's IoU; in percent; {method}")
    extra = {name: results[name] for name in ("blind", "ceiling") if results.get(name)}
    metrics = [name for name in METRICS if name not in ("Pr@60", "Pr@80")]  # fits 80 columns
    for column in ("split", "samples", *metrics, *extra):
        table.add_column(column, justify="left" if column == "split" else "right", no_wrap=True)
    for split, values in results["splits"].items():
        scores = (column.get(split) for column in extra.values())
        table.add_row(
            split,
            str(values["samples"]),
            *(f"{100 * values[name]:.2f}" for name in metrics),
            *(f"{100 * score['mIoU']:.2f}" if score else "-" for score in scores),
        )
    Console(width=max(Console().width, 80)).print(table)
