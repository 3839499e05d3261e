"""Benchmarks the speed of inference: evaluation, latency, and the rows of table 1."""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crislit.benchmarks.devices import attempt, forget_compiled
from crislit.benchmarks.inference import (
    ONE_AT_A_TIME,
    SENTENCES,
    Candidate,
    accelerated,
    build_network,
    in_channels_last,
    optimized_copy,
    reference_network,
)
from crislit.benchmarks.measurements import Measurement, compare_to_reference
from crislit.benchmarks.options import Options
from crislit.benchmarks.timing import Cost, Machine, count_cost, interleave
from crislit.data import EvaluationBatch
from crislit.experiments import TABLE1
from crislit.models import CRIS
from crislit.training.mask_counter import MaskCounter
from crislit.transforms import probability_squares, tokenize

IMAGE_SIZE = (480, 640)
"""Height and width of the images that masks are counted on, as most of COCO's."""
MASKS_BATCHES = 4
"""Batches whose masks are counted in one run on an accelerator, which computes the next meanwhile.
"""
NOT_TIMED = ("for inference, bfloat16",)
"""Forms whose agreement is measured only: they are as fast as float16."""
NOT_IN_ROWS = (*NOT_TIMED, "for inference, compiled")
"""Forms that are not measured for every row of table 1, as compiling takes long."""
WITH_OPERATIONS = ("plain", "for inference")
"""Candidates whose number of operations is reported; the others have one of theirs."""
Inputs = tuple[Tensor, Tensor, Tensor]
"""Images, tokens and image indices."""


@dataclass(frozen=True)
class Run:
    """A run of a candidate that is timed.

    Attributes:
        candidate: The network.
        inputs: What it computes.
        sentences: Number of sentences that a run predicts.
    """

    candidate: Candidate
    inputs: Inputs
    sentences: int

    def __call__(self) -> Tensor:
        """Compute the logits."""
        return self.candidate(*self.inputs)

    @functools.cached_property
    def cost(self) -> Cost | None:
        """The cost of a run; None of another runtime's."""
        if self.candidate.eager is None:
            return None
        return count_cost(
            partial(replace(self.candidate, compute=self.candidate.eager), *self.inputs)
        )

    def limits(self, machine: Machine) -> tuple[float, float] | None:
        """Return the seconds that arithmetic and memory traffic take at least."""
        if self.cost is None:
            return None
        return self.cost.floor(machine, self.candidate.precision), self.cost.moved(machine)


@torch.inference_mode()
def measure_inference(
    part: str,
    candidates: Mapping[str, Candidate],
    options: Options,
    machine: Machine,
    device: torch.device,
) -> Iterator[Measurement]:
    """Time all candidates on two images of seven sentences (evaluation) or one of one (latency)."""
    image_count, sentences = (2, SENTENCES) if part == "evaluation" else (1, SENTENCES[:1])
    images, tokens, image_indices = make_inputs(image_count, sentences, options.image_size, device)
    count = len(sentences)
    # One sentence after another: a second image would take as long again.
    first = (images[:1], tokens[:count], image_indices[:count])
    runs = {
        name: Run(candidate, first, count)
        if name in ONE_AT_A_TIME
        else Run(candidate, (images, tokens, image_indices), len(tokens))
        for name, candidate in candidates.items()
        if name not in NOT_TIMED
    }
    if part == "evaluation":
        runs["for inference, counted at image size"] = with_masks(runs["for inference"])
    yield from time_runs(part, runs, options.rounds, machine, device)


def make_inputs(
    image_count: int, sentences: Sequence[str], image_size: int, device: torch.device
) -> Inputs:
    """Return random images, the same sentences for each, and their image indices."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(image_count, 3, image_size, image_size, generator=generator)
    tokens = tokenize(list(sentences) * image_count, 17)
    image_indices = torch.arange(image_count).repeat_interleave(len(sentences))
    return images.to(device), tokens.to(device), image_indices.to(device)


def with_masks(run: Run) -> Run:
    """Return a run that also counts the pixels of the masks at image size, as evaluation does."""
    images, tokens, image_indices = run.inputs
    on_cpu = images.device.type == "cpu"
    batches = 1 if on_cpu else MASKS_BATCHES
    # As in CRISTask: on a CPU, the network needs the cores.
    threads = (os.cpu_count() or 1) if images.device.type == "cuda" else 0
    targets = [np.zeros(IMAGE_SIZE, np.uint8) for _ in tokens]
    batch = EvaluationBatch(images, tokens, image_indices, targets, list(range(len(tokens))))

    def compute(*inputs: Any) -> Tensor:
        counter = MaskCounter(0.35, threads)
        for _ in range(batches):
            logits = run.candidate(*inputs)
            counter.add(probability_squares(logits, images.shape[-1]), batch)
        counter.finish()
        return logits

    return Run(Candidate(compute, None), run.inputs, batches * run.sentences)


def time_runs(
    part: str, runs: Mapping[str, Run], rounds: int, machine: Machine, device: torch.device
) -> Iterator[Measurement]:
    """Time runs in turn, and compare their logits with the baseline's.

    Compiled candidates come last, and the baseline takes turns with them again: where compiling
    takes too long, the others have been measured.
    """
    eager = {name: run for name, run in runs.items() if not run.candidate.is_compiled}
    yield from time_in_turn(part, eager, rounds, machine, device)
    compiled = {name: run for name, run in runs.items() if run.candidate.is_compiled}
    if compiled:
        forget_compiled()
        compared = {"plain": runs["plain"], **compiled}
        yield from time_in_turn(part, compared, rounds, machine, device)[1:]


def time_in_turn(
    part: str, runs: Mapping[str, Run], rounds: int, machine: Machine, device: torch.device
) -> list[Measurement]:
    """Time runs in turn, the baseline first.

    Candidates that this machine cannot run are left out, and all of them without the baseline.
    """
    results = {
        name: attempt(f"{part}, {name}", run, run.candidate.is_compiled)
        for name, run in runs.items()
    }
    expected = results["plain"]
    if expected is None:
        return []
    differences = {
        name: relative_error(logits[: len(expected)], expected)
        for name, logits in results.items()
        if logits is not None
    }
    usable = {name: runs[name] for name in differences}
    limits = {name: run.limits(machine) for name, run in usable.items()}
    return compare_to_reference(
        part,
        interleave(usable, rounds, device=device),
        {name: run.sentences for name, run in usable.items()},
        "s per sentence",
        {name: limit for name, limit in limits.items() if limit},
        differences,
    )


def relative_error(logits: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of the expected values."""
    return float((logits.float() - expected).norm() / expected.norm())


@torch.inference_mode()
def measure_table1_rows(
    options: Options, machine: Machine, device: torch.device
) -> Iterator[Measurement]:
    """Time one image and one sentence by every row of table 1, baseline and optimized."""
    inputs = make_inputs(1, SENTENCES[:1], options.image_size, device)
    for row in TABLE1:
        candidates = row_candidates(build_network(options.model, row), device)
        runs = {name: Run(candidate, inputs, 1) for name, candidate in candidates.items()}
        for timed in time_runs(row, runs, max(1, options.rounds // 2), machine, device):
            name, cost = f"{row}, {timed.candidate}", runs[timed.candidate].cost
            if timed.candidate in WITH_OPERATIONS and cost:
                yield Measurement("rows", name, cost.flops / 1e9, "GFLOP")
            yield replace(
                timed,
                part="rows",
                candidate=name,
                value=1 / timed.value,
                unit="images/s",
                floor=1 / timed.floor if timed.floor else None,
                moved=None,
            )


def row_candidates(model: CRIS, device: torch.device) -> dict[str, Candidate]:
    """Return the forms of a network that are measured for every row of table 1."""
    if device.type != "cpu":
        return accelerated(model, device, without=NOT_IN_ROWS)
    reference, optimized = reference_network(model), in_channels_last(optimized_copy(model))
    return {
        "plain": Candidate(reference, reference),
        "for inference": Candidate(optimized, optimized),
    }
