"""The network that ships, shapes-tiny, is small, does what is recorded of it, and is at hand everywhere by its name."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import crislit
from crislit.checkpoints.checkpoint import CONFIG, read_checkpoint
from crislit.data import shapes
from crislit.data.dataset import ReferEvaluationSet
from crislit.data.refer_index import ReferIndex
from crislit.inference.onnx_export import export_onnx
from crislit.io.assets import ASSETS, EXAMPLES
from crislit.training.metrics import METRICS, intersection_and_union, iou

ROOT = Path(__file__).parents[2]
FOLDER = ASSETS / "shapes-tiny"


def test_it_is_small_and_loads_by_its_name() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 20e6
    assert crislit.load("shapes-tiny").image_size == read_checkpoint(Path("shapes-tiny")).image_size


def test_its_record_its_own_description_and_the_readme_agree() -> None:
    results = json.loads((FOLDER / CONFIG).read_text())["results"]
    with (ROOT / "results/shapes_tiny.csv").open() as file:
        rows = {row["split"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(results["splits"]) == ["val", "testA", "testB"]
    for split, row in rows.items():
        for metric in METRICS:
            assert float(row[metric]) == pytest.approx(results["splits"][split][metric], abs=5e-5)
        shown = [
            f"{100 * float(row[name]):.2f}" for name in ("mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90")
        ]
        assert (
            f"| shapes {split} | {row['samples']} | {' | '.join(shown)} |"
            in (ROOT / "README.md").read_text()
        )
    val = float(rows["val"]["mIoU"])
    assert val >= 0.65
    assert float(rows["val"]["blind"]) <= val / 2
    assert val <= float(rows["val"]["ceiling"])


def test_it_does_on_scenes_of_val_what_is_recorded(tmp_path: Path) -> None:
    scenes = {"train": 1, "val": 25, "testA": 1, "testB": 1}  # the first ones of the whole set's
    folder = shapes.write_shapes(tmp_path, "shapes", scenes=scenes)
    index = ReferIndex.open(folder, "shapes", "refs(crislit).p")
    segmenter = crislit.load("shapes-tiny")
    data = ReferEvaluationSet(
        index, index.split_refs("val").tolist(), image_size=segmenter.image_size, max_tokens=17
    )
    numbers = range(len(data))
    found = segmenter.batch([data.image(n) for n in numbers], [[data.sentence(n)] for n in numbers])
    reached = [iou(*intersection_and_union(found[n][0].mask, data.target(n))) for n in numbers]
    recorded = json.loads((FOLDER / CONFIG).read_text())["results"]["splits"]["val"]["mIoU"]
    assert sum(reached) / len(reached) == pytest.approx(recorded, abs=0.06)


@pytest.mark.slow
def test_onnx_runtime_computes_it_alike(tmp_path: Path) -> None:
    export_onnx(Path("shapes-tiny"), tmp_path / "onnx")
    ours, theirs = crislit.load("shapes-tiny"), crislit.load(tmp_path / "onnx", backend="onnx")
    for picture in EXAMPLES.glob("*.jpg"):
        sentences = picture.with_suffix(".txt").read_text().splitlines()
        for one, other in zip(ours(picture, sentences), theirs(picture, sentences), strict=True):
            np.testing.assert_allclose(one.probability, other.probability, atol=1e-4)
