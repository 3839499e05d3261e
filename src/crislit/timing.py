"""How fast this machine is, what a computation costs at least, and how alternatives are timed against each other."""

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Work = Callable[[], Any]


def interleave(
    candidates: Mapping[str, Work], rounds: int, prepare: Callable[[str], Any] | None = None
) -> dict[str, list[float]]:
    """Run all candidates in turn, once to warm up and then so many times; return each one's seconds.

    Args:
        candidates: What to time, by name.
        rounds: How often.
        prepare: What is done before a candidate is run, given its name, and not timed.
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


def peak_memory() -> float:
    """Return this process's largest resident memory so far, in GB."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    # Not Linux's ru_maxrss, in which a process starts with what its parent had.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e9


@dataclass(frozen=True)
class Machine:
    """What the hardware gives with PyTorch's threads.

    Attributes:
        flops: Floating-point operations a second, of a product of large float32 matrices.
        bytes: Bytes read and written a second, of a copy that no cache holds.
    """

    flops: float
    bytes: float


def measure_machine(size: int = 2048, megabytes: int = 256, rounds: int = 7) -> Machine:
    """Measure both, the best of a few rounds."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    seconds = interleave({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds)
    return Machine(2 * size**3 / min(seconds["product"]), 2 * source.nbytes / min(seconds["copy"]))


@dataclass(frozen=True)
class Cost:
    """What a computation takes.

    Attributes:
        flops: Floating-point operations of its matrix products and convolutions, two for a multiplication and an addition.
        bytes: What its kernels read and write, each on its own: what fusing them could save is included.
    """

    flops: int
    bytes: int

    def floor(self, machine: Machine) -> float:
        """Return the seconds below which the machine cannot do its arithmetic."""
        return self.flops / machine.flops

    def moved(self, machine: Machine) -> float:
        """Return the seconds that its reading and writing would take from memory; caches make them fewer."""
        return self.bytes / machine.bytes


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            touched = {id(x): x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
            self.bytes += sum(x.numel() * x.element_size() for x in touched.values())
        return result


def count_cost(work: Work, training: bool = False) -> Cost:
    """Count what a computation takes by running it once.

    Args:
        work: The computation.
        training: It needs gradients.
    """
    traffic = _Traffic()  # type: ignore[no-untyped-call]
    counting = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    # In inference mode linear layers and their like would come here whole, not as the kernels that they are.
    with torch.inference_mode(False), torch.set_grad_enabled(training), counting as flops, traffic:
        work()
    return Cost(flops.get_total_flops(), traffic.bytes)


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What PyTorch's own counter does not know."""


@dataclass(frozen=True)
class Measurement:
    """A line of the benchmark's tables.

    Attributes:
        part: Of the benchmark.
        candidate: What was measured.
        value: The median.
        unit: Of the value.
        ratio: How many times better than the part's plain one.
        floor: What arithmetic alone would take, in the same unit.
        moved: What memory traffic without caches and fusion would take.
        spread: Largest less smallest value, over the median.
        difference: From the plain one's result, relative.
        rounds: How many values the median is of.
    """

    part: str
    candidate: str
    value: float
    unit: str
    ratio: float | None = None
    floor: float | None = None
    moved: float | None = None
    spread: float | None = None
    difference: float | None = None
    rounds: int | None = None


def compare(
    part: str,
    seconds: Mapping[str, list[float]],
    each: Mapping[str, int],
    unit: str,
    costs: Mapping[str, tuple[float, float]] | None = None,
    differences: Mapping[str, float] | None = None,
) -> list[Measurement]:
    """Return a line a candidate; the first one is plain, to which the others' medians are compared.

    Args:
        part: Of the benchmark.
        seconds: Of every candidate's runs.
        each: How many things a run of it does.
        unit: Of one of them.
        costs: Seconds of a run by arithmetic and by memory traffic, where known.
        differences: From the plain one's result, where known.
    """
    found: list[Measurement] = []
    for name, values in seconds.items():
        value = statistics.median(values) / each[name]
        floor, moved = (cost / each[name] for cost in costs[name]) if costs and name in costs else (None, None)
        ratio = found[0].value / value if found else 1.0
        spread = (max(values) - min(values)) / statistics.median(values)
        difference = (differences or {}).get(name)
        found.append(Measurement(part, name, value, unit, ratio, floor, moved, spread, difference, len(values)))
    return found
