"""Fixtures shared by all tests, and an environment without network access."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
# With several test processes, more threads that wait for each other double the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from crislit.data import shapes
from tests.golden import weights
from tests.refer_data import write_refer_root
from tests.runs import run

SHARED = Path(__file__).parents[1].parent / "shared"
"""The maintainers' folder, which is not part of the project."""
REFER_ROOTS = ["generated"]
if (SHARED / "minirefer").is_dir():
    REFER_ROOTS.append("minirefer")


def shared(name: str) -> Path:
    """Return a path in the maintainers' folder; skip the test where the folder is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs ../shared/{name} of the maintainers, which is not part of the project")
    return path


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Remove the handlers of a command that ran in this process: its output is closed soon."""
    yield
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) in (logging.StreamHandler, logging.FileHandler):
            root.removeHandler(handler)
            handler.close()


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers computed with the released network, see its README."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that the golden numbers were computed with, under their released names."""
    folder = tmp_path_factory.mktemp("golden")
    return weights.write_checkpoint(folder / "tiny_a.checkpoint.safetensors")


@pytest.fixture(scope="session")
def generated_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A REFER root with drawn images."""
    return write_refer_root(tmp_path_factory.mktemp("refer") / "data")


@pytest.fixture(scope="session", params=REFER_ROOTS)
def refer_root(request: pytest.FixtureRequest) -> Path:
    """A REFER root: the generated one and, where present, the maintainers' 53 COCO images."""
    if request.param == "minirefer":
        return shared("minirefer")
    root: Path = request.getfixturevalue("generated_root")
    return root


@pytest.fixture(scope="session")
def small_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a `shapes` of 12 training scenes and 6 in each evaluation split."""
    root = tmp_path_factory.mktemp("data")
    scenes = {"train": 12, "val": 6, "testA": 6, "testB": 6}
    small = shapes.write_shapes(root, "shapes", scenes=scenes)
    small.rename(root / f"shapes-v{shapes.VERSION}")
    return root


@pytest.fixture(scope="session")
def four_networks(small_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of baseline, without decoder, without contrastive, full: each after one step."""
    checkpoints = []
    options = [
        f"data_root={small_shapes}",
        "batch_size=8",
        "image_size=64",
        "trainer.max_steps=1",
        "callbacks.pictures=0",
        "model.clip_weights=null",
    ]
    with pytest.MonkeyPatch.context() as patch:
        for row in ("baseline", "con", "dec1", "con_dec3"):
            folder = tmp_path_factory.mktemp("runs") / row
            run(patch, folder, f"ablation={row}", *options)
            checkpoints.append(folder / "checkpoints/last.ckpt")
    return checkpoints
