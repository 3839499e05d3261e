"""Lets networks compute in forked processes, where the threads of the parent do not exist.

OpenMP and OpenCV keep a pool of threads from the first large operation on, and loading a network
is one. After a fork they would wait for ever for threads that only the parent has. With a single
thread they wait for none.

``import crislit`` imports this file, which imports nothing large, so that no fork is missed.
"""

import os
from typing import TYPE_CHECKING

from crislit.errors import require

if TYPE_CHECKING:
    import torch

_is_forked = False


def _remember_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_remember_fork)


def prepare_forked_process() -> None:
    """In a forked process, compute with a single thread from now on; elsewhere do nothing."""
    if _is_forked:
        import cv2
        import torch

        torch.set_num_threads(1)
        cv2.setNumThreads(0)  # 1 would first wait for the parent's threads to end


def check_process(creator: int, device: "torch.device", compiled: bool = False) -> None:
    """Raise an ``InputError`` if a network cannot be used in a fork of its process.

    Args:
        creator: The process that created the network.
        device: Where it computes.
        compiled: Whether it is compiled, and so has a fixed number of threads.
    """
    kind = "a compiled network" if compiled else f"a network on {device}"
    require(
        creator == os.getpid() or (device.type == "cpu" and not compiled),
        f"{kind} cannot be used in a forked process: start processes with "
        "multiprocessing.get_context('spawn'), and load the network in each of them",
    )
