"""Fixtures of all tests, and an environment in which nothing asks the network."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import pytest

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
