"""Benchmarks a training step: time, memory, losses and gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crislit.benchmarks.inference import SENTENCES, build_network
from crislit.benchmarks.measurements import Measurement, Options, compare_to_reference
from crislit.benchmarks.reference import reference_logits
from crislit.benchmarks.timing import (
    Machine,
    count_cost,
    interleave,
    peak_memory,
    run_in_new_process,
)
from crislit.models.cris import CRIS
from crislit.models.optimized import optimize_for_training
from crislit.models.recompute import recompute_activations
from crislit.training.allocator import keep_freed_memory
from crislit.training.losses import text_to_pixel_contrastive_loss
from crislit.transforms.tokenizer import tokenize

BATCH = 4
"""Sentences per step."""


@dataclass(frozen=True)
class Kind:
    """How a step is computed.

    Attributes:
        reference: As in the released implementation: contiguous tensors, an optimizer that updates
            one parameter at a time, and freed memory returned to the system.
        optimized: ``rearrange=true``.
        recomputed: ``recompute=true``.
        sentences: ``dataset.sentences_per_image``.
    """

    reference: bool = False
    optimized: bool = False
    recomputed: bool = False
    sentences: int = 1


KINDS = {
    "plain": Kind(reference=True),
    "default": Kind(),
    "rearrange": Kind(optimized=True),
    "recompute": Kind(recomputed=True),
    "rearrange recompute": Kind(optimized=True, recomputed=True),
    "4 sentences an image": Kind(sentences=4),
    "rearrange, 4 sentences an image": Kind(optimized=True, sentences=4),
}
"""Kinds of steps by their names in results/speed.csv, the reference first."""
MEMORY_KINDS = ("plain", "default", "rearrange", "recompute", "rearrange recompute")
"""Kinds whose memory is measured, each in a new process."""
GRADIENT_KINDS = ("plain", "default", "rearrange recompute")
"""Kinds whose gradients are compared with one sentence per image."""
SHARED_IMAGES = Kind(optimized=True, recomputed=True, sentences=2)
"""Compared with the reference on two copies of the same image."""
LOSS_STEPS = 20
"""Steps whose losses are compared."""


class Step:
    """A training step of one kind, on random images and masks.

    Args:
        kind: How it is computed.
        model: The network; steps of several kinds may train it in turn.
        image_size: Side of its input in pixels.
        optimizer: Updates the network's weights; None builds the kind's own.
        batch: Sentences per step.
    """

    def __init__(
        self,
        kind: Kind,
        model: CRIS,
        image_size: int,
        optimizer: torch.optim.Optimizer | None = None,
        batch: int = BATCH,
    ) -> None:
        self.kind, self.model = kind, model
        self.optimizer = optimizer or build_optimizer(model, kind.reference)
        self.network = optimize_for_training(model) if kind.optimized else model
        generator = torch.Generator().manual_seed(0)
        square = (image_size, image_size)
        self.masks = (torch.rand(batch, 1, *square, generator=generator) > 0.9).float()
        self.images = torch.randn(batch // kind.sentences, 3, *square, generator=generator)
        self.tokens = tokenize(list(SENTENCES[:batch]), model.max_tokens)

    def prepare(self) -> None:
        """Set the network, the allocator and dropout's seed to what the kind needs."""
        keep_freed_memory(not self.kind.reference)
        layout = torch.contiguous_format if self.kind.reference else torch.channels_last
        self.optimizer.zero_grad()
        self.model.to(memory_format=layout)
        recompute_activations(self.network, self.kind.recomputed)
        torch.manual_seed(0)

    def differentiate(self) -> float:
        """Compute the gradients of the batch; return its loss."""
        if self.kind.reference:
            logits: Tensor = reference_logits(self.model, self.images, self.tokens)
        else:
            logits = self.network(self.images, self.tokens)
        loss = text_to_pixel_contrastive_loss(logits, self.masks)
        torch.autograd.backward(loss)
        return loss.item()

    def take(self) -> float:
        """Take a step; return its loss."""
        self.optimizer.zero_grad()
        loss = self.differentiate()
        self.optimizer.step()
        return loss


def build_optimizer(model: CRIS, reference: bool) -> torch.optim.Optimizer:
    """Return Adam, fused as in our training or not as in the released implementation."""
    return torch.optim.Adam(model.parameters(), lr=1e-6, fused=not reference)


def measure_training(options: Options, machine: Machine) -> list[Measurement]:
    """Time steps of all kinds in turn."""
    model = build_network(options.model).train()
    # One optimizer for all kinds of a layout takes less memory.
    optimizers = {reference: build_optimizer(model, reference) for reference in (True, False)}
    steps = {
        name: Step(kind, model, options.image_size, optimizers[kind.reference])
        for name, kind in KINDS.items()
    }
    seconds = interleave(
        {name: step.take for name, step in steps.items()},
        max(1, options.rounds // 2),
        prepare=lambda name: steps[name].prepare(),
    )
    costs = {}
    for name, step in steps.items():
        step.prepare()
        cost = count_cost(step.take, training=True)
        costs[name] = (cost.floor(machine), cost.moved(machine))
    counts = dict.fromkeys(steps, BATCH)
    return compare_to_reference("training", seconds, counts, "s per sentence", costs)


def compare_losses(options: Options) -> list[Measurement]:
    """Compare the losses of some steps with the reference's.

    The learning rate is so low that Adam does not amplify rounding errors.
    """
    expected: list[float] = []
    measurements: list[Measurement] = []
    for name in ("plain", "rearrange recompute"):
        step = Step(KINDS[name], build_network(options.model).train(), options.image_size)
        step.prepare()
        losses = [step.take() for _ in range(LOSS_STEPS)]
        expected = expected or losses
        difference = max(
            abs(loss / other - 1) for loss, other in zip(losses, expected, strict=True)
        )
        unit = f"after {LOSS_STEPS} steps"
        measurements.append(Measurement("losses", name, losses[-1], unit, difference=difference))
    return measurements


def compare_gradients(options: Options) -> list[Measurement]:
    """Compare all gradients of one step with the reference's in float64.

    The comparison in float64 separates errors from rounding. Dropout is off, as its draws differ
    between the precisions.
    """
    model = build_network(options.model, overrides=["decoder.dropout=0"]).train()
    measurements: list[Measurement] = []

    def compute(kind: Kind, dtype: torch.dtype, repeat_image: bool = False) -> list[Tensor | None]:
        step = Step(kind, model, options.image_size, batch=2)
        step.images, step.masks = step.images.to(dtype), step.masks.to(dtype)
        if repeat_image:
            step.images = step.images[:1].expand_as(step.images).contiguous()
        step.prepare()
        step.differentiate()
        gradients = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        return gradients

    def compare(name: str, gradients: Sequence[Tensor | None]) -> None:
        error = gradient_error(gradients, exact)
        unit = "of the reference's in float64"
        measurements.append(Measurement("gradients", name, error, unit, difference=error))

    exact: list[Tensor | None] = []
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)  # weights made in float32 survive the round trip
        for name in GRADIENT_KINDS:
            gradients = compute(KINDS[name], dtype)
            exact = exact or gradients
            compare(f"{name}, {str(dtype).removeprefix('torch.')}", gradients)
    model.double()
    exact = compute(KINDS["plain"], torch.float64, repeat_image=True)
    gradients = compute(SHARED_IMAGES, torch.float64)
    compare("rearrange recompute, 2 sentences an image, float64", gradients)
    return measurements


def gradient_error(gradients: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Return the norm of the difference over the norm of the expected gradients."""
    squares = expected_squares = 0.0
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None and other is not None:
            squares += float((gradient - other).double().square().sum())
            expected_squares += float(other.double().square().sum())
    return float((squares / expected_squares) ** 0.5)


def measure_memory(options: Options) -> list[Measurement]:
    """Measure the largest resident memory of a training process, for some kinds of steps."""
    measurements: list[Measurement] = []
    for name in MEMORY_KINDS:
        peak = run_in_new_process(training_peak, name, options)
        ratio = measurements[0].value / peak if measurements else 1.0
        measurements.append(Measurement("memory", name, peak, "GB", ratio=ratio))
    return measurements


def training_peak(name: str, options: Options) -> float:
    """Take two steps of a kind; return this process's largest resident memory in GB."""
    step = Step(KINDS[name], build_network(options.model).train(), options.image_size)
    step.prepare()
    step.take()
    step.take()
    return peak_memory()
