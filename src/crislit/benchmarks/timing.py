"""Times alternatives in turn, counts what a computation costs at least, and measures memory."""

import gc
import inspect
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

Work = Callable[[], Any]
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: inspect.unwrap(sdpa_flop),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: inspect.unwrap(
        sdpa_backward_flop
    ),
}
"""Formulas for operations that PyTorch's own flop counter ignores."""


def interleave(
    candidates: Mapping[str, Work], rounds: int, prepare: Callable[[str], Any] | None = None
) -> dict[str, list[float]]:
    """Run all candidates in turn, once to warm up and then ``rounds`` times.

    Args:
        candidates: The work to time, by name.
        rounds: Number of timed runs per candidate.
        prepare: Called with a candidate's name before each of its runs; not timed.

    Returns:
        Seconds of each candidate's timed runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(1 + rounds):
        for name, work in candidates.items():
            if prepare is not None:
                prepare(name)
            gc.collect()
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def run_in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run a module's function in a freshly started Python, and return its result.

    Nothing of this process's memory is inherited, and the new process may start others.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def peak_memory() -> float:
    """Return this process's largest resident memory so far, in GB."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    # On Linux, ru_maxrss of a new process starts at its parent's; VmHWM starts at zero.
    status = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
    return kilobytes * 1024 / 1e9


@dataclass(frozen=True)
class Machine:
    """Rates that the hardware reaches with PyTorch's threads.

    Attributes:
        flops: Floating-point operations per second, in a product of large float32 matrices.
        bytes: Bytes read and written per second, in a copy too large for the caches.
    """

    flops: float
    bytes: float


def measure_machine(size: int = 2048, megabytes: int = 256, rounds: int = 7) -> Machine:
    """Measure both rates; the best of a few rounds counts."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    seconds = interleave({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds)
    return Machine(2 * size**3 / min(seconds["product"]), 2 * source.nbytes / min(seconds["copy"]))


@dataclass(frozen=True)
class Cost:
    """Arithmetic and memory traffic of a computation.

    Attributes:
        flops: Floating-point operations of its matrix products and convolutions; a multiplication
            with an addition counts as two.
        bytes: Bytes that its kernels read and write, each kernel on its own, without fusion.
    """

    flops: int
    bytes: int

    def floor(self, machine: Machine) -> float:
        """Return the seconds that the machine needs for the arithmetic alone."""
        return self.flops / machine.flops

    def moved(self, machine: Machine) -> float:
        """Return the seconds that the memory traffic would take without caches."""
        return self.bytes / machine.bytes


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, result))
            tensors = {id(x): x for x in leaves if isinstance(x, Tensor)}
            self.bytes += sum(x.numel() * x.element_size() for x in tensors.values())
        return result


def count_cost(work: Work, training: bool = False) -> Cost:
    """Count the cost of a computation by running it once, with gradients if it is training."""
    traffic = _Traffic()  # type: ignore[no-untyped-call]
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    # Inference mode would dispatch composite operations such as linear, not their kernels.
    with torch.inference_mode(False), torch.set_grad_enabled(training), counter, traffic:
        work()
    return Cost(counter.get_total_flops(), traffic.bytes)
