"""Benchmarks inference: start-up, latency, evaluation, table 1's rows, agreement of backends."""

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from crislit.benchmarks.measurements import Measurement, compare_to_reference
from crislit.benchmarks.options import Options
from crislit.benchmarks.reference import reference_logits
from crislit.benchmarks.timing import Machine, Work, count_cost, interleave
from crislit.checkpoints import Checkpoint, read_any, write_folder
from crislit.config import compose_config
from crislit.data import ReferEvaluationSet
from crislit.errors import InputError, require
from crislit.experiments import TABLE1
from crislit.inference import OnnxNetwork, export_onnx
from crislit.io import EXAMPLES
from crislit.models import CRIS, optimize_for_inference
from crislit.training import SegmentationMetric, build_data, build_model, intersection_and_union
from crislit.transforms import normalise, probability_maps, tokenize

SENTENCES = (
    "the man in red",
    "leftmost dog",
    "woman with an umbrella",
    "second pizza from the right",
    "blue car",
    "the child that is closest to us",
    "a cat on the sofa",
)
"""Sentences about one image; RefCOCO has about seven per image."""
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Images, tokens and image indices to logits, as :meth:`crislit.CRIS.forward`."""


def build_network(model: str, row: str = "con_dec3", overrides: Sequence[str] = ()) -> CRIS:
    """Build a network with random weights, on which speed does not depend.

    Args:
        model: ``rn50``, ``rn101`` or ``tiny``.
        row: Row of table 1, as in ``ablation=``.
        overrides: More overrides of the configuration.
    """
    torch.manual_seed(0)
    config = compose_config([f"model={model}", f"ablation={row}", "dataset=refcoco", *overrides])
    return build_model(config).eval()


def measure_startup(options: Options) -> list[Measurement]:
    """Time whole processes: the libraries' imports, the package's, and a first prediction."""
    image = min(EXAMPLES.glob("*.jpg"))
    commands = {
        "import torch, open_clip": ["-c", "import torch, open_clip"],
        "import crislit": ["-c", "import crislit"],
        "crislit.predict": ["-m", "crislit.predict", str(image), "red star", "--output", "-"],
    }
    # Bytecode is written in the first round, which is not counted, as on a user's machine.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = partial(subprocess.run, check=True, capture_output=True, env=environment)
    work = {name: partial(run, [sys.executable, *command]) for name, command in commands.items()}
    seconds = interleave(work, options.rounds)
    return compare_to_reference("start", seconds, dict.fromkeys(work, 1), "s")


def backends(
    model: CRIS, image_size: int, folder: Path, threshold: float = 0.35
) -> dict[str, Network]:
    """Return a network on all backends, the baseline first.

    Args:
        model: The network.
        image_size: Side of its input in pixels.
        folder: Where it is exported to, for ONNX Runtime if that is installed.
        threshold: Written into the exports.
    """
    optimized = optimized_copy(model)
    networks: dict[str, Network] = {
        "plain": reference_network(model),
        "for inference": lambda images, tokens, image_indices: optimized(
            images.contiguous(memory_format=torch.channels_last), tokens, image_indices
        ),
    }
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        print("ONNX Runtime is not installed: not measured", file=sys.stderr)
        return networks
    checkpoint = Checkpoint(model.config, model.state_dict(), image_size, threshold, "random")
    write_folder(checkpoint, folder / "network")
    for name, calibrate in (("ONNX Runtime", None), ("ONNX Runtime, int8", EXAMPLES)):
        export_onnx(folder / "network", folder / name, calibrate=calibrate)
        networks[name] = OnnxNetwork(folder / name)
    return networks


def optimized_copy(model: CRIS) -> CRIS:
    """Return a copy in the form that crislit.load and evaluation use; it shares no weights."""
    return optimize_for_inference(copy.deepcopy(model).to(memory_format=torch.channels_last))


def reference_network(model: CRIS) -> Network:
    """Return the baseline: one image and one sentence at a time."""

    def compute(images: Tensor, tokens: Tensor, image_indices: Tensor) -> Tensor:
        pairs = zip(image_indices, tokens, strict=True)
        return torch.cat([reference_logits(model, images[i, None], row[None]) for i, row in pairs])

    return compute


@torch.inference_mode()
def measure_inference(
    part: str, networks: Mapping[str, Network], options: Options, machine: Machine
) -> list[Measurement]:
    """Time all backends on two images of seven sentences (evaluation) or one of one (latency)."""
    image_count, sentences = (2, SENTENCES) if part == "evaluation" else (1, SENTENCES[:1])
    size, count = options.image_size, len(sentences)
    images = torch.randn(image_count, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens = tokenize(list(sentences) * image_count, 17)
    image_indices = torch.arange(image_count).repeat_interleave(count)
    inputs = dict.fromkeys(networks, (images, tokens, image_indices))
    # The baseline computes one sentence after another: a second image would take as long again.
    inputs["plain"] = (images[:1], tokens[:count], image_indices[:count])
    work = {name: partial(compute, *inputs[name]) for name, compute in networks.items()}
    expected = work["plain"]()
    differences = {name: relative_error(run()[:count], expected) for name, run in work.items()}
    counted = {name: count_cost(run) for name, run in work.items() if "ONNX" not in name}
    return compare_to_reference(
        part,
        interleave(work, options.rounds),
        {name: len(tokens) for name, (_, tokens, _) in inputs.items()},
        "s per sentence",
        {name: (cost.floor(machine), cost.moved(machine)) for name, cost in counted.items()},
        differences,
    )


def relative_error(logits: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of the expected values."""
    return float((logits - expected).norm() / expected.norm())


@torch.inference_mode()
def measure_table1_rows(options: Options, machine: Machine) -> list[Measurement]:
    """Time one image and one sentence by every row of table 1, baseline and optimized."""
    measurements: list[Measurement] = []
    image = torch.randn(1, 3, options.image_size, options.image_size)
    channels_last = image.contiguous(memory_format=torch.channels_last)
    tokens = tokenize([SENTENCES[0]], 17)
    for row in TABLE1:
        model = build_network(options.model, row)
        work: dict[str, Work] = {
            "plain": partial(reference_logits, model, image, tokens),
            "for inference": partial(optimized_copy(model), channels_last, tokens),
        }
        seconds = interleave(work, max(1, options.rounds // 2))
        for timed in compare_to_reference(row, seconds, dict.fromkeys(work, 1), "s"):
            name, cost = f"{row}, {timed.candidate}", count_cost(work[timed.candidate])
            fps, bound = 1 / timed.value, 1 / cost.floor(machine)
            measurements += [
                Measurement("rows", name, cost.flops / 1e9, "GFLOP"),
                Measurement("rows", name, fps, "images/s", timed.ratio, bound, spread=timed.spread),
            ]
    return measurements


def measure_agreement(options: Options, folder: Path) -> list[Measurement]:
    """Measure a trained network's mIoU on all backends, on images of its validation split.

    Args:
        options: Name the checkpoint and the number of images.
        folder: Where the network is exported to.

    Raises:
        InputError: If the checkpoint does not record its data set.
    """
    try:
        checkpoint = read_any(Path(options.checkpoint).expanduser())
    except InputError as error:
        print(f"--agreement is not run: {error}", file=sys.stderr)
        return []
    require(checkpoint.config, f"{options.checkpoint} does not say what data it was trained on")
    data_root = compose_config()["data_root"]
    module = build_data(checkpoint.config | {"data_root": data_root, "workers": 0})
    data = module.evaluation_set(module.select_split)
    networks = backends(checkpoint.build(), checkpoint.image_size, folder, checkpoint.threshold)
    metrics = {name: SegmentationMetric() for name in networks}
    groups = itertools.groupby(range(len(data)), key=data.image_ids.__getitem__)
    for _, numbers in itertools.islice(groups, options.images):
        batch = ReferEvaluationSet.collate([data[number] for number in numbers])
        for name, compute in networks.items():
            with torch.inference_mode():
                logits = compute(normalise(batch.images), batch.tokens, batch.image_indices)
            maps = probability_maps(
                logits, checkpoint.image_size, [target.shape for target in batch.targets]
            )
            for probability, target in zip(maps, batch.targets, strict=True):
                intersection, union = intersection_and_union(
                    probability > checkpoint.threshold, target
                )
                metrics[name].update([intersection], [union], [not target.any()])
    values = {name: float(metric.compute()["mIoU"]) for name, metric in metrics.items()}
    return [
        Measurement("agreement", name, value, "mIoU", difference=value - values["plain"])
        for name, value in values.items()
    ]
