"""A network may be used in processes that are forked after it was loaded."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from tests.io.test_images import photo
from tests.runs import environment

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system has no forks"
)
PROGRAM = """
import json, multiprocessing, sys
torch.set_num_threads(int(sys.argv[1]))
torch.ones(500, 500) @ torch.ones(500, 500)
torch.ones(10**6).exp()
import crislit

when, network, image = sys.argv[2:]
segmenter = None if when == "child" else crislit.load(network)

def area(name):
    here = segmenter or crislit.load(network)
    return here(name, "red disc")[0].area

areas = [area(image)] if when == "used" else []
with multiprocessing.get_context("fork").Pool(2) as pool:
    areas += pool.map_async(area, [image] * 4).get(timeout=60)
areas.append(area(image))
print(json.dumps(areas))
"""


def areas(tmp_path: Path, threads: int, when: str, network: str = "shapes-tiny") -> list[int]:
    """Segment an image in forked processes and then in their parent; return the masks' areas."""
    PIL.Image.fromarray(photo(240, 320)).save(tmp_path / "photo.png")
    line = [sys.executable, "-c", PROGRAM, str(threads), when, network, str(tmp_path / "photo.png")]
    done = subprocess.run(
        line,
        env=environment([("OMP_NUM_THREADS", str(threads))]),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("when", ["loaded", "used", "child"])
def test_forked_processes_get_the_masks_of_their_parent(
    threads: int, when: str, tmp_path: Path
) -> None:
    found = areas(tmp_path, threads, when)
    assert len(found) == (6 if when == "used" else 5)
    assert len(set(found)) == 1
    assert found[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("when", ["loaded", "used"])
def test_forked_processes_run_an_exported_network(when: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    crislit_export = [sys.executable, "-m", "crislit.export", "shapes-tiny", str(tmp_path / "onnx")]
    subprocess.run(crislit_export, env=environment(), check=True, capture_output=True)
    found = areas(tmp_path, 2, when, str(tmp_path / "onnx"))
    assert len(set(found)) == 1
    assert found[0] > 0
