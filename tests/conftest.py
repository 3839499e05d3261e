"""Fixtures of all tests, and an environment in which nothing asks the network."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests at once, and threads that wait for each other, take twice as long

import pytest

from tests.runs import run

SHARED = Path(__file__).parents[1].parent / "shared"


def shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs the maintainers' folder {name} (../shared/{name}), which is not part of the project")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers computed with the released network."""
    return shared("golden")


@pytest.fixture(scope="session")
def minirefer() -> Path:
    """53 real photographs in the REFER layout."""
    return shared("minirefer")


@pytest.fixture(scope="session")
def small_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a `shapes` of 12 training scenes and 6 in each evaluation split."""
    from crislit.data import shapes

    root = tmp_path_factory.mktemp("data")
    small = shapes.write(root, "shapes", scenes={"train": 12, "val": 6, "testA": 6, "testB": 6})
    small.rename(root / f"shapes-v{shapes.VERSION}")
    return root


@pytest.fixture(scope="session")
def four_networks(small_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of baseline, without decoder, without contrastive, full: each after one step."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for row in ("baseline", "con", "dec1", "con_dec3"):
            folder = tmp_path_factory.mktemp("runs") / row
            short = [f"ablation={row}", f"data_root={small_shapes}", "batch_size=8", "image_size=64", "trainer.max_steps=1"]
            run(patch, folder, *short, "callbacks.pictures=0", "model.clip_weights=null")
            found.append(folder / "checkpoints/last.ckpt")
    return found
