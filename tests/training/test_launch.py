"""Environments of torchrun and Slurm that cannot work are one clear line, before any work."""

import os
import socket
from typing import Any

import pytest

from crislit.errors import InputError
from crislit.training import processes
from crislit.training.launch import check_launch, started_processes

ONE: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "num_nodes": 1}
TWO: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "num_nodes": 1}
SLURM = {
    **{"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "myjob", "SLURM_PROCID": "0"},
    **{"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"},
}
TORCHRUN = {
    **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "GROUP_RANK": "0"},
    **{"MASTER_ADDR": "localhost", "MASTER_PORT": "29400"},
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what another run in this process has set."""
    for name in os.environ:
        if name.startswith(("SLURM_", "MASTER_", "CRISLIT_")) or "RANK" in name:
            monkeypatch.delenv(name)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


BROKEN: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "four tasks for one process": (
        SLURM | {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"},
        ONE,
        r"started SLURM_NTASKS=4 tasks.*make 1: set trainer.devices to Slurm's --ntasks-per-node",
    ),
    "tasks without tasks per node": (
        SLURM | {"SLURM_NTASKS": "2"},
        TWO,
        "asked for --ntasks=2.*--ntasks-per-node instead",
    ),
    "Slurm without srun": ({"SLURM_NTASKS": "2"}, TWO, "lacks SLURM_PROCID.*with srun"),
    "tasks that are not a number": ({"SLURM_NTASKS": "two"}, TWO, "SLURM_NTASKS must be .*'two'"),
    "a size without a rank": ({"WORLD_SIZE": "4"}, ONE, "WORLD_SIZE=4 is set, but RANK is not"),
    "a rank without a size": ({"RANK": "0"}, ONE, "sets RANK, but lacks WORLD_SIZE and MASTER"),
    "a rank that is not a number": ({"RANK": "first"}, ONE, "RANK must be a whole number.*'first'"),
    "a negative rank": ({"LOCAL_RANK": "-1"}, ONE, "LOCAL_RANK must be a whole number"),
    "a local rank set by hand": ({"LOCAL_RANK": "0"}, TWO, "sets LOCAL_RANK, but lacks WORLD_SIZE"),
    "a port that is not a number": ({"MASTER_PORT": "http"}, TWO, "MASTER_PORT must be a whole"),
    "two nodes without a launcher": (
        {},
        TWO | {"num_nodes": 2},
        "num_nodes=2 needs a process on every node: start with torchrun or srun",
    ),
    "torchrun with another size": (TORCHRUN, ONE, "torchrun has started 2 processes.*make 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_environment_that_cannot_work_is_refused(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, trainer, message = BROKEN[case]
    set_all(monkeypatch, variables)
    with pytest.raises(InputError, match=message):
        check_launch(trainer)


@pytest.mark.parametrize(
    ("variables", "trainer", "started"),
    [
        ({}, TWO, None),
        (TORCHRUN, TWO, 2),
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, TWO, 2),
        (SLURM | {"SLURM_NTASKS": "1"}, ONE, 1),
        # In an interactive allocation, Lightning starts the processes.
        (SLURM | {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, TWO, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ONE, 1),
        ({"NODE_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}, TWO, None),
        (TORCHRUN, {"accelerator": "gpu", "devices": "auto", "num_nodes": 1}, 2),
        (TORCHRUN, {"accelerator": "gpu", "devices": [0, 1], "num_nodes": 1}, 2),
    ],
)
def test_environments_that_work_are_accepted(
    variables: dict[str, str],
    trainer: dict[str, Any],
    started: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_all(monkeypatch, variables)
    check_launch(trainer)
    assert started_processes() == started


def test_a_port_in_use_is_refused_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        check_launch(ONE)
        with pytest.raises(InputError, match=r"cannot meet at MASTER_PORT=.*Unset MASTER_PORT"):
            check_launch(TWO)


def test_children_of_a_run_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"LOCAL_RANK": "1", processes.MAIN_PROCESS: str(os.getppid())})
    check_launch(TWO)


@pytest.mark.parametrize(
    ("variables", "is_main"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0", "SLURM_PROCID": "0"}, True),
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "4"}, False),
    ],
)
def test_only_the_first_process_on_the_first_node_is_the_main_one(
    variables: dict[str, str], is_main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, variables)
    assert processes.is_main_process() == is_main
