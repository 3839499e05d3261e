"""The digest of an index: one identity of sentences and masks, wherever the data are."""

import copy
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from crislit.data import refer_cache, refer_index
from crislit.data.refer_build import build_index
from crislit.data.refer_cache import IndexArrays, digest_arrays
from crislit.data.refer_index import ReferIndex
from tests.data.test_refer_annotations import index_of, relaxed
from tests.data.test_refer_cache import cache_home, caches
from tests.io.test_pickles import open_set
from tests.refer_data import HEIGHT, SETS, SQUARE, WIDTH, Instances, Refs, one_ref, write_set

__all__ = ["cache_home"]

RUNS = {"size": [HEIGHT, WIDTH], "counts": [5, 2, HEIGHT * WIDTH - 7]}


def two_refs() -> tuple[Refs, Instances]:
    """Return a set of two refs on two images: one of polygons, one of run lengths."""
    refs, instances = one_ref([SQUARE, [1, 1, 5, 1, 5, 5]])
    sentence = {"sent": "two pixels", "sent_id": 6}
    refs.append(refs[0] | {"ref_id": 4, "ann_id": 2, "image_id": 8, "sentences": [sentence]})
    instances["images"].append(instances["images"][0] | {"id": 8, "file_name": "eight.jpg"})
    instances["annotations"].append({"id": 2, "image_id": 8, "segmentation": RUNS})
    return copy.deepcopy(refs), copy.deepcopy(instances)


def test_the_digest_of_a_set_is_the_recorded_one_in_every_version() -> None:
    """Results are recorded under it: a change here makes them results of other data."""
    assert index_of(*two_refs()).digest == "5abd1dfcde539bcc"


# -- It changes with everything that numbers depend on


@pytest.mark.parametrize("name", [field.name for field in fields(IndexArrays)])
def test_every_array_counts(name: str) -> None:
    arrays = build_index(*two_refs(), Path("refs.p"))
    changed = getattr(arrays, name).copy()
    changed.reshape(-1)[-1] += 1
    assert digest_arrays(replace(arrays, **{name: changed})) != digest_arrays(arrays)


def test_types_and_shapes_count() -> None:
    arrays = build_index(*two_refs(), Path("refs.p"))
    others = [
        replace(arrays, image_size=arrays.image_size.reshape(-1)),
        replace(arrays, runs=arrays.runs.view(np.uint64)),
        replace(arrays, split=arrays.ref_id, ref_id=arrays.split),
    ]
    assert len({digest_arrays(each) for each in (arrays, *others)}) == 4


Change = Callable[[Refs, Instances], Any]
CHANGES: dict[str, Change] = {
    "a sentence": lambda refs, _: refs[0]["sentences"][0].update(sent="a Square"),
    "a space at the end": lambda refs, _: refs[0]["sentences"][0].update(sent="a square "),
    "a sentence's id": lambda refs, _: refs[0]["sentences"][0].update(sent_id=7),
    "one sentence more": lambda refs, _: refs[0]["sentences"].append({"sent": "", "sent_id": 9}),
    "the split of a ref": lambda refs, _: refs[0].update(split="train"),
    "the name of a split": lambda refs, _: [ref.update(split="test") for ref in refs],
    "a ref's id": lambda refs, _: refs[0].update(ref_id=9),
    "a ref less": lambda refs, _: refs.pop(),
    "the order of refs": lambda refs, _: refs.reverse(),
    "a point": lambda _, instances: instances["annotations"][0]["segmentation"][0].__setitem__(
        0, np.nextafter(2.0, 3)
    ),
    "a polygon less": lambda _, instances: instances["annotations"][0]["segmentation"].pop(),
    "two run lengths": lambda _, instances: instances["annotations"][1]["segmentation"].update(
        counts=[5, 3, HEIGHT * WIDTH - 8]
    ),
    "an image's size": lambda _, instances: instances["images"][0].update(height=HEIGHT + 1),
    "a file name": lambda _, instances: instances["images"][0].update(file_name="7.jpg"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_files_changes_the_digest(change: Change) -> None:
    refs, instances = two_refs()
    change(refs, instances)
    assert index_of(refs, instances).digest != index_of(*two_refs()).digest


texts = st.lists(st.text(alphabet="ab", max_size=3), min_size=1, max_size=3)


@relaxed
@given(st.tuples(texts, texts), st.tuples(texts, texts))
def test_two_sets_have_one_digest_only_if_their_sentences_are_equal(
    first: tuple[list[str], list[str]], second: tuple[list[str], list[str]]
) -> None:
    """However the same characters are divided among sentences and refs."""

    def digest(in_refs: tuple[list[str], list[str]]) -> str:
        refs, instances = two_refs()
        for ref, sentences in zip(refs, in_refs, strict=True):
            ref["sentences"] = [{"sent": text, "sent_id": 0} for text in sentences]
        return index_of(refs, instances).digest

    assert (digest(first) == digest(second)) == (first == second)


# -- It changes with nothing else


def test_what_no_number_depends_on_does_not_count() -> None:
    refs, instances = two_refs()
    instances["info"] = {"year": 2014}
    instances["annotations"].append(instances["annotations"][0] | {"id": 77})
    instances["annotations"].reverse()
    refs[0]["sentences"][0].update(raw="", tokens=[])
    assert index_of(refs, instances).digest == index_of(*two_refs()).digest


def test_the_byte_order_of_the_machine_does_not_count() -> None:
    arrays = build_index(*two_refs(), Path("refs.p"))
    swapped = {
        name: array.astype(array.dtype.newbyteorder()) for name, array in vars(arrays).items()
    }
    assert any(array.dtype.byteorder == ">" for array in swapped.values())
    assert digest_arrays(IndexArrays(**swapped)) == digest_arrays(arrays)


def test_moved_and_indexed_again_a_set_keeps_its_digest(tmp_path: Path) -> None:
    root = write_set(tmp_path / "data")
    before = open_set(root).digest
    assert re.fullmatch("[0-9a-f]{16}", before)
    moved = Path(shutil.move(root, tmp_path / "moved"))
    (moved / "images/mscoco/images").mkdir(parents=True)
    (moved / "images/train2014").rename(moved / "images/mscoco/images/train2014")
    assert open_set(moved).digest == before
    assert len(caches(moved)) == 2, "the old cache is not used"
    os.utime(moved / "refcoco/refs(unc).p")
    assert open_set(moved).digest == before
    assert ReferIndex.of(*one_ref(), Path("elsewhere.jsonl"), tmp_path).digest == before


@pytest.mark.parametrize(("folder", "refs_file"), SETS)
def test_the_digest_of_an_opened_index_is_the_one_stored_when_it_was_built(
    refer_root: Path, folder: str, refs_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = ReferIndex.open(refer_root, folder, refs_file)
    for module in (refer_cache, refer_index):  # opening must not compute it: that takes time
        monkeypatch.delattr(module, "digest_arrays")
    opened = ReferIndex.open(refer_root, folder, refs_file)
    assert opened.digest == built.digest == digest_arrays(built._arrays)


def test_left_out_refs_change_the_digest_and_are_cached_with_it(tmp_path: Path) -> None:
    refs, instances = two_refs()
    for ref in refs:
        ref["split"] = "train"
    complete = index_of(refs, instances).digest
    refs[1]["sentences"] = []
    remaining = index_of(refs[:1], instances).digest
    root = write_set(tmp_path / "data", pickle.dumps(refs), json.dumps(instances).encode())
    for _ in ("built", "cached"):
        index = ReferIndex.open(root, "refcoco", "refs(unc).p", skip_unusable=True)
        assert index.digest == remaining != complete
        assert len(index.skipped) == 1


# -- A cache without it


@pytest.mark.parametrize("digest", [None, "", "0123", "0" * 15 + "G", "0" * 17])
def test_a_cache_without_a_proper_digest_is_built_again(
    digest: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_set(tmp_path / "data")
    expected = open_set(root).digest
    (cache,) = caches(root)
    metadata = {} if digest is None else {"digest": digest}
    save_file(load_file(cache), cache, metadata)
    assert open_set(root).digest == expected
    assert f"ignoring the damaged cache {cache}" in caplog.text
    with safe_open(cache, framework="numpy") as file:
        assert file.metadata()["digest"] == expected
