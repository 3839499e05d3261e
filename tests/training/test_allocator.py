"""Memory that is kept is not cleared again."""

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
    for _ in range(16):  # until glibc has put aside the few small pieces that keep large ones apart
        torch.ones(2**25)  # 128 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**25)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no glibc")
def test_large_tensors_find_their_memory_again_where_it_is_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 100  # of huge pages, where the system has them; 4 x 32,768 of small ones
    assert kept < 10
