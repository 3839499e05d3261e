"""python -m crislit.benchmark: what the network costs, against the network as written and against what the machine could do.

Without a part, all of them. Times are medians of rounds in which plain and its alternatives take turns. *Plain* is the network
as written: eager, float32, contiguous, one picture and one sentence at a time, reading and preprocessing excluded.
"""

import argparse
import copy
import csv
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from crislit import data_benchmark, training_benchmark
from crislit.callbacks import commit, hardware
from crislit.checkpoint import Checkpoint, read_any, write_folder
from crislit.config import load_settings
from crislit.data.dataset import ReferEvaluationSet
from crislit.data.letterbox import normalise, restore, upsample_probabilities
from crislit.data.tokenizer import tokenize
from crislit.errors import InputError, check_whole, one_line_errors
from crislit.export import export
from crislit.memory import keep_memory
from crislit.metrics import SegmentationMetric, intersection_and_union
from crislit.models.cris import CRIS, count_parameters
from crislit.models.rearranged import for_inference
from crislit.onnx_network import OnnxNetwork
from crislit.paper import TABLE1
from crislit.plain import plain_logits
from crislit.quantise import EXAMPLES
from crislit.timing import Machine, Measurement, Work, compare, count_cost, interleave, measure_machine
from crislit.train import build_data, build_model

BACKBONES = ("rn50", "rn101")
PARTS = ("parameters", "start", "rows", "evaluation", "latency", "agreement", "training", "data")
SENTENCES = (
    "the man in red",
    "leftmost dog",
    "woman with an umbrella",
    "second pizza from the right",
    "blue car",
    "the child that is closest to us",
    "a cat on the sofa",
)
"""RefCOCO has about seven sentences a picture."""

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Images, tokens and owners -> logits."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        "python -m crislit.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_argument_group("parts")
    parts.add_argument("--parameters", action="store_true", help="count them, beside the paper's")
    parts.add_argument("--start", action="store_true", help="seconds until a first mask, beside imports alone")
    parts.add_argument("--rows", action="store_true", help="GFLOPs and pictures a second of every row of table 1")
    parts.add_argument("--evaluation", action="store_true", help="seven sentences a picture: seconds a sentence")
    parts.add_argument("--latency", action="store_true", help="one picture, one sentence: seconds")
    parts.add_argument("--agreement", action="store_true", help="mIoU of a trained network by every way to compute it")
    parts.add_argument("--training", action="store_true", help="a training step: seconds a sentence, memory, gradients")
    parts.add_argument("--data", action="store_true", help="samples stage by stage, and an index of RefCOCO's size")
    parser.add_argument("--model", default="rn50", help="rn50 (default), rn101, tiny: the network whose speed is measured")
    parser.add_argument("--image-size", type=int, default=416, metavar="S", help="side of its input (default: 416)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is timed (default: 5)")
    parser.add_argument("--checkpoint", default="shapes-tiny", help="the network of --agreement (default: shapes-tiny)")
    parser.add_argument("--pictures", type=int, default=40, metavar="N", help="evaluated by --agreement (default: 40)")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="refcoco's, for --data (default: drawn pictures)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write DIR/speed.csv too")
    parser.add_argument("--peak", choices=training_benchmark.KINDS, help=argparse.SUPPRESS)  # a process of --training's own
    options = parser.parse_args(arguments)
    chosen = [part for part in PARTS if getattr(options, part)] or list(PARTS)
    with one_line_errors():
        check_whole("--image-size", options.image_size, 32, multiple_of=32)
        check_whole("--rounds", options.rounds, 1)
        check_whole("--pictures", options.pictures, 1)
        if options.model not in (*BACKBONES, "tiny"):
            raise InputError(f"--model must be tiny, rn50 or rn101, got {options.model}")
        if options.peak:
            print(json.dumps(training_benchmark.peak(options.peak, network(options), options.image_size, SENTENCES)))
            return
        console = Console(width=max(Console().width, 120))
        if "parameters" in chosen:
            console.print(parameter_table(count_all()))
            chosen.remove("parameters")
        if not chosen:
            return
        machine = measure_machine()
        console.print(
            f"{hardware()}: {machine.flops / 1e9:.0f} GFLOP/s in products of float32 matrices, "
            f"{machine.bytes / 1e9:.1f} GB/s in copies; load {os.getloadavg()[0]:.1f}"
        )
        for lines in measure(options, chosen, machine, console):
            if options.output:  # after each part: one that fails later loses nothing
                write_lines(options.output / "speed.csv", lines, options, machine)


def measure(
    options: argparse.Namespace, chosen: Sequence[str], machine: Machine, console: Console
) -> Iterator[list[Measurement]]:
    """Measure the chosen parts, print each one's table when it is done, and yield its lines."""
    with tempfile.TemporaryDirectory() as folder:
        networks: dict[str, Network] = {}
        if {"evaluation", "latency"} & set(chosen):
            networks = ways(network(options), options.image_size, Path(folder))
        for part in chosen:
            if part == "start":
                lines = start(options)
            elif part == "rows":
                lines = rows(options, machine)
            elif part == "agreement":
                lines = agreement(options, Path(folder, "trained"))
            elif part == "training":
                networks.clear()  # their memory is needed
                lines = training_benchmark.measure(network(options), options, SENTENCES, machine)
                lines += training_benchmark.losses(lambda: network(options), options, SENTENCES)
                lines += training_benchmark.gradients(network(options, overrides=["decoder.dropout=0"]), options, SENTENCES)
                lines += training_benchmark.memory(options)
                keep_memory(False)
            elif part == "data":
                lines = list(data_benchmark.measure(network(options), options))
            else:
                lines = inference(part, networks, options, machine)
            console.print(line_table(part, lines))
            yield lines


def network(options: argparse.Namespace, row: str = "con_dec3", overrides: Sequence[str] = ()) -> CRIS:
    """Build the network to measure; speed does not depend on its weights."""
    torch.manual_seed(0)
    return build_model(load_settings([f"model={options.model}", f"ablation={row}", "dataset=refcoco", *overrides])).eval()


def start(options: argparse.Namespace) -> list[Measurement]:
    """Time whole processes: what imports the two libraries alone, the package alone, and a prediction by shapes-tiny."""
    picture = min(EXAMPLES.glob("*.jpg"))
    commands = {
        "import torch, open_clip": ["-c", "import torch, open_clip"],
        "import crislit": ["-c", "import crislit"],
        "crislit.predict": ["-m", "crislit.predict", str(picture), "red star", "--output", "-"],
    }
    # Compiled once, as on a user's machine: the first round is not counted.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    work = {
        name: functools.partial(subprocess.run, [sys.executable, *command], check=True, capture_output=True, env=environment)
        for name, command in commands.items()
    }
    return compare("start", interleave(work, options.rounds), dict.fromkeys(work, 1), "s")


# -- Inference ----------------------------------------------------------------------------------------------------------------


def ways(model: CRIS, image_size: int, folder: Path, threshold: float = 0.35) -> dict[str, Network]:
    """Return every way to compute a network, plain first; those by ONNX Runtime where it is installed."""
    found: dict[str, Network] = {"plain": by_turns(model)}
    quick = quickened(model)
    found["for inference"] = lambda images, tokens, owners: quick(
        images.contiguous(memory_format=torch.channels_last), tokens, owners
    )
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        print("ONNX Runtime is not installed: not measured", file=sys.stderr)
        return found
    write_folder(Checkpoint(model.settings, model.state_dict(), image_size, threshold, "random"), folder / "network")
    for name, calibrate in (("ONNX Runtime", None), ("ONNX Runtime, int8", EXAMPLES)):
        export(folder / "network", folder / name, calibrate=calibrate)
        found[name] = OnnxNetwork(folder / name)
    return found


def quickened(model: CRIS) -> CRIS:
    """Return the network as crislit.load and evaluation use it, which shares nothing with the plain one."""
    return for_inference(copy.deepcopy(model).to(memory_format=torch.channels_last))


def by_turns(model: CRIS) -> Network:
    """Return the plain network: one picture and one sentence at a time."""

    def compute(images: Tensor, tokens: Tensor, owners: Tensor) -> Tensor:
        return torch.cat([plain_logits(model, images[i, None], row[None]) for i, row in zip(owners, tokens, strict=True)])

    return compute


@torch.inference_mode()
def inference(part: str, networks: dict[str, Network], options: argparse.Namespace, machine: Machine) -> list[Measurement]:
    """Time every way to compute the network, on two pictures of seven sentences or one of one."""
    generator = torch.Generator().manual_seed(0)
    pictures, said = (2, SENTENCES) if part == "evaluation" else (1, SENTENCES[:1])
    images = torch.randn(pictures, 3, options.image_size, options.image_size, generator=generator)
    tokens = tokenize(list(said) * pictures, 17)
    owners = torch.arange(pictures).repeat_interleave(len(said))
    given = dict.fromkeys(networks, (images, tokens, owners))
    given["plain"] = (images[:1], tokens[: len(said)], owners[: len(said)])  # a picture more would tell nothing new
    work = {name: functools.partial(compute, *given[name]) for name, compute in networks.items()}
    expected = work["plain"]()
    differences = {name: relative(work[name]()[: len(expected)], expected) for name in networks}
    counted = {name: count_cost(work[name]) for name in networks if not name.startswith("ONNX")}
    costs = {name: (cost.floor(machine), cost.moved(machine)) for name, cost in counted.items()}
    seconds = interleave(work, options.rounds)
    return compare(part, seconds, {name: len(given[name][1]) for name in networks}, "s a sentence", costs, differences)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of a difference over the norm of what was expected."""
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def rows(options: argparse.Namespace, machine: Machine) -> list[Measurement]:
    """Time one picture and one sentence by every row of table 1, plain and for inference."""
    lines: list[Measurement] = []
    image, tokens = torch.randn(1, 3, options.image_size, options.image_size), tokenize([SENTENCES[0]], 17)
    channels_last = image.contiguous(memory_format=torch.channels_last)
    for row in TABLE1:
        model = network(options, row)
        work: dict[str, Work] = {
            "plain": functools.partial(plain_logits, model, image, tokens),
            "for inference": functools.partial(quickened(model), channels_last, tokens),
        }
        costs = {name: count_cost(run) for name, run in work.items()}
        seconds = interleave(work, max(1, options.rounds // 2))
        for name, line in zip(work, compare(row, seconds, dict.fromkeys(work, 1), "s"), strict=True):
            lines.append(Measurement("rows", f"{row}, {name}", costs[name].flops / 1e9, "GFLOP"))
            fps, bound = 1 / line.value, 1 / costs[name].floor(machine)
            lines.append(Measurement("rows", f"{row}, {name}", fps, "pictures/s", line.ratio, bound, spread=line.spread))
    return lines


def agreement(options: argparse.Namespace, folder: Path) -> list[Measurement]:
    """Return a trained network's mIoU on some pictures of its validation split, by every way to compute it."""
    try:
        checkpoint = read_any(Path(options.checkpoint).expanduser())
    except InputError as error:
        print(f"--agreement is not run: {error}", file=sys.stderr)
        return []
    if not checkpoint.config:
        raise InputError(f"{options.checkpoint} does not say what data it was trained on")
    root = {"data_root": load_settings()["data_root"], "workers": 0}
    module = build_data(checkpoint.config | root)
    module.prepare_data()
    data = module.evaluation_set(module.select_split)
    networks = ways(checkpoint.build(), checkpoint.image_size, folder, checkpoint.threshold)
    metrics = {name: SegmentationMetric() for name in networks}
    seen, sample, total = 0, 0, len(data)
    while sample < total and seen < options.pictures:
        samples = [data[sample]]
        while sample + len(samples) < total and (following := data[sample + len(samples)])[0] is samples[0][0]:
            samples.append(following)
        sample, seen = sample + len(samples), seen + 1
        batch = ReferEvaluationSet.collate(samples)
        for name, compute in networks.items():
            with torch.inference_mode():
                logits = compute(normalise(batch.images), batch.tokens, batch.owners)
            for square, truth in zip(upsample_probabilities(logits, checkpoint.image_size).numpy(), batch.truths, strict=True):
                mask = restore(square, *truth.shape) > checkpoint.threshold
                intersection, union = intersection_and_union(mask, truth)
                metrics[name].update([intersection], [union], [not truth.any()])
    values = {name: float(metric.compute()["mIoU"]) for name, metric in metrics.items()}
    return [Measurement("agreement", name, value, "mIoU", difference=value - values["plain"]) for name, value in values.items()]


# -- Tables -------------------------------------------------------------------------------------------------------------------


def line_table(part: str, lines: Sequence[Measurement]) -> Table:
    """Lay lines out as a table."""
    table = Table(title=part)
    for column in ("", "median", "unit", "x plain", "floor", "memory", "spread", "difference"):
        table.add_column(column, justify="left" if column in ("", "unit") else "right", no_wrap=True)
    for line in lines:
        numbers = (line.ratio, line.floor, line.moved, line.spread, line.difference)
        forms = (".2f", ".4f", ".4f", ".0%", ".1e")
        shown = ["-" if x is None else f"{x:{form}}" for x, form in zip(numbers, forms, strict=True)]
        table.add_row(line.candidate, f"{line.value:.4f}", line.unit, *shown)
    return table


def write_lines(path: Path, lines: Sequence[Measurement], options: argparse.Namespace, machine: Machine) -> None:
    """Write lines as CSV, each with what it takes to judge and to repeat it; lines of other parts stay as they were."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "onnxruntime", "numpy") if installed(name)]
    about = {
        "model": options.model,
        "image_size": options.image_size,
        "commit": commit(),
        "hardware": hardware(),
        "GFLOP/s": f"{machine.flops / 1e9:.1f}",
        "GB/s": f"{machine.bytes / 1e9:.1f}",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[1], 1),
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
    }
    others = {"start": "shapes-tiny", "agreement": options.checkpoint}  # which have a network and a size of their own
    rows: list[dict[str, Any]] = []
    for line in lines:
        values = {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in dataclasses.asdict(line).items()}
        own = {"model": others[line.part], "image_size": None} if line.part in others else {}
        rows.append(values | about | own)
    measured = {line.part for line in lines}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["part"] not in measured] + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(
            file, [field.name for field in dataclasses.fields(Measurement)] + list(about), lineterminator="\n"
        )
        table.writeheader()
        table.writerows(rows)


def installed(name: str) -> bool:
    """Whether a package is there."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def count_all() -> dict[tuple[str, str], int]:
    """Return the parameters of every row of table 1, by (row, backbone), of networks that exist as shapes alone."""
    counts = {}
    for row in TABLE1:
        for backbone in BACKBONES:
            with torch.device("meta"):
                model = build_model(load_settings([f"model={backbone}", f"ablation={row}", "dataset=refcoco"]))
            counts[row, backbone] = count_parameters(model)
    return counts


def parameter_table(counts: dict[tuple[str, str], int]) -> Table:
    """Lay the counts out like table 1, in millions."""
    table = Table(title="Parameters that the optimizer can train, in millions (table 1, which has RN50 only)")
    for column in ("ablation=", "Con.", "Dec.", "RN50", "paper", "difference", "RN101"):
        table.add_column(column, justify="left" if column == "ablation=" else "right", no_wrap=True)
    for name, row in TABLE1.items():
        rn50, rn101 = (counts[name, backbone] / 1e6 for backbone in BACKBONES)
        difference = round(rn50, 2) - row.parameters
        table.add_row(
            name,
            "yes" if row.contrastive else "-",
            f"n={row.layers}" if row.layers else "-",
            f"{rn50:.2f}",
            f"{row.parameters:.2f}",
            f"{difference:+.2f}",
            f"{rn101:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
