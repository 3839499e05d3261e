"""CSV tables and ids of COCO files: nothing is cut, ignored or guessed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from crislit.data import read_custom
from crislit.data.custom.builder import CustomData
from crislit.errors import InputError
from tests.conftest import shared

BOX = [[10, 5, 30, 5, 30, 25, 10, 25]]


def read(
    folder: Path, table: str | bytes, change: dict[str, Any] | None = None, **options: Any
) -> CustomData:
    """Read a COCO file of the images and annotations 0 to 2 with a table."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in range(3)]
    annotations = [{"id": i, "image_id": i, "segmentation": BOX} for i in range(3)]
    content: dict[str, Any] = {"images": images, "annotations": annotations}
    for image in images:
        PIL.Image.fromarray(np.full((40, 60, 3), 99, dtype=np.uint8)).save(
            folder / str(image["file_name"])
        )
    for place, value in (change or {}).items():
        kind, row, key = place.split(".")
        content[kind][int(row)][key] = value
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "s.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    return read_custom(str(folder / "instances.json"), str(folder / "s.csv"), **options)


def sentences(data: CustomData) -> list[tuple[str, list[str]]]:
    return [(ref["split"], [s["sent"] for s in ref["sentences"]]) for ref in data.refs]


def reasons(data: CustomData) -> list[tuple[int, str]]:
    return [(problem.line, problem.reason) for problem in data.problems]


MANY = "put quotation marks around a sentence with a comma"


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("ann_id,sentence,split\n0,a disc, red,train\n1,dog,val\n", (2, 4, 3, MANY)),
        ("ann_id,split,sentence\n1,val,dog\n0,train,a disc, red\n", (3, 4, 3, MANY)),
        ("ann_id,sentence\n0,a disc, red\n1,dog\n", (2, 3, 2, MANY)),
        ("ann_id,sentence,split\n1,dog,val\n\n0,dog\n", (4, 2, 3, "write every column")),
        ("ann_id;sentence;split\n0;a; b;val\n1;dog;val\n", (2, 4, 3, "a semicolon")),
    ],
)
def test_a_row_of_another_length_is_a_problem(
    table: str, expected: tuple[int, int, int, str], tmp_path: Path
) -> None:
    data = read(tmp_path, table)
    line, found, header, cure = expected
    [(number, reason)] = reasons(data)
    assert number == line
    assert f"the line has {found} fields, the header {header}: " in reason
    assert cure in reason
    assert sentences(data) in ([("val", ["dog"])], [("train", ["dog"])])


@pytest.mark.parametrize(
    "table",
    [
        'ann_id,sentence,split\n0,"the ""red"" disc, left",val\n1,a "b" c,train\n',
        'ann_id, sentence, split\n0, "the ""red"" disc, left", val\n1, a "b" c, train\n',
        'ann_id;sentence;split\n0;the "red" disc, left;val\n1;a "b" c;train\n',
        'ann_id\tsentence\tsplit\n0\tthe "red" disc, left\tval\n1\ta "b" c\ttrain\n',
        '\ufeffAnn_ID,Sentence ,SPLIT\r\n0.0,"the ""red"" disc, left",valid\r\n1,a "b" c,\r\n',
        'ann_id,sentence,split\r0,"the ""red"" disc, left",val \r 1 ,a "b" c,Train\r',
        "\n,,\n".join(
            ["ann_id,split,sentence", '0,validation,"the ""red"" disc, left"', '1,,a "b" c']
        ),
    ],
)
def test_one_table_in_many_spellings(table: str, tmp_path: Path) -> None:
    data = read(tmp_path, table)
    assert not data.problems
    assert sentences(data) == [("val", ['the "red" disc, left']), ("train", ['a "b" c'])]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("ann_id,sentence,spilt\n0,dog,val\n", "has an unknown column 'spilt'"),
        ("ann_id,sentence,sentence\n0,dog,cat\n", "has a column twice"),
        ("ann_id,sentence,\n0,dog,\n", "has an unknown column ''"),
        ('ann_id,sentence\n0,"dog" red\n', "after line 1. Put quotation marks around a whole"),
        (b"ann_id,sentence\n0,\xe9toile\n", "is not a CSV file in UTF-8"),
        ("ann_id,sentence\n0,dog\n".encode("utf-16"), "is not a CSV file in UTF-8"),
    ],
)
def test_a_table_with_another_header_or_encoding_is_an_error(
    table: str | bytes, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected):
        read(tmp_path, table)


TABLE = "ann_id,sentence,split\n0,dog,train\n1,cat,val\n"


@pytest.mark.parametrize(
    "change",
    [
        {"images.0.id": 0.0, "annotations.0.id": "0", "annotations.0.image_id": " 0 "},
        {"annotations.1.id": 1.0, "annotations.1.image_id": "1.0", "images.1.id": "1"},
        {"images.0.height": "40", "images.0.width": 60.0},
    ],
)
def test_whole_numbers_count_however_they_are_written(
    change: dict[str, Any], tmp_path: Path
) -> None:
    data = read(tmp_path, TABLE, change)
    assert not data.problems
    assert sentences(data) == [("train", ["dog"]), ("val", ["cat"])]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"images.0.id": "a3f1-00"}, "the id of one of the images must be a number, found 'a3f1"),
        ({"annotations.0.id": -1}, "the id of one of the annotations must be a number, found -1"),
        (
            {"annotations.0.id": 1.5},
            "items with an 'id', as in COCO; the id 1.5 is not a whole number",
        ),
        ({"annotations.0.id": None}, "the id None is not a whole number"),
        ({"annotations.0.id": True}, "the id True is not a whole number"),
        ({"annotations.2.id": 1}, "the id 1 occurs twice among the annotations"),
    ],
)
def test_other_ids_are_named(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, TABLE, change)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"annotations.0.image_id": "a3f1"}, "image_id must be a number, found 'a3f1'"),
        ({"annotations.0.image_id": 9.0}, "annotation 0 belongs to image 9.0, which is not listed"),
        ({"images.0.height": None}, "height of 0.png must be a number, found None"),
        ({"images.0.width": "60 px"}, "width of 0.png must be a number, found '60 px'"),
        ({"images.0.width": "61"}, "0.png has width 60, expected 61 as in instances.json"),
    ],
)
def test_other_sizes_and_image_ids_are_problems_of_their_row(
    change: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    data = read(tmp_path, TABLE, change)
    [(line, reason)] = reasons(data)
    assert (line, reason.startswith(expected)) == (2, True), reason
    assert sentences(data) == [("val", ["cat"])]


def test_the_cases_of_the_maintainers_are_read_or_named() -> None:
    folder = shared("cases/01-csv-commas")
    for name, lines in (
        *(("said-three-columns", [2]), ("said-two-columns", [2]), ("said-sentence-last", [2])),
        ("said-space-before-quote", []),
    ):
        data = read_custom(f"{folder}/instances.json", f"{folder}/{name}.csv", f"{folder}/images")
        assert [problem.line for problem in data.problems] == lines, name
    assert sentences(data)[0] == ("train", ["the disc, red"])
    folder = shared("cases/09-coco-ids-and-sizes")
    for name in ("coco-annid-csv-float", "coco-ids-float", "coco-size-strings"):
        data = read_custom(
            f"{folder}/{name}/instances.json", f"{folder}/{name}/said.csv", f"{folder}/images"
        )
        assert (len(data.refs), data.problems) == (4, []), name
