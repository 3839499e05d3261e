"""Benchmarks a training step: time, memory, losses and gradients."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from crislit.benchmarks.devices import CPU, Precision, autocast, compile_forward, tf32
from crislit.benchmarks.inference import SENTENCES, build_network
from crislit.benchmarks.measurements import Measurement, compare_to_reference
from crislit.benchmarks.options import Options
from crislit.benchmarks.reference import reference_logits
from crislit.benchmarks.timing import (
    Machine,
    count_cost,
    interleave,
    peak_memory,
    run_in_new_process,
)
from crislit.models import CRIS, optimize_for_training, recompute_activations
from crislit.training import keep_freed_memory, text_to_pixel_contrastive_loss
from crislit.transforms import tokenize

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
        precision: What it computes in; float16 with a loss that is scaled, as ``16-mixed`` does.
        compiled: The forward pass is compiled, and with it the backward pass.
    """

    reference: bool = False
    optimized: bool = False
    recomputed: bool = False
    sentences: int = 1
    precision: Precision = "float32"
    compiled: bool = False


KINDS = {
    "plain": Kind(reference=True),
    "default": Kind(),
    "rearrange": Kind(optimized=True),
    "recompute": Kind(recomputed=True),
    "rearrange recompute": Kind(optimized=True, recomputed=True),
    "4 sentences an image": Kind(sentences=4),
    "rearrange, 4 sentences an image": Kind(optimized=True, sentences=4),
}
"""Kinds of steps by their names in results/speed.csv, the baseline first."""
MEMORY_KINDS = ("plain", "default", "rearrange", "recompute", "rearrange recompute")
"""Kinds whose memory is measured, each in a new process."""
GRADIENT_KINDS = ("plain", "default", "rearrange recompute")
"""Kinds whose gradients are compared with one sentence per image."""
SHARED_IMAGES = Kind(optimized=True, recomputed=True, sentences=2)
"""Compared with the baseline on two copies of the same image."""
LOSS_STEPS = 20
"""Steps whose losses are compared."""


class Step:
    """A training step of one kind, on random images and masks.

    Args:
        kind: How it is computed.
        model: The network, on its device; steps of several kinds may train it in turn.
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
        self.device = next(model.parameters()).device
        self.optimizer = optimizer or build_optimizer(model, kind.reference)
        self.network = optimize_for_training(model) if kind.optimized else model
        self.forward: Callable[..., Tensor] = self.network
        if kind.reference:
            self.forward = partial(reference_logits, model)
        elif kind.compiled:
            self.forward = compile_forward(self.network.forward)
        is_scaled = kind.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_scaled)
        generator = torch.Generator().manual_seed(0)
        square = (image_size, image_size)
        masks = (torch.rand(batch, 1, *square, generator=generator) > 0.9).float()
        images = torch.randn(batch // kind.sentences, 3, *square, generator=generator)
        tokens = tokenize([SENTENCES[i % len(SENTENCES)] for i in range(batch)], model.max_tokens)
        self.masks, self.images, self.tokens = (x.to(self.device) for x in (masks, images, tokens))

    def prepare(self) -> None:
        """Set the network, the allocator and dropout's seed to what the kind needs."""
        keep_freed_memory(not self.kind.reference)
        layout = torch.contiguous_format if self.kind.reference else torch.channels_last
        self.optimizer.zero_grad()
        self.model.to(memory_format=layout)
        recompute_activations(self.network, self.kind.recomputed)
        torch.manual_seed(0)

    def differentiate(self) -> Tensor:
        """Compute the gradients of the batch; return its loss, for which nothing has waited."""
        with tf32(self.kind.precision == "TF32"):
            with autocast(self.kind.precision, self.device):
                logits = self.forward(self.images, self.tokens)
                loss = text_to_pixel_contrastive_loss(logits, self.masks)
            torch.autograd.backward(self.scaler.scale(loss))
        return loss.detach()

    def take(self) -> Tensor:
        """Take a step; return its loss."""
        self.optimizer.zero_grad()
        loss = self.differentiate()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss


def build_optimizer(model: CRIS, reference: bool) -> torch.optim.Optimizer:
    """Return Adam, fused as in our training or not as in the released implementation."""
    return torch.optim.Adam(model.parameters(), lr=1e-6, fused=not reference)


def measure_training(options: Options, machine: Machine) -> list[Measurement]:
    """Measure steps: their time, and losses, gradients and memory beside the baseline's."""
    rows = [
        *time_steps(options, machine),
        *compare_losses(options),
        *compare_gradients(options),
        *measure_memory(options),
    ]
    keep_freed_memory(False)
    return rows


def time_steps(options: Options, machine: Machine) -> list[Measurement]:
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
    return compare_to_reference(
        "training", seconds, dict.fromkeys(steps, BATCH), "s per sentence", costs
    )


def compare_losses(options: Options) -> list[Measurement]:
    """Compare the losses of some steps with the baseline's."""
    names = ("plain", "rearrange recompute")
    return loss_rows({name: take_steps(name, options, LOSS_STEPS) for name in names})


def loss_rows(losses: Mapping[str, list[float]]) -> list[Measurement]:
    """Return rows with the last loss of every kind, the largest difference of all as difference.

    The learning rate is so low that Adam does not amplify rounding errors.
    """
    return [
        Measurement(
            "losses",
            name,
            values[-1],
            f"after {LOSS_STEPS} steps",
            difference=max(abs(a / b - 1) for a, b in zip(values, losses["plain"], strict=True)),
        )
        for name, values in losses.items()
    ]


def take_steps(name: str, options: Options, count: int) -> list[float]:
    """Take steps of a kind with a new network; return their losses."""
    step = Step(KINDS[name], build_network(options.model).train(), options.image_size)
    step.prepare()
    return [float(step.take()) for _ in range(count)]


def compare_gradients(options: Options, device: torch.device = CPU) -> Iterator[Measurement]:
    """Compare all gradients of one step with the baseline's in float64.

    The comparison in float64 separates errors from rounding. Dropout is off, as its draws differ
    between the precisions.
    """
    model = build_network(options.model, overrides=["decoder.dropout=0"]).train()
    model = model.to(device)
    compute = partial(compute_gradients, model, options.image_size)
    exact: dict[str, Tensor] = {}
    for dtype in (torch.float64, torch.float32):
        for name in GRADIENT_KINDS:
            gradients = compute(KINDS[name], dtype)
            exact = exact or gradients
            title = f"{name}, {str(dtype).removeprefix('torch.')}"
            yield gradient_row(title, gradients, exact)
    exact = compute(KINDS["plain"], torch.float64, repeat_image=True)
    gradients = compute(SHARED_IMAGES, torch.float64)
    yield gradient_row("rearrange recompute, 2 sentences an image, float64", gradients, exact)


def compute_gradients(
    model: CRIS, image_size: int, kind: Kind, dtype: torch.dtype, repeat_image: bool = False
) -> dict[str, Tensor]:
    """Return the gradients of two sentences, of the first image or one each, by parameter."""
    # Weights made in float32 survive the round trip to float64.
    step = Step(kind, model.to(dtype), image_size, batch=2)
    step.images, step.masks = step.images.to(dtype), step.masks.to(dtype)
    if repeat_image:
        step.images = step.images[:1].expand_as(step.images).contiguous()
    step.prepare()
    step.differentiate()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return gradients


def gradient_row(
    title: str, gradients: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> Measurement:
    """Return a row with the difference of the gradients, relative to the norm of the exact ones."""
    assert gradients.keys() == exact.keys()
    squares = sum(float((gradients[k] - x).double().square().sum()) for k, x in exact.items())
    exact_squares = sum(float(x.double().square().sum()) for x in exact.values())
    error = (squares / exact_squares) ** 0.5
    unit = "of the reference's in float64"
    return Measurement("gradients", title, error, unit, difference=error)


def measure_memory(options: Options) -> list[Measurement]:
    """Measure the largest resident memory of a training process, for some kinds of steps."""
    peaks = {name: run_in_new_process(training_peak, name, options) for name in MEMORY_KINDS}
    return [
        Measurement("memory", name, peak, "GB", ratio=peaks["plain"] / peak)
        for name, peak in peaks.items()
    ]


def training_peak(name: str, options: Options) -> float:
    """Take two steps of a kind; return this process's largest resident memory in GB."""
    take_steps(name, options, 2)
    return peak_memory()
