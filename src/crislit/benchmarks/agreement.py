"""Benchmarks how well the forms of a trained network agree: their mIoU."""

import itertools
import sys
from functools import partial
from pathlib import Path

import torch

from crislit.benchmarks.devices import attempt, forget_compiled
from crislit.benchmarks.inference import Candidate, all_candidates
from crislit.benchmarks.measurements import Measurement
from crislit.benchmarks.options import Options
from crislit.checkpoints import Checkpoint, read_any
from crislit.config import compose_config
from crislit.data import EvaluationBatch, ReferEvaluationSet
from crislit.errors import InputError, require
from crislit.training import SegmentationMetric, build_data, intersection_and_union
from crislit.transforms import normalize, probability_maps


def measure_agreement(options: Options, device: torch.device, folder: Path) -> list[Measurement]:
    """Measure a trained network's mIoU in all forms, on images of its validation split.

    Args:
        options: Name the checkpoint and the number of images.
        device: Where the network computes.
        folder: Where it is exported to.

    Raises:
        InputError: If the checkpoint does not record its data set.
    """
    try:
        checkpoint = read_any(Path(options.checkpoint).expanduser())
    except InputError as error:
        print(f"--agreement is not run: {error}", file=sys.stderr)
        return []
    require(checkpoint.config, f"{options.checkpoint} does not say what data it was trained on")
    candidates = all_candidates(
        checkpoint.build(), device, checkpoint.image_size, folder, checkpoint.threshold
    )
    values = compare_masks(candidates, checkpoint, device, options.images)
    if "plain" not in values:
        return []
    return [
        Measurement("agreement", name, value, "mIoU", difference=value - values["plain"])
        for name, value in values.items()
    ]


def compare_masks(
    candidates: dict[str, Candidate], checkpoint: Checkpoint, device: torch.device, images: int
) -> dict[str, float]:
    """Return the mIoU of all candidates that run, on the first images."""
    data_root = compose_config()["data_root"]
    assert checkpoint.config is not None
    module = build_data(checkpoint.config | {"data_root": data_root, "workers": 0})
    data = module.evaluation_set(module.select_split)
    metrics = {name: SegmentationMetric() for name in candidates}
    groups = itertools.groupby(range(len(data)), key=data.image_ids.__getitem__)
    forget_compiled()
    for _, numbers in itertools.islice(groups, images):
        batch = ReferEvaluationSet.collate([data[number] for number in numbers])
        for name, metric in list(metrics.items()):
            count = partial(count_masks, candidates[name], batch, checkpoint, device)
            counts = attempt(f"agreement, {name}", count, candidates[name].is_compiled)
            if counts is None:
                del metrics[name]
                continue
            intersections, unions = zip(*counts, strict=True)
            metric.update(intersections, unions, [not target.any() for target in batch.targets])
    return {name: float(metric.compute()["mIoU"]) for name, metric in metrics.items()}


@torch.inference_mode()
def count_masks(
    candidate: Candidate, batch: EvaluationBatch, checkpoint: Checkpoint, device: torch.device
) -> list[tuple[int, int]]:
    """Return intersection and union of each sentence's mask and target."""
    tokens, image_indices = batch.tokens.to(device), batch.image_indices.to(device)
    for tensor in (tokens, image_indices):  # compiled once for all numbers of sentences
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    logits = candidate(normalize(batch.images.to(device)), tokens, image_indices)
    sizes = [target.shape for target in batch.targets]
    maps = probability_maps(logits, checkpoint.image_size, sizes)
    return [
        intersection_and_union(probability > checkpoint.threshold, target)
        for probability, target in zip(maps, batch.targets, strict=True)
    ]
