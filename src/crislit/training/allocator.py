"""Tunes glibc's malloc to keep freed memory instead of returning it to the system."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt."""
MAX_MMAP_THRESHOLD = 2**25
"""32 MB: by default, glibc maps larger blocks on their own and unmaps them when they are freed."""


def keep_freed_memory(keep: bool = True) -> None:
    """Keep freed memory for the next allocation.

    By default glibc returns large tensors to the system, which clears their pages again at the
    next step: a training step of RN50 touches a million of them. Without glibc (macOS, Windows,
    musl) nothing happens.

    Args:
        keep: False restores glibc's behavior after it has freed large blocks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0 if keep else 2**16)
    mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
    mallopt(M_TRIM_THRESHOLD, -1 if keep else 2 * MAX_MMAP_THRESHOLD)
