"""The benchmark's training step: plain against what can be switched on, in seconds, memory and gradients."""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crislit.data.tokenizer import tokenize
from crislit.losses import text_to_pixel_contrastive_loss
from crislit.models.cris import CRIS
from crislit.models.rearranged import rearrange
from crislit.models.recompute import recompute_activations
from crislit.plain import plain_logits
from crislit.timing import Measurement, compare, interleave

BATCH = 4
"""Sentences of a step."""


@dataclass(frozen=True)
class Kind:
    """How a step is computed.

    Attributes:
        plain: As the released program does it: contiguous, its optimizer a parameter at a time.
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
PEAKS = ("plain", "default", "recompute", "rearrange recompute")
"""Whose memory is measured, each in a process of its own."""


class Step:
    """A training step of one kind.

    Args:
        kind: How it is computed.
        model: The network, which steps of several kinds may train in turn.
        optimizer: Of its weights, in the layout that the kind has.
        image_size: Side of its input.
        sentences: What it is asked.
    """

    def __init__(
        self, kind: Kind, model: CRIS, optimizer: torch.optim.Optimizer, image_size: int, sentences: Sequence[str]
    ) -> None:
        self.kind, self.model, self.optimizer = kind, model, optimizer
        self.network = rearrange(model) if kind.rearranged else model
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(BATCH // kind.sentences, 3, image_size, image_size, generator=generator)
        self.masks = (torch.rand(BATCH, 1, image_size, image_size, generator=generator) > 0.9).float()
        self.tokens = tokenize(list(sentences[:BATCH]), model.max_words)

    def prepare(self) -> None:
        """Give the network the form that the step needs."""
        layout = torch.contiguous_format if self.kind.plain else torch.channels_last
        self.optimizer.zero_grad()
        self.model.to(memory_format=layout)
        recompute_activations(self.network, self.kind.recomputed)
        torch.manual_seed(0)  # of dropout

    def differentiate(self) -> None:
        """Compute the gradients of a batch."""
        if self.kind.plain:
            logits: Tensor = plain_logits(self.model, self.images, self.tokens)
        else:
            logits = self.network(self.images, self.tokens)
        torch.autograd.backward(text_to_pixel_contrastive_loss(logits, self.masks))

    def take(self) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        self.differentiate()
        self.optimizer.step()


def build_optimizer(model: CRIS, plain: bool) -> torch.optim.Optimizer:
    """Return Adam, as the released program has it or as ours."""
    return torch.optim.Adam(model.parameters(), lr=1e-6, fused=not plain)


def measure(model: CRIS, options: argparse.Namespace, sentences: Sequence[str]) -> list[Measurement]:
    """Time steps of all kinds in turn, and compare gradients."""
    model.train()
    optimizers = {plain: build_optimizer(model, plain) for plain in (True, False)}  # one for all takes less memory
    steps = {name: Step(kind, model, optimizers[kind.plain], options.image_size, sentences) for name, kind in KINDS.items()}
    difference = gradient_difference(steps["plain"], steps["rearrange recompute"])
    takes = {name: step.take for name, step in steps.items()}
    seconds = interleave(takes, max(1, options.rounds // 2), prepare=lambda name: steps[name].prepare())
    known = {"rearrange recompute": difference}
    return compare("training", seconds, dict.fromkeys(steps, BATCH), "s a sentence", differences=known)


def gradient_difference(one: Step, other: Step) -> float:
    """Return how far all gradients of two kinds of step are apart, relative to the first."""
    found = []
    for step in (one, other):
        step.prepare()
        step.differentiate()
        found.append({name: p.grad for name, p in step.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    apart = sum(float((found[1][name] - gradient).double().square().sum()) for name, gradient in found[0].items())
    return float((apart / sum(float(gradient.double().square().sum()) for gradient in found[0].values())) ** 0.5)


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
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
