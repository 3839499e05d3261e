"""Kills trainings at random moments, resumes them, and compares their weights with the expected.

    python scripts/kill_and_resume.py --trials 20 --log results/kills.csv
    python scripts/kill_and_resume.py --trials 8 --processes 2 --log results/kills_two_processes.csv

Every trial starts a training in its own process group and kills all of it (SIGKILL) at a moment of
one of four kinds, after a random number of checkpoints. It then starts the training again with
``resume=auto`` until it ends. The log has one row per trial: the kind, when the training was
killed, the checkpoint and step from which it continued, and whether its weights are bit for bit
those of an uninterrupted run.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from crislit.data import shapes
from crislit.io.files import write_csv
from crislit.training.checkpointing import LAST, NEXT
from crislit.training.provenance import commit, hardware

KINDS = ("any moment", "writing a checkpoint", "in a validation", "at an epoch's end")
SCENES = {"train": 12, "val": 6, "testA": 6, "testB": 6}
STEPS = 6
"""Steps per epoch: four sentences per scene, eight per step."""
PAUSE = 0.0005
"""Seconds between two looks at a run."""
CHECKPOINT_INTERVAL = 0.5
"""Approximate seconds between two checkpoints."""
OVERRIDES = (
    *("dataset=shapes", "image_size=64", "batch_size=8", "model.neck=[16,64,32]"),
    *("decoder.layers=1", "recipe.epochs=6", "checkpoint_every=2", "resume=auto"),
    *("callbacks.pictures=0", "eval_batch_size=2", "threshold=0.15", "workers=1"),
)
COLUMNS = (
    *("trial", "kind", "processes", "after checkpoints", "killed after seconds", "checkpoint"),
    *("went on at step", "of steps", "same", "seed", "commit", "hardware"),
)


def main() -> int:
    """Run the trials; return 1 if a run ended with other weights than the uninterrupted one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="more overrides of the training")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, help="processes per training")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("outputs/kills"),
        help="folder of the runs, removed first (default: outputs/kills)",
    )
    parser.add_argument("--log", type=Path, default=Path("outputs/kills.csv"))
    options = parser.parse_args()
    processes = options.processes
    trainer = ["trainer=ddp_cpu", f"trainer.devices={processes}"]
    if processes == 1:
        trainer = ["trainer=cpu"]
    shutil.rmtree(options.folder, ignore_errors=True)
    data = shapes.write_shapes(options.folder / "data", "shapes", scenes=SCENES)
    data.rename(data.with_name(f"shapes-v{shapes.VERSION}"))
    overrides = [*OVERRIDES, *trainer, f"data_root={options.folder / 'data'}", *options.overrides]

    uninterrupted = options.folder / "undisturbed"
    start = time.monotonic()
    child = start_run(uninterrupted, overrides)
    saves = CheckpointCounter(uninterrupted)
    while child.poll() is None:
        saves.update()
        time.sleep(PAUSE)
    wait(child, uninterrupted)
    steps, seconds = last_step(uninterrupted), time.monotonic() - start
    print(f"uninterrupted: {steps} steps, {saves.count} checkpoints, {seconds:.1f} s", flush=True)

    rng = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    for trial in range(options.trials):
        folder = options.folder / f"trial{trial}"
        kind = KINDS[(trial + 3 * (processes - 1)) % len(KINDS)]
        killed_after = None
        while killed_after is None:  # a run that ended before its kill is repeated
            shutil.rmtree(folder, ignore_errors=True)
            # The last epoch's end is not followed by a checkpoint.
            after = rng.randrange(saves.count * 3 // 4)
            killed_after = kill(start_run(folder, overrides), folder, kind, after, rng)
        wait(start_run(folder, overrides), folder)
        log = (folder / "log.txt").read_text()
        resumed = re.findall(r"continuing from .*/(\S+) at step (\d+)", log)
        checkpoint, step = resumed[-1] if resumed else ("none", 0)
        same = "yes" if have_equal_weights(folder, uninterrupted) else "NO"
        values = (trial, kind, processes, after, f"{killed_after:.2f}", checkpoint, step, steps)
        values += (same, options.seed, commit(), hardware())
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        write_csv(options.log, COLUMNS, rows)
        print(rows[-1], flush=True)
        shutil.rmtree(folder)
    return int(any(row["same"] == "NO" for row in rows))


def start_run(folder: Path, overrides: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Start or resume a training in its own process group."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "crislit.train", *overrides, f"hydra.run.dir={folder}"]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def wait(child: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Wait for the end of a training; exit with its log if it fails."""
    if child.wait():
        raise SystemExit(f"error: the run failed: {(folder / 'log.txt').read_text()[-2000:]}")


def kill(
    child: "subprocess.Popen[bytes]", folder: Path, kind: str, after: int, rng: random.Random
) -> float | None:
    """Kill a training with all its processes at the first moment of a kind.

    Args:
        child: The training.
        folder: Its folder.
        kind: One of ``KINDS``.
        after: Number of checkpoints to wait for.
        rng: Chooses the exact moment.

    Returns:
        Seconds until the kill, or None if the training ended before.
    """
    start = time.monotonic()
    saves = CheckpointCounter(folder)
    ended_epochs = None
    while child.poll() is None:
        is_new = saves.update()
        if saves.count >= after:
            if kind == "any moment":
                time.sleep(rng.uniform(0, CHECKPOINT_INTERVAL))
                break
            if kind == "writing a checkpoint" and any((folder / "checkpoints").glob(".*.part")):
                break
            if kind == "in a validation" and is_new and last_step(folder) % STEPS == 0:
                # An epoch's last checkpoint is written before its validation.
                time.sleep(rng.uniform(0, 0.2))
                break
            if kind == "at an epoch's end":
                epochs = (folder / "log.txt").read_bytes().count(b"/mIoU ")
                if ended_epochs is not None and epochs > ended_epochs:
                    break
                ended_epochs = epochs
        time.sleep(PAUSE)
    seconds = time.monotonic() - start
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    if child.wait() == -signal.SIGKILL:
        return seconds
    wait(child, folder)
    return None


class CheckpointCounter:
    """Counts the checkpoints that a run writes.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.last, self.count, self._time = folder / "checkpoints" / LAST, 0, 0

    def update(self) -> bool:
        """Look at the folder; return whether there is a new checkpoint."""
        try:
            modified = self.last.stat().st_mtime_ns
        except FileNotFoundError:  # before the first, and briefly between two renames
            return False
        is_new = modified != self._time
        self.count, self._time = self.count + is_new, modified
        return is_new


def last_step(folder: Path) -> int:
    """Return the step of a run's last checkpoint; 0 without one."""
    for name in (LAST, NEXT):
        try:
            path = folder / "checkpoints" / name
            return int(torch.load(path, weights_only=True, mmap=True)["global_step"])
        except FileNotFoundError:  # between two renames
            continue
    return 0


def have_equal_weights(folder: Path, other: Path) -> bool:
    """Whether the last and the best checkpoints of two runs have bitwise equal weights."""
    for name in (LAST, "best.ckpt"):
        first, second = (
            torch.load(run / "checkpoints" / name, weights_only=True)["state_dict"]
            for run in (folder, other)
        )
        if first.keys() != second.keys():
            return False
        if not all(torch.equal(first[key], second[key]) for key in first):
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
