"""What a run leaves in its folder: pictures and the results."""

import functools
import json
import logging
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import crislit
from crislit import processes
from crislit.data.datamodule import evaluation_share
from crislit.data.dataset import EvaluationBatch, ReferEvaluationSet
from crislit.data.letterbox import Image
from crislit.loggers import Sample, log_samples
from crislit.metrics import METRICS, intersection_and_union, iou
from crislit.models.cris import CRIS, count_parameters

log = logging.getLogger(__name__)

CODE = (":/src", ":/conf", ":/pyproject.toml")
"""What a run depends on, from the checkout's top."""

PROTOCOLS = {
    "all_sentences": "all sentences",
    "first_sentence": "first sentence of each ref, the figure that the released code selects checkpoints by",
}


class Companions(L.Callback):
    """Ends the run's processes when one of them ends too early, see :mod:`crislit.processes`."""

    def __init__(self) -> None:
        self._watching = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Watch the processes that this one has started by now."""
        if not self._watching:
            self._watching = True
            processes.watch(getattr(trainer.strategy.launcher, "procs", []))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """After the evaluation, which is the last that the processes do together, each ends by itself."""
        if stage == "test":
            processes.go_alone()


class Narrator(L.Callback):
    """Logs a line after every validation, which stays where a progress bar does not.

    Args:
        split: The validated split.
    """

    def __init__(self, split: str) -> None:
        self.split = split

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how far the run is."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            names = ("train/loss", f"{self.split}/mIoU")  # a run that goes on with a validation has no loss yet
            values = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
            told = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            log.info("epoch %d of %s, step %d: %s", trainer.current_epoch + 1, trainer.max_epochs, trainer.global_step, told)


class Pictures(L.Callback):
    """Writes test samples as pictures, and shows them in the loggers: image, sentence, truth, prediction and IoU.

    Args:
        folder: Where to.
        count: How many samples of the split, evenly spread over it.
        loader: Number of the test loader to take them from.
        data: Its samples.
    """

    def __init__(self, folder: Path, count: int, loader: int, data: ReferEvaluationSet) -> None:
        self.folder, self.loader, self.data = folder, loader, data
        self.count = count
        self.chosen: set[int] = set()
        self.samples: list[Sample] = []

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose samples among those that the first process sees."""
        if trainer.is_global_zero:
            share = evaluation_share(len(self.data), 0, trainer.world_size)
            self.chosen = {share[i] for i in np.linspace(0, len(share) - 1, min(self.count, len(share)), dtype=int)}

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: EvaluationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the chosen samples of a batch."""
        if dataloader_idx != self.loader:
            return
        for sample, prediction, truth in zip(batch.samples, outputs["masks"], batch.truths, strict=True):
            if sample in self.chosen:
                self.folder.mkdir(parents=True, exist_ok=True)
                image, sentence = self.data.picture(sample), self.data.sentence(sample)
                figure = draw_sample(image, sentence, truth, prediction)
                figure.savefig(self.folder / f"sample_{sample:05d}.png", dpi=80)
                score = iou(*intersection_and_union(prediction, truth))
                self.samples.append(Sample(sample, sentence, image, truth, prediction, score, figure))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hand the samples to the loggers that can show them."""
        if trainer.is_global_zero and self.samples:
            log_samples(trainer.loggers, self.samples, trainer.global_step)


def draw_sample(image: Image, sentence: str, truth: npt.NDArray[Any], prediction: npt.NDArray[Any]) -> Figure:
    """Draw a picture, its truth and its predicted mask side by side, under the sentence."""
    score = iou(*intersection_and_union(prediction, truth))
    height = 3.5 * image.shape[0] / image.shape[1] + 0.7
    figure = Figure(figsize=(10.5, height))
    figure.suptitle(f"“{sentence}”", y=1 - 0.05 / height, va="top", parse_math=False)  # a $ is a $
    # Places that are known take half as long as a layout that is searched for.
    places = {"left": 0.005, "right": 0.995, "bottom": 0.05 / height, "top": 1 - 0.6 / height, "wspace": 0.02}
    left, middle, right = figure.subplots(1, 3, gridspec_kw=places)
    left.imshow(image)
    left.set_title("image", fontsize=10)
    draw_mask(middle, image, truth, "lime")
    middle.set_title("truth", fontsize=10)
    draw_mask(right, image, prediction, "orange")
    right.set_title(f"prediction, IoU {score:.2f}", fontsize=10)
    for axes in (left, middle, right):
        axes.axis("off")
    return figure


def draw_mask(axes: Axes, image: Image, mask: npt.NDArray[Any], colour: str) -> None:
    """Show a picture, darkened where the mask is not, and outline the mask."""
    mask = mask.astype(bool)
    axes.imshow((image * np.where(mask, 1.0, 0.3)[..., None]).astype(np.uint8))
    if mask.any() and not mask.all():
        axes.contour(mask, levels=[0.5], colors=colour, linewidths=1.5)


@torch.no_grad()
def measure_fps(model: CRIS, device: torch.device, image_size: int, max_words: int, runs: int = 10) -> float:
    """Return one over the median time in seconds of a forward pass of one picture and one sentence (table 1's "FPS")."""
    model.to(device).eval()
    image = torch.zeros(1, 3, image_size, image_size, device=device, dtype=next(model.parameters()).dtype)
    tokens = crislit.tokenize(["the man in red"], max_words=max_words).to(device)
    times = []
    for _ in range(3 + runs):
        start = time.perf_counter()
        model(image, tokens).cpu()  # waits for the device
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times[3:])


def split_results(logged: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return one loader's metrics out of everything that Lightning logged."""
    values = {metric: float(logged[f"{name}/{metric}"]) for metric in METRICS}
    counts = {count: int(logged[f"{name}/{count}"]) for count in ("samples", "empty")}
    return {"samples": counts["samples"], **values, "empty": counts["empty"]}


def describe_run(model: CRIS) -> dict[str, Any]:
    """Return where a run happens: commit, hardware and the network's number of parameters."""
    return {"commit": commit(), "hardware": hardware(), "parameters": count_parameters(model)}


@functools.cache
def commit() -> str:
    """Return the commit of the checkout that runs, "-dirty" if its code was changed, or the version of an installed package.

    It is what was there when it was first asked for, which a program does when it begins.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", *CODE], capture_output=True, text=True, check=True
        ).stdout
        tracked = (
            subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False).returncode == 0
        )
    except (OSError, subprocess.CalledProcessError):
        tracked = False
    return name + ("-dirty" if changed else "") if tracked else f"crislit {crislit.__version__}"


def hardware() -> str:
    """Return what computes: GPUs by name, or processor and number of threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        processor = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            processor,
        )
    return f"{processor}, {torch.get_num_threads()} threads"


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``, whole or not at all."""
    part = path.with_suffix(".part")
    with part.open("w") as file:
        file.write(json.dumps(results, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def print_results(results: Mapping[str, Any]) -> None:
    """Print the table of a run's results, in percent."""
    told = PROTOCOLS[results["protocol"]]
    table = Table(title=f"mIoU is the paper's IoU; in percent; threshold {results['threshold']}; {told}")
    extra = [("blind", results.get("blind", {})), ("ceiling", results.get("ceiling", {}))]
    metrics = [metric for metric in METRICS if metric not in ("Pr@60", "Pr@80")]  # 80 columns; results.json has all
    columns = ["split", "samples", *metrics, *(name for name, values in extra if values)]
    for column in columns:
        table.add_column(column, justify="left" if column == "split" else "right", no_wrap=True)
    for split, values in results["splits"].items():
        row = [split, str(values["samples"]), *(f"{100 * values[metric]:.2f}" for metric in metrics)]
        for _, known in extra:
            if known:
                row.append(f"{100 * known[split]['mIoU']:.2f}" if split in known else "-")
        table.add_row(*row)
    Console(width=max(Console().width, 80)).print(table)
