"""What the system does with memory that was freed."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt."""
LARGEST_THRESHOLD = 2**25
"""Bytes, 32 MB: from there on glibc takes a block from the system and gives it back at once."""


def keep_memory(keep: bool = True) -> None:
    """Keep memory that is freed for what comes next, as a program does well that needs as much at every step.

    Otherwise glibc gives large tensors back to the system, which clears their pages again when the next step asks for them:
    a training step of RN50 touches a million of them. Nothing is done where there is no glibc, as on macOS and Windows.

    Args:
        keep: False: what glibc does by itself in a program that has freed large blocks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS and musl have none, and Windows no such library
        return
    mallopt(M_MMAP_MAX, 0 if keep else 2**16)
    mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
    mallopt(M_TRIM_THRESHOLD, -1 if keep else 2 * LARGEST_THRESHOLD)
