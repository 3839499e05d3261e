"""Checks the environment variables by which Slurm, torchrun and others start several processes."""

import os
import socket
from collections.abc import Mapping
from typing import Any

from crislit.errors import InputError, require, see
from crislit.training import processes

SLURM_RANKS = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
"""Environment variables by which Slurm numbers processes and nodes."""
COUNTS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES", "MASTER_PORT")
"""Environment variables that hold a positive number."""
RENDEZVOUS = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which the processes of a run find each other."""
NODE_LAUNCH = ("MASTER_ADDR", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Environment variables of other ways to start a run on several nodes."""
INTERACTIVE = ("bash", "interactive")
"""Names of Slurm's jobs in which Lightning starts the processes itself."""


def check_launch(trainer: Mapping[str, Any]) -> None:
    """Check how this process was started, before a run waits for processes that do not exist.

    Args:
        trainer: The group ``trainer`` of the configuration.

    Raises:
        InputError: If the environment is incomplete, or starts another number of processes than
            the trainer has.
    """
    if processes.is_child():
        return
    check_numbers()
    _check_complete()
    wanted = count_processes(trainer)
    started = started_processes()
    nodes = trainer.get("num_nodes", 1)
    require(
        nodes == 1 or started is not None or any(name in os.environ for name in NODE_LAUNCH),
        f"trainer.num_nodes={nodes} needs a process on every node: start with torchrun or srun, or "
        f"set MASTER_ADDR, MASTER_PORT and NODE_RANK on each node{see('hangs')}",
    )
    if started is not None and wanted is not None:
        check_size(wanted, trainer)
    is_first_node = os.environ.get("NODE_RANK", "0") == "0"
    if started is None and wanted != 1 and is_first_node and "MASTER_PORT" in os.environ:
        _check_port(int(os.environ["MASTER_PORT"]))


def check_numbers() -> None:
    """Check that every rank and size in the environment is a number.

    Raises:
        InputError: If one is not.
    """
    ranks = dict.fromkeys((*processes.RANKS, *SLURM_RANKS), 0)
    for name, least in {**ranks, **dict.fromkeys(COUNTS, 1)}.items():
        text = os.environ.get(name, str(least))
        require(
            text.isascii() and text.isdecimal() and int(text) >= least,
            f"the environment variable {name} must be a whole number, at least {least}, got "
            f"{text!r}: start with torchrun or srun, which set it, or unset {name}",
        )


def _check_complete() -> None:
    present = [name for name in ("RANK", "LOCAL_RANK") if name in os.environ]
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if is_slurm():
        lacking = [name for name in SLURM_RANKS if name not in os.environ]
        require(
            not lacking,
            f"Slurm has started this job (SLURM_NTASKS={os.environ['SLURM_NTASKS']}), but "
            f"the environment lacks {' and '.join(lacking)}: start the command with srun, or unset "
            f"SLURM_NTASKS{see('slurm')}",
        )
        tasks = os.environ["SLURM_NTASKS"]
        require(
            tasks == "1" or "SLURM_NTASKS_PER_NODE" in os.environ,
            f"Slurm was asked for --ntasks={tasks}, which does not set the tasks per node: "
            f"ask for --nodes and --ntasks-per-node instead{see('slurm')}",
        )
    elif present and missing:
        raise InputError(
            f"the environment sets {present[0]}, but lacks {' and '.join(missing)}: start with "
            f"torchrun, which sets all of them, or unset {present[0]}{see('hangs')}"
        )
    elif "WORLD_SIZE" in os.environ and not present and "NODE_RANK" not in os.environ:
        size = os.environ["WORLD_SIZE"]
        require(
            size == "1",
            f"the environment variable WORLD_SIZE={size} is set, but RANK is not: start with "
            f"torchrun, which sets both, or unset WORLD_SIZE{see('hangs')}",
        )


def is_slurm() -> bool:
    """Whether Lightning takes the processes of this run to be started by Slurm."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE


def started_processes() -> int | None:
    """Return the number of processes that Slurm or torchrun has started; None without them."""
    if processes.is_child():
        return None
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ["SLURM_NTASKS"]) if is_slurm() else None


def count_processes(trainer: Mapping[str, Any]) -> int | None:
    """Return the number of processes that a trainer asks for; None if the machine decides."""
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes", 1)
    if isinstance(devices, list):
        devices = len(devices)
    if devices == "auto" and trainer.get("accelerator") == "cpu":
        devices = 1
    if type(devices) is not int or type(nodes) is not int or devices < 0:
        return None
    return devices * nodes


def check_size(wanted: int, trainer: Mapping[str, Any]) -> None:
    """Check that as many processes were started as a run has.

    Raises:
        InputError: If not.
    """
    started = started_processes()
    if started in (None, wanted):
        return
    asked = f"trainer.devices={trainer.get('devices')}, trainer.num_nodes={trainer['num_nodes']}"
    if "RANK" in os.environ:
        raise InputError(
            f"torchrun has started {started} processes (WORLD_SIZE), but {asked} make {wanted}: "
            "set trainer.devices to its --nproc-per-node and trainer.num_nodes to its --nnodes"
            f"{see('hangs')}"
        )
    raise InputError(
        f"Slurm has started SLURM_NTASKS={started} tasks, but {asked} make {wanted}: "
        "set trainer.devices to Slurm's --ntasks-per-node and trainer.num_nodes to its --nodes, or "
        "request as many tasks; in an interactive allocation, unset SLURM_NTASKS"
        f"{see('slurm')}"
    )


def _check_port(port: int) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"the processes of this run cannot meet at MASTER_PORT={port}: {error}. Unset "
                f"MASTER_PORT, and a free port is chosen{see('master-port')}"
            ) from error
