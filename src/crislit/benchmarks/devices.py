"""Devices that are measured: their names, precisions, memory, and what they cannot run."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch

from crislit.errors import InputError, first_line

Precision = Literal["float32", "TF32", "float16", "bfloat16"]
"""How products are computed: float32 is without TF32, the 16-bit types are by autocast."""
NO_TF32: tuple[Precision, ...] = ("float32", "float16", "bfloat16")
CPU = torch.device("cpu")
Result = TypeVar("Result")


def device_name(device: torch.device) -> str:
    """Return ``cpu``, an accelerator's model, or its type if PyTorch does not know its model."""
    if device.type == "cpu":
        return "cpu"
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(get_name(device)) if get_name else device.type


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished all work; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def precisions(device: torch.device) -> tuple[Precision, ...]:
    """Return the precisions that a device computes products in."""
    if device.type == "cpu":
        return ("float32",)
    return ("float32", "TF32", "float16", "bfloat16") if has_tf32(device) else NO_TF32


def has_tf32(device: torch.device) -> bool:
    """Return whether the device is a CUDA GPU with TensorFloat-32."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Compute float32 products and convolutions with or without TF32 within the context.

    PyTorch's defaults differ: convolutions use TF32, products do not.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = enabled
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of mixed precision; an empty one for float32 and TF32."""
    if precision in ("float32", "TF32"):
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


@contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute in a precision within the context."""
    with tf32(precision == "TF32"), autocast(precision, device):
        yield


def compile_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a forward pass as one graph; if the graph breaks, running it raises an error."""
    compiled: Callable[..., Any] = torch.compile(forward, fullgraph=True)
    return compiled


def forget_compiled() -> None:
    """Discard what was compiled.

    Otherwise PyTorch would compile for any shape from the second shape on, and stop compiling a
    function after a few networks.
    """
    torch.compiler.reset()


def attempt(name: str, work: Callable[[], Result], compiled: bool = False) -> Result | None:
    """Run work and return its result; report work that this machine cannot run.

    Args:
        name: The candidate's name.
        work: Runs it.
        compiled: Whether it is compiled. Errors of compilers and of what they make have many types.

    Returns:
        The result. None if the device has too little memory, if the precision is too small for the
        network, or if ``torch.compile`` fails, for example without a compiler for C++.
    """
    try:
        return work()
    except Exception as error:
        if isinstance(error, InputError):
            reason = str(error)
        elif "out of memory" in str(error):  # MPS raises no OutOfMemoryError
            reason = "out of memory"
        elif compiled:
            reason = f"torch.compile failed: {first_line(error)}"
        else:
            raise
    print(f"{name}: not run, {reason}", file=sys.stderr)
    return None


def release_memory(device: torch.device) -> None:
    """Return memory that is not used to the device, so that the next candidate may have all."""
    gc.collect()
    if empty_cache := getattr(torch.get_device_module(device), "empty_cache", None):
        empty_cache()


def measure_peak(work: Callable[[], Any], device: torch.device) -> float | None:
    """Run work; return the largest memory of all tensors meanwhile in GB.

    None where PyTorch does not record it, as on MPS.
    """
    module = torch.get_device_module(device)
    if not hasattr(module, "max_memory_allocated"):
        return None
    module.reset_peak_memory_stats(device)
    work()
    synchronize(device)
    return float(module.max_memory_allocated(device)) / 1e9
