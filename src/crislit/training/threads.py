"""Chooses the number of threads of a run on a CPU."""

import os

import torch

from crislit.models import CRIS, count_parameters

SMALL = 20_000_000
"""Parameters below which one thread is as fast as several on an idle machine. On a busy machine the
threads of each operation wait for one another, and a run takes ten times as long."""


def choose_threads(model: CRIS, device: torch.device) -> None:
    """Compute small networks on a CPU with one thread, unless the user has set OMP_NUM_THREADS."""
    is_small = count_parameters(model) < SMALL
    if device.type == "cpu" and is_small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
