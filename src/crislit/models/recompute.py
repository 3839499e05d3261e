"""Activation checkpointing: less memory in training, for a second forward pass in the backward one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Recomputable(nn.Module):
    """A box of the figure whose parts can be computed again in the backward pass, where memory is short."""

    recompute = False
    """Whether training keeps what enters each part, and nothing in between."""

    def run(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Compute a part of this box; dropout and BatchNorm's statistics are the same whether or not it is computed again."""
        if not self.recompute or not torch.is_grad_enabled():
            return part(*inputs)
        result: Tensor = checkpoint(
            part, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_statistics(self))
        )
        return result


def recompute_activations(model: nn.Module, wanted: bool = True) -> None:
    """From now on, train a network in less memory, or in as much as it takes."""
    for module in model.modules():
        if isinstance(module, Recomputable):
            module.recompute = wanted


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Let no BatchNorm count what it normalises: it has seen these samples before."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    kept = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, statistics in zip(norms, kept, strict=True):
        for name, value in statistics.items():
            setattr(norm, name, value.clone())  # it counts there
    try:
        yield
    finally:
        for norm, statistics in zip(norms, kept, strict=True):
            for name, value in statistics.items():
                setattr(norm, name, value)
