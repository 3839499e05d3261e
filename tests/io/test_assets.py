"""Shipped files: shapes-tiny is small, loads by name, and reaches its recorded results."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

import crislit
from crislit.checkpoints.checkpoint import read_checkpoint
from crislit.checkpoints.paths import CONFIG
from crislit.data import shapes
from crislit.data.dataset import ReferEvaluationSet
from crislit.data.refer_index import ReferIndex
from crislit.inference.onnx_export import export_onnx
from crislit.io.assets import ASSETS, EXAMPLES
from crislit.training.metrics import METRICS, intersection_and_union, iou

ROOT = Path(__file__).parents[2]
FOLDER = ASSETS / "shapes-tiny"


def test_the_network_is_small_and_loads_by_name() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 20e6
    assert crislit.load("shapes-tiny").image_size == read_checkpoint(Path("shapes-tiny")).image_size


def test_recorded_results_agree_with_the_config_and_the_model_zoo() -> None:
    results = json.loads((FOLDER / CONFIG).read_text())["results"]
    zoo = (ROOT / "docs/model_zoo.md").read_text()
    with (ROOT / "results/shapes_tiny.csv").open() as file:
        rows = {row["split"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(results["splits"]) == ["val", "testA", "testB"]
    for split, row in rows.items():
        for metric in METRICS:
            assert float(row[metric]) == pytest.approx(results["splits"][split][metric], abs=5e-5)
    val = float(rows["val"]["mIoU"])
    assert re.search(rf"^\| `shapes-tiny` \|.*\| {100 * val:.2f} \|", zoo, re.MULTILINE)
    assert val >= 0.75
    assert float(rows["val"]["blind"]) <= val / 2
    assert val <= float(rows["val"]["ceiling"])


def test_the_model_zoo_states_the_recorded_memory() -> None:
    zoo = (ROOT / "docs/model_zoo.md").read_text()
    with (ROOT / "results/memory.csv").open() as file:
        rows = {row["network"]: float(row["gigabytes"]) for row in csv.DictReader(file)}
    shown = re.findall(
        r"^\| (?:`([\w-]+)`|(RN\d+), n = 3) \|.*\| ([\d.]+) GB \|$", zoo, re.MULTILINE
    )
    assert {tiny or large: float(memory) for tiny, large, memory in shown} == {
        network: round(memory, 1) for network, memory in rows.items()
    }


def test_the_network_reaches_its_recorded_iou_on_scenes_of_val(tmp_path: Path) -> None:
    scenes = {"train": 1, "val": 25, "testA": 1, "testB": 1}  # the first scenes of the full set
    folder = shapes.write_shapes(tmp_path, "shapes", scenes=scenes)
    index = ReferIndex.open(folder, "shapes", "refs(crislit).p")
    segmenter = crislit.load("shapes-tiny")
    data = ReferEvaluationSet(
        index, index.split_refs("val").tolist(), image_size=segmenter.image_size, max_tokens=17
    )
    samples = range(len(data))
    sentences = [[data.sentence(i)] for i in samples]
    results = segmenter.batch([data.image(i) for i in samples], sentences)
    masks = [result.mask for (result,) in results]
    ious = [iou(*intersection_and_union(masks[i], data.target(i))) for i in samples]
    recorded = json.loads((FOLDER / CONFIG).read_text())["results"]["splits"]["val"]["mIoU"]
    assert sum(ious) / len(ious) == pytest.approx(recorded, abs=0.06)


@pytest.mark.slow
def test_onnx_runtime_computes_the_same_probabilities(tmp_path: Path) -> None:
    export_onnx(Path("shapes-tiny"), tmp_path / "onnx")
    torch_network = crislit.load("shapes-tiny")
    onnx_network = crislit.load(tmp_path / "onnx", backend="onnx")
    for image in EXAMPLES.glob("*.jpg"):
        sentences = image.with_suffix(".txt").read_text().splitlines()
        pairs = zip(torch_network(image, sentences), onnx_network(image, sentences), strict=True)
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours.probability, theirs.probability, atol=1e-4)
