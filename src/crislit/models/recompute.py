"""Activation checkpointing: training in less memory, with a second forward pass."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Recomputable(nn.Module):
    """Base class of modules whose parts can be recomputed in the backward pass."""

    recompute = False
    """Whether training stores only the inputs of each part, and recomputes its activations."""

    def run(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Apply a part of this module.

        Recomputing repeats the same dropout masks, and does not update the statistics of BatchNorms
        a second time.
        """
        if not self.recompute or not torch.is_grad_enabled():
            return part(*inputs)
        if torch.compiler.is_compiling():  # a compiled graph updates the statistics once
            output: Tensor = checkpoint(part, *inputs, use_reentrant=False)
            return output
        output = checkpoint(
            part,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), frozen_statistics(self)),
        )
        return output

    def run_each(
        self, parts: Iterable[Callable[..., Tensor]], x: Tensor, *inputs: Tensor
    ) -> Tensor:
        """Apply parts one after the other, each to the output of the previous one.

        Args:
            parts: The parts.
            x: Input of the first part.
            inputs: Further inputs of every part.
        """
        for part in parts:
            x = self.run(part, x, *inputs)
        return x


def recompute_activations(model: nn.Module, enabled: bool = True) -> None:
    """Switch activation checkpointing on or off for a network.

    Args:
        model: The network, whose ``Recomputable`` modules are switched.
        enabled: Recompute activations in the backward pass, instead of storing them.
    """
    for module in model.modules():
        if isinstance(module, Recomputable):
            module.recompute = enabled


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Restore the running statistics of all BatchNorms on exit."""
    statistics = [
        (norm, name, buffer)
        for norm in module.modules()
        if isinstance(norm, _BatchNorm)
        for name, buffer in norm.named_buffers(recurse=False)
    ]
    for norm, name, buffer in statistics:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in statistics:
            setattr(norm, name, buffer)
