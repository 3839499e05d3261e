"""A run that was killed at any moment goes on as if nothing had happened."""

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

from crislit.config import compose_config
from crislit.errors import InputError
from crislit.io.tensors import find_corruption
from crislit.training.build import build_trainer
from crislit.training.checkpointing import LAST, NEXT, PREVIOUS, AtomicCheckpointIO, LastCheckpoint
from crislit.training.loggers import earlier_rows, earlier_wandb_run
from crislit.training.resume import find_resume, latest_checkpoint
from crislit.training.task import CRISTask
from tests.runs import command, environment, run

SMALL = (
    "dataset=shapes",
    "image_size=64",
    "batch_size=8",
    "model.neck=[16,64,32]",
    "decoder.layers=1",
    "trainer=cpu",
)
SHORT = (
    *SMALL,
    "recipe.epochs=2",
    "callbacks.pictures=0",
    "threshold=0.15",
    "dataset.evaluation_splits=[val]",
)


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def same_state(one: Path, other: Path) -> bool:
    """Whether weights, optimizer and schedule are bit for bit the same."""
    a, b = content(one), content(other)
    moments = zip(
        a["optimizer_states"][0]["state"].values(),
        b["optimizer_states"][0]["state"].values(),
        strict=True,
    )
    return (
        same_weights(one, other)
        and all(torch.equal(x[name], y[name]) for x, y in moments for name in x)
        and str(a["lr_schedulers"]) == str(b["lr_schedulers"])
        and (a["global_step"], a["epoch"]) == (b["global_step"], b["epoch"])
    )


def same_weights(one: Path, other: Path) -> bool:
    a: dict[str, Tensor] = content(one)["state_dict"]
    b: dict[str, Tensor] = content(other)["state_dict"]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- Exactness ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(
            (
                "batch_size_per_device=4",
                "workers=1",
                "trainer.check_val_every_n_epoch=2",
                "logger=none",
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "accumulated"],
)
def test_from_whatever_checkpoint_a_run_goes_on_it_ends_the_same(
    options: tuple[str, ...], small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (*SHORT, f"data_root={small_shapes}", "checkpoint_every=3", "resume=auto", *options)
    folder, kept = tmp_path / "run", tmp_path / "kept"
    save = LastCheckpoint.save

    def keep(self: LastCheckpoint, trainer: Any) -> None:
        save(self, trainer)
        place = kept / f"{trainer.global_step}"
        if not place.exists():
            shutil.copytree(folder, place)

    monkeypatch.setattr(LastCheckpoint, "save", keep)
    whole = run(monkeypatch, folder, *overrides)
    monkeypatch.setattr(LastCheckpoint, "save", save)
    folder.rename(tmp_path / "whole")
    # Of twelve; the sixth and twelfth end epochs, which are saved before a validation, and else not at all but at the end.
    steps = [3, 7, 10, 12] if options else [3, 6, 9, 12]
    assert sorted(int(path.name) for path in kept.iterdir()) == steps
    for step in steps:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept / str(step), folder)
        again = run(monkeypatch, folder, *overrides)
        assert same_state(folder / "checkpoints" / LAST, tmp_path / "whole/checkpoints" / LAST), (
            step
        )
        assert same_weights(
            folder / "checkpoints/best.ckpt", tmp_path / "whole/checkpoints/best.ckpt"
        ), step
        assert again["splits"] == whole["splits"], step
        assert again["steps"] == whole["steps"]
        if "logger=none" not in options:
            assert rows(folder) == rows(tmp_path / "whole"), step


def rows(folder: Path) -> list[dict[str, str]]:
    """What a run's metrics.csv says, without the columns that a row has not."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if value} for row in csv.DictReader(file)
        ]


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


def test_what_cannot_go_on_is_one_error(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = (*SHORT, f"data_root={small_shapes}", "trainer.max_steps=2")
    run(monkeypatch, tmp_path / "run", *overrides)
    last = tmp_path / "run/checkpoints" / LAST
    (tmp_path / "run/results.json").unlink()
    for options, expected in (
        (["resume=auto", "seed=7"], "is of a run with other settings"),
        (["resume=auto", "hydra.run.dir=outputs/${now:%H}"], "add hydra.run.dir=FOLDER"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path / "run", *overrides, *options)
        assert expected in capsys.readouterr().err
    with pytest.raises(
        SystemExit
    ):  # from a named checkpoint, other settings are the user's own affair, but not another place
        run(
            monkeypatch,
            tmp_path / "other",
            *overrides,
            f"resume={last}",
            "batch_size=4",
            "trainer.max_steps=4",
        )
    assert "from within an epoch of 6 batches, and here an epoch has 12" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(
            monkeypatch,
            tmp_path / "slower",
            *overrides,
            f"resume={last}",
            "recipe.optimizer.learning_rate=1e-5",
        )
    assert (
        "recipe.optimizer.learning_rate=1e-05 must be 0.001, as in its own run"
        in capsys.readouterr().err
    )


# -- Checkpoints, whole or not at all -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with a last checkpoint and the one before it."""
    writer = AtomicCheckpointIO()
    for name, step in ((PREVIOUS, 1), (LAST, 2)):
        writer.save_checkpoint(
            {"step": step, "weights": torch.randn(1000)}, tmp_path / "checkpoints" / name
        )
    return tmp_path


@pytest.mark.parametrize("harm", ["cut", "empty", "flipped", "zeros"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(
    harm: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = folder / "checkpoints" / LAST
    assert latest_checkpoint(folder) == last
    whole = bytearray(last.read_bytes())
    whole[len(whole) // 2] ^= 1
    last.write_bytes(
        {
            "cut": bytes(whole[:-9]),
            "empty": b"",
            "flipped": bytes(whole),
            "zeros": bytes(len(whole)),
        }[harm]
    )
    assert find_corruption(last)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(folder) == last.with_name(PREVIOUS)
    assert "is damaged" in caplog.text
    last.with_name(PREVIOUS).write_bytes(b"")
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        latest_checkpoint(folder)


def test_every_flipped_bit_of_the_weights_is_noticed(folder: Path) -> None:
    last = folder / "checkpoints" / LAST
    whole = last.read_bytes()
    start = whole.index(content(last)["weights"].numpy().tobytes())
    for place in range(start, start + 4000, 97):
        harmed = bytearray(whole)
        harmed[place] ^= 1 << place % 8
        last.write_bytes(harmed)
        assert find_corruption(last)


def test_whatever_byte_of_a_checkpoint_is_changed_it_is_told_or_harmless(folder: Path) -> None:
    last = folder / "checkpoints" / LAST
    whole, saved = last.read_bytes(), content(last)
    start = whole.index(saved["weights"].numpy().tobytes())
    harmless = 0
    for place in [
        *range(start),
        *range(start + 4000, len(whole)),
    ]:  # the weights' own bytes are the test's above
        harmed = bytearray(whole)
        harmed[place] ^= 1 << place % 8
        last.write_bytes(harmed)
        if find_corruption(last) is None:  # of what the archive says twice, or of what fills it up
            harmless += 1
            found = torch.load(last, weights_only=True)
            assert found["step"] == saved["step"]
            assert torch.equal(found["weights"], saved["weights"])
    assert harmless < len(whole) - 4000


def test_a_checkpoint_that_the_disk_does_not_give_out_is_not_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile, "ZipFile", fail)
    with pytest.raises(InputError, match=rf"^cannot read .*{LAST}: Input/output error"):
        latest_checkpoint(folder)


def test_a_kill_between_two_renames_loses_nothing(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    AtomicCheckpointIO().save_checkpoint({"step": 3}, checkpoints / NEXT)
    assert latest_checkpoint(folder) == checkpoints / NEXT
    (checkpoints / LAST).replace(checkpoints / PREVIOUS)
    assert latest_checkpoint(folder) == checkpoints / NEXT
    assert latest_checkpoint(folder / "elsewhere") is None


def test_a_damaged_checkpoint_never_takes_the_place_of_the_sound_one_before_it(
    folder: Path,
) -> None:
    checkpoints = folder / "checkpoints"
    (checkpoints / LAST).write_bytes(b"damaged")
    alone = SimpleNamespace(barrier=lambda: None)
    callback = LastCheckpoint(checkpoints, 1)
    for step, before in ((3, 1), (4, 3)):
        save = partial(AtomicCheckpointIO().save_checkpoint, {"step": step})
        trainer: Any = SimpleNamespace(
            global_step=step,
            validating=False,
            loggers=[],
            is_global_zero=True,
            strategy=alone,
            save_checkpoint=save,
        )
        callback.save(trainer)
        found = [
            torch.load(checkpoints / name, weights_only=True)["step"] for name in (LAST, PREVIOUS)
        ]
        assert found == [step, before]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_ends_with_one_error_and_leaves_what_was_there(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "checkpoints" / LAST).read_bytes()

    def fails(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    expected = "the disk is full" if number == errno.ENOSPC else "Permission denied"
    with pytest.raises(
        InputError, match=f"cannot write .*{expected}.* make room and go on with resume=auto"
    ):
        AtomicCheckpointIO().save_checkpoint({"step": 3}, folder / "checkpoints" / LAST)
    assert (folder / "checkpoints" / LAST).read_bytes() == before
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [LAST, PREVIOUS]


class SmallDisk(io.FileIO):
    """A file on a disk that has room for 3,000 bytes."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 3000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_disk_that_gets_full_within_a_checkpoint_is_told_as_such(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = folder / "checkpoints" / LAST
    before = last.read_bytes()
    monkeypatch.setattr(Path, "open", lambda path, mode: SmallDisk(path, mode))
    with pytest.raises(
        InputError,
        match=r"cannot write .*last.ckpt: the disk is full\. What was saved before stays",
    ):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.randn(10_000)}, last)
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


# -- Signals and kills --------------------------------------------------------------------------------------------------------


LONG = (
    *SHORT,
    "recipe.epochs=20",
    "checkpoint_every=1000000",
    "resume=auto",
    "trainer.log_every_n_steps=1",
    "workers=1",
)
STEPS = 120


def train(folder: Path, data: Path, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(
            "train",
            *LONG,
            "trainer.check_val_every_n_epoch=50",
            f"data_root={data}",
            f"hydra.run.dir={folder}",
            *more,
        ),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(moment: Callable[[], bool]) -> None:
    """Wait until something is so, two minutes at most."""
    deadline = time.time() + 120
    while not moment():
        assert time.time() < deadline
        time.sleep(0.05)


def step_of(checkpoint: Path) -> int:
    """Return a checkpoint's step, 0 while it is not there."""
    with contextlib.suppress(FileNotFoundError):  # for a moment between two renames
        return int(content(checkpoint)["global_step"])
    return 0


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_a_request_to_end_during_evaluation_is_no_success(
    program: str,
    four_networks: list[Path],
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = CRISTask.test_step

    def told_to_end(task: CRISTask, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(task, *arguments)

    monkeypatch.setattr(CRISTask, "test_step", told_to_end)
    own = (
        (*SHORT, "trainer.max_steps=1")
        if program == "train"
        else (f"checkpoint={four_networks[0]}", "eval_batch_size=4")
    )
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "run", *own, f"data_root={small_shapes}", program=program)
    assert end.value.code == 128 + signal.SIGTERM
    assert (
        "error: told to end by SIGTERM before it was done: start it again"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run/results.json").exists()


def test_slurms_signals_are_left_to_us(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "cris")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    trainer = build_trainer(compose_config(["trainer=cpu"]), tmp_path, [], False)
    slurm = trainer._accelerator_connector.cluster_environment
    assert isinstance(slurm, SLURMEnvironment)
    assert not slurm.auto_requeue


def test_only_a_file_can_be_gone_on_from(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run(
            monkeypatch, tmp_path / "run", *SHORT, f"data_root={small_shapes}", f"resume={tmp_path}"
        )
    assert (
        f"resume={tmp_path} is no file: a run keeps its checkpoints as" in capsys.readouterr().err
    )


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
def test_a_signal_saves_and_ends_and_the_next_start_goes_on(
    name: str, undisturbed: Path, small_shapes: Path, tmp_path: Path
) -> None:
    child = train(tmp_path / "run", small_shapes)
    metrics = tmp_path / "run/metrics.csv"
    wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") > 8)
    os.killpg(
        child.pid, getattr(signal, name)
    )  # to the data's worker too, as terminals and clusters do
    told, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + getattr(signal, name)
    assert f"told to end by {name} at step" in told + errors
    assert "Traceback" not in errors
    last = tmp_path / "run/checkpoints" / LAST
    assert 0 < content(last)["global_step"] < STEPS
    child = train(tmp_path / "run", small_shapes)
    _, errors = child.communicate(timeout=200)
    assert child.returncode == 0, errors
    assert content(last)["global_step"] == STEPS
    assert same_state(last, undisturbed)


@pytest.mark.slow
def test_several_processes_end_in_order_at_a_signal_and_go_on(
    small_shapes: Path, tmp_path: Path
) -> None:
    metrics, steps = tmp_path / "run/metrics.csv", [0]

    def rows() -> int:
        return metrics.read_text().count("\n") if metrics.is_file() else 0

    def has(wanted: int) -> bool:
        return rows() >= wanted

    for _ in range(2):
        wanted = rows() + 7
        child = train(tmp_path / "run", small_shapes, "trainer=ddp_cpu", "trainer.devices=2")
        wait_for(partial(has, wanted))
        os.killpg(child.pid, signal.SIGTERM)
        told, errors = child.communicate(timeout=60)
        assert child.returncode == 128 + signal.SIGTERM
        assert "told to end by SIGTERM at step" in told + errors
        assert "error:" not in errors
        assert bool(re.search(rf"going on from .* at step {steps[-1]}\b", told + errors)) == (
            len(steps) > 1
        )
        steps.append(step_of(tmp_path / "run/checkpoints" / LAST))
    assert 0 < steps[1] < steps[2] < STEPS


def fill(part: Path) -> bool:
    """Let the next checkpoint meet a full disk."""
    with contextlib.suppress(FileExistsError):  # one is being written
        part.symlink_to("/dev/full")
        return True
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "trainer", [["trainer=cpu"], ["trainer=ddp_cpu", "trainer.devices=2"]], ids=["one", "two"]
)
def test_a_run_whose_disk_gets_full_ends_with_one_error_and_goes_on_later(
    trainer: list[str], small_shapes: Path, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "run/checkpoints"
    child = train(tmp_path / "run", small_shapes, *trainer, "checkpoint_every=2")
    wait_for((checkpoints / LAST).is_file)
    wait_for(lambda: fill(checkpoints / f".{NEXT}.part"))
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1, errors
    assert errors.count("error:") == 1
    assert re.search(
        r"error: cannot write .*next\.ckpt: the disk is full\. What was saved before stays", errors
    )
    before = step_of(checkpoints / LAST)
    assert before > 0
    again = train(tmp_path / "run", small_shapes, *trainer, "checkpoint_every=2")
    wait_for(lambda: step_of(checkpoints / LAST) > before + 2)
    os.killpg(again.pid, signal.SIGTERM)
    told, errors = again.communicate(timeout=60)
    assert again.returncode == 128 + signal.SIGTERM
    assert re.search(rf"going on from .* at step {before}\b", told + errors)
    assert step_of(checkpoints / LAST) > before + 2


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "trials"), [(1, 2), (2, 1)])
def test_runs_killed_at_random_moments_end_with_the_same_weights(
    processes: int, trials: int, tmp_path: Path
) -> None:
    script = Path(__file__).parents[2] / "scripts/kill_and_resume.py"
    log = tmp_path / "log.csv"
    arguments = [
        "--trials",
        str(trials),
        "--processes",
        str(processes),
        "--folder",
        str(tmp_path / "runs"),
        "--log",
        str(log),
    ]
    done = subprocess.run(
        [sys.executable, str(script), *arguments, "recipe.epochs=4"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with log.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == trials
    assert all(trial["same"] == "yes" for trial in found)


def test_a_named_checkpoint_that_is_damaged_is_an_error_that_names_the_one_before_if_there_is_one(
    folder: Path,
) -> None:
    last = folder / "checkpoints" / LAST
    last.write_bytes(last.read_bytes()[:-9])
    with pytest.raises(
        InputError, match=rf"is damaged .*; resume=.*{PREVIOUS} is the one before it"
    ):
        find_resume({"resume": str(last)}, folder)
    last.with_name(PREVIOUS).unlink()
    with pytest.raises(InputError, match=r"is damaged \(.*\)$"):
        find_resume({"resume": str(last)}, folder)
