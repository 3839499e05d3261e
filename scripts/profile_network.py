"""Profile the network before and after each change that made it faster, one change after another.

    python scripts/profile_network.py > results/profiles.md

Two pictures of seven sentences are evaluated, a step of four sentences is trained, and ONNX Runtime marks one sentence, on this
machine's threads and with random weights. Each profile has the time of every part's forward pass (in runs of their own; plain,
the benchmark's yardstick, has no parts), and the operations that take most of the time themselves (by PyTorch's profiler and by
the runtime's). How much faster is crislit.benchmark's to say, for here nothing takes turns.
"""

import argparse
import contextlib
import copy
import json
import statistics
import sys
import tempfile
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

from crislit.benchmarks.inference import SENTENCES, backends, build_network, one_by_one
from crislit.benchmarks.training import KINDS, Step, build_optimizer
from crislit.inference.onnx_network import GROUNDING, IMAGE_ENCODER, OnnxNetwork
from crislit.models.cris import CRIS
from crislit.models.optimized import optimize_for_inference, optimize_for_training
from crislit.training.provenance import commit, hardware
from crislit.transforms.tokenizer import tokenize

OPERATIONS = 10
"""How many are listed."""
TRAINED = (
    "plain",
    "default",
    "rearrange",
    "rearrange recompute",
    "rearrange, 4 sentences an image",
)
PARTS = {
    "image encoder": ("image_encoder", "forward"),
    "neck, pictures": ("neck", "project_maps"),
    "text encoder": ("text_encoder", "forward"),
    "neck, sentences": ("neck", "fuse"),
    "decoder": ("decoder", "forward"),
    "image projector": ("image_projector", "forward"),
    "last convolution": ("head", "forward"),
}
"""What is timed: the network's boxes and their methods."""

Run = Callable[[], Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the profiles as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rn50")
    parser.add_argument("--image-size", type=int, default=416)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    print("# Profiles, before and after each change\n")
    print(
        f"By `python scripts/profile_network.py` at {commit()}, on {hardware()}: {options.model}, {options.image_size} pixels,"
    )
    print(f"random weights, medians of {options.rounds}. Milliseconds a sentence.\n")
    print(
        "## Evaluation, two pictures of seven sentences: each column has the changes of those before it\n"
    )
    tables(
        evaluation(build_network(options), options.image_size), len(SENTENCES) * 2, options.rounds
    )
    print(
        "\n## A training step of four sentences: each column names what is on, `default` channels last and the fused Adam\n"
    )
    tables(training(build_network(options), options.image_size), 4, options.rounds)
    print("\n## One picture and one sentence by ONNX Runtime")
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            backends(build_network(options), options.image_size, Path(folder))
        for name in ("ONNX Runtime", "ONNX Runtime, int8"):
            operation_table(
                name, profile_runtime(Path(folder) / name, options.image_size, options.rounds), 1
            )


def evaluation(model: CRIS, image_size: int) -> Iterator[tuple[str, nn.Module, Run]]:
    """Yield every stage's name, network and work."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, image_size, image_size, generator=generator)
    tokens = tokenize(list(SENTENCES) * 2, model.max_tokens)
    image_indices = torch.arange(2).repeat_interleave(len(SENTENCES))

    def one_at_a_time(net: CRIS, given: Tensor) -> Run:
        return lambda: [
            net(given[i, None], row[None]) for i, row in zip(image_indices, tokens, strict=True)
        ]

    last = images.contiguous(memory_format=torch.channels_last)
    yield "plain", model, partial(one_by_one(model), images, tokens, image_indices)
    yield "its parts", model, one_at_a_time(model, images)
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    yield "channels last", model, one_at_a_time(model, last)
    yield (
        "a picture encoded once, its sentences together",
        model,
        partial(model, last, tokens, image_indices),
    )
    rearranged = optimize_for_training(model)
    yield "rearranged", rearranged, partial(rearranged, last, tokens, image_indices)
    folded = optimize_for_inference(model)
    yield (
        "BatchNorm folded, large maps sentence by sentence",
        folded,
        partial(folded, last, tokens, image_indices),
    )


def training(model: CRIS, image_size: int) -> Iterator[tuple[str, nn.Module, Run]]:
    """Yield every kind of step's name, network and work."""
    model.train()
    for name in TRAINED:
        kind = KINDS[name]
        step = Step(kind, model, build_optimizer(model, kind.plain), image_size, SENTENCES)
        step.prepare()
        yield name, step.network, step.take


def tables(stages: Iterator[tuple[str, nn.Module, Run]], sentences: int, rounds: int) -> None:
    """Run the stages, and print what their parts and operations take."""
    names, parts, operations = [], [], []
    for name, net, run in stages:
        inference = torch.inference_mode() if not net.training else torch.enable_grad()
        with inference:
            run()  # to warm up
            names.append(name)
            parts.append(time_parts(net, run, rounds))
            operations.append(time_operations(run))
        scale = 1000 / sentences
        print(f"- {name}: {scale * parts[-1]['all']:.0f}", flush=True)
    print("\n" + row("part", names) + row("---", ["---:"] * len(names)), end="")
    for part in (*PARTS, "all"):
        print(
            row(
                part,
                [
                    f"{1000 * found[part] / sentences:.1f}" if part in found else "-"
                    for found in parts
                ],
            ),
            end="",
        )
    for name, found in zip(names, operations, strict=True):
        operation_table(name, found, sentences)


def operation_table(name: str, found: dict[str, tuple[float, int]], sentences: int) -> None:
    """Print the operations that take most of the time."""
    whole = sum(seconds for seconds, _ in found.values())
    listed = sorted(found.items(), key=lambda item: -item[1][0])[:OPERATIONS]
    print(
        f"\n### {name}: operations by their own time\n\n"
        + row("operation", ["ms a sentence", "share", "calls"]),
        end="",
    )
    print(row("---", ["---:"] * 3), end="")
    for operation, (seconds, calls) in listed:
        print(
            row(
                f"`{operation}`",
                [f"{1000 * seconds / sentences:.1f}", f"{seconds / whole:.0%}", str(calls)],
            ),
            end="",
        )


def row(first: str, cells: Sequence[str]) -> str:
    """Return a row of a table."""
    return "| " + " | ".join([first, *cells]) + " |\n"


def time_parts(net: nn.Module, run: Run, rounds: int) -> dict[str, float]:
    """Return the seconds that a run spends in each part's forward pass, and in all."""
    seconds: dict[str, list[float]] = defaultdict(list)
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            found = method(*given, **named)
            spent[name] += time.perf_counter() - start
            return found

        return call

    watched = {name: (getattr(net, box, None), method) for name, (box, method) in PARTS.items()}
    for name, (box, method) in watched.items():
        if box is not None:
            setattr(box, method, timed(name, getattr(box, method)))
    for _ in range(rounds):
        spent.clear()
        start = time.perf_counter()
        run()
        seconds["all"].append(time.perf_counter() - start)
        for name, value in spent.items():
            seconds[name].append(value)
    for box, method in watched.values():
        if box is not None:
            delattr(box, method)
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_operations(run: Run) -> dict[str, tuple[float, int]]:
    """Return the seconds that each of PyTorch's operations takes itself, and how often it is called."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    return {
        event.key: (event.self_cpu_time_total / 1e6, event.count) for event in found.key_averages()
    }


def profile_runtime(folder: Path, image_size: int, rounds: int) -> dict[str, tuple[float, int]]:
    """Return the seconds of a run that each operation of an exported network takes itself, and how often it is called."""
    network = OnnxNetwork(folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_profiling = True
    for box, name in (("image_encoder", IMAGE_ENCODER), ("grounding", GROUNDING)):
        options.profile_file_prefix = str(folder / box)
        setattr(
            network,
            box,
            onnxruntime.InferenceSession(
                folder / name, options, providers=["CPUExecutionProvider"]
            ),
        )
    image = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    given = (image, tokenize([SENTENCES[0]], network.max_tokens), torch.zeros(1, dtype=torch.long))
    for _ in range(1 + rounds):
        network(*given)
    found: dict[str, list[float]] = defaultdict(list)
    for session in (network.image_encoder, network.grounding):
        events = json.loads(Path(session.end_profiling()).read_text())
        ran = [
            event
            for event in events
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
        ]
        for event in ran[len(ran) // (1 + rounds) :]:  # the first run warms up
            found[event["args"]["op_name"]].append(event["dur"] / 1e6)
    return {
        name: (sum(seconds) / rounds, len(seconds) // rounds) for name, seconds in found.items()
    }


if __name__ == "__main__":
    main()
