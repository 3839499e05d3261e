"""REFER annotations: masks as pycocotools draws them, and an error for every malformed entry."""

import copy
import itertools
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pycocotools import mask as coco_mask

from crislit.data.refer_annotations import MAX_SIDE, Mask, parse_runs, parse_segmentation
from crislit.data.refer_build import build_index
from crislit.data.refer_index import ReferIndex
from crislit.errors import InputError
from tests.conftest import shared
from tests.io.test_pickles import open_set, plain
from tests.refer_data import (
    HEIGHT,
    SQUARE,
    WIDTH,
    Instances,
    Refs,
    decode,
    one_ref,
    write_set,
)

# The same examples on every run, and no failure on a busy machine.
relaxed = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def index_of(refs: Refs, instances: Instances) -> ReferIndex:
    arrays = build_index(refs, instances, Path("refcoco/refs(unc).p"))
    return ReferIndex(arrays, Path("images"), Path("instances.json"))


def mask_of(segmentation: Any, height: int = HEIGHT, width: int = WIDTH) -> Mask:
    refs, instances = one_ref(segmentation)
    instances["images"][0].update(height=height, width=width)
    return index_of(refs, instances).mask(0)


# -- Masks


def test_a_square_covers_the_pixels_between_its_corners() -> None:
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[2:8, 2:8] = 1
    np.testing.assert_array_equal(mask_of([SQUARE]), expected)


def test_overlapping_polygons_do_not_cancel_out() -> None:
    mask = mask_of([[0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 6, 2, 6, 6, 2, 6], [0, 0, 4, 0, 4, 4, 0, 4]])
    assert mask[2:4, 2:4].all()
    assert mask.sum() == 16 + 16 - 4


def test_degenerate_polygons_are_dropped_and_the_others_kept() -> None:
    odd, two_points, one_number = [0, 0, 19, 0, 19, 11, 0], [0, 0, 19, 11], [0.0]
    mask = mask_of([odd, SQUARE, two_points, [], one_number])
    np.testing.assert_array_equal(mask, mask_of([SQUARE]))


EMPTY = {
    "no polygon": [],
    "degenerate polygons only": [[1, 1, 5, 1], [1, 1, 5, 1, 5, 5, 1]],
    "a line": [[2, 2, 8, 2, 2, 2]],
    "outside the image": [[30, 2, 35, 2, 35, 8, 30, 8]],
    "run lengths of zeros": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
    "run lengths with an empty run": {"size": [HEIGHT, WIDTH], "counts": [100, 0, 140]},
}


@pytest.mark.parametrize("segmentation", EMPTY.values(), ids=EMPTY)
def test_a_ref_with_an_empty_mask_is_reported(
    segmentation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    refs, instances = one_ref()
    empty = copy.deepcopy(refs[0]) | {"ref_id": 4711, "ann_id": 2}
    instances["annotations"].append({"id": 2, "image_id": 7, "segmentation": segmentation})
    index = index_of([*refs, empty], instances)
    np.testing.assert_array_equal(index.mask(1), np.zeros((HEIGHT, WIDTH), dtype=np.uint8))
    assert index.mask(0).sum() == 36, "the ref before it keeps its pixels"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("1 ref has an empty mask: ref_id 4711")


def test_a_ref_with_pixels_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    index_of(*one_ref())
    assert not caplog.records


def test_polygon_points_a_little_outside_the_image_are_clipped_at_its_border() -> None:
    mask = mask_of([[-3, -3, 4, -3, 4, 4, -3, 4]])
    assert mask[:4, :4].all()
    assert mask.sum() == 16


def random_masks() -> list[Mask]:
    """Return masks with runs of all lengths; first and last pixel set or not."""
    rng = np.random.default_rng(0)
    masks = []
    for _ in range(60):
        height, width = rng.integers(1, 90, 2)
        mask = (rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])).astype(np.uint8)
        if rng.random() < 0.5:
            top, left = rng.integers(0, height), rng.integers(0, width)
            bottom, right = top + rng.integers(1, 90), left + rng.integers(1, 90)
            mask[top:bottom, left:right] = rng.integers(2)
        masks.append(mask)
    # Runs of 20 bits, then one shorter than the run before the last.
    long_runs = np.zeros((1000, 1500), dtype=np.uint8)
    long_runs[:, 700:] = 1
    long_runs[3:5, 900] = 0
    return [*masks, long_runs, np.ones((5, 4), dtype=np.uint8)]


def run_lengths(mask: Mask) -> list[int]:
    """Return run lengths column by column, starting with zeros."""
    groups = itertools.groupby(mask.ravel(order="F").tolist())
    lengths = [(value, len(list(group))) for value, group in groups]
    return [0] * (lengths[0][0] == 1) + [length for _, length in lengths]


@pytest.mark.parametrize("kind", ["uncompressed", "compressed bytes", "compressed text"])
def test_run_lengths_decode_to_the_mask_that_was_encoded(kind: str) -> None:
    for mask in random_masks():
        encoded = coco_mask.encode(np.asfortranarray(mask))["counts"]
        counts = {
            "uncompressed": run_lengths(mask),
            "compressed bytes": encoded,
            "compressed text": encoded.decode(),
        }[kind]
        decoded = mask_of({"size": list(mask.shape), "counts": counts}, *mask.shape)
        np.testing.assert_array_equal(decoded, mask)


def test_compressed_run_lengths_are_those_that_pycocotools_compressed() -> None:
    for mask in random_masks():
        encoded = coco_mask.encode(np.asfortranarray(mask))["counts"]
        assert parse_runs(encoded) == run_lengths(mask)


def test_the_largest_allowed_image_takes_no_memory_before_its_mask_is_drawn() -> None:
    full = {"size": [MAX_SIDE, MAX_SIDE], "counts": [0, MAX_SIDE**2]}
    polygons, runs = parse_segmentation(full, (MAX_SIDE, MAX_SIDE))
    assert (polygons, runs) == ([], [0, MAX_SIDE**2])


# -- Lists of run lengths, as in refclef and RRSIS-D


def as_runs(mask: Mask, kind: str) -> dict[str, Any]:
    counts: Any = coco_mask.encode(np.asfortranarray(mask))["counts"]
    counts = run_lengths(mask) if kind == "uncompressed" else counts.decode()
    return {"size": list(mask.shape), "counts": counts}


@pytest.mark.parametrize("kind", ["uncompressed", "compressed"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_list_of_run_lengths_is_their_union(count: int, kind: str) -> None:
    for mask in random_masks():
        rng = np.random.default_rng(mask.size)
        masks = [mask, *(rng.integers(0, 2, (count - 1, *mask.shape), dtype=np.uint8))]
        united = mask_of([as_runs(each, kind) for each in masks], *mask.shape)
        np.testing.assert_array_equal(united, np.max(masks, axis=0))


def test_a_list_of_one_run_length_is_the_same_data_as_the_run_length() -> None:
    runs = {"size": [HEIGHT, WIDTH], "counts": [5, 0, 0, 2, HEIGHT * WIDTH - 7]}
    assert index_of(*one_ref([runs])).digest == index_of(*one_ref(runs)).digest


@given(
    masks=npst.arrays(
        np.uint8,
        st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
        elements=st.integers(0, 1),
    )
)
@settings(relaxed, max_examples=200)
def test_the_union_of_run_lengths_is_written_like_the_mask_itself(masks: Mask) -> None:
    size = masks.shape[1:]
    _, runs = parse_segmentation([as_runs(mask, "uncompressed") for mask in masks], size)
    union = masks.max(axis=0)
    assert runs == (run_lengths(union) if union.any() else [])


def test_run_lengths_that_mark_nothing_add_nothing() -> None:
    empty = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    assert parse_segmentation([empty, empty], (HEIGHT, WIDTH)) == ([], [])
    square = {"size": [HEIGHT, WIDTH], "counts": [0, 4, HEIGHT * WIDTH - 4]}
    assert mask_of([empty, square, empty]).sum() == 4


def test_the_run_lengths_of_a_list_have_their_size_however_it_is_written() -> None:
    runs = {"size": [float(HEIGHT), str(WIDTH)], "counts": [0, 4, HEIGHT * WIDTH - 4]}
    assert mask_of([runs]).sum() == 4


@pytest.mark.parametrize("reverse", [False, True])
def test_a_mixture_of_polygons_and_run_lengths_is_an_error_with_its_cure(reverse: bool) -> None:
    parts = [SQUARE, {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}]
    expected = "ref 3: its mask mixes polygons and run lengths: convert all to run lengths"
    with pytest.raises(InputError, match=expected):
        mask_of(parts[::-1] if reverse else parts)


@pytest.mark.parametrize("size", [[WIDTH, HEIGHT], [HEIGHT, WIDTH, 1]])
def test_each_run_length_of_a_list_has_to_fill_the_image(size: list[int]) -> None:
    good = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    with pytest.raises(InputError, match="ref 3: its run lengths do not fill its image of 12 x 20"):
        mask_of([good, good | {"size": size}])


def test_a_set_with_lists_of_run_lengths_has_the_masks_that_pycocotools_decodes(
    tmp_path: Path,
) -> None:
    root = tmp_path / "data"
    shutil.copytree(shared("cases/08-refer-layout/list-of-run-lengths"), root)
    index = open_set(root)
    annotations = json.loads((root / "refcoco/instances.json").read_text())["annotations"]
    for ref, annotation in enumerate(annotations):
        expected = coco_mask.decode(annotation["segmentation"]).max(axis=2)
        assert expected.any()
        np.testing.assert_array_equal(index.mask(ref), expected)


# -- Files of other contents


@pytest.mark.parametrize("refs", [None, 5, "text", {}, {"val": []}, (), b"bytes"], ids=repr)
def test_a_refs_file_without_a_list_is_an_error_that_names_it(refs: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"refs\(unc\)\.p should hold a list of refs"):
        open_set(write_set(tmp_path / "data", pickle.dumps(refs)))


@pytest.mark.parametrize("ref", [None, 5, "text", [], {}, ("ref_id", 3)], ids=repr)
def test_an_entry_other_than_a_ref_is_an_error_that_names_the_file(
    ref: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"refs\(unc\)\.p: ref .* is malformed"):
        open_set(write_set(tmp_path / "data", pickle.dumps([ref])))


NOT_INSTANCES: list[Any] = [
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


@pytest.mark.parametrize("instances", NOT_INSTANCES, ids=json.dumps)
def test_an_instances_file_without_lists_of_items_is_an_error_that_names_it(
    instances: Any, tmp_path: Path
) -> None:
    root = write_set(tmp_path / "data", instances=json.dumps(instances).encode())
    expected = r"instances\.json should hold a list '(images|annotations)'"
    with pytest.raises(InputError, match=expected):
        open_set(root)


# -- Malformed entries


def parts_of(refs: Refs, instances: Instances) -> dict[str, dict[str, Any]]:
    """Return the dictionaries that a set of one ref consists of."""
    (ref,), (image,), (annotation,) = refs, instances["images"], instances["annotations"]
    return {"ref": ref, "sentence": ref["sentences"][0], "image": image, "annotation": annotation}


REQUIRED = [
    *(("ref", key) for key in ("ann_id", "image_id", "split", "sentences")),
    *(("sentence", key) for key in ("sent", "sent_id")),
    *(("image", key) for key in ("height", "width", "file_name")),
    *(("annotation", key) for key in ("image_id", "segmentation")),
]


@pytest.mark.parametrize(("part", "key"), REQUIRED)
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


def change(part: str, **changes: Any) -> Callable[[dict[str, dict[str, Any]]], object]:
    """Return what changes keys of one of `parts_of`."""
    return lambda parts: parts[part].update(changes)


HUGE = 2**70
NEGATIVE_RUNS = {"size": [-HEIGHT, -WIDTH], "counts": [HEIGHT * WIDTH - 9, 9]}
MALFORMED: dict[str, Callable[[dict[str, dict[str, Any]]], object]] = {
    "an absent image": change("ref", image_id=8),
    "an absent annotation": change("ref", ann_id=9),
    "text for an image id": change("ref", image_id="seven"),
    "null for an image id": change("ref", image_id=None),
    "a fraction for an image id": change("ref", image_id=7.5),
    "true for an image id": change("ref", image_id=True),
    "an image id that is a list": change("ref", image_id=[7]),
    "an annotation of another image": change("annotation", image_id=8),
    "text for a ref id": change("ref", ref_id="three"),
    "a list for a split": change("ref", split=["val"]),
    "a number for sentences": change("ref", sentences=5),
    "bare texts for sentences": change("ref", sentences=["a square"]),
    # Training could not draw a sentence.
    "no sentence": change("ref", sentences=[]),
    "a number for a sentence": change("sentence", sent=5),
    "text for a sentence id": change("sentence", sent_id="x"),
    "text for a height": change("image", height="tall"),
    "NaN for a height": change("image", height=float("nan")),
    "an infinite height": change("image", height=float("inf")),
    "a height of zero": change("image", height=0),
    "a negative size": lambda parts: (
        parts["image"].update(height=-HEIGHT, width=-WIDTH),
        parts["annotation"].update(segmentation=NEGATIVE_RUNS),
    ),
    # pycocotools would end the process when it draws the mask.
    "an image larger than any memory": change("image", height=2**40),
    "None for a segmentation": change("annotation", segmentation=None),
    "a number for a segmentation": change("annotation", segmentation=5),
    "a polygon of words": change("annotation", segmentation=[["a"] * 6]),
    "a polygon of points": change("annotation", segmentation=[[1, 1, 5, 1, 5, [5, 1]]]),
    "a ref id too large for the index": change("ref", ref_id=HUGE),
    "a sentence id too large for the index": change("sentence", sent_id=HUGE),
    "half a character in a sentence": change("sentence", sent="\ud800"),
    "half a character in a split's name": change("ref", split="\ud800"),
    "half a character in a file name": change("image", file_name="\ud800.jpg"),
}


@pytest.mark.parametrize("damage", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_entry_is_an_error_that_names_file_and_ref(
    damage: Callable[[dict[str, dict[str, Any]]], object],
) -> None:
    refs, instances = one_ref()
    damage(parts_of(refs, instances))
    with pytest.raises(InputError, match=rf"refs\(unc\)\.p: ref {refs[0]['ref_id']}\b"):
        index_of(refs, instances)


@pytest.mark.parametrize(
    "name",
    ["../seven.jpg", "/etc/passwd", "a/seven.jpg", "a/../seven.jpg", "seven.jpg/", "", ".", ".."],
)
def test_a_file_name_with_a_path_in_it_is_an_error(name: str) -> None:
    refs, instances = one_ref()
    instances["images"][0]["file_name"] = name
    with pytest.raises(InputError, match=r"ref 3: its image's file name .* is not a plain name"):
        index_of(refs, instances)


WRITTEN: dict[str, Callable[[int], Any]] = {
    "a float": float,
    "text": str,
    "text with a point": "{}.0".format,
    "text with spaces": " {} ".format,
}


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("where", ["instances", "refs", "both"])
def test_whole_numbers_count_however_they_are_written(
    where: str, write: Callable[[int], Any]
) -> None:
    refs, instances = one_ref()
    expected = index_of(refs, instances)
    (image,), (annotation,) = instances["images"], instances["annotations"]
    if where != "refs":
        annotation |= {key: write(annotation[key]) for key in ("id", "image_id")}
        image |= {key: write(image[key]) for key in ("id", "height", "width")}
    if where != "instances":
        refs[0] |= {key: write(refs[0][key]) for key in ("ref_id", "ann_id", "image_id")}
        refs[0]["sentences"][0]["sent_id"] = write(refs[0]["sentences"][0]["sent_id"])
    index = index_of(refs, instances)
    assert index.digest == expected.digest
    assert (index.ref_id(0), index.image_id(0), index.sentence_id(0)) == (3, 7, 5)
    assert index.image_size(0) == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(index.mask(0), expected.mask(0))


def test_annotations_may_have_text_for_ids() -> None:
    refs, instances = one_ref()
    instances["annotations"][0]["id"] = refs[0]["ann_id"] = "550e8400-e29b-41d4-a716-446655440000"
    assert index_of(refs, instances).mask(0).sum() == 36


UUID = "550e8400-e29b-41d4-a716-446655440000"
NAMED: dict[str, tuple[dict[str, Any], str]] = {  # changes of the image, and the message
    "a UUID": ({"id": UUID}, f"image_id '{UUID}' is not a whole number: number the images 0, 1"),
    "a file name": ({"id": "seven"}, "image_id 'seven' is not a whole number: number the images"),
    "a negative id": ({"id": -1}, "image_id -1 is negative: number the images 0, 1, 2"),
    "null": ({"height": None}, "the height of its image, None is not a whole number: write the"),
    "words": ({"width": "20px"}, "the width of its image, '20px' is not a whole number: write"),
    "a fraction": ({"width": 20.5}, r"the width of its image, 20\.5 is not a whole number"),
    "zero": ({"width": 0}, r"its image is listed with 12 x 0 pixels .*, expected 1 to 32,768 per"),
    "a negative height": ({"height": -12}, "its image is listed with -12 x 20 pixels"),
}


@pytest.mark.parametrize(("changes", "expected"), NAMED.values(), ids=NAMED)
def test_an_unusable_id_or_size_is_named_with_its_cure(
    changes: dict[str, Any], expected: str
) -> None:
    refs, instances = one_ref()
    instances["images"][0] |= changes
    number = instances["images"][0]["id"]
    refs[0]["image_id"] = instances["annotations"][0]["image_id"] = number
    with pytest.raises(InputError, match=rf"refs\(unc\)\.p: ref 3: {expected}"):
        index_of(refs, instances)


@pytest.mark.parametrize("value", [None, 7.5, [7], {}, True])
@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_an_id_that_is_none_is_an_error_that_names_it_and_the_list(kind: str, value: Any) -> None:
    refs, instances = one_ref()
    instances[kind].append(instances[kind][0] | {"id": value})
    expected = rf"instances\.json should hold a list '{kind}' .* in COCO; the id .* is not a whole"
    with pytest.raises(InputError, match=expected) as caught:
        index_of(refs, instances)
    shown = f"of type {type(value).__name__}" if isinstance(value, (list, dict)) else repr(value)
    assert f"the id {shown} is" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ref_id": 3.7}, r"3\.7 is not a whole number"),
        ({"image_id": 2**70}, "does not fit 64 bits"),
        ({"ann_id": 2**70}, "does not fit 64 bits"),
    ],
)
def test_numbers_that_cannot_be_ids_are_errors(changes: dict[str, Any], expected: str) -> None:
    refs, instances = one_ref()
    refs[0] |= changes
    with pytest.raises(InputError, match=expected):
        build_index(refs, instances, Path("refs.p"))


def test_ids_with_equal_hashes_are_refused() -> None:
    refs, instances = one_ref()
    instances["images"] += [{"id": number * (2**61 - 1)} for number in range(1, 30_000)]
    with pytest.raises(InputError, match=r"instances\.json should hold a list 'images'"):
        build_index(refs, instances, Path("refs.p"))


def compress(mask: Mask) -> bytes:
    counts: bytes = coco_mask.encode(np.asfortranarray(mask))["counts"]
    return counts


WRONG_COUNTS = {
    "too few pixels": [HEIGHT * WIDTH - 1],
    "too many pixels": [0, HEIGHT * WIDTH + 1],
    "more pixels than fit in memory": [0, 2**60],
    "negative runs with the right sum": [0, HEIGHT * WIDTH + 60, -60],
    "no run": [],
    "compressed, too few pixels": "d4",
    "compressed, too many pixels": compress(np.ones((HEIGHT + 1, WIDTH), dtype=np.uint8)),
    "compressed, truncated": compress(np.ones((HEIGHT, WIDTH), dtype=np.uint8))[:-1],
    "compressed, empty": "",
    "compressed, invalid characters": "~~~",
    "compressed, characters beyond ASCII": "é",
    "compressed, an endless number": "o" * 50,
}


@pytest.mark.parametrize("counts", WRONG_COUNTS.values(), ids=WRONG_COUNTS)
def test_run_lengths_that_do_not_fill_their_image_are_an_error(counts: Any) -> None:
    expected = r"ref 3: its (compressed run lengths are damaged|run lengths do not fill)"
    with pytest.raises(InputError, match=expected):
        mask_of({"size": [HEIGHT, WIDTH], "counts": counts})


@pytest.mark.parametrize(
    "size", [[WIDTH, HEIGHT], [HEIGHT], [1, HEIGHT * WIDTH], [HEIGHT, WIDTH, 1]], ids=repr
)
def test_run_lengths_of_another_image_size_are_an_error(size: list[int]) -> None:
    expected = "ref 3: its run lengths do not fill its image of 12 x 20 pixels"
    with pytest.raises(InputError, match=expected):
        mask_of({"size": size, "counts": [100, 140]})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e9, -1e9, 1e308])
@pytest.mark.parametrize("position", [0, 5])
def test_polygon_points_that_are_not_numbers_or_far_away_are_an_error(
    bad: float, position: int
) -> None:
    points = [float(number) for number in SQUARE]
    points[position] = bad
    expected = "ref 3: a polygon of its mask has points that are not numbers, or far outside"
    with pytest.raises(InputError, match=expected):
        mask_of([SQUARE, points])


# -- Random input


@given(
    part=st.sampled_from(["ref", "sentence", "image", "annotation"]), data=st.data(), value=plain
)
@settings(relaxed, max_examples=200)
def test_any_value_anywhere_gives_an_index_or_an_error_that_names_the_file(
    part: str, data: st.DataObject, value: Any
) -> None:
    refs, instances = one_ref()
    changed = parts_of(refs, instances)[part]
    changed[data.draw(st.sampled_from(sorted(changed)))] = value
    index, message = None, ""
    try:
        index = index_of(refs, instances)
    except InputError as error:
        message = str(error)
    assert index is not None or "refs(unc).p" in message or "instances.json" in message
    if index is not None and max(index.image_size(0)) < 1000:
        assert index.mask(0).shape == index.image_size(0)


@given(
    mask=npst.arrays(
        np.uint8, st.tuples(st.integers(1, 30), st.integers(1, 30)), elements=st.integers(0, 1)
    )
)
@settings(relaxed, max_examples=150)
def test_any_mask_is_restored_from_its_run_lengths(mask: Mask) -> None:
    encoded = compress(mask)
    assert parse_runs(encoded) == run_lengths(mask)
    for counts in (encoded, encoded.decode(), run_lengths(mask)):
        decoded = mask_of({"size": [*mask.shape], "counts": counts}, *mask.shape)
        np.testing.assert_array_equal(decoded, mask)


@given(
    counts=st.lists(st.integers(-5, 300), max_size=6)
    | st.binary(max_size=12)
    | st.text(max_size=12),
    data=st.data(),
)
@settings(relaxed, max_examples=300)
def test_any_run_lengths_fill_their_image_or_are_refused(counts: Any, data: st.DataObject) -> None:
    if isinstance(counts, list) and data.draw(st.booleans()):
        counts.append(HEIGHT * WIDTH - sum(counts))
    segmentation = {"size": [HEIGHT, WIDTH], "counts": counts}
    try:
        polygons, runs = parse_segmentation(segmentation, (HEIGHT, WIDTH))
    except InputError:
        return
    except UnicodeEncodeError:  # build_index turns it into an InputError
        assert isinstance(counts, str)
        return
    assert not polygons
    assert sum(runs) == (HEIGHT * WIDTH if runs else 0)


@given(
    polygons=st.lists(
        st.lists(st.floats(-3 * WIDTH, 3 * WIDTH, width=32), min_size=6, max_size=12),
        min_size=1,
        max_size=3,
    )
)
@settings(relaxed, max_examples=150)
def test_any_polygons_give_the_union_that_pycocotools_draws(polygons: list[list[float]]) -> None:
    even = [polygon for polygon in polygons if len(polygon) % 2 == 0]
    np.testing.assert_array_equal(mask_of(polygons), decode(even, HEIGHT, WIDTH))
