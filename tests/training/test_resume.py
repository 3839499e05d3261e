"""A run killed at any moment continues, and ends exactly as if it had not been interrupted."""

import contextlib
import csv
import errno
import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch import Tensor

from crislit.checkpoints.checkpoint import KEY, checkpoint_metadata, read_checkpoint
from crislit.config import compose_config
from crislit.errors import DamagedFileError, InputError
from crislit.io.tensors import check_checksums
from crislit.models.config import CRISConfig
from crislit.training.checkpointing import LAST, NEXT, PREVIOUS, AtomicCheckpointIO, LastCheckpoint
from crislit.training.loggers import earlier_rows, earlier_wandb_run
from crislit.training.resume import find_checkpoint, latest_checkpoint
from crislit.training.task import CRISTask
from crislit.training.trainer import build_trainer
from tests.runs import command, environment, run

SMALL = (
    *("dataset=shapes", "image_size=64", "batch_size=8", "model.neck=[16,64,32]"),
    *("decoder.layers=1", "trainer=cpu"),
)
SHORT = (
    *SMALL,
    *("recipe.epochs=2", "callbacks.pictures=0", "threshold=0.15"),
    "dataset.evaluation_splits=[val]",
)


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def same_state(a: Path, b: Path) -> bool:
    """Whether the weights, optimizers and schedules of two checkpoints are bit-identical."""
    first, second = content(a), content(b)
    states = [c["optimizer_states"][0]["state"].values() for c in (first, second)]
    return (
        same_weights(a, b)
        and all(torch.equal(x[n], y[n]) for x, y in zip(*states, strict=True) for n in x)
        and str(first["lr_schedulers"]) == str(second["lr_schedulers"])
        and (first["global_step"], first["epoch"]) == (second["global_step"], second["epoch"])
    )


def same_weights(a: Path, b: Path) -> bool:
    first: dict[str, Tensor] = content(a)["state_dict"]
    second: dict[str, Tensor] = content(b)["state_dict"]
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# -- Exactness


ACCUMULATED = (
    *("batch_size_per_device=4", "workers=1", "trainer.check_val_every_n_epoch=2", "logger=none"),
)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        # The sixth and twelfth step end epochs, which are saved before a validation, and without
        # one only at the end of the run.
        pytest.param((), [3, 6, 9, 12], id="default"),
        pytest.param(ACCUMULATED, [3, 7, 10, 12], marks=pytest.mark.slow, id="accumulated"),
        pytest.param(("trainer.max_steps=12",), [3, 6, 9, 12], marks=pytest.mark.slow, id="steps"),
    ],
)
def test_a_run_ends_the_same_from_whichever_checkpoint_it_continues(
    options: tuple[str, ...],
    steps: list[int],
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = (*SHORT, f"data_root={small_shapes}", "checkpoint_every=3", "resume=auto", *options)
    folder, copies, whole = tmp_path / "run", tmp_path / "copies", tmp_path / "whole"
    save = LastCheckpoint.save

    def save_and_copy(self: LastCheckpoint, trainer: Any) -> None:
        save(self, trainer)
        copy = copies / f"{trainer.global_step}"
        if not copy.exists():
            shutil.copytree(folder, copy)

    monkeypatch.setattr(LastCheckpoint, "save", save_and_copy)
    expected = run(monkeypatch, folder, *overrides)
    monkeypatch.setattr(LastCheckpoint, "save", save)
    folder.rename(whole)
    assert sorted(int(path.name) for path in copies.iterdir()) == steps
    for step in steps:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(copies / str(step), folder)
        results = run(monkeypatch, folder, *overrides)
        checkpoints = folder / "checkpoints", whole / "checkpoints"
        assert same_state(*(path / LAST for path in checkpoints)), step
        assert same_weights(*(path / "best.ckpt" for path in checkpoints)), step
        assert results["splits"] == expected["splits"], step
        assert results["steps"] == expected["steps"]
        if "logger=none" not in options:
            assert metrics(folder) == metrics(whole), step


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        # Epochs have six steps.
        pytest.param(6, (), id="at the end of the first epoch"),
        pytest.param(8, (), id="within the second epoch"),
        pytest.param(2, ("+trainer.val_check_interval=2",), id="at a validation within the first"),
        pytest.param(8, ("+trainer.val_check_interval=2",), id="at a validation within the second"),
    ],
)
def test_a_run_whose_limit_of_steps_is_raised_ends_as_if_it_had_been_higher_from_the_start(
    stop: int,
    options: tuple[str, ...],
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = (*SHORT, f"data_root={small_shapes}", *options)
    run(monkeypatch, tmp_path / "whole", *overrides, "trainer.max_steps=11")
    run(monkeypatch, tmp_path / "first", *overrides, f"trainer.max_steps={stop}")
    last = tmp_path / "first/checkpoints" / LAST
    run(monkeypatch, tmp_path / "second", *overrides, "trainer.max_steps=11", f"resume={last}")
    ends = [tmp_path / name / "checkpoints" / LAST for name in ("second", "whole")]
    assert same_state(*ends)


def metrics(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv, without their empty columns."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: v for name, v in row.items() if v} for row in csv.DictReader(file)]


def test_a_finished_run_is_not_run_again(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = (*SHORT, f"data_root={small_shapes}", "resume=auto", "trainer.max_steps=1")
    results = run(monkeypatch, tmp_path / "run", *overrides)
    before = (tmp_path / "run/checkpoints" / LAST).stat().st_mtime_ns
    assert run(monkeypatch, tmp_path / "run", *overrides) == results
    assert "finished before" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoints" / LAST).stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", *overrides, "seed=7")
    assert "holds a run with other settings" in capsys.readouterr().err


def test_a_run_that_cannot_continue_ends_with_one_error(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = (*SHORT, f"data_root={small_shapes}", "trainer.max_steps=2")
    run(monkeypatch, tmp_path / "run", *overrides)
    (tmp_path / "run/results.json").unlink()

    def error(name: str, *options: str) -> str:
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path / name, *overrides, *options)
        return capsys.readouterr().err

    assert "belongs to a run with other settings" in error("run", "resume=auto", "seed=7")
    changing = "hydra.run.dir=outputs/${now:%H}"
    assert "add hydra.run.dir=FOLDER" in error("run", "resume=auto", changing)
    # Other settings are the user's choice if the checkpoint is named, but not another position.
    named = f"resume={tmp_path / 'run/checkpoints' / LAST}"
    message = error("other", named, "batch_size=4", "trainer.max_steps=4")
    assert "within an epoch of 6 batches, and here an epoch has 12" in message
    message = error("slower", named, "recipe.optimizer.learning_rate=1e-5")
    assert "recipe.optimizer.learning_rate=1e-05 must be 0.001, as in its own run" in message
    message = error("without cooldown", named, "recipe.optimizer.cooldown=0")
    assert "counts its schedule in steps, and recipe.optimizer.cooldown=0 in epochs" in message


@pytest.mark.parametrize("source", ["", "shapes-tiny", "model.safetensors"])
def test_a_network_without_its_optimizer_cannot_be_resumed(source: str, tmp_path: Path) -> None:
    path = str(tmp_path / source) if source != "shapes-tiny" else source
    message = f"resume={path} is not the checkpoint of a run, .* init_from={path}"
    with pytest.raises(InputError, match=message):
        find_checkpoint(path, tmp_path)


def test_the_folder_of_a_run_is_answered_with_its_last_checkpoint(folder: Path) -> None:
    last = folder / "checkpoints" / LAST
    write_checkpoint(last, 3)
    with pytest.raises(InputError, match=f"resume={folder} is the folder of a run: resume={last}"):
        find_checkpoint(str(folder), folder)


def test_the_time_of_a_run_includes_the_starts_that_it_continues_from(tmp_path: Path) -> None:
    first = LastCheckpoint(tmp_path, 1, time.perf_counter() - 100)
    second = LastCheckpoint(tmp_path, 1)
    assert second.seconds() < 1
    second.load_state_dict(first.state_dict())
    assert 100 <= second.seconds() < 101
    second.load_state_dict({"batches": 3})  # of version 0.1
    assert second.seconds() < 1


# -- Checkpoints are written completely or not at all


def write_checkpoint(path: Path, step: int, size: int = 1000) -> None:
    """Write a checkpoint of this many random weights."""
    config = {"image_size": 64, "threshold": 0.35}
    metadata = checkpoint_metadata(CRISConfig("RN50-quickgelu"), config, "random")
    state = {"model.weights": torch.randn(size)}
    saved = {"epoch": 0, "global_step": step, "state_dict": state, KEY: metadata}
    AtomicCheckpointIO().save_checkpoint(saved, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with a last checkpoint and the one before it."""
    for name, step in ((PREVIOUS, 1), (LAST, 2)):
        write_checkpoint(tmp_path / "checkpoints" / name, step)
    return tmp_path


def latest(folder: Path) -> Path:
    """Return the path of a run's latest intact checkpoint."""
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    return Path(checkpoint.source)


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "zeros"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    damage: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = folder / "checkpoints" / LAST
    assert latest(folder) == last
    data = last.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    damaged = {"truncated": data[:-9], "empty": b"", "zeros": bytes(len(data))}
    last.write_bytes((damaged | {"one bit": bytes(flipped)})[damage])
    for read in (read_checkpoint, check_checksums):
        with pytest.raises(DamagedFileError, match="damaged"):
            read(last)
    with caplog.at_level(logging.WARNING):
        assert latest(folder) == last.with_name(PREVIOUS)
    assert "is damaged" in caplog.text
    assert "using the checkpoint before it" in caplog.text
    last.with_name(PREVIOUS).write_bytes(b"")
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        latest_checkpoint(folder)


def test_a_checkpoint_is_read_without_the_weights_which_lightning_loads(folder: Path) -> None:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    assert (checkpoint.steps, checkpoint.weights) == (2, {})


def test_every_flipped_bit_of_the_weights_is_noticed(folder: Path) -> None:
    last = folder / "checkpoints" / LAST
    data = last.read_bytes()
    start = data.index(content(last)["state_dict"]["model.weights"].numpy().tobytes())
    for position in range(start, start + 4000, 97):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        last.write_bytes(flipped)
        with pytest.raises(DamagedFileError, match="damaged"):
            read_checkpoint(last)


def test_every_other_flipped_bit_is_noticed_or_harmless(folder: Path) -> None:
    last = folder / "checkpoints" / LAST
    data, saved = last.read_bytes(), read_checkpoint(last)
    weights = saved.weights["weights"].clone()
    start = data.index(weights.numpy().tobytes())
    harmless = 0
    for position in [*range(start), *range(start + 4000, len(data))]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        last.write_bytes(flipped)
        try:
            checkpoint = read_checkpoint(last)
        except DamagedFileError:
            continue
        harmless += 1  # a bit that the archive repeats, or of its padding
        assert checkpoint.steps == saved.steps
        assert torch.equal(checkpoint.weights["weights"], weights)
    assert harmless < len(data) - 4000


def test_a_checkpoint_that_the_disk_cannot_read_is_not_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile, "ZipFile", fail)
    with pytest.raises(InputError, match=rf"^cannot read .*{LAST}: Input/output error") as error:
        latest_checkpoint(folder)
    assert not isinstance(error.value, DamagedFileError)


def test_a_named_damaged_checkpoint_is_an_error_that_names_the_one_before_it(folder: Path) -> None:
    last = folder / "checkpoints" / LAST
    last.write_bytes(last.read_bytes()[:-9])
    message = r"it is damaged, or not a PyTorch checkpoint \(.*\)"
    with pytest.raises(InputError, match=rf"{message}; resume=.*{PREVIOUS} is the one before it"):
        find_checkpoint(str(last), folder)
    last.with_name(PREVIOUS).unlink()
    with pytest.raises(InputError, match=rf"{message}$"):
        find_checkpoint(str(last), folder)


def test_a_kill_between_two_renames_loses_nothing(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    write_checkpoint(checkpoints / NEXT, 3)
    assert latest(folder) == checkpoints / NEXT
    (checkpoints / LAST).replace(checkpoints / PREVIOUS)
    assert latest(folder) == checkpoints / NEXT
    assert latest_checkpoint(folder / "elsewhere") is None


def test_a_damaged_checkpoint_never_replaces_the_intact_one_before_it(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    (checkpoints / LAST).write_bytes(b"damaged")
    callback = LastCheckpoint(checkpoints, 1)
    for step, before in ((3, 1), (4, 3)):
        trainer: Any = SimpleNamespace(
            global_step=step,
            validating=False,
            loggers=[],
            is_global_zero=True,
            strategy=SimpleNamespace(barrier=lambda: None),
            save_checkpoint=partial(write_checkpoint, step=step),
        )
        callback.save(trainer)
        saved = [content(checkpoints / name)["global_step"] for name in (LAST, PREVIOUS)]
        assert saved == [step, before]


def test_files_that_a_killed_run_left_half_written_are_removed(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    for name in (f".{NEXT}.1234.part", f".{NEXT}.5.part", f".{LAST}.6.part", "best.ckpt"):
        (checkpoints / name).write_bytes(b"half")
    write_checkpoint(checkpoints / NEXT, 3)
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == [f".{LAST}.6.part", "best.ckpt", LAST, NEXT, PREVIOUS]
    assert read_checkpoint(checkpoints / NEXT).steps == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_failed_write_is_one_error_and_leaves_the_old_checkpoint(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = folder / "checkpoints" / LAST
    before = last.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    reason = "the disk is full" if number == errno.ENOSPC else "Permission denied"
    message = f"cannot write .*{reason}.* make room and continue with resume=auto"
    with pytest.raises(InputError, match=message):
        write_checkpoint(last, 3)
    assert last.read_bytes() == before
    assert sorted(path.name for path in last.parent.iterdir()) == [LAST, PREVIOUS]


class SmallDisk(io.FileIO):
    """A file on a disk that has room for 3,000 bytes."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 3000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_disk_that_fills_up_within_a_checkpoint_is_reported_as_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = folder / "checkpoints" / LAST
    before = last.read_bytes()
    monkeypatch.setattr(Path, "open", lambda path, mode: SmallDisk(path, mode))
    message = r"cannot write .*last.ckpt: the disk is full \(.*\)\. Files saved before are intact"
    with pytest.raises(InputError, match=message):
        write_checkpoint(last, 3, size=10_000)
    assert last.read_bytes() == before
    assert sorted(path.name for path in last.parent.iterdir()) == [LAST, PREVIOUS]


def test_rows_after_the_checkpoint_are_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text(
        "epoch,step,train/loss,val/mIoU\n0,9,0.5,\n0,9,,0.1\n1,19,0.4,\n1,19,,0.2\n2,29,0.3,\n2,3"
    )
    assert [row["step"] for row in earlier_rows(file, 20)] == ["9", "9", "19"]
    assert [row["step"] for row in earlier_rows(file, 25)] == ["9", "9", "19", "19"]
    assert earlier_rows(tmp_path / "none.csv", 5) == []
    assert earlier_wandb_run(tmp_path) is None
    for name in ("run-20260101_100000-abc", "offline-run-20260102_100000-xyz"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert earlier_wandb_run(tmp_path) == "xyz"


# -- Signals and kills


LONG = (
    *SHORT,
    *("recipe.epochs=20", "checkpoint_every=1000000", "resume=auto"),
    *("trainer.log_every_n_steps=1", "workers=1", "trainer.check_val_every_n_epoch=50"),
)
STEPS = 120


def train(
    folder: Path, data: Path, *options: str, variables: tuple[tuple[str, str], ...] = ()
) -> "subprocess.Popen[str]":
    """Start a training of ``STEPS`` steps in a process group of its own."""
    return subprocess.Popen(
        command("train", *LONG, f"data_root={data}", f"hydra.run.dir={folder}", *options),
        env=environment(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, two minutes at most."""
    deadline = time.time() + 120
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def step_of(checkpoint: Path) -> int:
    """Return a checkpoint's step, 0 if it does not exist."""
    with contextlib.suppress(FileNotFoundError):  # for a moment between two renames
        return int(content(checkpoint)["global_step"])
    return 0


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_an_evaluation_interrupted_by_a_signal_does_not_count_as_success(
    program: str,
    four_networks: list[Path],
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = CRISTask.test_step

    def interrupted_step(task: CRISTask, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(task, *arguments)

    monkeypatch.setattr(CRISTask, "test_step", interrupted_step)
    options: tuple[str, ...] = (f"checkpoint={four_networks[0]}", "eval_batch_size=4")
    if program == "train":
        options = (*SHORT, "trainer.max_steps=1")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "run", *options, f"data_root={small_shapes}", program=program)
    assert end.value.code == 128 + signal.SIGTERM
    message = "error: interrupted by SIGTERM before evaluation finished; start it again"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/results.json").exists()


def test_lightning_does_not_handle_slurms_signals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "cris")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    trainer = build_trainer(compose_config(["trainer=cpu"]), tmp_path, [], False)
    slurm = trainer._accelerator_connector.cluster_environment
    assert isinstance(slurm, SLURMEnvironment)
    assert not slurm.auto_requeue


@pytest.fixture(scope="module")
def undisturbed(small_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run that no signal reached."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    child = train(folder, small_shapes)
    _, errors = child.communicate(timeout=200)
    assert child.returncode == 0, errors
    return folder / "checkpoints" / LAST


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_ends_a_run_and_the_next_start_continues_it(
    name: str, undisturbed: Path, small_shapes: Path, tmp_path: Path
) -> None:
    child = train(tmp_path / "run", small_shapes)
    metrics = tmp_path / "run/metrics.csv"
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 8)
    # To the data worker, too, as terminals and clusters do.
    os.killpg(child.pid, getattr(signal, name))
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + getattr(signal, name)
    assert f"interrupted by {name} at step" in output + errors
    assert "Traceback" not in errors
    last = tmp_path / "run/checkpoints" / LAST
    assert 0 < content(last)["global_step"] < STEPS
    child = train(tmp_path / "run", small_shapes)
    _, errors = child.communicate(timeout=200)
    assert child.returncode == 0, errors
    assert content(last)["global_step"] == STEPS
    assert same_state(last, undisturbed)


@pytest.mark.slow
def test_several_processes_end_together_on_a_signal_and_continue(
    small_shapes: Path, tmp_path: Path
) -> None:
    metrics, steps = tmp_path / "run/metrics.csv", [0]

    def count_rows() -> int:
        return metrics.read_text().count("\n") if metrics.is_file() else 0

    def has_rows(count: int) -> bool:
        return count_rows() >= count

    for _ in range(2):
        count = count_rows() + 7
        child = train(tmp_path / "run", small_shapes, "trainer=ddp_cpu", "trainer.devices=2")
        wait_until(partial(has_rows, count))
        os.killpg(child.pid, signal.SIGTERM)
        output, errors = child.communicate(timeout=60)
        assert child.returncode == 128 + signal.SIGTERM
        assert "interrupted by SIGTERM at step" in output + errors
        assert "error:" not in errors
        continued = re.search(rf"continuing from .* at step {steps[-1]}\b", output + errors)
        assert bool(continued) == (len(steps) > 1)
        steps.append(step_of(tmp_path / "run/checkpoints" / LAST))
    assert 0 < steps[1] < steps[2] < STEPS


FULL_DISK = """
import io, os
from pathlib import Path

open_file, full = io.open, Path(os.environ["FULL_DISK"])

def open_on_full_disk(file, *arguments, **options):
    is_part = str(file).endswith(".part") and full.exists()
    return open_file("/dev/full" if is_part else file, *arguments, **options)

io.open = open_on_full_disk
"""
"""A ``sitecustomize.py``: while a file exists, every temporary file meets a full disk."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "trainer", [["trainer=cpu"], ["trainer=ddp_cpu", "trainer.devices=2"]], ids=["one", "two"]
)
def test_a_run_on_a_full_disk_ends_with_one_error_and_continues_later(
    trainer: list[str], small_shapes: Path, tmp_path: Path
) -> None:
    last, full = tmp_path / "run/checkpoints" / LAST, tmp_path / "full"
    (tmp_path / "sitecustomize.py").write_text(FULL_DISK)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    variables = (("PYTHONPATH", path), ("FULL_DISK", str(full)))
    options = (*trainer, "checkpoint_every=2")
    child = train(tmp_path / "run", small_shapes, *options, variables=variables)
    wait_until(last.is_file)
    full.touch()
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1, errors
    assert errors.count("error:") == 1
    message = r"error: cannot write .*next\.ckpt: the disk is full \(.*\)\. Files saved before are"
    assert re.search(message, errors)
    before = step_of(last)
    assert before > 0
    full.unlink()
    child = train(tmp_path / "run", small_shapes, *options)
    wait_until(lambda: step_of(last) > before + 2)
    os.killpg(child.pid, signal.SIGTERM)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert re.search(rf"continuing from .* at step {before}\b", output + errors)
    assert step_of(last) > before + 2


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "trials"), [(1, 2), (2, 1)])
def test_runs_killed_at_random_moments_end_with_the_same_weights(
    processes: int, trials: int, tmp_path: Path
) -> None:
    script, log = Path(__file__).parents[2] / "scripts/kill_and_resume.py", tmp_path / "log.csv"
    options = [f"--trials={trials}", f"--processes={processes}", f"--log={log}"]
    result = subprocess.run(
        [sys.executable, str(script), *options, f"--folder={tmp_path / 'runs'}", "recipe.epochs=4"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == trials
    assert all(row["same"] == "yes" for row in rows)
