"""A network may be used in processes that are forked before or after it was used."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch

from crislit.errors import InputError
from crislit.inference.forks import check_process
from tests.io.test_images import photo
from tests.runs import environment

PROGRAM = """
import json, multiprocessing, sys
import torch
torch.set_num_threads(int(sys.argv[1]))
torch.ones(10**6).exp()  # starts the threads of OpenMP
import crislit

network, image = sys.argv[2:]
segmenter = None

def area(name):
    return (segmenter or crislit.load(network))(name, "red disc")[0].area

def fork():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map_async(area, [image] * 2).get(timeout=60)

areas = fork()  # each process loads the network
segmenter = crislit.load(network)
areas += fork()
areas.append(area(image))
areas += fork()
print(json.dumps(areas))
"""


def areas(network: str, threads: int, tmp_path: Path) -> list[int]:
    """Segment an image in forked processes and in their parent; return the areas of the masks."""
    PIL.Image.fromarray(photo(240, 320)).save(tmp_path / "photo.png")
    line = [sys.executable, "-c", PROGRAM, str(threads), network, str(tmp_path / "photo.png")]
    done = subprocess.run(
        line,
        env=environment([("OMP_NUM_THREADS", str(threads))]),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system has no forks"
)
@pytest.mark.parametrize("threads", [1, 2])
def test_forked_processes_get_the_masks_of_their_parent(threads: int, tmp_path: Path) -> None:
    found = areas("shapes-tiny", threads, tmp_path)
    assert len(found) == 7
    assert len(set(found)) == 1
    assert found[0] > 0


def test_a_gpu_cannot_be_used_in_a_forked_process() -> None:
    check_process(os.getpid(), torch.device("cuda"))
    check_process(os.getpid() + 1, torch.device("cpu"))
    with pytest.raises(InputError, match=r"cuda:1 cannot be used in a forked .*'spawn'"):
        check_process(os.getpid() + 1, torch.device("cuda:1"))


def test_a_compiled_network_cannot_be_used_in_a_forked_process() -> None:
    check_process(os.getpid(), torch.device("cpu"), compiled=True)
    with pytest.raises(InputError, match=r"a compiled network cannot be used .*'spawn'"):
        check_process(os.getpid() + 1, torch.device("cpu"), compiled=True)
