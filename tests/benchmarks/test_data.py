"""Benchmarks of data loading, and the data that they generate."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crislit.benchmarks import data
from crislit.benchmarks.timing import run_in_new_process
from crislit.data.dataset import read_image
from crislit.data.refer_index import ReferIndex


def test_generated_images_have_cocos_size(tmp_path: Path) -> None:
    index = ReferIndex.open(data.write_images(tmp_path, 3), "refcoco", "refs(unc).p")
    assert len(index) == 3
    for ref in range(3):
        assert read_image(index, ref).shape == (480, 640, 3)
        assert 1000 < index.mask(ref).sum() < 100_000
        assert len(index.sentence_rows(ref)) == 3


def test_a_generated_index_has_the_requested_sizes(tmp_path: Path) -> None:
    data.write_full_size(tmp_path, {"images": 20, "refs": 50, "sentences": 142, "annotations": 200})
    index = ReferIndex.open(tmp_path, "refcoco", "refs(unc).p")
    assert len({index.image_id(ref) for ref in range(len(index))}) == 20
    rows = [row for ref in range(len(index)) for row in index.sentence_rows(ref)]
    assert (len(index), rows) == (50, list(range(142)))
    assert len(json.loads((tmp_path / "refcoco/instances.json").read_text())["annotations"]) == 200
    assert index.mask(0).any()


def allocate() -> tuple[float, float]:
    """Allocate 100 MB; return by how much private memory grows, and the resident memory."""
    before = data.private_memory_mb()
    block = np.ones(100_000_000, np.uint8)
    return data.private_memory_mb() - before + 0 * block[0], data.resident_memory_mb()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_private_memory_grows_by_what_is_allocated() -> None:
    grown, resident = run_in_new_process(allocate)  # a new process has nothing to free meanwhile
    assert 95 < grown < 130
    assert resident > 100


def test_stages_are_compared_with_decoding_and_warping(tmp_path: Path) -> None:
    root = data.write_images(tmp_path, 5)
    threads = torch.get_num_threads()
    floor, sample, *stages = data.measure_stages(root, image_size=64, rounds=1)
    assert "floor" in floor.candidate
    assert sample.ratio == floor.value / sample.value
    expected = {"read", "decode", "warp", "mask", "choice and tokens", "made floats"}
    assert expected < {stage.candidate for stage in stages}
    assert torch.get_num_threads() == threads
