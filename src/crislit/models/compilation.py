"""Compiles networks for inference, and checks that this machine can, with ``torch.compile``."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from crislit.errors import InputError, first_line


def check_compiler(device: torch.device) -> None:
    """Compile a small function, to find out before any long work whether that works.

    Args:
        device: Where the network computes. CPUs need a C++ compiler, GPUs need Triton and
            a C compiler.

    Raises:
        InputError: If PyTorch cannot compile for the device.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except RuntimeError as error:  # of many classes, but nothing here can fail except the compiler
        on_cpu = device.type == "cpu"
        needed = "a C++ compiler (g++)" if on_cpu else "Triton and a C compiler (gcc)"
        raise InputError(
            f"compile=true needs {needed}, and cannot compile for {device}: {first_line(error)}. "
            "Install it, or leave compile out"
        ) from error


def compile_for_inference(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a network's method once for all numbers of images and sentences.

    Args:
        compute: The method; the first axis of its tensors counts images or sentences.

    Returns:
        The same function of the same arguments. Its first call compiles, which takes a minute or
        more. A single image or sentence is compiled separately.
    """

    # A function of its own: PyTorch limits how often one is compiled, and training compiles
    # CRIS.forward, too.
    @torch.compile
    def compiled(*inputs: Any) -> Any:
        return compute(*inputs)

    def compute_any(*inputs: Any) -> Any:
        for tensor in tree_leaves(inputs):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*inputs)

    return compute_any
