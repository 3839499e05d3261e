"""Profiles a whole run: where the time of a step goes, and how often it reads the device.

    python scripts/profile_run.py > results/run_profile.md

Trains the smallest network on embedded data and evaluates it, on this machine's CPU in one thread.
Everything outside of the network takes on a GPU's host what it takes here. Two tables: milliseconds
of each of Lightning's calls (hooks of callbacks, moving a batch, the step itself), and how often
Python reads values of a tensor, for which it would wait for a GPU.
"""

import argparse
import contextlib
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import SimpleProfiler
from torch.profiler import ProfilerActivity, profile

from crislit.config import compose_config
from crislit.training import run as steps
from crislit.training.provenance import commit, hardware

READS = ("aten::_local_scalar_dense", "aten::nonzero")
"""Operations whose result Python needs."""
METHODS = ("tolist", "cpu")
"""Methods of tensors that read or copy values without such an operation."""
ADAM = "aten::_fused_adam_"
"""On a CPU, it reads the number of steps of each parameter; on a GPU it reads nothing."""
CALLS = 14
"""Number of Lightning's calls listed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the profile as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--data-root", help="folder of the data (default: a temporary one)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        training = build(Path(folder), options.data_root or f"{folder}/data", options.steps)
        trained, evaluated = profiled(training, steps.fit), profiled(training, steps.evaluate)
    header = (
        f"Measured by `python scripts/profile_run.py --steps {options.steps}` at {commit()} on "
        f"{hardware()}: model=tiny, 64 pixels, 4 sentences per step, one thread, one data worker."
    )
    print(f"# Profile of a run\n\n{textwrap.fill(header, 100)}")
    print_profile("Training, per step", *trained)
    print_profile("Evaluation, per batch", *evaluated)


def build(folder: Path, data_root: str, count: int) -> steps.Training:
    """Build a short training, timed by Lightning's profiler."""
    config = compose_config(
        [
            *(f"data_root={data_root}", "trainer=cpu", "image_size=64", "batch_size=4"),
            *("workers=1", "callbacks.pictures=0", "model.clip_weights=null", "logger=none"),
            *("dataset.sentences_per_image=1", f"trainer.max_steps={count}", "recipe.epochs=9"),
            *("dataset.max_images=600", "trainer.check_val_every_n_epoch=9"),
            "+trainer.limit_test_batches=20",
        ]
    )
    started = steps.start(config, folder / "run")
    assert isinstance(started, steps.Start)
    return steps.build(started)


class Reads(L.Callback):
    """Counts how often Python reads values of a tensor between a batch's start and its end.

    Attributes:
        counts: The number of reads by batch, counted from 1, of those that read any.
    """

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.batches = 0

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Start to count."""
        self.calls = 0
        self.methods = {name: getattr(torch.Tensor, name) for name in METHODS}
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, self.counted(method))
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.profiler.start()

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Stop, after all other callbacks."""
        self.profiler.stop()
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, method)
        self.batches += 1
        events: Any = self.profiler.events()  # type: ignore[no-untyped-call]
        reads = [event for event in events if event.name in READS]
        if count := self.calls + sum(ADAM not in callers(event) for event in reads):
            self.counts[self.batches] = count

    def counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method of tensors whose calls are counted."""

        def call(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return method(tensor, *arguments, **options)

        return call

    on_test_batch_start = on_train_batch_start  # type: ignore[assignment]
    on_test_batch_end = on_train_batch_end  # type: ignore[assignment]


def profiled(
    training: steps.Training, work: Callable[[steps.Training], Any]
) -> tuple[dict[str, float], Reads]:
    """Do some work; return the seconds of Lightning's calls, and the reads."""
    timer, reads = SimpleProfiler(), Reads()
    training.trainer.profiler = timer  # type: ignore[attr-defined]
    training.trainer.callbacks.append(reads)  # type: ignore[attr-defined]
    work(training)
    training.trainer.callbacks.remove(reads)  # type: ignore[attr-defined]
    seconds = {name: sum(values) for name, values in timer.recorded_durations.items()}
    # Neither counting, nor what contains it.
    outer = ("run_training_epoch", "[Callback]Reads.")
    return {name: x for name, x in seconds.items() if not name.startswith(outer)}, reads


def callers(event: Any) -> list[str]:
    """Return the operations that an operation is part of."""
    parent = event.cpu_parent
    return [] if parent is None else [parent.name, *callers(parent)]


def print_profile(title: str, seconds: Mapping[str, float], reads: Reads) -> None:
    """Print the table of a loop over batches, and its reads."""
    print(f"\n## {title} ({reads.batches})\n\n| call | ms |\n| --- | ---: |")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1])[:CALLS]:
        print(f"| {name} | {1000 * value / reads.batches:.2f} |")
    by_count: dict[int, list[str]] = {}
    for number, count in reads.counts.items():
        by_count.setdefault(count, []).append(str(number))
    every = [str(number) for number in range(1, reads.batches + 1)]
    found = [
        f"{count} in {'each' if numbers == every else 'number ' + ', '.join(numbers)}"
        for count, numbers in by_count.items()
    ]
    print(f"\nReads of a tensor's values by Python: {'; '.join(found) or 'none'}.")


if __name__ == "__main__":
    main()
