"""REFER annotations: what is read must be right, and what strangers wrote must do no harm."""

import copy
import itertools
import json
import logging
import os
import pickle
import random
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pycocotools import mask as coco_mask
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from crislit import pickles
from crislit.data import refer
from crislit.data.refer import LARGEST_SIDE, Mask, ReferIndex, build_index, load_json, outlines, parse_runs
from crislit.errors import InputError
from crislit.pickles import load_pickle

SETS = (("refcoco", "refs(unc).p"), ("refcoco+", "refs(unc).p"), ("refcocog", "refs(umd).p"), ("refcocog", "refs(google).p"))
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
HEIGHT, WIDTH = 12, 20
SQUARE = [2, 2, 8, 2, 8, 8, 2, 8]  # covers the pixels 2 to 7 of both axes, 36 of them

# The same examples on every run, and no complaint about a busy machine.
unhurried = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
relaxed = settings(deadline=None, database=None, derandomize=True, suppress_health_check=unhurried)

Refs = list[dict[str, Any]]
Instances = dict[str, Any]


@pytest.fixture(autouse=True)
def cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing of a test is left in the home."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


def one_ref(segmentation: Any = (SQUARE,)) -> tuple[Refs, Instances]:
    """A set of one ref with one sentence."""
    images = [{"id": 7, "height": HEIGHT, "width": WIDTH, "file_name": "seven.jpg"}]
    annotations = [
        {"id": 1, "image_id": 7, "segmentation": segmentation if isinstance(segmentation, dict) else [*segmentation]}
    ]
    sentences = [{"sent": "a square", "raw": "A square!", "tokens": ["a", "square"], "sent_id": 5}]
    ref = {"ref_id": 3, "ann_id": 1, "image_id": 7, "category_id": 2, "file_name": "seven_1.jpg", "split": "val"}
    return [{**ref, "sent_ids": [5], "sentences": sentences}], {"images": images, "annotations": annotations}


def write_set(root: Path, refs: bytes | None = None, instances: bytes | None = None, *, picture: bool = True) -> Path:
    """Write a set, of one ref where nothing else is given, and return its root."""
    plain_refs, plain_instances = one_ref()
    (root / "images/train2014").mkdir(parents=True)
    if picture:
        (root / "images/train2014/seven.jpg").touch()
    (root / "refcoco").mkdir()
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(plain_refs) if refs is None else refs)
    (root / "refcoco/instances.json").write_bytes(json.dumps(plain_instances).encode() if instances is None else instances)
    return root


def open_set(root: Path) -> ReferIndex:
    return ReferIndex.open(root, "refcoco", "refs(unc).p")


def index_of(refs: Refs, instances: Instances) -> ReferIndex:
    return ReferIndex(build_index(refs, instances, Path("refcoco/refs(unc).p")), Path("images"), Path("instances.json"))


def mask_of(segmentation: Any, height: int = HEIGHT, width: int = WIDTH) -> Mask:
    refs, instances = one_ref(segmentation)
    instances["images"][0].update(height=height, width=width)
    return index_of(refs, instances).mask(0)


# -- Genuine annotations


@pytest.mark.parametrize(("folder", "refs_file"), SETS)
def test_every_mask_is_the_union_that_pycocotools_draws(minirefer: Path, folder: str, refs_file: str) -> None:
    refs, annotations, images = contents(minirefer, folder, refs_file)
    index = ReferIndex.open(minirefer, folder, refs_file)
    for number, ref in enumerate(refs):
        image = images[ref["image_id"]]
        expected = union(annotations[ref["ann_id"]]["segmentation"], image["height"], image["width"])
        mask = index.mask(number)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, expected, err_msg=f"ref {ref['ref_id']}")
        assert mask.any()


@pytest.mark.parametrize(("folder", "refs_file"), SETS)
def test_sentences_ids_and_images_are_joined_as_in_the_files(minirefer: Path, folder: str, refs_file: str) -> None:
    refs, _, images = contents(minirefer, folder, refs_file)
    index = ReferIndex.open(minirefer, folder, refs_file)
    assert len(index) == len(refs)
    for number, ref in enumerate(refs):
        image = images[ref["image_id"]]
        assert index.ref_id(number) == ref["ref_id"]
        assert index.image_id(number) == ref["image_id"]
        assert index.image_size(number) == (image["height"], image["width"])
        assert index.image_path(number).name == image["file_name"]
        rows = index.sentence_rows(number)
        assert [index.sentence(row) for row in rows] == [sentence["sent"] for sentence in ref["sentences"]]
        assert [index.sentence_id(row) for row in rows] == [sentence["sent_id"] for sentence in ref["sentences"]]
    expected = [ref["image_id"] for ref in refs[::2]]
    assert index.image_ids(np.arange(0, len(refs), 2)).tolist() == expected


@pytest.mark.parametrize(("folder", "refs_file"), SETS)
def test_every_ref_is_in_its_own_split_and_no_other(minirefer: Path, folder: str, refs_file: str) -> None:
    refs, _, _ = contents(minirefer, folder, refs_file)
    index = ReferIndex.open(minirefer, folder, refs_file)
    assert set(index.splits) == {ref["split"] for ref in refs}
    for split in index.splits:
        assert index.refs_of(split).tolist() == [number for number, ref in enumerate(refs) if ref["split"] == split]


def test_the_counts_of_minirefer_are_those_of_its_provenance(minirefer: Path) -> None:
    counts = []
    for folder, refs_file in SETS:
        index = ReferIndex.open(minirefer, folder, refs_file)
        counts.append((len(index), sum(len(index.sentence_rows(ref)) for ref in range(len(index)))))
    assert counts == [(136, 337), (95, 193), (43, 44), (18, 18)]


def test_photographs_are_found_beside_a_plain_file_of_the_folders_name(minirefer: Path) -> None:
    assert (minirefer / "images/train2014").is_file()
    index = ReferIndex.open(minirefer, "refcoco", "refs(unc).p")
    assert index.image_folder == minirefer / "images/mscoco/images/train2014"
    index.check_images(np.arange(len(index)))
    assert all(index.image_path(ref).is_file() for ref in range(len(index)))


def contents(root: Path, folder: str, refs_file: str) -> tuple[Refs, dict[int, Any], dict[int, Any]]:
    """Refs, annotations and images, read without the code under test; these pickles are the project's own."""
    instances = json.loads((root / folder / "instances.json").read_text())
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    images = {image["id"]: image for image in instances["images"]}
    return pickle.loads((root / folder / refs_file).read_bytes()), annotations, images


def union(segmentation: Any, height: int, width: int) -> Mask:
    if isinstance(segmentation, dict):
        mask: Mask = coco_mask.decode(coco_mask.frPyObjects(segmentation, height, width))
        return mask
    covered = np.zeros((height, width), dtype=np.uint8)
    for polygon in segmentation:
        covered |= coco_mask.decode(coco_mask.frPyObjects([polygon], height, width))[:, :, 0]
    return covered


# -- Masks


def test_a_square_covers_the_pixels_between_its_corners() -> None:
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[2:8, 2:8] = 1
    np.testing.assert_array_equal(mask_of([SQUARE]), expected)


def test_overlapping_polygons_do_not_cancel_out() -> None:
    mask = mask_of([[0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 6, 2, 6, 6, 2, 6], [0, 0, 4, 0, 4, 4, 0, 4]])
    assert mask[2:4, 2:4].all()
    assert mask.sum() == 16 + 16 - 4


def test_degenerate_polygons_are_dropped_and_the_others_stay() -> None:
    odd, two_points, none = [0, 0, 19, 0, 19, 11, 0], [0, 0, 19, 11], [0.0]
    np.testing.assert_array_equal(mask_of([odd, SQUARE, two_points, [], none]), mask_of([SQUARE]))


EMPTY = {
    "no polygon": [],
    "degenerate polygons only": [[1, 1, 5, 1], [1, 1, 5, 1, 5, 5, 1]],
    "a line": [[2, 2, 8, 2, 2, 2]],
    "outside the picture": [[30, 2, 35, 2, 35, 8, 30, 8]],
    "run lengths of zeros": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
    "run lengths with an empty run": {"size": [HEIGHT, WIDTH], "counts": [100, 0, 140]},
}


@pytest.mark.parametrize("segmentation", EMPTY.values(), ids=EMPTY)
def test_a_ref_left_with_no_pixel_is_reported_and_has_an_all_zero_mask(
    segmentation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    refs, instances = one_ref()
    bare = copy.deepcopy(refs[0]) | {"ref_id": 4711, "ann_id": 2}
    instances["annotations"].append({"id": 2, "image_id": 7, "segmentation": segmentation})
    index = index_of([*refs, bare], instances)
    np.testing.assert_array_equal(index.mask(1), np.zeros((HEIGHT, WIDTH), dtype=np.uint8))
    assert index.mask(0).sum() == 36, "the ref before it keeps its pixels"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("1 refs have a mask without pixels: ref_id 4711")


def test_a_ref_with_pixels_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    index_of(*one_ref())
    assert not caplog.records


def random_masks() -> list[Mask]:
    """Masks with runs of all lengths, single pixels and whole rectangles among them, first and last pixel set or not."""
    rng = np.random.default_rng(0)
    masks = []
    for _ in range(60):
        height, width = rng.integers(1, 90, 2)
        mask = (rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])).astype(np.uint8)
        if rng.random() < 0.5:
            top, left = rng.integers(0, height), rng.integers(0, width)
            mask[top : top + rng.integers(1, 90), left : left + rng.integers(1, 90)] = rng.integers(2)
        masks.append(mask)
    long_runs = np.zeros((1000, 1500), dtype=np.uint8)
    long_runs[:, 700:] = 1  # runs of 20 bits, then one that is shorter than the one before the last
    long_runs[3:5, 900] = 0
    return [*masks, long_runs, np.ones((5, 4), dtype=np.uint8)]


def run_lengths(mask: Mask) -> list[int]:
    """Column by column, starting with zeros."""
    groups = [(value, len(list(group))) for value, group in itertools.groupby(mask.ravel(order="F").tolist())]
    return [0] * (groups[0][0] == 1) + [length for _, length in groups]


@pytest.mark.parametrize("kind", ["uncompressed", "compressed bytes", "compressed text"])
def test_run_lengths_come_back_as_the_mask_that_was_encoded(kind: str) -> None:
    for mask in random_masks():
        encoded = coco_mask.encode(np.asfortranarray(mask))["counts"]
        counts = {"uncompressed": run_lengths(mask), "compressed bytes": encoded, "compressed text": encoded.decode()}[kind]
        decoded = mask_of({"size": list(mask.shape), "counts": counts}, *mask.shape)
        np.testing.assert_array_equal(decoded, mask)


def test_compressed_run_lengths_are_the_ones_that_pycocotools_compressed() -> None:
    for mask in random_masks():
        assert parse_runs(coco_mask.encode(np.asfortranarray(mask))["counts"]) == run_lengths(mask)


# -- Splits and sentences of one's own


def test_splits_come_in_the_usual_order_whatever_the_files_order() -> None:
    refs, instances = one_ref()
    names = ["zebra", "testB", "test", "apple", "train", "testA", "val"]
    index = index_of([refs[0] | {"ref_id": i, "split": name} for i, name in enumerate(names)], instances)
    assert index.splits == ("train", "val", "test", "testA", "testB", "apple", "zebra")
    assert {name: index.refs_of(name).tolist() for name in names} == {name: [i] for i, name in enumerate(names)}


def test_an_unknown_split_is_an_error_that_names_the_existing_ones() -> None:
    with pytest.raises(InputError, match=r"no split 'testA', only val$"):
        index_of(*one_ref()).refs_of("testA")


def test_sentences_of_several_refs_do_not_run_into_each_other() -> None:
    refs, instances = one_ref()
    said = [["left", "the 左 one"], ["naïve", "", "x"], ["right"]]
    for number, texts in enumerate(said):
        sentences = [{"sent": text, "sent_id": 10 * number + i} for i, text in enumerate(texts)]
        refs.append(refs[0] | {"ref_id": number, "sentences": sentences})
    index = index_of(refs[1:], instances)
    assert [[index.sentence(row) for row in index.sentence_rows(ref)] for ref in range(3)] == said
    assert [index.sentence_id(row) for ref in range(3) for row in index.sentence_rows(ref)] == [0, 1, 10, 11, 12, 20]


# -- Pickles of plain data


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickles_of_every_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    refs, _ = one_ref()
    refs[0]["sentences"][0]["sent"] = "café 左"
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(refs, protocol))
    assert load_pickle(path) == refs


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_plain_kinds_of_data_are_read(protocol: int, tmp_path: Path) -> None:
    value = [
        None,
        True,
        False,
        0,
        -1,
        2**40,
        -(2**80),
        1.5,
        float("inf"),
        "é",
        b"\xe9\x00",
        (),
        (1,),
        (1, (2, 3)),
        {},
        {"a": [1]},
    ]
    path = tmp_path / "plain.p"
    path.write_bytes(pickle.dumps(value, protocol))
    assert load_pickle(path) == value


@pytest.mark.parametrize("protocol", [0, 2])
def test_byte_strings_of_python_2_are_read_as_latin_1(protocol: int, tmp_path: Path) -> None:
    refs, instances = one_ref()
    refs[0]["sentences"][0]["sent"] = "the café's \\ 'sign'\n"
    root = write_set(tmp_path / "data", python2_pickle(refs, protocol), json.dumps(instances).encode())
    index = open_set(root)
    assert load_pickle(root / "refcoco/refs(unc).p") == refs
    assert index.sentence(0) == "the café's \\ 'sign'\n"
    assert index.splits == ("val",)
    assert (index.ref_id(0), index.image_id(0), index.sentence_id(0)) == (3, 7, 5)


def python2_pickle(value: Any, protocol: int) -> bytes:
    """Pickle as Python 2 did: strings are bytes, and COCO's ids are longs."""
    return (b"\x80\x02" if protocol == 2 else b"") + python2_opcodes(value, protocol) + b"."


def python2_opcodes(value: Any, protocol: int) -> bytes:
    if isinstance(value, str):
        data = value.encode("latin-1")
        return b"U" + bytes([len(data)]) + data if protocol else b"S" + repr(data)[1:].encode() + b"\n"
    if isinstance(value, int):
        return b"\x8a\x02" + value.to_bytes(2, "little") if protocol else b"L%dL\n" % value
    if isinstance(value, list):
        items = [python2_opcodes(item, protocol) for item in value]
        return b"](" + b"".join(items) + b"e" if protocol else b"(l" + b"".join(item + b"a" for item in items)
    assert isinstance(value, dict)
    pairs = [python2_opcodes(key, protocol) + python2_opcodes(item, protocol) for key, item in value.items()]
    return b"}(" + b"".join(pairs) + b"u" if protocol else b"(d" + b"".join(pair + b"s" for pair in pairs)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_byte_strings_of_python_3_are_read_wherever_text_is_expected(protocol: int, tmp_path: Path) -> None:
    refs, instances = one_ref()
    refs[0]["sentences"][0]["sent"] = b"caf\xe9"
    refs[0]["split"] = b"val"
    both = [*refs, copy.deepcopy(refs[0]) | {"ref_id": 4}]  # the split's name occurs twice and is one split
    index = open_set(write_set(tmp_path / "data", pickle.dumps(both, protocol), json.dumps(instances).encode()))
    assert index.sentence(0) == "café"
    assert index.splits == ("val",)
    assert index.refs_of("val").tolist() == [0, 1]


# -- Pickles that would run code


class Runs:
    """Unpickling it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class WithState:
    def __init__(self) -> None:
        self.ref_id = 3


def dangerous(sentinel: Path) -> dict[str, Any]:
    """What leaves the sentinel behind when it is unpickled, in many wrappings."""
    touch = Runs(os.system, f"touch {sentinel}")
    cycle: list[Any] = [touch]
    cycle.append(cycle)
    return {
        "os.system": touch,
        "eval": Runs(eval, f"open({str(sentinel)!r}, 'w').close()"),
        "exec": Runs(exec, f"open({str(sentinel)!r}, 'w').close()"),
        "open": Runs(open, str(sentinel), "w"),
        "subprocess": Runs(subprocess.check_call, ["touch", str(sentinel)]),
        "a method of a class": Runs(Path.touch, Path(sentinel)),
        "deep in a ref": [{"ref_id": 3, "sentences": [{"sent": [(1, touch)]}]}],
        "as a dictionary's key": {(1, touch): 2},
        "among thousands of plain items": [*range(3000), touch, *range(3000)],
        "seen twice": [touch, touch],
        "in a cycle": cycle,
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", dangerous(Path("x")))
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the payload "open" leaves a file open when Python's own reader runs it
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(name: str, protocol: int, tmp_path: Path) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(dangerous(sentinel)[name], protocol))
    pickle.loads(path.read_bytes())
    assert sentinel.exists(), "the payload is a live one"
    sentinel.unlink()
    with pytest.raises(InputError, match=r"cannot read .*refs\.p: .*only plain containers, numbers and strings"):
        load_pickle(path)
    assert not sentinel.exists()


OPCODES = {  # {} is the shell command
    "protocol 0's GLOBAL and REDUCE": b"cos\nsystem\n(S'{}'\ntR.",
    "INST": b"(S'{}'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'{}'\no.",
    "STACK_GLOBAL with names out of the memo": b"\x80\x04\x8c\x06system\x94\x8c\x02os\x94h\x01h\x00\x93(S'{}'\ntR.",
    "hidden below a plain result": b"cos\nsystem\n(S'{}'\ntR0(lp0\n.",
    "memoised, then fetched": b"cos\nsystem\np7\n0(lp0\n0g7\n(S'{}'\ntR.",
    "posix": b"cposix\nsystem\n(S'{}'\ntR.",
    "Python 2's name of subprocess": b"ccommands\ngetoutput\n(S'{}'\ntR.",
}


@pytest.mark.parametrize("opcodes", OPCODES.values(), ids=OPCODES)
def test_handwritten_opcodes_that_would_run_code_are_refused(opcodes: bytes, tmp_path: Path) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "refs.p"
    path.write_bytes(opcodes.replace(b"{}", f"touch {sentinel}".encode()))
    pickle.loads(path.read_bytes())
    assert sentinel.exists(), "the payload is a live one"
    sentinel.unlink()
    with pytest.raises(InputError, match="only plain containers, numbers and strings"):
        load_pickle(path)
    assert not sentinel.exists()


TRICKS = {
    "a persistent id": b"Pfile\n.",
    "an extension code": b"\x80\x02\x82\x01.",
    "a walk from the one admitted function": b"\x80\x04\x8c\x07_codecs\x8c\x12encode.__globals__\x93.",
    "the admitted function's neighbour": b"c_codecs\ndecode\n(S'x'\nS'rot13'\ntR.",
    "the admitted function with a codec that unpacks": b"c_codecs\nencode\n(I1\nS'zip'\ntR.",
    "a class made by the admitted function": b"\x80\x02c_codecs\nencode\n)\x81.",
    "attributes set on the admitted function": b"\x80\x02c_codecs\nencode\nN(S'__code__'\nI1\nd\x86b.",
    "builtins' getattr": b"cbuiltins\ngetattr\n.",
    "Python 2's builtins": b"c__builtin__\neval\n.",
    "a module to import": b"cthis\ns\n.",
}


@pytest.mark.parametrize("opcodes", TRICKS.values(), ids=TRICKS)
def test_tricks_around_the_reader_are_refused(opcodes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(opcodes)
    with pytest.raises(InputError, match=r"cannot read .*refs\.p"):
        load_pickle(path)


OBJECTS = {
    "an instance of a class": WithState(),
    "a class": WithState,
    "a function": len,
    "an ordered dictionary": OrderedDict(a=1),
    "a path": Path("x"),
    "a fraction": Fraction(1, 3),
    "a complex number": 1j,
    "a numpy array": np.zeros(3),
    "a numpy number": np.float64(1.0),
    "a numpy dtype": np.dtype("int64"),
    "a range": range(3),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", OBJECTS)
def test_a_pickled_object_that_is_no_plain_data_is_refused(name: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps([{"ref_id": OBJECTS[name]}], protocol))
    with pytest.raises(InputError, match="only plain containers, numbers and strings"):
        load_pickle(path)


def test_a_set_with_a_dangerous_pickle_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    root = write_set(tmp_path / "data", pickle.dumps([Runs(os.system, f"touch {sentinel}")]))
    with pytest.raises(InputError, match=r"refs\(unc\)\.p: it asks for \w+\.system"):
        open_set(root)
    assert not sentinel.exists()


# -- Damaged files


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_cut_off_anywhere_is_an_error_that_names_it(protocol: int, tmp_path: Path) -> None:
    whole = pickle.dumps(one_ref()[0], protocol)
    path = tmp_path / "refs(unc).p"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"cannot read .*refs\(unc\)\.p"):
            load_pickle(path)


def test_a_pickle_with_any_byte_changed_is_read_or_refused_but_never_anything_else(tmp_path: Path) -> None:
    whole = pickle.dumps(one_ref()[0], 2)
    path = tmp_path / "refs.p"
    rng = random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            build_index(load_pickle(path), one_ref()[1], path)
        except InputError:
            refused += 1
    assert refused > 100


def test_a_json_file_cut_off_anywhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    whole = json.dumps(one_ref()[1]).encode()
    path = tmp_path / "instances.json"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"cannot read .*instances\.json"):
            load_json(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", b"[" * 200_000, b"{'a': 1}", b"\x00"])
def test_a_json_file_of_other_bytes_is_an_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*instances\.json"):
        load_json(path)


@pytest.mark.parametrize("refs", [None, 5, "text", {}, {"val": []}, (), b"bytes"], ids=repr)
def test_a_refs_file_that_holds_no_list_is_an_error_that_names_it(refs: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"refs\(unc\)\.p should hold a list of refs"):
        open_set(write_set(tmp_path / "data", pickle.dumps(refs)))


@pytest.mark.parametrize("ref", [None, 5, "text", [], {}, ("ref_id", 3)], ids=repr)
def test_a_ref_that_is_no_ref_is_an_error_that_names_the_file(ref: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"refs\(unc\)\.p: ref .* is not as REFER has them"):
        open_set(write_set(tmp_path / "data", pickle.dumps([ref])))


NO_INSTANCES: list[Any] = [
    None,
    5,
    "text",
    [],
    {},
    {"images": []},
    {"images": None, "annotations": []},
    {"images": 5, "annotations": []},
    {"images": [5], "annotations": []},
    {"images": [{}], "annotations": []},
    {"images": {"id": 7}, "annotations": []},
    {"images": [{"id": [7]}], "annotations": []},
    {"images": [], "annotations": "text"},
]


@pytest.mark.parametrize("instances", NO_INSTANCES, ids=json.dumps)
def test_an_instances_file_without_lists_of_items_is_an_error_that_names_it(instances: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"instances\.json should hold a list '(images|annotations)'"):
        open_set(write_set(tmp_path / "data", instances=json.dumps(instances).encode()))


MISSING = [
    *(("ref", key) for key in ("ann_id", "image_id", "category_id", "split", "sentences")),
    *(("sentence", key) for key in ("sent", "sent_id")),
    *(("image", key) for key in ("height", "width", "file_name")),
    *(("annotation", key) for key in ("image_id", "segmentation")),
]


def parts_of(refs: Refs, instances: Instances) -> dict[str, dict[str, Any]]:
    """The dictionaries that a set of one ref consists of."""
    (ref,), (image,), (annotation,) = refs, instances["images"], instances["annotations"]
    return {"ref": ref, "sentence": ref["sentences"][0], "image": image, "annotation": annotation}


@pytest.mark.parametrize(("part", "key"), MISSING)
def test_a_missing_key_is_an_error_that_names_the_ref_and_the_key(part: str, key: str) -> None:
    refs, instances = one_ref()
    del parts_of(refs, instances)[part][key]
    with pytest.raises(InputError, match=rf"refs\(unc\)\.p: ref 3 .*KeyError '{key}'"):
        index_of(refs, instances)


def test_a_ref_without_its_id_is_an_error_that_says_so() -> None:
    refs, instances = one_ref()
    del refs[0]["ref_id"]
    with pytest.raises(InputError, match=r"refs\(unc\)\.p: ref without ref_id"):
        index_of(refs, instances)


HUGE = 2**70
Break = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], object]
BROKEN: dict[str, Break] = {  # of a ref, its image and its annotation
    "an image that is not there": lambda ref, image, annotation: ref.update(image_id=8),
    "an annotation that is not there": lambda ref, image, annotation: ref.update(ann_id=9),
    "an image id of another type": lambda ref, image, annotation: ref.update(image_id="7"),
    "an image id that is a list": lambda ref, image, annotation: ref.update(image_id=[7]),
    "an annotation of another image": lambda ref, image, annotation: annotation.update(image_id=8),
    "a ref id that is no number": lambda ref, image, annotation: ref.update(ref_id="three"),
    "a category that is no number": lambda ref, image, annotation: ref.update(category_id=None),
    "a split that is no text": lambda ref, image, annotation: ref.update(split=["val"]),
    "sentences that are no list": lambda ref, image, annotation: ref.update(sentences=5),
    "sentences that are bare texts": lambda ref, image, annotation: ref.update(sentences=["a square"]),
    "no sentence at all": lambda ref, image, annotation: ref.update(sentences=[]),  # training could not draw one
    "a sentence that is no text": lambda ref, image, annotation: ref["sentences"][0].update(sent=5),
    "a sentence id that is no number": lambda ref, image, annotation: ref["sentences"][0].update(sent_id="x"),
    "a height that is no number": lambda ref, image, annotation: image.update(height="tall"),
    "a height that is not a number": lambda ref, image, annotation: image.update(height=float("nan")),
    "a height without end": lambda ref, image, annotation: image.update(height=float("inf")),
    "a picture of no height": lambda ref, image, annotation: image.update(height=0),
    "a picture of negative size": lambda ref, image, annotation: (
        image.update(height=-HEIGHT, width=-WIDTH),
        annotation.update(segmentation={"size": [-HEIGHT, -WIDTH], "counts": [HEIGHT * WIDTH - 9, 9]}),
    ),
    # pycocotools would end the process when it draws the mask.
    "a picture larger than any memory": lambda ref, image, annotation: image.update(height=2**40),
    "a segmentation that is nothing": lambda ref, image, annotation: annotation.update(segmentation=None),
    "a segmentation that is a number": lambda ref, image, annotation: annotation.update(segmentation=5),
    "a polygon of words": lambda ref, image, annotation: annotation.update(segmentation=[["a"] * 6]),
    "a polygon of points": lambda ref, image, annotation: annotation.update(segmentation=[[1, 1, 5, 1, 5, [5, 1]]]),
    "numbers too large for the index: ref id": lambda ref, image, annotation: ref.update(ref_id=HUGE),
    "numbers too large for the index: category": lambda ref, image, annotation: ref.update(category_id=HUGE),
    "numbers too large for the index: sentence id": lambda ref, image, annotation: ref["sentences"][0].update(sent_id=HUGE),
    "half a character in a sentence": lambda ref, image, annotation: ref["sentences"][0].update(sent="\ud800"),
    "half a character in a split's name": lambda ref, image, annotation: ref.update(split="\ud800"),
    "half a character in a file's name": lambda ref, image, annotation: image.update(file_name="\ud800.jpg"),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_what_does_not_fit_together_is_an_error_that_names_file_and_ref(damage: Break) -> None:
    refs, instances = one_ref()
    damage(refs[0], instances["images"][0], instances["annotations"][0])
    with pytest.raises(InputError, match=rf"refs\(unc\)\.p: ref {refs[0]['ref_id']}\b"):
        index_of(refs, instances)


@pytest.mark.parametrize("name", ["../seven.jpg", "/etc/passwd", "a/seven.jpg", "a/../seven.jpg", "seven.jpg/", "", ".", ".."])
def test_a_file_name_with_a_path_in_it_is_an_error(name: str) -> None:
    refs, instances = one_ref()
    instances["images"][0]["file_name"] = name
    with pytest.raises(InputError, match=r"ref 3: its image's file name .* is not a plain name"):
        index_of(refs, instances)


LIES = {
    "too few pixels": [HEIGHT * WIDTH - 1],
    "too many pixels": [0, HEIGHT * WIDTH + 1],
    "more pixels than fit in memory": [0, 2**60],
    "negative runs that add up": [0, HEIGHT * WIDTH + 60, -60],
    "no run": [],
    "compressed, too few pixels": "d4",
    "compressed, too many pixels": coco_mask.encode(np.ones((HEIGHT + 1, WIDTH), dtype=np.uint8, order="F"))["counts"],
    "compressed, cut off": coco_mask.encode(np.ones((HEIGHT, WIDTH), dtype=np.uint8, order="F"))["counts"][:-1],
    "compressed, empty": "",
    "compressed, of other characters": "~~~",
    "compressed, of foreign characters": "é",
    "compressed, a number without end": "o" * 50,
}


@pytest.mark.parametrize("counts", LIES.values(), ids=LIES)
def test_run_lengths_that_lie_about_their_size_are_an_error(counts: Any) -> None:
    with pytest.raises(InputError, match=r"ref 3: its (compressed run lengths are damaged|run lengths do not fill)"):
        mask_of({"size": [HEIGHT, WIDTH], "counts": counts})


@pytest.mark.parametrize("size", [[WIDTH, HEIGHT], [HEIGHT], [1, HEIGHT * WIDTH], [HEIGHT, WIDTH, 1]], ids=repr)
def test_run_lengths_of_another_picture_size_are_an_error(size: list[int]) -> None:
    with pytest.raises(InputError, match=r"ref 3: its run lengths do not fill its image of 12 x 20 pixels"):
        mask_of({"size": size, "counts": [100, 140]})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e9, -1e9, 1e308])
@pytest.mark.parametrize("place", [0, 5])
def test_polygon_points_that_are_no_numbers_or_far_away_are_an_error(bad: float, place: int) -> None:
    points = [float(number) for number in SQUARE]
    points[place] = bad
    with pytest.raises(InputError, match="ref 3: a polygon of its mask has points that are not numbers, or far outside"):
        mask_of([SQUARE, points])


def test_polygon_points_a_little_outside_the_picture_are_cut_at_its_border() -> None:
    mask = mask_of([[-3, -3, 4, -3, 4, 4, -3, 4]])
    assert mask[:4, :4].all()
    assert mask.sum() == 16


# -- Whatever it may be

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(-(2**63), 2**63), inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=12,
)


@given(value=plain, protocol=st.sampled_from(PROTOCOLS))
@settings(relaxed, max_examples=150)
def test_any_plain_data_comes_back_from_any_protocol(value: Any, protocol: int, tmp_path: Path) -> None:
    (tmp_path / "refs.p").write_bytes(pickle.dumps(value, protocol))
    assert load_pickle(tmp_path / "refs.p") == value


@given(content=st.binary(max_size=60))
@settings(relaxed, max_examples=300)
def test_any_bytes_are_plain_data_or_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(content)
    for load in (load_pickle, load_json):
        told = str(path)
        try:
            load(path)
        except InputError as error:
            told = str(error)
        assert str(path) in told


@given(place=st.sampled_from(["ref", "sentence", "image", "annotation"]), data=st.data(), value=plain)
@settings(relaxed, max_examples=200)
def test_any_value_anywhere_makes_an_index_or_is_refused_with_the_refs_name(
    place: str, data: st.DataObject, value: Any
) -> None:
    refs, instances = one_ref()
    part = parts_of(refs, instances)[place]
    part[data.draw(st.sampled_from(sorted(part)))] = value
    index, told = None, ""
    try:
        index = index_of(refs, instances)
    except InputError as error:
        told = str(error)
    assert index is not None or "refs(unc).p" in told or "instances.json" in told
    if index is not None and max(index.image_size(0)) < 1000:
        assert index.mask(0).shape == index.image_size(0)


@given(mask=npst.arrays(np.uint8, st.tuples(st.integers(1, 30), st.integers(1, 30)), elements=st.integers(0, 1)))
@settings(relaxed, max_examples=150)
def test_any_mask_comes_back_from_its_run_lengths(mask: Mask) -> None:
    encoded = coco_mask.encode(np.asfortranarray(mask))["counts"]
    assert parse_runs(encoded) == run_lengths(mask)
    for counts in (encoded, encoded.decode(), run_lengths(mask)):
        np.testing.assert_array_equal(mask_of({"size": [*mask.shape], "counts": counts}, *mask.shape), mask)


@given(counts=st.lists(st.integers(-5, 300), max_size=6) | st.binary(max_size=12) | st.text(max_size=12), data=st.data())
@settings(relaxed, max_examples=300)
def test_any_run_lengths_fill_their_picture_or_are_refused(counts: Any, data: st.DataObject) -> None:
    if isinstance(counts, list) and data.draw(st.booleans()):
        counts.append(HEIGHT * WIDTH - sum(counts))
    try:
        polygons, runs = outlines({"size": [HEIGHT, WIDTH], "counts": counts}, (HEIGHT, WIDTH))
    except InputError:
        return
    except UnicodeEncodeError:  # which build_index tells of
        assert isinstance(counts, str)
        return
    assert not polygons
    assert sum(runs) == (HEIGHT * WIDTH if runs else 0)


@given(polygons=st.lists(st.lists(st.floats(-3 * WIDTH, 3 * WIDTH, width=32), min_size=6, max_size=12), min_size=1, max_size=3))
@settings(relaxed, max_examples=150)
def test_any_polygons_make_the_union_that_pycocotools_draws(polygons: list[list[float]]) -> None:
    whole = [polygon for polygon in polygons if len(polygon) % 2 == 0]
    np.testing.assert_array_equal(mask_of(polygons), union(whole, HEIGHT, WIDTH))


def test_the_largest_picture_that_is_admitted_takes_no_memory_until_it_is_drawn() -> None:
    whole = {"size": [LARGEST_SIDE, LARGEST_SIDE], "counts": [0, LARGEST_SIDE**2]}
    assert outlines(whole, (LARGEST_SIDE, LARGEST_SIDE)) == ([], [0, LARGEST_SIDE**2])


# -- Files that are not there


def test_a_missing_root_is_an_error_that_draws_the_expected_tree(tmp_path: Path) -> None:
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
    assert first.count(str(root)) == 2, "the root and the one missing part, no other"


@pytest.mark.parametrize("folder", ["images/train2014", "images/mscoco/images/train2014"])
def test_both_image_folders_of_refer_are_found(folder: str, tmp_path: Path) -> None:
    root = write_set(tmp_path / "data", picture=False)
    (root / "images/train2014").rmdir()
    (root / folder).mkdir(parents=True)
    assert open_set(root).image_path(0) == root / folder / "seven.jpg"


def test_missing_photographs_are_named(tmp_path: Path) -> None:
    refs, instances = one_ref()
    for number in range(10, 15):
        instances["images"].append(instances["images"][0] | {"id": number, "file_name": f"{number}.jpg"})
        instances["annotations"].append({"id": number, "image_id": number, "segmentation": [SQUARE]})
        refs.append(refs[0] | {"ref_id": number, "ann_id": number, "image_id": number})
    refs.append(refs[-1] | {"ref_id": 99})  # a photograph with two refs is one photograph
    root = write_set(tmp_path / "data", pickle.dumps(refs), json.dumps(instances).encode())
    index = open_set(root)
    index.check_images(np.array([0]))
    with pytest.raises(InputError, match=r"^1 of 2 images are missing in .*train2014: 14\.jpg\. "):
        index.check_images(np.array([0, 5, 6]))
    with pytest.raises(InputError, match=r"^5 of 6 images are missing in .*train2014: 10\.jpg, 11\.jpg, 12\.jpg, \.\.\.\. "):
        index.check_images(np.arange(7))


# -- The cache


@pytest.fixture
def no_building(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, an index that is built instead of read is an error."""

    def forbid(*arguments: Any) -> None:
        raise AssertionError("the index was built again")

    return lambda: monkeypatch.setattr(refer, "build_index", forbid)


def caches(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.crislit"))


def test_the_second_open_reads_the_cache_and_finds_everything_the_same(
    minirefer: Path, tmp_path: Path, no_building: Callable[[], None]
) -> None:
    root = copy_annotations(minirefer, tmp_path)
    built = open_set(root)
    assert len(caches(root / "refcoco")) == 1
    no_building()
    read = open_set(root)
    assert read.splits == built.splits
    assert read.image_folder == built.image_folder
    for name, array in vars(built._arrays).items():
        np.testing.assert_array_equal(getattr(read._arrays, name), array, err_msg=name)
        assert getattr(read._arrays, name).dtype == array.dtype, name


def copy_annotations(minirefer: Path, tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "images/train2014").mkdir(parents=True)
    (root / "refcoco").mkdir()
    for name in ("instances.json", "refs(unc).p"):
        shutil.copyfile(minirefer / "refcoco" / name, root / "refcoco" / name)  # the contents, not the read-only mode
    return root


def test_nothing_but_the_cache_is_left_beside_the_data(tmp_path: Path, cache_home: Path) -> None:
    root = write_set(tmp_path / "data")
    open_set(root)
    (cache,) = caches(root)
    assert {path.name for path in (root / "refcoco").iterdir()} == {"instances.json", "refs(unc).p", cache.name}
    assert not list(cache_home.iterdir())


CHANGES = {  # of a source: what is written instead of what, and what the index then says
    "refs(unc).p": (b"a square", b"A SQUARE", ("A SQUARE", 36)),
    "instances.json": (b"[2, 2, 8, 2, 8, 8, 2, 8]", b"[2, 2, 4, 2, 4, 4, 2, 4]", ("a square", 4)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_source_is_indexed_again(name: str, change: str, tmp_path: Path) -> None:
    root = write_set(tmp_path / "data")
    open_set(root)
    path = root / "refcoco" / name
    before, (old, new, expected) = path.stat(), CHANGES[name]
    # Neither format minds a line's end behind its own.
    path.write_bytes(path.read_bytes().replace(old, new) + (b"\n" if change == "size" else b""))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (change == "time")))
    assert (path.stat().st_size != before.st_size) == (change == "size")
    index = open_set(root)
    assert (index.sentence(0), index.mask(0).sum()) == expected


def test_two_refs_files_of_one_folder_do_not_share_a_cache(minirefer: Path) -> None:
    lengths = [len(ReferIndex.open(minirefer, folder, refs)) for folder, refs in (*SETS, *SETS)]  # built, then read
    assert lengths == [136, 95, 43, 18] * 2


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "cut off at the last byte": lambda content: content[:-1],
    "overwritten": lambda content: b"x" * len(content),
    "another file": lambda content: pickle.dumps([1, 2, 3]),
    "without one of its arrays": lambda content: content.replace(b'"ref_id"', b'"ref_ix"'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_built_again_with_a_warning(
    damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture, no_building: Callable[[], None]
) -> None:
    root = write_set(tmp_path / "data")
    open_set(root)
    (cache,) = caches(root)
    damaged = damage(cache.read_bytes())
    assert damaged != cache.read_bytes()
    cache.write_bytes(damaged)
    assert open_set(root).sentence(0) == "a square"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"ignoring the damaged cache {cache}")
    caplog.clear()
    no_building()
    open_set(root)
    assert not caplog.records, "the next open reads a whole one"


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a path for a file name": lambda a: a.update(text(["../../../etc/passwd"], "file_names")),
    "a folder for a file name": lambda a: a.update(text([".."], "file_names")),
    "sentences that end beyond the end": lambda a: a.update(sentences_ends=a["sentences_ends"] + 1),
    "ends that go back": lambda a: a.update(polygons_ends=np.array([8, -4, 8])),
    "a ref too many": lambda a: a.update(ref_id=np.array([1, 2])),
    "an image that is not there": lambda a: a.update(ref_image=a["ref_image"] + 1),
    "a split before the first": lambda a: a.update(split=a["split"] - 1),
    "a picture without end": lambda a: a.update(image_size=np.array([[2**40, 2**40]])),
    "a picture without height": lambda a: a.update(image_size=np.array([[0, 20]])),
    "one side only": lambda a: a.update(image_size=np.array([[12]])),
    "fractions for ids": lambda a: a.update(ref_id=a["ref_id"] + 0.5),
    "runs that fill more": lambda a: a.update(runs=np.array([2**40]), ref_runs_ends=np.array([1])),
    "runs that wrap around": lambda a: a.update(runs=np.full(4, 2**62), ref_runs_ends=np.array([4])),
    "a negative run": lambda a: a.update(runs=np.array([-5, 245]), ref_runs_ends=np.array([2])),
    "NaN for a point": lambda a: a.update(points=a["points"] * np.nan),
    "points far away": lambda a: a.update(points=a["points"] * 1e9),
    "half a point": lambda a: a.update(points=a["points"][:-1], polygons_ends=np.array([7])),
    "sentences that are no text": lambda a: a.update(sentences=np.full_like(a["sentences"], 0xFF)),
    "a split's name that is no text": lambda a: a.update(split_names=np.full_like(a["split_names"], 0xFF)),
    "a polygon of two points": lambda a: a.update(polygons_ends=np.array([4, 8]), ref_polygons_ends=np.array([2])),
    "a ref without a sentence": lambda a: a.update(
        sentence_id=a["sentence_id"][:0],
        sentences=a["sentences"][:0],
        sentences_ends=a["sentences_ends"][:0],
        ref_sentences_ends=a["ref_sentences_ends"] * 0,
    ),
    "a picture larger than any": lambda a: a.update(image_size=np.array([[2**15, 2**15]])),
    "an endless outline": lambda a: a.update(points=np.tile([0.0, 0, 3e5, 3e5], 9), polygons_ends=np.array([36])),
}


def test_a_cache_for_which_there_is_no_room_goes_elsewhere(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch, no_building: Callable[[], None]
) -> None:
    root = write_set(tmp_path / "data")

    def save(tensors: dict[str, Any], path: Path, metadata: dict[str, str] | None) -> None:
        if path.is_relative_to(root):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(refer, "save_file", save)
    assert open_set(root).sentence(0) == "a square"
    assert not caches(root)
    assert len(list(cache_home.rglob("*.crislit"))) == 1
    no_building()
    assert open_set(root).sentence(0) == "a square"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ref_id": 3.7}, "3.7 is no whole number"),
        ({"image_id": 2**70}, "does not fit 64 bits"),
        ({"ann_id": 2**70}, "does not fit 64 bits"),
    ],
)
def test_numbers_that_are_no_ids_are_errors(changes: dict[str, Any], expected: str) -> None:
    refs, instances = one_ref()
    refs[0] |= changes
    with pytest.raises(InputError, match=expected):
        build_index(refs, instances, Path("refs.p"))


def test_ids_that_all_have_one_hash_are_refused() -> None:
    refs, instances = one_ref()
    instances["images"] += [{"id": number * (2**61 - 1)} for number in range(1, 30_000)]
    with pytest.raises(InputError, match=r"instances\.json should hold a list 'images'"):
        build_index(refs, instances, Path("refs.p"))


def text(strings: list[str], name: str) -> dict[str, Any]:
    joined = [np.frombuffer(string.encode(), np.uint8) for string in strings]
    return {name: np.concatenate(joined), f"{name}_ends": np.cumsum([len(part) for part in joined])}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_cache_that_another_made_is_checked(
    forge: Callable[[dict[str, Any]], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_set(tmp_path / "data")
    open_set(root)
    (cache,) = caches(root)
    arrays = load_file(cache)
    save_file(arrays, cache)
    open_set(root)
    assert "ignoring" not in caplog.text, "what was only written again is taken"
    forge(arrays)
    save_file(arrays, cache)
    index = open_set(root)
    assert [index.sentence(0), index.image_path(0).name, index.mask(0).sum()] == ["a square", "seven.jpg", 36]
    assert any(record.getMessage().startswith(f"ignoring the damaged cache {cache}") for record in caplog.records)


def test_a_refs_file_of_too_many_containers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MOST_CONTAINERS", 1000)
    path = tmp_path / "refs.p"
    for protocol in PROTOCOLS:
        crowds: list[list[Any]] = [[[] for _ in range(1001)], [{} for _ in range(1001)], [(i,) for i in range(1001)]]
        for value in crowds:
            path.write_bytes(pickle.dumps(value, protocol))
            with pytest.raises(InputError, match=r"refs\.p: it has more than 1,000 lists, tuples and dictionaries"):
                load_pickle(path)
        path.write_bytes(pickle.dumps(["x"] * 10_000, protocol))
        assert len(load_pickle(path)) == 10_000


def test_a_read_only_data_folder_is_cached_elsewhere_and_stays_untouched(
    tmp_path: Path, cache_home: Path, no_building: Callable[[], None]
) -> None:
    root = write_set(tmp_path / "data")
    folder = root / "refcoco"
    folder.chmod(0o555)
    try:
        before = folder.stat().st_mtime_ns, sorted(folder.iterdir())
        open_set(root)
        assert (folder.stat().st_mtime_ns, sorted(folder.iterdir())) == before
        (cache,) = caches(cache_home)
        assert cache.parent == cache_home / "crislit"
        no_building()
        assert open_set(root).sentence(0) == "a square"
    finally:
        folder.chmod(0o755)  # so that pytest can remove it


def test_an_index_that_cannot_be_cached_anywhere_still_opens_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_set(tmp_path / "data")
    blocked = tmp_path / "a file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    (root / "refcoco").chmod(0o555)
    try:
        assert open_set(root).sentence(0) == "a square"
    finally:
        (root / "refcoco").chmod(0o755)
    assert any("could not be cached" in record.getMessage() for record in caplog.records)


def test_a_set_that_is_moved_does_not_take_another_sets_cache(tmp_path: Path) -> None:
    first = write_set(tmp_path / "first")
    open_set(first)
    shutil.copytree(first, tmp_path / "second")  # with cache, sizes and times
    refs, _ = one_ref()
    refs[0]["sentences"][0]["sent"] = "A SQUARE"
    path = tmp_path / "second/refcoco/refs(unc).p"
    before = path.stat()
    path.write_bytes(pickle.dumps(refs))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_set(tmp_path / "second").sentence(0) == "A SQUARE"
