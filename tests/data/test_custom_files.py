"""Files of custom data: usual mistakes are named with their cure, or the file is found."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from crislit.data import build_source, read_custom
from crislit.errors import InputError

BOX = [[10, 5, 30, 5, 30, 25, 10, 25]]
GOOD = {"image": "a.png", "sentence": "dog", "polygons": BOX}


def save_image(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((40, 60, 3), 99, dtype=np.uint8)).save(folder / name)


def write(folder: Path, content: str | bytes) -> str:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "d.jsonl").write_bytes(data)
    return str(folder / "d.jsonl")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"image": "a.png", "sentence": "dog",}', "remove the comma at the end"),
        (json.dumps(GOOD) + ",", "remove the comma at the end"),
        ('{"image": "a.png", "polygons": [[1, 2,]]}', "remove the comma at the end"),
        (str(GOOD), "write double quotes, not single ones"),
        ('{“image”: "a.png"}', "write straight quotes"),
        ('{"image": "a.png", "mask": None}', "write null, true or false"),
        (r'{"image": "images\p0.png"}', r"write / or \\ for a backslash"),
        (json.dumps(GOOD) + json.dumps(GOOD), "write one object per line"),
        ('{"image": "a.png", "sentence": "the', "must end on its line"),
        ('{"image": "a.png", "image": "b.png"}', "the key 'image' occurs twice"),
        (json.dumps({**GOOD, "sentances": ["dog"]}), "did you mean 'sentences'?"),
        (
            json.dumps({**GOOD, "image": "images\new.png"}),
            r"in JSON, write / or \\ for a backslash",
        ),
        (json.dumps({**GOOD, "mask_value": 1}), "mask_value is for mask, not for polygons"),
        (json.dumps({**GOOD, "polygons": [[0.1, 0.2, 0.5, 0.2, 0.5, 1]]}), "multiply shares"),
        (json.dumps({**GOOD, "sentence": float("nan")}), "must be non-empty text"),
        (json.dumps({**GOOD, "polygons": [[float("nan")] * 6]}), "not numbers"),
    ],
)
def test_a_usual_mistake_is_named_with_its_cure(line: str, expected: str, tmp_path: Path) -> None:
    save_image(tmp_path, "a.png")
    data = read_custom(write(tmp_path, f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}"))
    [problem] = data.problems
    assert problem.line == 2
    assert expected in problem.reason
    assert len(data.refs) == 2


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([GOOD, GOOD]),
        json.dumps([GOOD, GOOD], indent=2),
        "\ufeff" + json.dumps(GOOD) + "\r\n" + json.dumps(GOOD) + "\r\n",
        json.dumps(GOOD) + "\r" + json.dumps(GOOD),
        "\n\n" + json.dumps(GOOD) + "\n  \n" + json.dumps(GOOD),
    ],
)
def test_lines_or_one_list_with_any_line_ends(content: str, tmp_path: Path) -> None:
    save_image(tmp_path, "a.png")
    data = read_custom(write(tmp_path, content))
    assert (len(data.refs), data.problems) == (2, [])


def test_an_item_of_a_list_is_named_by_its_number(tmp_path: Path) -> None:
    save_image(tmp_path, "a.png")
    data = read_custom(write(tmp_path, json.dumps([GOOD, 5, {**GOOD, "sentence": ""}])))
    assert data.unit == "item"
    assert [problem.line for problem in data.problems] == [2, 3]


def png() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (60, 40)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"ann_id,sentence,split\n5,the dog,train\n", r"is a CSV table \(ann_id,sentence,split\)"),
        (b"image;sentence\na.png;a dog\n", r"is a CSV table .*: write one JSON object per line"),
        (b"<?xml version='1.0'?>\n<annotations>\n", "but is XML: export COCO 1.0 from CVAT"),
        (b"images: [a.png]\n- b\n", "neither JSON nor JSON lines, but starts with 'images: "),
        (b"PK\x03\x04\x14\0\0\0", "not a text file but a zip archive or a spreadsheet"),
        (b"PAR1\0\0", "not a text file but a table in Parquet"),
        (png(), "not a text file but an image: expected JSON lines"),
        (b"\x93NUMPY\x01\0", "not a text file but binary"),
        (b" \n\n", "is empty, expected one JSON object per line"),
    ],
)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d"])
def test_a_file_of_another_kind_is_one_error_that_tells_which(
    name: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    for sentences in (None, "s.csv"):
        with pytest.raises(InputError, match=expected):
            read_custom(str(tmp_path / name), sentences)


@pytest.mark.parametrize("name", ["d.json", "d.txt", "d", "d.JSONL"])
@pytest.mark.parametrize("content", [json.dumps(GOOD), json.dumps([GOOD])])
def test_samples_are_read_whatever_the_name_of_their_file(
    content: str, name: str, tmp_path: Path
) -> None:
    save_image(tmp_path, "a.png")
    (tmp_path / name).write_text(content)
    data = read_custom(str(tmp_path / name))
    assert (len(data.refs), data.problems) == (1, [])


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
@pytest.mark.parametrize("option", ["sentences", "images"])
def test_options_of_coco_files_are_refused_for_json_lines_of_any_name(
    option: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n")
    sentences, images = ("x", None) if option == "sentences" else (None, "x")
    with pytest.raises(InputError, match=rf"dataset\.{option} is for COCO files; .* JSON-lines"):
        read_custom(str(tmp_path / name), sentences, images)


@pytest.mark.parametrize("name", ["coco.json", "coco.jsonl"])
def test_a_coco_file_of_any_name_takes_its_table(name: str, tmp_path: Path) -> None:
    save_image(tmp_path, "a.png")
    image = {"id": 1, "file_name": "a.png", "height": 40, "width": 60}
    annotation = {"id": 5, "image_id": 1, "segmentation": BOX}
    content = {"images": [image], "annotations": [annotation]}
    (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "s.csv").write_text("ann_id,sentence\n5,the dog\n")
    assert len(read_custom(str(tmp_path / name), str(tmp_path / "s.csv")).refs) == 1
    for text in (json.dumps(GOOD), json.dumps(GOOD, indent=1), json.dumps([GOOD])):
        (tmp_path / "s.csv").write_text(text)
        with pytest.raises(InputError, match=r"s\.csv holds JSON, expected a CSV table with the"):
            read_custom(str(tmp_path / name), str(tmp_path / "s.csv"))


def test_a_folder_with_a_list_names_the_list(tmp_path: Path) -> None:
    save_image(tmp_path, "a.png")
    file = write(tmp_path, json.dumps(GOOD))
    with pytest.raises(InputError, match=rf"is a folder: name the file in it, {re.escape(file)}$"):
        read_custom(str(tmp_path))
    Path(file).rename(tmp_path / "export.json")
    with pytest.raises(InputError, match=r"holds neither .* name .*export\.json, see"):
        read_custom(str(tmp_path))


@pytest.mark.parametrize("option", ["file", "sentences", "images", "folder", "refs"])
@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_name_is_one_error(option: str, text: str, tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps(GOOD))
    with pytest.raises(InputError, match=rf"^dataset\.{option} is empty: expected "):
        build_source({"file": file, option: text}, tmp_path)
    texts: dict[str, Any] = {"file": file, option: text}
    if option not in ("folder", "refs"):
        with pytest.raises(InputError, match=rf"^dataset\.{option} .* is empty"):
            read_custom(**texts)


def test_a_missing_file_tells_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not found: expected a JSON-lines file .*check_data"):
        read_custom(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"either dataset\.file=FILE .*check_data --help"):
        build_source({}, tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (json.dumps(GOOD).encode("utf-16"), "is not UTF-8 text but UTF-16: save it as UTF-8"),
        (json.dumps(GOOD).encode("utf-16-le"), "is not UTF-8 text but UTF-16"),
        (b'{}\n{"sentence": "\xe9toile"}', "in line 2.: save it as UTF-8"),
        ('[\n{"image": "a.png",}\n]', "is not valid JSON: .* at line 2: remove the comma"),
        ('{\n"image": "a.png"\n}', "one JSON document over several lines"),
    ],
)
def test_another_encoding_or_document_is_one_error(
    content: str | bytes, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected):
        read_custom(write(tmp_path, content))


def test_a_file_is_found_under_the_spelling_that_exists(tmp_path: Path) -> None:
    on_disk = ["images/p0.jpg", "my photo.png", "Upper.JPG", "caf\u00e9.png", "100%25.png"]
    for name in on_disk:
        save_image(tmp_path, name)
    listed = ["images\\p0.jpg", "my%20photo.png", "upper.jpg", "cafe\u0301.png", "100%25.png"]
    more = ["Images\\\\P0.jpg", "./images/../images/p0.jpg"]  # the first image again
    lines = [json.dumps({**GOOD, "image": name}) for name in [*listed, *more]]
    data = read_custom(write(tmp_path, "\n".join(lines)))
    assert not data.problems
    assert [image["file_name"] for image in data.instances["images"]] == on_disk
    assert [ref["image_id"] for ref in data.refs] == [1, 2, 3, 4, 5, 1, 1]
    assert data.notes == [
        "5 names of files are spelled differently on disk, for example images\\p0.jpg as "
        "images/p0.jpg"
    ]


def test_a_name_is_simplified_only_where_it_stays_the_same_file(tmp_path: Path) -> None:
    for folder, shade in (("", 1), ("elsewhere", 2)):
        save_image(tmp_path, f"{folder}/i.png")
        PIL.Image.fromarray(np.full((40, 60, 3), shade, dtype=np.uint8)).save(
            tmp_path / folder / "i.png"
        )
    (tmp_path / "elsewhere/deep").mkdir()
    (tmp_path / "plain").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere/deep")
    names = ["i.png", "plain/../i.png", "link/../i.png"]
    lines = [json.dumps({**GOOD, "image": name}) for name in names]
    data = read_custom(write(tmp_path, "\n".join(lines)))
    assert not data.problems
    found = [image["file_name"] for image in data.instances["images"]]
    assert found == ["i.png", "link/../i.png"]
    with PIL.Image.open(data.folder / found[1]) as image:
        assert image.getpixel((0, 0)) == (2, 2, 2)
    assert [ref["image_id"] for ref in data.refs] == [1, 1, 2]


def test_a_mask_is_found_too_and_two_candidates_are_an_error(tmp_path: Path) -> None:
    save_image(tmp_path, "a.png")
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[5:25, 10:30] = 255
    PIL.Image.fromarray(mask).save(tmp_path / "M.png")
    sample: dict[str, Any] = {"image": "a.png", "sentence": "dog", "mask": "m.PNG"}
    data = read_custom(write(tmp_path, json.dumps(sample)))
    assert (len(data.refs), data.mask_values) == (1, {"0, 255": 1})
    PIL.Image.fromarray(mask).save(tmp_path / "m.png")
    if len(list(tmp_path.glob("*.png"))) == 3:  # the file system tells capital letters apart
        [problem] = read_custom(write(tmp_path, json.dumps(sample))).problems
        assert problem.reason == "'m.PNG' may be M.png or m.png"
