"""Fixtures of the tests of the network."""

import pytest
import torch

from crislit.models.cris import CRIS
from tests.models.networks import tiny, with_statistics


@pytest.fixture(scope="package")
def model() -> CRIS:
    """The tiny network in evaluation mode; tests must not change it."""
    return with_statistics(tiny())


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)
