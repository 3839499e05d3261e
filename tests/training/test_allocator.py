"""Memory that is kept is not cleared again by the system."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from crislit.training.allocator import keep_freed_memory

for keep in (False, True):
    keep_freed_memory(keep)
    for _ in range(16):  # warm-up: glibc also keeps small blocks that separate large ones
        torch.ones(2**25)  # 128 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**25)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Prints the number of page faults without and with kept memory."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_tensors_reuse_memory_if_it_is_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    faults_returned, faults_kept = map(int, done.stdout.split())
    assert faults_returned > 100  # with huge pages; 4 x 32,768 with small ones
    assert faults_kept < 10
