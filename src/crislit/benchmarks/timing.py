"""Times alternatives in turn, counts what a computation costs at least, and measures memory."""

import gc
import inspect
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from crislit.benchmarks.devices import CPU, Precision, device_name, precisions, synchronize, tf32

Work = Callable[[], Any]
FLOPS, BACKWARD_FLOPS = inspect.unwrap(sdpa_flop), inspect.unwrap(sdpa_backward_flop)
ATTENTION = {
    getattr(torch.ops.aten, name): formula
    for name, formula in {
        "_scaled_dot_product_flash_attention_for_cpu": FLOPS,
        "_scaled_dot_product_flash_attention_for_cpu_backward": BACKWARD_FLOPS,
        "_scaled_dot_product_fused_attention_overrideable": FLOPS,  # XPU
        "_scaled_dot_product_fused_attention_overrideable_backward": BACKWARD_FLOPS,
        "_scaled_dot_product_attention_math_for_mps": FLOPS,
    }.items()
}
"""Formulas for operations that PyTorch's own flop counter ignores."""
WARM_UPS = 3
"""Runs on an accelerator before the timed ones, which choose algorithms and raise its clock."""
ROUNDS_FACTOR = 10
"""Timed runs on an accelerator for each of those on a CPU, as they take milliseconds."""


def interleave(
    candidates: Mapping[str, Work],
    rounds: int,
    prepare: Callable[[str], Any] | None = None,
    device: torch.device = CPU,
) -> dict[str, list[float]]:
    """Run all candidates in turn, once to warm up and then ``rounds`` times.

    On an accelerator, ``WARM_UPS`` times to warm up and then ``ROUNDS_FACTOR * rounds`` times; a
    run lasts until the device has finished.

    Args:
        candidates: The work to time, by name.
        rounds: Number of timed runs per candidate.
        prepare: Called with a candidate's name before each of its runs; not timed.
        device: Where the candidates compute.

    Returns:
        Seconds of each candidate's timed runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    warm_ups, rounds = (1, rounds) if device.type == "cpu" else (WARM_UPS, ROUNDS_FACTOR * rounds)
    with small_heap() if device.type != "cpu" else nullcontext():
        for _ in range(warm_ups + rounds):
            for name, work in candidates.items():
                if prepare is not None:
                    prepare(name)
                gc.collect()
                synchronize(device)
                start = time.perf_counter()
                work()
                synchronize(device)
                seconds[name].append(time.perf_counter() - start)
    return {name: values[warm_ups:] for name, values in seconds.items()}


@contextmanager
def small_heap() -> Iterator[None]:
    """Hide existing objects from the garbage collector, which takes longer than a GPU's runs."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
    """Rates that a device reaches; a CPU with PyTorch's threads.

    Attributes:
        flops: Floating-point operations per second, in a product of large float32 matrices.
        bytes: Bytes read and written per second, in a copy too large for the caches.
        name: The device's name, ``cpu`` for a CPU.
        rates: As ``flops``, for the device's other precisions.
    """

    flops: float
    bytes: float
    name: str = "cpu"
    rates: Mapping[Precision, float] = field(default_factory=dict)

    def rate(self, precision: Precision) -> float:
        """Return the floating-point operations per second in a precision."""
        return self.flops if precision == "float32" else self.rates[precision]


def measure_machine(
    device: torch.device = CPU,
    size: int | None = None,
    megabytes: int | None = None,
    rounds: int = 7,
    measured: Sequence[Precision] | None = None,
) -> Machine:
    """Measure the rates of a device; the best of a few rounds counts.

    Args:
        device: The device.
        size: Rows and columns of the matrices; None for 2048 on a CPU and 8192 elsewhere.
        megabytes: Size of the copy in MiB; None for 256 on a CPU and 1024 elsewhere.
        rounds: See ``interleave``.
        measured: Precisions of the products; None for all of the device.
    """
    on_cpu = device.type == "cpu"
    size = size or (2048 if on_cpu else 8192)
    a, b = torch.randn(2, size, size, device=device)
    source = torch.ones((megabytes or (256 if on_cpu else 1024)) * 2**18, device=device)
    target = torch.empty_like(source)
    measured = measured or precisions(device)
    work: dict[str, Work] = {x: product(a, b, x) for x in measured}
    work["copy"] = lambda: target.copy_(source)
    best = {name: min(values) for name, values in interleave(work, rounds, device=device).items()}
    rates = {precision: 2 * size**3 / best[precision] for precision in measured}
    return Machine(
        rates.pop("float32"), 2 * source.nbytes / best["copy"], device_name(device), rates
    )


def product(a: Tensor, b: Tensor, precision: Precision) -> Work:
    """Return work that multiplies float32 matrices in a precision."""
    if precision in ("float16", "bfloat16"):
        a, b = a.to(getattr(torch, precision)), b.to(getattr(torch, precision))

    def multiply() -> Tensor:
        with tf32(precision == "TF32"):
            return a @ b

    return multiply


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

    def floor(self, machine: Machine, precision: Precision = "float32") -> float:
        """Return the seconds that the machine needs for the arithmetic alone."""
        return self.flops / machine.rate(precision)

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
