"""The embedded sets can be read by other readers of the REFER format, and by this one as before."""

import json
import os
import pickle
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from crislit.data import shapes
from crislit.data.refer_index import ReferIndex
from crislit.data.shapes import SETS, write_shapes
from tests.data.test_refer_annotations import run_lengths

REFS = "refs(crislit).p"
SCENES = 12


@pytest.fixture(scope="module", params=SETS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an embedded set's annotations."""
    name: str = request.param
    scenes = dict.fromkeys(SETS[name].splits, SCENES)
    return write_shapes(tmp_path_factory.mktemp("data"), name, 0, scenes) / name


class OtherReader:
    """The parts of the REFER project's class that matter, written from its documentation."""

    def __init__(self, folder: Path) -> None:
        self.image_folder = folder.parent / "images/mscoco/images/train2014"
        self.refs = pickle.loads((folder / REFS).read_bytes())
        instances = json.loads((folder / "instances.json").read_text())
        self.images = {image["id"]: image for image in instances["images"]}
        self.annotations = {item["id"]: item for item in instances["annotations"]}

    def mask(self, ref: dict[str, Any]) -> np.ndarray:
        segmentation = self.annotations[ref["ann_id"]]["segmentation"]
        image = self.images[ref["image_id"]]
        if type(segmentation[0]) is list:
            encoded = coco_mask.frPyObjects(segmentation, image["height"], image["width"])
        else:
            encoded = segmentation
        mask: np.ndarray = np.sum(coco_mask.decode(encoded), axis=2).astype(np.uint8)
        return mask


def test_another_reader_finds_every_image_and_every_mask(written: Path) -> None:
    reader = OtherReader(written)
    index = ReferIndex.open(written.parent, written.name, REFS)
    kinds = set()
    for number, ref in enumerate(reader.refs):
        np.testing.assert_array_equal(reader.mask(ref) > 0, index.mask(number) > 0)
        path = reader.image_folder / reader.images[ref["image_id"]]["file_name"]
        assert path.read_bytes() == index.image_path(number).read_bytes()
        kinds.add(type(reader.annotations[ref["ann_id"]]["segmentation"][0]))
    assert kinds == {list, dict}, "polygons and run lengths occur"


def as_formerly(folder: Path) -> None:
    """Rewrite annotations as version 0.1 wrote them: one dictionary of uncompressed run lengths."""
    path = folder / "instances.json"
    instances = json.loads(path.read_text())
    for item in instances["annotations"]:
        if isinstance(item["segmentation"][0], dict):
            mask = coco_mask.decode(item["segmentation"][0])
            item["segmentation"] = {"counts": run_lengths(mask), "size": list(mask.shape)}
    path.write_text(json.dumps(instances))


def test_sets_written_by_an_earlier_version_are_the_same_data(
    written: Path, tmp_path: Path
) -> None:
    root = tmp_path / "former"
    shutil.copytree(written.parent, root, symlinks=True)
    shutil.rmtree(root / "images/mscoco")
    as_formerly(root / written.name)
    former = ReferIndex.open(root, written.name, REFS)
    index = ReferIndex.open(written.parent, written.name, REFS)
    for name, array in vars(index._arrays).items():
        np.testing.assert_array_equal(getattr(former._arrays, name), array, err_msg=name)
    assert former.digest == index.digest


def test_the_version_of_recorded_results_is_unchanged() -> None:
    assert shapes.VERSION == 1


def test_the_link_to_the_images_is_relative_and_takes_no_space(written: Path) -> None:
    link = written.parent / "images/mscoco/images/train2014"
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == (written.parent / "images/train2014").resolve()


def test_without_links_the_set_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    root = write_shapes(tmp_path, "shapes", 0, dict.fromkeys(SETS["shapes"].splits, 1))
    assert ReferIndex.open(root, "shapes", REFS).image_path(0).is_file()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_files_and_folders_have_the_users_mode(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        root = write_shapes(tmp_path, "shapes", 0, dict.fromkeys(SETS["shapes"].splits, 1))
        ReferIndex.open(root, "shapes", REFS)
    finally:
        os.umask(before)
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            assert stat.S_IMODE(path.stat().st_mode) == expected, path
