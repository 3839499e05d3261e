"""Kills trainings at random moments, lets them go on, and compares their weights with a run's that nobody disturbed.

python scripts/kill_and_resume.py --trials 20 --log results/kills.csv
python scripts/kill_and_resume.py --trials 8 --processes 2 --log results/kills_two_processes.csv

Every trial starts a training in a process group of its own, kills all of it (SIGKILL) at a moment of one of four kinds, after
as many checkpoints as the seed draws, and starts it again with resume=auto, until it ends. A line of the log is a trial: its
kind, when the kill came, from which checkpoint and step the run went on, and whether it ended with the undisturbed run's
weights, bit for bit.
"""

import argparse
import csv
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

import torch

from crislit.data import shapes
from crislit.training.checkpointing import LAST, NEXT
from crislit.training.provenance import commit, hardware

KINDS = ("any moment", "writing a checkpoint", "in a validation", "at an epoch's end")
SCENES = {"train": 12, "val": 6, "testA": 6, "testB": 6}
STEPS = 6
"""Of an epoch: four sentences a scene, eight a step."""
PAUSE, ONE_SAVE = 0.0005, 0.5
"""Seconds between two looks at a run, and about as many between two checkpoints."""
RUN = (
    "dataset=shapes",
    "image_size=64",
    "batch_size=8",
    "model.neck=[16,64,32]",
    "decoder.layers=1",
    "recipe.epochs=6",
)
RUN += (
    "checkpoint_every=2",
    "resume=auto",
    "callbacks.pictures=0",
    "eval_batch_size=2",
    "threshold=0.15",
    "workers=1",
)
COLUMNS = (
    "trial",
    "kind",
    "processes",
    "after checkpoints",
    "killed after seconds",
    "checkpoint",
    "went on at step",
    "of steps",
    "same",
    "seed",
    "commit",
    "hardware",
)


def main() -> int:
    """Run the trials; the exit code is 1 if a run ended otherwise than undisturbed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="further overrides of the training")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, help="that each training has")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--folder", type=Path, default=Path("kills"), help="where the runs go (default: kills)"
    )
    parser.add_argument("--log", type=Path, default=Path("kills.csv"))
    options = parser.parse_args()
    trainer = (
        ["trainer=cpu"]
        if options.processes == 1
        else ["trainer=ddp_cpu", f"trainer.devices={options.processes}"]
    )
    shutil.rmtree(options.folder, ignore_errors=True)
    data = shapes.write_shapes(options.folder / "data", "shapes", scenes=SCENES)
    data.rename(data.with_name(f"shapes-v{shapes.VERSION}"))
    overrides = [*RUN, *trainer, f"data_root={options.folder / 'data'}", *options.overrides]

    whole = options.folder / "undisturbed"
    start = time.monotonic()
    child = start_run(whole, overrides)
    saves = Saves(whole)
    while child.poll() is None:
        saves.look()
        time.sleep(PAUSE)
    wait(child, whole)
    steps = step_of(whole)
    print(
        f"undisturbed: {steps} steps, {saves.count} checkpoints, {time.monotonic() - start:.1f} s",
        flush=True,
    )

    rng = random.Random(options.seed)
    different = 0
    options.log.parent.mkdir(parents=True, exist_ok=True)
    with options.log.open("w", newline="") as file:
        log = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        log.writeheader()
        for trial in range(options.trials):
            folder = options.folder / f"trial{trial}"
            kind = KINDS[(trial + 3 * (options.processes - 1)) % len(KINDS)]
            killed = None
            while killed is None:  # a run that ended before its kill shows nothing
                shutil.rmtree(folder, ignore_errors=True)
                after = rng.randrange(saves.count * 3 // 4)  # the last epoch's end has no later one
                killed = kill(start_run(folder, overrides), folder, kind, after, rng)
            wait(start_run(folder, overrides), folder)
            went_on = re.findall(
                r"going on from .*/(\S+) at step (\d+)", (folder / "log.txt").read_text()
            )
            checkpoint, step = went_on[-1] if went_on else ("none", 0)
            same = equal(folder, whole)
            different += not same
            values = (
                trial,
                kind,
                options.processes,
                after,
                f"{killed:.2f}",
                checkpoint,
                step,
                steps,
                "yes" if same else "NO",
            )
            values += (options.seed, commit(), hardware())
            row = dict(zip(COLUMNS, values, strict=True))
            log.writerow(row)
            file.flush()
            print(row, flush=True)
            shutil.rmtree(folder)
    return int(different > 0)


def start_run(folder: Path, overrides: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Start a training, or let it go on, in a process group of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "crislit.train", *overrides, f"hydra.run.dir={folder}"]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def wait(child: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Let a training go on to its end."""
    if child.wait():
        raise SystemExit(f"error: the run failed: {(folder / 'log.txt').read_text()[-2000:]}")


def kill(
    child: "subprocess.Popen[bytes]", folder: Path, kind: str, after: int, rng: random.Random
) -> float | None:
    """Kill a training at the first occasion of a kind after so many checkpoints, with all its processes.

    Returns:
        After how many seconds, or None if the training ended before.
    """
    start = time.monotonic()
    checkpoints, saves = folder / "checkpoints", Saves(folder)
    told = None
    while child.poll() is None:
        new = saves.look()
        if saves.count >= after:
            if kind == "any moment":
                time.sleep(rng.uniform(0, ONE_SAVE))
                break
            if kind == "writing a checkpoint" and any(checkpoints.glob(".*.part")):
                break
            if kind == "in a validation" and new and step_of(folder) % STEPS == 0:
                time.sleep(
                    rng.uniform(0, 0.2)
                )  # an epoch's last checkpoint is written before its validation
                break
            if kind == "at an epoch's end":
                epochs = (folder / "log.txt").read_bytes().count(b"INFO] - epoch ")
                if told is not None and epochs > told:
                    break
                told = epochs
        time.sleep(PAUSE)
    seconds = time.monotonic() - start
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    if child.wait() == -signal.SIGKILL:
        return seconds
    wait(child, folder)
    return None


class Saves:
    """Counts the checkpoints that a run writes.

    Args:
        folder: The run's, whose count starts with what is written from now on.
    """

    def __init__(self, folder: Path) -> None:
        self.last, self.count, self._seen = folder / "checkpoints" / LAST, 0, 0

    def look(self) -> bool:
        """Return whether there is a new one."""
        try:
            now = self.last.stat().st_mtime_ns
        except FileNotFoundError:  # before the first, and for a moment between two renames
            return False
        new = now != self._seen
        self.count, self._seen = self.count + new, now
        return new


def step_of(folder: Path) -> int:
    """Return the step of a run's last checkpoint."""
    for name in (LAST, NEXT):
        try:
            return int(
                torch.load(folder / "checkpoints" / name, weights_only=True, mmap=True)[
                    "global_step"
                ]
            )
        except FileNotFoundError:
            continue  # between two renames
    return 0


def equal(folder: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, and with the same best ones, bit for bit."""
    for name in (LAST, "best.ckpt"):
        one, two = (
            torch.load(run / "checkpoints" / name, weights_only=True)["state_dict"]
            for run in (folder, other)
        )
        if one.keys() != two.keys() or not all(torch.equal(one[key], two[key]) for key in one):
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
