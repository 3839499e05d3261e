"""Remarks, the automatic split and contact sheets of custom data."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from crislit import check_data
from crislit.data import (
    draw_sheets,
    find_remarks,
    measure_targets,
    read_custom,
    read_images,
)
from crislit.data.custom import figures
from crislit.data.custom.builder import CustomData
from crislit.data.custom.figures import DIMMED, SIDE, choose_rows, outline
from crislit.data.custom.reader import split_by_image
from crislit.data.custom.remarks import Remark
from crislit.data.sources import build_source
from crislit.errors import InputError, see
from tests.conftest import shared

HEIGHT, WIDTH = 40, 60


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def write(folder: Path, *samples: dict[str, Any], equal: tuple[str, ...] = ()) -> str:
    """Write images of different content, except the equal ones, and a list; return its path."""
    for place, name in enumerate(sorted({sample["image"] for sample in samples})):
        shade = 99 if name in equal else 100 + place
        image = np.full((HEIGHT, WIDTH, 3), shade, dtype=np.uint8)
        PIL.Image.fromarray(image).save(folder / name)
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, samples)), encoding="utf-8")
    return str(folder / "d.jsonl")


def sample(image: int | str, sentence: str = "a dog", **more: Any) -> dict[str, Any]:
    name = image if isinstance(image, str) else f"{image}.png"
    polygons = {} if {"mask", "polygons"} & set(more) else {"polygons": box(10, 5, 30, 25)}
    return {"image": name, "sentence": sentence, **polygons, **more}


def remarks_of(data: CustomData, max_tokens: int = 22) -> dict[str, tuple[int, ...]]:
    problems, digests = read_images(data)
    assert not problems
    remarks = find_remarks(data, measure_targets(data), digests, max_tokens)
    return {remark.text: remark.rows for remark in remarks}


TWICE = {**sample(90), "sentence": None, "sentences": ["cat", "Cat "]}


def spread(count: int) -> list[dict[str, Any]]:
    """Return unsuspicious samples of train and val."""
    words = ("red", "blue", "left", "right", "tall", "small", "old", "young", "near", "far")
    return [
        sample(i, f"the {words[i % 10]} dog", split="train" if i < count - 6 else "val")
        for i in range(count)
    ]


def test_unsuspicious_data_have_no_remark(tmp_path: Path) -> None:
    assert remarks_of(read_custom(write(tmp_path, *spread(10)))) == {}


@pytest.mark.parametrize(
    ("samples", "expected", "rows"),
    [
        ([sample(90, polygons=box(0, 0, 60, 35))], "1 mask covers more than half", (10,)),
        ([sample(90, polygons=box(3, 3, 6, 6))], "1 mask covers less than 0.1%", (10,)),
        ([sample(90), sample(90, polygons=box(1, 1, 9, 9))], "1 sentence also describes", (11,)),
        ([sample(90), sample(90, "cat")], "1 mask is that of another object", (11,)),
        ([sample(90, "left_shoe")], "1 sentence looks like a label or the name of a file", (10,)),
        ([sample(90, "IMG001"), sample(91, "p0.jpg")], "2 sentences look like a label", (10, 11)),
        ([TWICE], "1 sentence is listed twice for the same object (line 11)", (10,)),
        ([sample(90, "word " * 30)], "1 sentence is longer than 22 tokens and", (10,)),
        ([sample(0, "cat", split="val")], "1 image of val is also in train, so", ()),
    ],
)  # fmt: skip
def test_what_is_suspicious_is_remarked(
    samples: list[dict[str, Any]], expected: str, rows: tuple[int, ...], tmp_path: Path
) -> None:
    remarks = remarks_of(read_custom(write(tmp_path, *spread(10), *samples)))
    [found] = [text for text in remarks if text.startswith(expected)]
    assert remarks[found] == rows


def test_the_same_sentence_everywhere_and_a_small_or_missing_val_are_remarked(
    tmp_path: Path,
) -> None:
    samples = [sample(i, split=split) for i, split in enumerate(("train", "train", "val"))]
    remarks = remarks_of(read_custom(write(tmp_path, *samples)))
    assert list(remarks) == [
        "val has few images (1), so its scores depend on chance",
        "all objects have the same sentence, 'a dog'",
    ]
    [missing] = remarks_of(read_custom(write(tmp_path, sample(1))))
    assert missing.startswith("split 'val' is missing, which training needs; dataset.val_share=0.2")


def test_images_of_equal_content_in_two_splits_are_remarked(tmp_path: Path) -> None:
    samples = [*spread(10), sample("copy.png", split="val")]
    remarks = remarks_of(read_custom(write(tmp_path, *samples, equal=("0.png", "copy.png"))))
    expected = "1 image of val has the same content as images of train (copy.png and 0.png)"
    assert {text.split(", so")[0]: rows for text, rows in remarks.items()} == {expected: (10,)}


@pytest.mark.parametrize(
    ("split", "meant"),
    [
        ("trian", "train"),
        ("Trains", "train"),
        ("vali", "val"),
        ("eval", "val"),
        ("validate", "val"),
        ("tset", "test"),
        ("testa", "testA"),
        ("fold 1", None),
        ("7", None),
    ],
)
def test_an_unusual_split_is_remarked_with_the_usual_one(
    split: str, meant: str | None, tmp_path: Path
) -> None:
    file = write(tmp_path, *spread(10), sample(90, split=split), sample(91, "cat", split=split))
    hint = "" if meant is None else f": did you mean {meant!r}?"
    assert remarks_of(read_custom(file)) == {
        f"split {split!r} (2 objects) is not one of train, val, test, testA, testB, so it is only "
        f"evaluated{hint}": (10, 11)
    }


@pytest.mark.parametrize("split", ["Training", "VALID", "validation", "test", "testA", "testB"])
def test_usual_splits_are_not_remarked(split: str, tmp_path: Path) -> None:
    assert remarks_of(read_custom(write(tmp_path, *spread(10), sample(90, split=split)))) == {}


def test_a_missing_split_names_the_one_that_is_like_it(tmp_path: Path) -> None:
    samples = [sample(0, split="trian"), sample(1, split="val"), sample(2, split="testA")]
    index = build_source({"file": write(tmp_path, *samples)}, tmp_path).open()
    for asked, hint in (
        ("train", ": is 'trian' misspelled in it?" + see("no-val")),
        ("vall", ": did you mean 'val'?"),
        ("testa", ": did you mean 'testA'?"),
        ("fold 1", ""),
    ):
        with pytest.raises(InputError) as error:
            index.split_refs(asked)
        expected = f"this data set has no split {asked!r}, only val, testA, trian{hint}"
        assert str(error.value) == expected


def test_polygons_that_reach_out_of_the_image_are_remarked_with_their_share(
    tmp_path: Path,
) -> None:
    inexact = box(-1, 5, 30, 25), box(40, 5, 61, 40.5)
    half, quarter = box(30, 5, 90, 25), [[10, 5, 30, 5, 30, 25, -20, 25]]
    samples = [*spread(10), *(sample(90 + i, polygons=p) for i, p in enumerate(inexact))]
    assert remarks_of(read_custom(write(tmp_path, *samples))) == {}
    samples += [sample(92, "cat", polygons=half), sample(93, "fox", polygons=quarter)]
    assert remarks_of(read_custom(write(tmp_path, *samples))) == {
        "2 masks have up to 50% of the points of polygons outside of the image, where they are cut "
        "off (lines 13, 14): drawn on an image of another size?": (12, 13)
    }


def test_measures_are_those_of_the_drawn_mask(tmp_path: Path) -> None:
    polygon = sample(0, polygons=box(10, 5, 30, 25))
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[5:25, 10:30] = 255
    PIL.Image.fromarray(mask).save(tmp_path / "m.png")
    data = read_custom(write(tmp_path, polygon, sample(0, mask="m.png")))
    first, second = measure_targets(data)
    assert first == second
    assert (first.pixels, first.area) == (400, 400 / 2400)


# -- The automatic split


def splits(data: CustomData) -> dict[str, set[str]]:
    names = {image["id"]: image["file_name"] for image in data.instances["images"]}
    found: dict[str, set[str]] = {}
    for ref in data.refs:
        found.setdefault(names[ref["image_id"]], set()).add(ref["split"])
    return found


def test_val_share_moves_whole_images_and_always_the_same(tmp_path: Path) -> None:
    samples = [sample(i, s, polygons=box(i, 5, i + 9, 25)) for i in range(20) for s in ("a", "b")]
    file = write(tmp_path, *samples, sample("t.png", split="test"))
    moved = splits(read_custom(file, val_share=0.2))
    assert all(len(found) == 1 for found in moved.values())
    assert list(moved.values()).count({"val"}) == 4
    assert moved["t.png"] == {"test"}
    backwards = write(tmp_path, *reversed(samples), sample("t.png", split="test"))
    assert splits(read_custom(backwards, val_share=0.2)) == moved
    more = splits(read_custom(write(tmp_path, *samples, sample("new.png")), val_share=0.2))
    assert sum(more[name] != found for name, found in moved.items() if name in more) <= 1
    file = write(tmp_path, *samples, sample("t.png", split="test"))
    index = build_source({"file": file, "val_share": 0.2}, tmp_path).open()
    assert index.splits == ("train", "val", "test")
    assert len(index.split_refs("val")) == 8


@pytest.mark.parametrize("share", [0, 1, -0.5, 2, True, "0.2", None, float("nan")])
def test_other_shares_are_errors(share: Any, tmp_path: Path) -> None:
    data = read_custom(write(tmp_path, *[sample(i) for i in range(3)]))
    with pytest.raises(InputError, match="val_share must be above 0 and below 1"):
        split_by_image(data, share)


def test_val_share_never_replaces_a_val_or_takes_all_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="for data without val, and these have it"):
        read_custom(write(tmp_path, *spread(10)), val_share=0.2)
    with pytest.raises(InputError, match="needs more images: 1 of 1 would go to val"):
        read_custom(write(tmp_path, sample(1)), val_share=0.2)


def test_mask_value_counts_for_every_mask_and_a_line_may_differ(tmp_path: Path) -> None:
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    labels[5:25, 10:30], labels[5:25, 40:50] = 1, 2
    PIL.Image.fromarray(labels).save(tmp_path / "m.png")
    file = write(tmp_path, sample(0, mask="m.png"), sample(0, mask="m.png", mask_value=2))
    assert len(read_custom(file).problems) == 1
    index = build_source({"file": file, "mask_value": 1}, tmp_path).open()
    assert np.array_equal(index.mask(0), labels == 1)
    assert np.array_equal(index.mask(1), labels == 2)
    assert read_custom(file, mask_value=1).mask_values == {
        "1 (mask_value) of 0, 1, 2": 1,
        "2 (mask_value) of 0, 1, 2": 1,
    }
    with pytest.raises(InputError, match="mask_value is for mask images"):
        read_custom(write(tmp_path, sample(0)), mask_value=1)


# -- Contact sheets


def test_suspicious_samples_come_first_and_others_are_spread_evenly() -> None:
    remarks = [Remark("a", (50, 7)), Remark("b", (7, 3)), Remark("c")]
    assert choose_rows(100, remarks, 8) == [50, 7, 3, 0, 21, 40, 61, 80]
    assert choose_rows(5, [], 8) == [0, 1, 2, 3, 4]
    assert choose_rows(100, [Remark("a", tuple(range(20)))], 8) == list(range(8))
    assert choose_rows(0, [], 8) == []


@pytest.mark.parametrize("size", [(40, 60), (1000, 600)])
def test_a_tile_is_dimmed_outside_the_target_and_outlined(size: tuple[int, int]) -> None:
    mask = np.zeros(size, dtype=np.uint8)
    mask[size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = 1
    tile = outline(np.full((*size, 3), 200, dtype=np.uint8), mask)
    assert max(tile.shape) == SIDE
    rows, columns, _ = tile.shape
    assert (tile[rows * 3 // 8, columns * 3 // 8] == 200).all()
    assert (tile[rows * 3 // 4, columns * 3 // 4] == int(DIMMED * 200)).all()
    assert (tile == (230, 0, 0)).all(axis=2).any()


def test_a_single_pixel_of_a_large_image_stays_visible() -> None:
    mask = np.zeros((2000, 2000), dtype=np.uint8)
    mask[1234, 567] = 1
    tile = outline(np.zeros((2000, 2000, 3), dtype=np.uint8), mask)
    assert (tile == (230, 0, 0)).all(axis=2).any()


def test_sheets_are_bounded_and_replace_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "MAX_SHEETS", 2)
    samples = [sample(i % 10, "the $x^2$ dog \u7ea2\u8272", split="train") for i in range(60)]
    data = read_custom(write(tmp_path, *samples))
    folder = tmp_path / "sheets"
    folder.mkdir()
    for name in ("crislit-sheet-9.png", "crislit-sheet-of-mine.png", "sheet-1.png"):
        (folder / name).write_text("")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph")
        paths, notes = draw_sheets(data, [], folder)
    assert [path.name for path in paths] == [f"crislit-sheet-{i}.png" for i in (1, 2)]
    assert sorted(path.name for path in folder.iterdir()) == [
        *(path.name for path in paths),
        "crislit-sheet-of-mine.png",
        "sheet-1.png",
    ]
    for path in paths:
        with PIL.Image.open(path) as image:
            assert 1000 < min(image.size) < 3000
    assert len(notes) <= 1


def test_sheets_never_replace_images_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Path(write(tmp_path / "photos", sample("crislit-sheet-2.png"))).unlink()
    line = json.dumps(sample("photos/crislit-sheet-2.png"))
    (tmp_path / "d.jsonl").write_text(line)
    data = read_custom(str(tmp_path / "d.jsonl"))
    assert not data.problems
    with pytest.raises(InputError, match="holds images of the data: choose another folder"):
        draw_sheets(data, [], tmp_path / "sheets" / ".." / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["crislit-sheet-2.png"]


def test_check_data_draws_what_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, *spread(10), sample("cut.png", "cat"))
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match="error: 1 problem in"):
        check_data.main([file, "--figures", str(tmp_path / "sheets")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "sheets/crislit-sheet-1.png")
    with PIL.Image.open(lines[-1]) as image:
        assert image.width > 1000


def test_check_data_of_the_maintainers_masks_marks_the_suspicious_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shared("cases/03-masks") / "data.jsonl"
    with pytest.raises(SystemExit, match="error: 2 problems"):
        check_data.main([str(file), "--figures", str(tmp_path)])
    output = capsys.readouterr().out
    assert [line.split(":")[0] for line in output.splitlines()[:2]] == ["line 1", "line 2"]
    assert "note: 2 masks cover more than half of their image (lines 4, 5)" in output


def test_the_help_of_check_data_does_not_wait_for_pytorch() -> None:
    script = """
import sys
from crislit import check_data
try:
    check_data.main(["--help"])
except SystemExit:
    print(*sorted({"torch", "numpy", "cv2", "matplotlib"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    *lines, loaded = result.stdout.splitlines()
    assert "check_data FILE" in "".join(lines)
    assert loaded == ""
