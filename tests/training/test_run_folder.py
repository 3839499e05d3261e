"""One process at a time writes to a folder, and a process that dies frees it."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crislit.errors import InputError
from crislit.training.run_folder import CONFIG_FOLDER, LOCK, find_owner, release_all, reserve

SETTING = "hydra.run.dir"
HOLDER = """
import os, sys, time
from pathlib import Path
from crislit.training.run_folder import reserve
reserve(Path(sys.argv[1]), "hydra.run.dir")
{body}
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _release() -> Iterator[None]:
    yield
    release_all()


def hold(folder: Path, body: str = "") -> "subprocess.Popen[str]":
    """Start a process that reserves a folder."""
    code = HOLDER.format(body=body)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def test_a_reserved_folder_is_refused_with_its_owner_until_it_is_released(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    first = reserve(folder, SETTING)
    assert find_owner(folder).startswith(f"process {os.getpid()} on ")  # type: ignore[union-attr]
    with pytest.raises(InputError) as error:
        reserve(folder, SETTING)
    message = str(error.value)
    assert message.startswith(f"{folder} is in use by process {os.getpid()} on ")
    assert " since 20" in message
    assert "choose another hydra.run.dir" in message
    first.release()
    assert find_owner(folder) is None
    assert list(folder.iterdir()) == [], "no lock file is left behind"
    reserve(folder, SETTING)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_killed_process_frees_its_folder_at_once(tmp_path: Path) -> None:
    process = hold(tmp_path / "run")
    with pytest.raises(InputError, match=f"in use by process {process.pid} on "):
        reserve(tmp_path / "run", SETTING)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "run" / LOCK).exists()
    assert find_owner(tmp_path / "run") is None
    reserve(tmp_path / "run", SETTING).release()
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_a_forked_data_worker_does_not_keep_the_folder(tmp_path: Path) -> None:
    body = "worker = os.fork()\nif worker == 0: time.sleep(30)\nprint(worker, flush=True)"
    code = HOLDER.format(body=body)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        reserve(tmp_path / "run", SETTING)
    finally:
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


def test_of_many_processes_that_start_at_once_exactly_one_gets_the_folder(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from crislit.errors import InputError
from crislit.training.run_folder import reserve
time.sleep(max(float(sys.argv[2]) - time.time(), 0))
try:
    reserve(Path(sys.argv[1]), "hydra.run.dir")
except InputError as error:
    print(error)
else:
    print("won")
    time.sleep(1.5)
"""
    start = str(time.time() + 1)
    arguments = [sys.executable, "-c", code, str(tmp_path / "new" / "run"), start]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate()[0] for process in processes]
    assert sum(output == "won\n" for output in outputs) == 1
    assert sum("is in use by process" in output for output in outputs) == 3


# -- Folders that are not left behind


def test_a_refused_command_leaves_no_folder_that_was_created_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "today" / "now"
    reserve(folder, SETTING)
    (folder / CONFIG_FOLDER).mkdir()
    (folder / CONFIG_FOLDER / "config.yaml").write_text("seed: 0")
    (folder / "train.log").write_text("a warning")
    (folder / "hparams.yaml").write_text("seed: 0")
    release_all(refused=True)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_sweep_leaves_no_folder_unless_a_job_has_trained(tmp_path: Path) -> None:
    for name, job in (("refused", ".hydra/config.yaml"), ("trained", "checkpoints/last.ckpt")):
        folder = tmp_path / name
        reserve(folder, "hydra.sweep.dir")
        (folder / "multirun.yaml").write_text("")
        (folder / "0" / job).parent.mkdir(parents=True)
        (folder / "0" / job).write_text("")
    release_all(refused=True)
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]


@pytest.mark.parametrize("name", ["results.json", "metrics.csv"])
def test_a_refused_command_keeps_folders_with_content_and_folders_that_existed(
    name: str, tmp_path: Path
) -> None:
    reserve(tmp_path / "new", SETTING)
    (tmp_path / "new" / name).write_text("")
    old = tmp_path / "old"
    (old / CONFIG_FOLDER).mkdir(parents=True)
    reserve(old, SETTING)
    release_all(refused=True)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    assert [path.name for path in old.iterdir()] == [CONFIG_FOLDER]


# -- Folders that cannot be written


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "run", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(InputError, match=r"^cannot write to .*: .*\. Choose another hydra"):
            reserve(folder, SETTING)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs Linux's /sys")
def test_a_folder_in_a_file_system_of_the_kernel_is_one_clear_error() -> None:
    with pytest.raises(InputError, match=r"cannot write to /sys/kernel/x: .*Choose another"):
        reserve(Path("/sys/kernel/x"), SETTING)


@pytest.mark.skipif(os.name != "posix", reason="replaces fcntl")
def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    reserve(tmp_path / "run", SETTING).release()
    assert "has no locks" in capsys.readouterr().err
