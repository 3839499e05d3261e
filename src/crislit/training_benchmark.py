"""The benchmark's training step: plain against what can be switched on, in seconds, memory and gradients."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crislit.data.tokenizer import tokenize
from crislit.losses import text_to_pixel_contrastive_loss
from crislit.memory import keep_memory
from crislit.models.cris import CRIS
from crislit.models.rearranged import rearrange
from crislit.models.recompute import recompute_activations
from crislit.plain import plain_logits
from crislit.timing import Machine, Measurement, compare, count_cost, interleave, peak_memory

BATCH = 4
"""Sentences of a step."""


@dataclass(frozen=True)
class Kind:
    """How a step is computed.

    Attributes:
        plain: As the released program does it: contiguous, its optimizer a parameter at a time, freed memory given back.
        rearranged: ``rearrange=true``.
        recomputed: ``recompute=true``.
        sentences: ``dataset.sentences_per_image``.
    """

    plain: bool = False
    rearranged: bool = False
    recomputed: bool = False
    sentences: int = 1


KINDS = {
    "plain": Kind(plain=True),
    "default": Kind(),
    "rearrange": Kind(rearranged=True),
    "recompute": Kind(recomputed=True),
    "rearrange recompute": Kind(rearranged=True, recomputed=True),
    "4 sentences an image": Kind(sentences=4),
    "rearrange, 4 sentences an image": Kind(rearranged=True, sentences=4),
}
PEAKS = ("plain", "default", "rearrange", "recompute", "rearrange recompute")
"""Whose memory is measured, each in a process of its own."""

COMPARED = ("plain", "default", "rearrange recompute")
"""Whose gradients are compared, of a picture a sentence."""
EVERYTHING = Kind(rearranged=True, recomputed=True, sentences=2)
"""Compared too, with plain on a picture that is there twice."""
LOSSES = 20
"""Steps whose losses are compared."""


class Step:
    """A training step of one kind.

    Args:
        kind: How it is computed.
        model: The network, which steps of several kinds may train in turn.
        optimizer: Of its weights, in the layout that the kind has.
        image_size: Side of its input.
        sentences: What it is asked.
        batch: How many of them.
    """

    def __init__(
        self,
        kind: Kind,
        model: CRIS,
        optimizer: torch.optim.Optimizer,
        image_size: int,
        sentences: Sequence[str],
        batch: int = BATCH,
    ) -> None:
        self.kind, self.model, self.optimizer = kind, model, optimizer
        self.network = rearrange(model) if kind.rearranged else model
        generator = torch.Generator().manual_seed(0)
        self.masks = (torch.rand(batch, 1, image_size, image_size, generator=generator) > 0.9).float()
        self.images = torch.randn(batch // kind.sentences, 3, image_size, image_size, generator=generator)
        self.tokens = tokenize(list(sentences[:batch]), model.max_words)

    def prepare(self) -> None:
        """Give the network the form that the step needs, and memory to the system or not."""
        keep_memory(not self.kind.plain)
        layout = torch.contiguous_format if self.kind.plain else torch.channels_last
        self.optimizer.zero_grad()
        self.model.to(memory_format=layout)
        recompute_activations(self.network, self.kind.recomputed)
        torch.manual_seed(0)  # of dropout

    def differentiate(self) -> float:
        """Compute the gradients of a batch; return its loss."""
        if self.kind.plain:
            logits: Tensor = plain_logits(self.model, self.images, self.tokens)
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


def build_optimizer(model: CRIS, plain: bool) -> torch.optim.Optimizer:
    """Return Adam, as the released program has it or as ours."""
    return torch.optim.Adam(model.parameters(), lr=1e-6, fused=not plain)


def measure(model: CRIS, options: argparse.Namespace, sentences: Sequence[str], machine: Machine) -> list[Measurement]:
    """Time steps of all kinds in turn."""
    model.train()
    optimizers = {plain: build_optimizer(model, plain) for plain in (True, False)}  # one for all takes less memory
    steps = {name: Step(kind, model, optimizers[kind.plain], options.image_size, sentences) for name, kind in KINDS.items()}
    takes = {name: step.take for name, step in steps.items()}
    seconds = interleave(takes, max(1, options.rounds // 2), prepare=lambda name: steps[name].prepare())
    costs = {}
    for name, step in steps.items():
        step.prepare()
        cost = count_cost(step.take, training=True)
        costs[name] = (cost.floor(machine), cost.moved(machine))
    return compare("training", seconds, dict.fromkeys(steps, BATCH), "s a sentence", costs)


def losses(build: Callable[[], CRIS], options: argparse.Namespace, sentences: Sequence[str]) -> list[Measurement]:
    """Compare the losses of some steps at a low rate, at which Adam does not amplify rounding, to plain's.

    Args:
        build: Returns a network, the same each time.
        options: The program's.
        sentences: What it is asked.
    """
    expected: list[float] = []
    found: list[Measurement] = []
    for name in ("plain", "rearrange recompute"):
        model, kind = build().train(), KINDS[name]
        step = Step(kind, model, build_optimizer(model, kind.plain), options.image_size, sentences)
        step.prepare()
        values = [step.take() for _ in range(LOSSES)]
        expected = expected or values
        apart = max(abs(one / other - 1) for one, other in zip(values, expected, strict=True))
        found.append(Measurement("losses", name, values[-1], f"after {LOSSES} steps", difference=apart))
    return found


def gradients(model: CRIS, options: argparse.Namespace, sentences: Sequence[str]) -> list[Measurement]:
    """Compare all gradients of one step to plain's in float64, which tells rounding from anything else.

    Args:
        model: A network without dropout, whose draws would differ between the precisions.
        options: The program's.
        sentences: What it is asked.
    """
    model.train()
    found: list[Measurement] = []

    def compute(kind: Kind, dtype: torch.dtype, twice: bool = False) -> list[Tensor | None]:
        step = Step(kind, model, build_optimizer(model, kind.plain), options.image_size, sentences, batch=2)  # has room
        step.images, step.masks = step.images.to(dtype), step.masks.to(dtype)
        if twice:
            step.images = step.images[:1].expand_as(step.images).contiguous()
        step.prepare()
        step.differentiate()
        computed = [p.grad for p in model.parameters()]
        model.zero_grad()  # the numbers stay in the list
        return computed

    def compare_to(exact: Sequence[Tensor | None], computed: Sequence[Tensor | None], label: str) -> None:
        difference = relative_difference(computed, exact)
        found.append(Measurement("gradients", label, difference, "of plain's in float64", difference=difference))

    exact: list[Tensor | None] = []
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)  # each weight was float32 at first, so that nothing is lost
        for name in COMPARED:
            computed = compute(KINDS[name], dtype)
            exact = exact or computed
            compare_to(exact, computed, f"{name}, {str(dtype).removeprefix('torch.')}")
    model.double()
    exact = compute(KINDS["plain"], torch.float64, twice=True)
    compare_to(exact, compute(EVERYTHING, torch.float64), "rearrange recompute, 2 sentences an image, float64")
    return found


def relative_difference(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Return the norm of a difference between two lists of gradients over the norm of what was expected."""
    pairs = list(zip(found, expected, strict=True))
    assert all((one is None) == (other is None) for one, other in pairs)
    apart = sum(float((one - other).double().square().sum()) for one, other in pairs if one is not None and other is not None)
    return float((apart / sum(float(x.double().square().sum()) for x in expected if x is not None)) ** 0.5)


def memory(options: argparse.Namespace) -> list[Measurement]:
    """Measure what a process that trains needs at most, for some kinds."""
    lines: list[Measurement] = []
    for name in PEAKS:
        command = [sys.executable, "-m", "crislit.benchmark", "--peak", name]
        command += ["--model", options.model, "--image-size", str(options.image_size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = float(json.loads(done.stdout.splitlines()[-1])["peak"])
        lines.append(Measurement("memory", name, peak, "GB", ratio=lines[0].value / peak if lines else 1.0))
    return lines


def peak(name: str, model: CRIS, image_size: int, sentences: Sequence[str]) -> dict[str, Any]:
    """Take two steps of a kind, and return this process's largest resident memory in GB."""
    kind = KINDS[name]
    step = Step(kind, model.train(), build_optimizer(model, kind.plain), image_size, sentences)
    step.prepare()
    step.take()
    step.take()
    return {"peak": peak_memory()}
