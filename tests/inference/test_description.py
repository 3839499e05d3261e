"""Descriptions of networks, and warnings of images that they were not trained for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crislit
from crislit.checkpoints.checkpoint import Checkpoint, read_checkpoint, write_released
from crislit.inference.description import (
    Description,
    describe_network,
    looks_like_photo,
    photo_warning,
)
from crislit.inference.segmenter import Segmenter
from crislit.io.assets import EXAMPLES
from crislit.io.images import open_image
from crislit.models.build import build_cris
from tests.conftest import shared
from tests.inference.test_segmenter import TINY
from tests.io.test_images import photo

REFER = {"name": "refcoco", "folder": "refcoco", "embedded": False}
CUSTOM = {"name": "custom", "file": "/home/me/own/data.jsonl"}


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(build_cris(TINY), image_size=64, device="cpu")


@pytest.mark.parametrize(
    ("config", "source", "expected"),
    [
        ({}, "cris.pth", "cris.pth, training data unknown; "),
        ({"dataset": REFER}, "/a/run/checkpoints/best.ckpt", "run/best.ckpt, trained on refcoco; "),
        ({"dataset": CUSTOM}, "net", "net, trained on custom data (data.jsonl); "),
    ],
)
def test_a_network_is_described_by_its_training(
    config: dict[str, Any], source: str, expected: str, segmenter: Segmenter
) -> None:
    about = Checkpoint(segmenter.model.config, {}, 64, 0.35, "random", config=config)  # type: ignore[union-attr]
    known = Segmenter(segmenter.model, image_size=64, device="cpu", about=about)
    text = str(describe_network(known, source))
    assert text.startswith(expected)
    assert text.endswith("million parameters, images of 64 pixels")


def test_the_shipped_network_is_known_to_know_drawn_shapes_only() -> None:
    segmenter = crislit.load("shapes-tiny", device="cpu")
    description = describe_network(segmenter, "shapes-tiny")
    assert description.images == "drawn"
    assert "trained on shapes (knows drawn shapes only)" in str(description)
    assert "a.jpg looks like a photo" in photo_warning(description, photo(240, 320), "a.jpg")
    assert photo_warning(replace(description, images="photos"), photo(240, 320), "a.jpg") == ""


def test_drawn_images_do_not_look_like_photos(small_shapes: Path) -> None:
    drawn = [*EXAMPLES.glob("*.jpg"), *small_shapes.rglob("*.jpg")]
    assert len(drawn) > 20
    assert not any(looks_like_photo(open_image(path)) for path in drawn)
    ramp = np.linspace(0, 255, 320).astype(np.uint8)
    gradient = np.repeat(np.tile(ramp, (240, 1))[..., None], 3, axis=2)
    assert not looks_like_photo(gradient)
    assert not looks_like_photo(np.full((8, 8, 3), 255, np.uint8))
    assert looks_like_photo(photo(240, 320))


def test_most_photos_look_like_photos() -> None:
    paths = sorted(shared("minirefer").rglob("*.jpg"))
    assert np.mean([looks_like_photo(open_image(path)) for path in paths]) > 0.8


def test_a_description_fits_a_line() -> None:
    description = Description("shapes-tiny", "shapes", "drawn", "5.5 million parameters", 192)
    assert len(str(description)) < 120


def test_a_segmenter_is_shown_as_one_line_with_its_network_and_device(
    segmenter: Segmenter, tmp_path: Path
) -> None:
    shown = repr(crislit.load("shapes-tiny", device="cpu", threshold=0.5))
    assert shown == (
        "Segmenter(shapes-tiny, trained on shapes (knows drawn shapes only); 5.5 million "
        "parameters, images of 192 pixels; cpu, float32, threshold 0.5)"
    )
    assert repr(segmenter) == (
        "Segmenter(training data unknown; 5.0 million parameters, images of 64 pixels; cpu, "
        "float32, threshold 0.35)"
    )
    segmenter.save_pretrained(tmp_path / "mine")
    assert repr(Segmenter.from_pretrained(tmp_path / "mine", device="cpu")).startswith(
        "Segmenter(mine, training data unknown; 5.0 million parameters"
    )
    released = tmp_path / "cris.pth"
    write_released(read_checkpoint(tmp_path / "mine"), released)
    assert repr(crislit.load(released, device="cpu")).startswith(
        "Segmenter(cris.pth, training data unknown; 5.0 million parameters, images of 416 pixels"
    )
