"""Trained networks on disk."""

from crislit.checkpoints.checkpoint import (
    KEY,
    Checkpoint,
    checkpoint_metadata,
    read_any,
    read_checkpoint,
    write_folder,
    write_released,
)
from crislit.checkpoints.clip_weights import (
    OPENAI,
    find_weights,
    fingerprint_source,
    identify_weights,
    load_clip_weights,
    unreachable,
)
from crislit.checkpoints.initial_weights import find_start, fingerprint_start, load_start
from crislit.checkpoints.paths import CONFIG, WEIGHTS, find_network
from crislit.checkpoints.released import load_released

__all__ = [
    "CONFIG",
    "KEY",
    "OPENAI",
    "WEIGHTS",
    "Checkpoint",
    "checkpoint_metadata",
    "find_network",
    "find_start",
    "find_weights",
    "fingerprint_source",
    "fingerprint_start",
    "identify_weights",
    "load_clip_weights",
    "load_released",
    "load_start",
    "read_any",
    "read_checkpoint",
    "unreachable",
    "write_folder",
    "write_released",
]
