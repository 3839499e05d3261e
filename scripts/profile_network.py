"""Profiles the network before and after each change that made it faster.

    python scripts/profile_network.py > results/profiles.md

Evaluates two images of seven sentences, trains a step of four sentences, and predicts one sentence
with ONNX Runtime, on this machine's threads and with random weights. Each profile has the time of
every box's forward pass, measured in separate runs (the baseline calls no box), and the operations
with the largest self time, by PyTorch's profiler and the runtime's. Use ``crislit.benchmark`` to
compare speeds: nothing here is run in turn.
"""

import argparse
import contextlib
import copy
import json
import statistics
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from crislit.benchmarks.inference import SENTENCES, backends, build_network, reference_network
from crislit.benchmarks.training import KINDS, Step
from crislit.inference.onnx_network import GROUNDING, IMAGE_ENCODER, OnnxNetwork
from crislit.models.cris import CRIS
from crislit.models.optimized import optimize_for_inference, optimize_for_training
from crislit.training.provenance import commit, hardware
from crislit.transforms.tokenizer import tokenize

OPERATIONS = 10
"""Number of operations listed."""
STEPS = {
    "baseline": "plain",
    "default": "default",
    "rearrange": "rearrange",
    "rearrange recompute": "rearrange recompute",
    "rearrange, 4 sentences per image": "rearrange, 4 sentences an image",
}
"""Kinds of training steps, by their titles."""
PARTS = {
    "image encoder": ("image_encoder", "forward"),
    "neck, images": ("neck", "project_maps"),
    "text encoder": ("text_encoder", "forward"),
    "neck, sentences": ("neck", "fuse"),
    "decoder": ("decoder", "forward"),
    "image projector": ("image_projector", "forward"),
    "last convolution": ("head", "forward"),
}
"""Boxes of the network and their methods that are timed."""

Run = Callable[[], Any]
Operations = dict[str, tuple[float, int]]
"""Seconds of self time and number of calls by operation."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the profiles as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rn50")
    parser.add_argument("--image-size", type=int, default=416)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    size, rounds = options.image_size, options.rounds
    header = (
        f"Measured by `python scripts/profile_network.py` at {commit()} on {hardware()}: "
        f"{options.model}, {size} pixels, random weights, medians of {rounds}, in milliseconds "
        "per sentence."
    )
    print(f"# Profiles, before and after each change\n\n{textwrap.fill(header, 100)}\n")
    print("## Evaluation of two images with seven sentences each; every column adds one change\n")
    print_tables(evaluation(build_network(options.model), size), len(SENTENCES) * 2, rounds)
    print(
        "\n## A training step of four sentences; the columns name the options, `default` uses "
        "channels last and the fused Adam\n"
    )
    print_tables(training(build_network(options.model), size), 4, rounds)
    print("\n## One image and one sentence with ONNX Runtime")
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            backends(build_network(options.model), size, Path(folder))
        for name in ("ONNX Runtime", "ONNX Runtime, int8"):
            print_operations(name, profile_runtime(Path(folder) / name, size, rounds), 1)


def evaluation(model: CRIS, image_size: int) -> Iterator[tuple[str, nn.Module, Run]]:
    """Yield the title, the network and the work of every stage."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, image_size, image_size, generator=generator)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    tokens = tokenize(list(SENTENCES) * 2, model.max_tokens)
    image_indices = torch.arange(2).repeat_interleave(len(SENTENCES))

    def one_at_a_time(network: CRIS, images: Tensor) -> Run:
        pairs = list(zip(image_indices, tokens, strict=True))
        return lambda: [network(images[i, None], row[None]) for i, row in pairs]

    def together(network: CRIS) -> Run:
        return partial(network, channels_last, tokens, image_indices)

    yield "baseline", model, partial(reference_network(model), images, tokens, image_indices)
    yield "our layers, one sentence at a time", model, one_at_a_time(model, images)
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    yield "channels last", model, one_at_a_time(model, channels_last)
    yield "images encoded once, sentences batched", model, together(model)
    optimized = optimize_for_training(model)
    yield "rearranged", optimized, together(optimized)
    folded = optimize_for_inference(model)
    title = "BatchNorm folded, large maps one sentence at a time"
    yield title, folded, together(folded)


def training(model: CRIS, image_size: int) -> Iterator[tuple[str, nn.Module, Run]]:
    """Yield the title, the network and the work of every kind of step."""
    model.train()
    for title, name in STEPS.items():
        step = Step(KINDS[name], model, image_size)
        step.prepare()
        yield title, step.network, step.take


def print_tables(stages: Iterator[tuple[str, nn.Module, Run]], sentences: int, rounds: int) -> None:
    """Run the stages; print the time of their parts and operations."""
    scale = 1000 / sentences
    parts: dict[str, dict[str, float]] = {}
    operations: dict[str, Operations] = {}
    for title, network, run in stages:
        with torch.enable_grad() if network.training else torch.inference_mode():
            run()  # to warm up
            parts[title] = time_parts(network, run, rounds)
            operations[title] = time_operations(run)
        print(f"- {title}: {scale * parts[title]['all']:.0f}", flush=True)
    print("\n" + row("part", list(parts)) + row("---", ["---:"] * len(parts)), end="")
    for part in (*PARTS, "all"):
        times = [seconds.get(part) for seconds in parts.values()]
        print(row(part, ["-" if x is None else f"{scale * x:.1f}" for x in times]), end="")
    for title, measured in operations.items():
        print_operations(title, measured, sentences)


def print_operations(title: str, operations: Operations, sentences: int) -> None:
    """Print the operations with the largest self time."""
    total = sum(seconds for seconds, _ in operations.values())
    largest = sorted(operations.items(), key=lambda item: -item[1][0])[:OPERATIONS]
    print(f"\n### {title}: operations by self time\n")
    print(row("operation", ["ms per sentence", "share", "calls"]), end="")
    print(row("---", ["---:"] * 3), end="")
    for name, (seconds, calls) in largest:
        cells = [f"{1000 * seconds / sentences:.1f}", f"{seconds / total:.0%}", str(calls)]
        print(row(f"`{name}`", cells), end="")


def row(first: str, cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join([first, *cells]) + " |\n"


def time_parts(network: nn.Module, run: Run, rounds: int) -> dict[str, float]:
    """Return the median seconds that a run spends in each part's forward pass, and in all."""
    seconds: dict[str, list[float]] = defaultdict(list)
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return result

        return call

    boxes = {name: (getattr(network, box), method) for name, (box, method) in PARTS.items()}
    for name, (box, method) in boxes.items():
        setattr(box, method, timed(name, getattr(box, method)))
    for _ in range(rounds):
        spent.clear()
        start = time.perf_counter()
        run()
        seconds["all"].append(time.perf_counter() - start)
        for name, value in spent.items():
            seconds[name].append(value)
    for box, method in boxes.values():
        delattr(box, method)
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_operations(run: Run) -> Operations:
    """Return the self time and the calls of each of PyTorch's operations."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = profiler.key_averages()
    return {event.key: (event.self_cpu_time_total / 1e6, event.count) for event in events}


def profile_runtime(folder: Path, image_size: int, rounds: int) -> Operations:
    """Return the self time and the calls of each operation in a run of an exported network."""
    network = OnnxNetwork(folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_profiling = True
    sessions = {}
    for box, name in (("image_encoder", IMAGE_ENCODER), ("grounding", GROUNDING)):
        options.profile_file_prefix = str(folder / box)
        sessions[box] = onnxruntime.InferenceSession(
            folder / name, options, providers=["CPUExecutionProvider"]
        )
        setattr(network, box, sessions[box])
    image = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    tokens = tokenize([SENTENCES[0]], network.max_tokens)
    for _ in range(1 + rounds):
        network(image, tokens, torch.zeros(1, dtype=torch.long))
    seconds: dict[str, list[float]] = defaultdict(list)
    for session in sessions.values():
        events = json.loads(Path(session.end_profiling()).read_text())
        kernels = [e for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
        for event in kernels[len(kernels) // (1 + rounds) :]:  # the first run warms up
            seconds[event["args"]["op_name"]].append(event["dur"] / 1e6)
    return {name: (sum(values) / rounds, len(values) // rounds) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
