"""Where one of a run's processes ends, the others do: shown by processes that do nothing else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")

PROGRAM = """
import os, subprocess, sys, time
from pathlib import Path
from crislit.training import processes
from crislit.training.program import _exit_with_error
from crislit.errors import InputError
processes.start_watchdog()
if "LOCAL_RANK" not in os.environ:
    os.environ["LOCAL_RANK"] = "0"
    started = [
        subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {{"LOCAL_RANK": str(rank)}}) for rank in range(1, 4)
    ]
    processes.watch_children(started)
rank = int(os.environ["LOCAL_RANK"])
print(rank, os.getpid(), flush=True)
def together(moment):
    Path(moment + str(rank)).touch()
    while not all(Path(moment + str(other)).exists() for other in range(4)):
        time.sleep(0.05)
together("begun")
{then}
"""


def start(folder: Path, then: str) -> "subprocess.Popen[str]":
    """Start a program that starts itself three times more."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(then=then))
    return subprocess.Popen(
        [sys.executable, str(program)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(first: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Wait until none of its processes is left, as their output ends only then; return exit code, output and errors."""
    told, errors = first.communicate(timeout=50)
    return first.returncode, told, errors


@pytest.mark.parametrize("killed", [0, 1, 3])
def test_where_one_of_four_processes_is_killed_the_others_end_and_one_says_so(
    killed: int, tmp_path: Path
) -> None:
    first = start(tmp_path, "time.sleep(600)")
    assert first.stdout is not None
    places = dict(first.stdout.readline().split() for _ in range(4))
    os.kill(int(places[str(killed)]), signal.SIGKILL)
    code, _, errors = end_of(first)
    assert code == (1 if killed else -signal.SIGKILL)
    expected = (
        f"error: process {killed} of 4,"
        if killed
        else "error: the first process of this run has ended"
    )
    assert errors.startswith(expected)
    assert errors.count("\n") == 1


def test_a_process_that_fails_by_itself_has_said_why_and_takes_the_others_along(
    tmp_path: Path,
) -> None:
    code, _, errors = end_of(start(tmp_path, "sys.exit('no' if rank == 2 else time.sleep(600))"))
    assert (code, errors) == (1, "no\n")


def test_a_process_that_ends_in_order_lets_the_others_go_on(tmp_path: Path) -> None:
    then = "if rank == 0: [process.wait() for process in started]\ntime.sleep(0.3 * rank)\nprint('done')"
    code, told, errors = end_of(start(tmp_path, then))
    assert (code, errors) == (0, "")
    assert told.count("done") == 4


def test_a_process_that_needs_the_first_no_more_may_outlive_it(tmp_path: Path) -> None:
    then = "processes.detach()\ntogether('alone')\ntime.sleep(2.0 if rank else 0.0)\nprint('done')"
    code, told, errors = end_of(start(tmp_path, then))
    assert (code, errors) == (0, "")
    assert told.count("done") == 4


@pytest.mark.parametrize(("fails", "patience"), [("True", 30), ("rank == 0", 30), ("rank == 2", 1)])
def test_an_error_of_all_processes_or_of_one_is_told_once(
    fails: str, patience: int, tmp_path: Path
) -> None:
    then = f"processes.PATIENCE = {patience}\nif {fails}: _exit_with_error(InputError('this image is damaged'))\ntime.sleep(600)"
    code, _, errors = end_of(start(tmp_path, then))
    assert (code, errors) == (1, "error: this image is damaged\n")
