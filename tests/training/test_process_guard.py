"""All processes of a run end together, shown with processes that do nothing else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

PROGRAM = """
import os, subprocess, sys, time
from pathlib import Path
from crislit.training import processes
from crislit.training.program import _exit_with_error
from crislit.errors import InputError
processes.start_watchdog()
if "LOCAL_RANK" not in os.environ:
    os.environ["LOCAL_RANK"] = "0"
    children = []
    for other in range(1, 4):
        environment = os.environ | {{"LOCAL_RANK": str(other)}}
        children.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    processes.watch_children(children)
rank = int(os.environ["LOCAL_RANK"])
os.write(1, f"{{rank}} {{os.getpid()}}\\n".encode())  # in one piece
def barrier(name):
    Path(name + str(rank)).touch()
    while not all(Path(name + str(other)).exists() for other in range(4)):
        time.sleep(0.05)
barrier("started")
{body}
"""
"""Starts three children of itself, waits for all of them, and runs ``body`` in all four."""


def start_program(folder: Path, body: str) -> "subprocess.Popen[str]":
    program = folder / "program.py"
    program.write_text(PROGRAM.format(body=body))
    return subprocess.Popen(
        [sys.executable, str(program)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_all(main_process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Wait for all processes, whose pipes close last; return exit code, output and errors."""
    output, errors = main_process.communicate(timeout=50)
    return main_process.returncode, output, errors


@pytest.mark.parametrize("killed", [0, 1, 3])
def test_if_one_of_four_processes_is_killed_the_others_end_and_one_reports_it(
    killed: int, tmp_path: Path
) -> None:
    main_process = start_program(tmp_path, "time.sleep(600)")
    assert main_process.stdout is not None
    ids = dict(main_process.stdout.readline().split() for _ in range(4))
    os.kill(int(ids[str(killed)]), signal.SIGKILL)
    code, _, errors = wait_for_all(main_process)
    assert code == (1 if killed else -signal.SIGKILL)
    child, main = f"process {killed} of 4,", "the main process of this run has ended"
    assert errors.startswith(f"error: {child if killed else main}")
    assert errors.count("\n") == 1


def test_a_process_that_fails_reports_the_reason_itself_and_ends_the_others(tmp_path: Path) -> None:
    program = start_program(tmp_path, "sys.exit('no' if rank == 2 else time.sleep(600))")
    code, _, errors = wait_for_all(program)
    assert (code, errors) == (1, "no\n")


@pytest.mark.parametrize(
    "body",
    [
        # The main process waits for its children, which end one after the other.
        "if rank == 0: [child.wait() for child in children]\ntime.sleep(0.3 * rank)",
        # Detached children outlive the main process.
        "processes.detach()\nbarrier('detached')\ntime.sleep(2.0 if rank else 0.0)",
    ],
    ids=["a child ends first", "the main process ends first"],
)
def test_a_process_that_succeeds_does_not_end_the_others(body: str, tmp_path: Path) -> None:
    code, output, errors = wait_for_all(start_program(tmp_path, f"{body}\nprint('done')"))
    assert (code, errors) == (0, "")
    assert output.count("done") == 4


@pytest.mark.parametrize(
    ("condition", "patience"), [("True", 30), ("rank == 0", 30), ("rank == 2", 1)]
)
def test_an_error_of_one_or_all_processes_is_reported_once(
    condition: str, patience: int, tmp_path: Path
) -> None:
    error = "_exit_with_error(InputError('this image is damaged'))"
    body = f"processes.PATIENCE = {patience}\nif {condition}: {error}\ntime.sleep(600)"
    code, _, errors = wait_for_all(start_program(tmp_path, body))
    assert (code, errors) == (1, "error: this image is damaged\n")


FORKS = """
import os
import torch.distributed
from crislit.training import processes
processes.start_watchdog()
pauses = []
processes.time.sleep = pauses.append
def fork():
    if os.fork() == 0:
        os._exit(0)
    os.wait()
fork()
print(pauses)
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
fork()
print(pauses)
"""


@pytest.mark.skipif(sys.version_info >= (3, 11, 10), reason="Python has fixed the cause")
def test_a_fork_waits_for_threads_of_collectives_if_there_are_several_processes() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FORKS], check=True, capture_output=True, text=True
    )
    assert result.stdout.split("\n")[:2] == ["[]", "[0.05]"]
