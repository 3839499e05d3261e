"""ReferIndex: opens sets in the REFER layout, and explains missing files."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from crislit.data.refer_index import ReferIndex
from crislit.errors import InputError
from tests.data.test_refer_annotations import index_of
from tests.io.test_pickles import open_set
from tests.refer_data import (
    IMAGE_FOLDER,
    SETS,
    SQUARE,
    count_refs,
    decode,
    one_ref,
    read_instances,
    read_refs,
    write_set,
)

# -- Complete sets, against their files read by other code


@pytest.mark.parametrize(("folder", "refs_file"), SETS)
def test_every_mask_is_the_union_that_pycocotools_draws(
    refer_root: Path, folder: str, refs_file: str
) -> None:
    annotations, images = read_instances(refer_root, folder)
    index = ReferIndex.open(refer_root, folder, refs_file)
    for number, ref in enumerate(read_refs(refer_root, folder, refs_file)):
        image = images[ref["image_id"]]
        segmentation = annotations[ref["ann_id"]]["segmentation"]
        mask = index.mask(number)
        assert mask.dtype == np.uint8
        expected = decode(segmentation, image["height"], image["width"])
        np.testing.assert_array_equal(mask, expected, err_msg=f"ref {ref['ref_id']}")
        assert mask.any()


@pytest.mark.parametrize(("folder", "refs_file"), SETS)
def test_sentences_ids_and_images_are_joined_as_in_the_files(
    refer_root: Path, folder: str, refs_file: str
) -> None:
    _, images = read_instances(refer_root, folder)
    refs = read_refs(refer_root, folder, refs_file)
    index = ReferIndex.open(refer_root, folder, refs_file)
    assert len(index) == len(refs)
    for number, ref in enumerate(refs):
        image = images[ref["image_id"]]
        assert index.ref_id(number) == ref["ref_id"]
        assert index.image_id(number) == ref["image_id"]
        assert index.image_size(number) == (image["height"], image["width"])
        assert index.image_path(number).name == image["file_name"]
        rows = index.sentence_rows(number)
        sentences = [(s["sent"], s["sent_id"]) for s in ref["sentences"]]
        assert [(index.sentence(row), index.sentence_id(row)) for row in rows] == sentences
    image_ids = [ref["image_id"] for ref in refs[::2]]
    assert index.image_ids(np.arange(0, len(refs), 2)).tolist() == image_ids


@pytest.mark.parametrize(("folder", "refs_file"), SETS)
def test_every_ref_is_in_its_own_split_only(refer_root: Path, folder: str, refs_file: str) -> None:
    refs = read_refs(refer_root, folder, refs_file)
    index = ReferIndex.open(refer_root, folder, refs_file)
    assert set(index.splits) == {ref["split"] for ref in refs}
    for split in index.splits:
        expected = [number for number, ref in enumerate(refs) if ref["split"] == split]
        assert index.split_refs(split).tolist() == expected


COUNTS = {  # refs and sentences of SETS
    "generated": [(97, 241), (72, 96), (44, 44), (18, 18)],
    "minirefer": [(136, 337), (95, 193), (43, 44), (18, 18)],  # from its PROVENANCE.md
}


def test_the_counts_of_refs_and_sentences_are_the_recorded_ones(refer_root: Path) -> None:
    counts = []
    for folder, refs_file in SETS:
        index = ReferIndex.open(refer_root, folder, refs_file)
        refs = range(len(index))
        counts.append((len(index), sum(len(index.sentence_rows(ref)) for ref in refs)))
    name = "minirefer" if refer_root.name == "minirefer" else "generated"
    assert counts == COUNTS[name]


def test_generated_sets_have_all_that_the_real_ones_have(generated_root: Path) -> None:
    annotations, images = read_instances(generated_root, "refcoco")
    segmentations = [annotation["segmentation"] for annotation in annotations.values()]
    polygons = [parts for parts in segmentations if isinstance(parts, list)]
    crowds = [annotation for annotation in annotations.values() if annotation["iscrowd"]]
    assert len(crowds) == len(segmentations) - len(polygons) >= 5
    assert sum(len(parts) > 1 for parts in polygons) >= 30
    assert any(len(polygon) < 6 for parts in polygons for polygon in parts)
    assert len({(image["height"], image["width"]) for image in images.values()}) == 5
    refs = read_refs(generated_root, "refcoco", "refs(unc).p")
    assert {len(ref["sentences"]) for ref in refs} == {1, 2, 3, 4}
    assert b"Ucaf\xe9" not in (generated_root / "refcoco/refs(unc).p").read_bytes()
    assert any("café" in sentence["sent"] for ref in refs for sentence in ref["sentences"])
    assert list(count_refs(generated_root, "refcoco", "refs(unc).p")) == [
        "train",
        "val",
        "testA",
        "testB",
    ]


def test_images_are_found_where_a_plain_file_has_the_name_of_the_other_folder(
    refer_root: Path,
) -> None:
    assert (refer_root / "images/train2014").is_file()
    index = ReferIndex.open(refer_root, "refcoco", "refs(unc).p")
    assert index.image_folder == refer_root / IMAGE_FOLDER
    index.check_images(np.arange(len(index)))
    assert all(index.image_path(ref).is_file() for ref in range(len(index)))


# -- Splits and sentences


def test_splits_come_in_the_usual_order_whatever_their_order_in_the_file() -> None:
    refs, instances = one_ref()
    names = ["zebra", "testB", "test", "apple", "train", "testA", "val"]
    refs = [refs[0] | {"ref_id": i, "split": name} for i, name in enumerate(names)]
    index = index_of(refs, instances)
    assert index.splits == ("train", "val", "test", "testA", "testB", "apple", "zebra")
    split_refs = {name: index.split_refs(name).tolist() for name in names}
    assert split_refs == {name: [i] for i, name in enumerate(names)}


def test_an_unknown_split_is_an_error_that_names_the_existing_ones() -> None:
    with pytest.raises(InputError, match=r"no split 'testA', only val$"):
        index_of(*one_ref()).split_refs("testA")


def test_sentences_of_several_refs_are_kept_apart() -> None:
    (template,), instances = one_ref()
    texts = [["left", "the 左 one"], ["naïve", "", "x"], ["right"]]
    refs = []
    for number, in_ref in enumerate(texts):
        sentences = [{"sent": text, "sent_id": 10 * number + i} for i, text in enumerate(in_ref)]
        refs.append(template | {"ref_id": number, "sentences": sentences})
    index = index_of(refs, instances)
    rows = [index.sentence_rows(ref) for ref in range(3)]
    assert [[index.sentence(row) for row in in_ref] for in_ref in rows] == texts
    ids = [index.sentence_id(row) for in_ref in rows for row in in_ref]
    assert ids == [0, 1, 10, 11, 12, 20]


# -- Missing files


def test_a_missing_root_is_an_error_that_shows_the_expected_tree(tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    with pytest.raises(InputError) as error:
        open_set(root)
    lines = [line.strip() for line in str(error.value).splitlines()]
    start = lines.index(f"{root}/")
    assert lines[start + 1].startswith("images/train2014/COCO_train2014_*.jpg")
    assert lines[start + 2 : start + 4] == ["refcoco/instances.json", "refcoco/refs(unc).p"]
    assert "CRISLIT_DATA" in lines[-1]


@pytest.mark.parametrize("name", ["refcoco/instances.json", "refcoco/refs(unc).p", "images"])
def test_the_missing_part_of_a_set_is_named(name: str, tmp_path: Path) -> None:
    root = write_set(tmp_path / "data")
    shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
    with pytest.raises(InputError) as error:
        open_set(root)
    first = str(error.value).splitlines()[0]
    assert str(root / name) in first
    assert first.count(str(root)) == 2, "the root and the one missing part"


@pytest.mark.parametrize("folder", ["images/train2014", "images/mscoco/images/train2014"])
def test_both_usual_image_folders_are_found(folder: str, tmp_path: Path) -> None:
    root = write_set(tmp_path / "data", image=False)
    (root / "images/train2014").rmdir()
    (root / folder).mkdir(parents=True)
    assert open_set(root).image_path(0) == root / folder / "seven.jpg"


def test_missing_images_are_named(tmp_path: Path) -> None:
    refs, instances = one_ref()
    (image,) = instances["images"]
    for number in range(10, 15):
        annotation = {"id": number, "image_id": number, "segmentation": [SQUARE]}
        instances["images"].append(image | {"id": number, "file_name": f"{number}.jpg"})
        instances["annotations"].append(annotation)
        refs.append(refs[0] | {"ref_id": number, "ann_id": number, "image_id": number})
    refs.append(refs[-1] | {"ref_id": 99})  # an image with two refs counts once
    root = write_set(tmp_path / "data", pickle.dumps(refs), json.dumps(instances).encode())
    index = open_set(root)
    index.check_images(np.array([0]))
    one = r"^1 of 2 images are missing in .*train2014: 14\.jpg\. "
    with pytest.raises(InputError, match=one):
        index.check_images(np.array([0, 5, 6]))
    several = r"^5 of 6 images are missing in .*train2014: 10\.jpg, 11\.jpg, 12\.jpg, \.\.\.\. "
    with pytest.raises(InputError, match=several):
        index.check_images(np.arange(7))
