"""Exports of labeling tools, written as the tools write them, are read to the pixel."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
from pycocotools import mask as coco_mask

from crislit import check_data
from crislit.data import read_custom
from crislit.data.custom.builder import CustomData
from crislit.data.sources import CustomSource, build_source
from crislit.errors import InputError, see

Mask = npt.NDArray[np.bool_]
PAGE = (Path(__file__).parents[2] / "docs/own_data.md").read_text(encoding="utf-8")
HEIGHT, WIDTH = 40, 60
BOX: Mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
BOX[5:25, 10:30] = True
POLYGON = [10, 5, 30, 5, 30, 25, 10, 25]
y, x = np.ogrid[:HEIGHT, :WIDTH]
DISC: Mask = np.hypot(x - 40, y - 20) < 12


def save_image(folder: Path, name: str, shade: int = 99) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((HEIGHT, WIDTH, 3), shade, dtype=np.uint8)).save(folder / name)


def write_json(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def listed(data: CustomData) -> list[tuple[str, str, list[str]]]:
    """Return file name, split and sentences of each ref."""
    names = {image["id"]: image["file_name"] for image in data.instances["images"]}
    return [
        (names[ref["image_id"]], ref["split"], [s["sent"] for s in ref["sentences"]])
        for ref in data.refs
    ]


# -- Label Studio


def pack(values: Sequence[int]) -> list[int]:
    """Encode bytes as Label Studio does: runs of one value, and short runs of several."""
    sizes = [3, 4, 8, 16]
    bits = f"{len(values):032b}" + f"{8 - 1:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    array = np.array(values)
    starts = np.flatnonzero(np.diff(array, prepend=-1))
    place = 0
    for start, end in zip(starts, [*starts[1:], len(array)], strict=True):
        while start < end:
            length = min(end - start, 2**16)
            index = next(i for i, size in enumerate(sizes) if length <= 2**size)
            repeated = length > 1 or place % 2 == 0
            bits += f"{repeated:b}{index:02b}{length - 1:0{sizes[index]}b}{array[start]:08b}"
            start, place = start + length, place + 1
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def brush(mask: Mask) -> list[int]:
    """Return the run lengths of a brush stroke: RGBA, with the mask in the last channel."""
    rgba = np.zeros((*mask.shape, 4), dtype=np.uint8)
    rgba[mask] = (12, 200, 7, 255)
    return pack(rgba.ravel().tolist())


def region(number: str, kind: str, value: dict[str, Any], **more: Any) -> dict[str, Any]:
    size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    names = {"from_name": "label", "to_name": "image", "origin": "manual"}
    return {**size, "value": value, "id": number, **names, "type": kind, **more}


def polygon(number: str, label: str = "object", **more: Any) -> dict[str, Any]:
    points = [
        [100 * x / WIDTH, 100 * y / HEIGHT] for x, y in zip(*[iter(POLYGON)] * 2, strict=True)
    ]
    value = {"points": points, "closed": True, "polygonlabels": [label]}
    return region(number, "polygonlabels", value, **more)


def stroke(number: str, mask: Mask = DISC, label: str = "object") -> dict[str, Any]:
    value = {"format": "rle", "rle": brush(mask), "brushlabels": [label]}
    return region(number, "brushlabels", value)


def text(number: str, *sentences: str) -> dict[str, Any]:
    return region(number, "textarea", {"text": list(sentences)}, from_name="sentence")


def task(number: int, image: str, *annotations: Any, **data: Any) -> dict[str, Any]:
    return {
        "id": number,
        "annotations": [
            {"id": 7 + place, "was_cancelled": False, "ground_truth": False, "result": results}
            if isinstance(results, list)
            else results
            for place, results in enumerate(annotations)
        ],
        "file_upload": image.rsplit("/", 1)[-1],
        "predictions": [],
        "data": {"image": image, **data},
        "project": 1,
    }


def test_label_studio_brush_and_polygon(tmp_path: Path) -> None:
    for name in ("p0.jpg", "0a1b2c3d-my photo.png", "deep/p2.png"):
        save_image(tmp_path / "photos", name)
    tasks = [
        task(
            1, "/data/upload/1/89abcdef-p0.jpg", [stroke("a"), text("a", "the disc", "right one")]
        ),
        task(
            2,
            "/data/upload/1/0a1b2c3d-my%20photo.png",
            [polygon("b", meta={"text": ["the box"]}), stroke("c"), text("c", "the disc")],
            split="validation",
        ),
        task(3, "/data/local-files/?d=deep/p2.png", [polygon("d"), text("loose", "alone")]),
        task(4, "/data/upload/1/p9.jpg"),
    ]
    file = write_json(tmp_path / "project-1.json", tasks)
    data = read_custom(file, images=str(tmp_path / "photos"))
    assert not data.problems
    assert listed(data) == [
        ("p0.jpg", "train", ["the disc", "right one"]),
        ("0a1b2c3d-my photo.png", "val", ["the box"]),
        ("0a1b2c3d-my photo.png", "val", ["the disc"]),
        ("deep/p2.png", "train", ["alone"]),
    ]
    index = CustomSource(file, images=str(tmp_path / "photos")).open()
    for ref, expected in enumerate((DISC, BOX, DISC, BOX)):
        assert np.array_equal(index.mask(ref), expected)


def test_what_label_studio_leaves_open_is_a_problem_of_its_task(tmp_path: Path) -> None:
    save_image(tmp_path, "p0.jpg")
    cancelled = {"was_cancelled": True, "result": [polygon("x")]}
    chosen = {"ground_truth": True, "result": [polygon("x"), text("x", "the box")]}
    box = region("r", "rectanglelabels", {"x": 1, "y": 2, "width": 5, "height": 5})
    turned = {**polygon("t"), "image_rotation": 90}
    small = {**polygon("s"), "original_width": 30}
    cut = stroke("c")
    cut["value"]["rle"] = cut["value"]["rle"][:40]
    image = "/data/upload/1/89abcdef-p0.jpg"
    tasks = [
        task(1, image, [polygon("a")]),
        task(2, image, [polygon("a"), text("a", "x")], [polygon("b"), text("b", "y")]),
        task(3, image, cancelled, chosen, [polygon("b"), text("b", "y")]),
        task(4, image, [box, text("r", "the box")]),
        task(5, image, [turned, text("t", "the box")]),
        task(6, image, [small, text("s", "the box")]),
        task(7, image, [polygon("a"), polygon("b"), text("loose", "which?")]),
        task(8, image, [cut, text("c", "the disc")]),
        task(9, "/data/upload/1/p9.jpg", [polygon("a"), text("a", "x")]),
    ]
    data = read_custom(write_json(tmp_path / "p.json", tasks))
    assert listed(data) == [("p0.jpg", "train", ["the box"])]
    expected = {
        1: "a region has no sentence",
        2: "the task has 2 annotations: delete all but one",
        4: "a region is neither a brush stroke nor a polygon but rectanglelabels",
        5: "the image was rotated in Label Studio",
        6: "p0.jpg has width 60, expected 30",
        7: 'a text belongs to the whole image, which has 2 regions: set perRegion="true"',
        8: "not Label Studio's run lengths of 60 x 40 pixels",
        9: "no image at",
    }
    assert [problem.line for problem in data.problems] == list(expected)
    for problem in data.problems:
        assert expected[problem.line] in problem.reason


def test_label_studio_labels_serve_as_sentences_only_on_request(tmp_path: Path) -> None:
    save_image(tmp_path, "p0.jpg")
    labels = region("b", "labels", {"labels": ["red disc"]})
    drawn = region("b", "brush", {"format": "rle", "rle": brush(DISC)})
    file = write_json(
        tmp_path / "p.json", [task(1, "p0.jpg", [polygon("a", "box"), drawn, labels])]
    )
    assert [problem.line for problem in read_custom(file).problems] == [1, 1]
    data = read_custom(file, "categories")
    assert [sentences for *_, sentences in listed(data)] == [["box"], ["red disc"]]
    assert "names of categories serve as sentences" in data.notes[0]
    with pytest.raises(InputError, match="leave out dataset"):
        read_custom(file, "sentences.csv")
    minimal = {"image": "p0.jpg", "id": 1, "annotator": 1, "annotation_id": 7, "lead_time": 3.1}
    with pytest.raises(InputError, match="export it as JSON, not as JSON-MIN"):
        read_custom(write_json(tmp_path / "min.json", [minimal]))


@pytest.mark.parametrize(
    "change",
    [
        {"meta": ["the box"]},
        {"meta": {"text": 5}},
        {"value": {"points": 5, "polygonlabels": 7}},
        {"value": {"points": [[1, None]], "polygonlabels": [{}]}},
        {"value": {"rle": 10**12}},
        {"value": {"rle": [256]}},
        {"value": None},
        {"id": {}},
    ],
)
@pytest.mark.parametrize("sentences", [None, "categories"])
def test_a_damaged_export_is_a_problem_and_never_a_traceback(
    sentences: str | None, change: dict[str, Any], tmp_path: Path
) -> None:
    save_image(tmp_path, "p0.jpg")
    results = [{**polygon("a"), **change}, *([] if "meta" in change else [text("a", "the box")])]
    data = read_custom(write_json(tmp_path / "p.json", [task(1, "p0.jpg", results)]), sentences)
    assert len(data.refs) + len(data.problems) >= 1
    for annotations in ([5], [{"result": 5}], [{"result": [5]}]):
        broken = [{**task(1, "p0.jpg"), "annotations": annotations}]
        assert not read_custom(write_json(tmp_path / "p.json", broken), sentences).refs
    broken = [{**task(1, "p0.jpg"), "annotations": 5}]
    with pytest.raises(InputError, match="has no annotations"):
        read_custom(write_json(tmp_path / "p.json", broken), sentences)


def test_label_studio_run_lengths_in_json_lines(tmp_path: Path) -> None:
    save_image(tmp_path, "a.png")
    lines = [
        {"image": "a.png", "sentence": "the disc", "rle": runs}
        for runs in (brush(DISC), brush(DISC[:20]), [1, 2], ["a"], [300])
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = read_custom(str(tmp_path / "d.jsonl"))
    [annotation] = data.instances["annotations"]
    assert np.array_equal(coco_mask.decode(annotation["segmentation"]), DISC)
    assert [problem.line for problem in data.problems] == [2, 3, 4, 5]
    assert all("not Label Studio's run lengths" in problem.reason for problem in data.problems)


def test_results_without_a_region_leave_the_regions_as_they_are(tmp_path: Path) -> None:
    save_image(tmp_path, "p0.jpg")
    arrow = {"from_id": "a", "to_id": "b", "type": "relation", "direction": "right"}
    results = [
        *(polygon("a"), text("a", "the box"), stroke("b"), text("b", "the disc")),
        *(arrow, {**arrow, "labels": ["beside"]}),
        *(
            region("t", "datetime", {"datetime": "2024-01-01"}),
            region("t", "rating", {"rating": 3}),
        ),
        region("p", "pairwise", {"selected": "left"}),
    ]
    data = read_custom(write_json(tmp_path / "p.json", [task(1, "p0.jpg", results)]))
    assert not data.problems
    assert [sentences for *_, sentences in listed(data)] == [["the box"], ["the disc"]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"caption": "A man. In red", "photo": "/data/upload/1/a.png"}, "a.png"),
        ({"caption": "A man. In red", "photo": "/data/local-files/?d=deep/b.JPG"}, "deep/b.JPG"),
        ({"note": "1.5", "photo": "https://host.org/a.png?size=1.5"}, "a.png"),
        ({"note": "b.JPG", "image": "a.png"}, "a.png"),
        ({"image": "none", "img": "a.png"}, "a.png"),
    ],
)
def test_the_image_of_a_task_ends_like_one(
    values: dict[str, str], expected: str, tmp_path: Path
) -> None:
    for name in ("a.png", "deep/b.JPG"):
        save_image(tmp_path, name)
    content = {**task(1, "a.png", [polygon("a"), text("a", "the box")]), "data": values}
    data = read_custom(write_json(tmp_path / "p.json", [content]))
    assert not data.problems
    assert listed(data) == [(expected, "train", ["the box"])]


# -- COCO: CVAT and Roboflow


def coco(names: list[str], **annotation: Any) -> dict[str, Any]:
    """Return COCO instances with one box per image."""
    size = {"height": HEIGHT, "width": WIDTH}
    return {
        "categories": [{"id": 1, "name": "disc", "supercategory": ""}],
        "images": [{"id": i, "file_name": name, **size} for i, name in enumerate(names, 1)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "segmentation": [POLYGON]}
            | annotation
            for i, _ in enumerate(names, 1)
        ],
    }


@pytest.mark.parametrize(
    ("subsets", "expected"),
    [
        ({"default": "images"}, ["train"]),
        ({"train": "images/train", "validation": "images/validation"}, ["train", "val"]),
        ({"train2017": "train2017", "val2017": "val2017"}, ["train", "val"]),
    ],
)
def test_cvat_attributes_are_sentences(
    subsets: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    attributes = {"occluded": False, "rotation": 0.0, "sentence": "the box"}
    for subset, images in subsets.items():
        save_image(tmp_path / images, f"{subset}.jpg")
        content = coco([f"{subset}.jpg"], attributes=attributes)
        write_json(tmp_path / f"annotations/instances_{subset}.json", content)
    data = read_custom(str(tmp_path))
    assert not data.problems
    assert sorted(listed(data)) == sorted(
        (f"{images}/{subset}.jpg", split, ["the box"])
        for (subset, images), split in zip(subsets.items(), expected, strict=True)
    )
    index = build_source({"file": str(tmp_path)}, tmp_path).open()
    assert np.array_equal(index.mask(0), BOX)


def test_own_sentences_of_a_single_file_need_no_table(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        save_image(tmp_path, name)
    content = coco(["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    for annotation, more in zip(
        content["annotations"],
        ({"caption": "one"}, {"sentences": ["two", "2"]}, {"attributes": {"sentence": 3}}, {}),
        strict=True,
    ):
        annotation.update(more)
    content["images"][1]["split"] = "valid"
    data = read_custom(write_json(tmp_path / "instances.json", content))
    assert listed(data) == [("a.jpg", "train", ["one"]), ("b.jpg", "val", ["two", "2"])]
    assert [(problem.line, problem.reason) for problem in data.problems] == [
        (3, "a sentence must be non-empty text, found 3"),
        (4, "it has no sentence: name a key or an attribute sentence, sentences or caption"),
    ]  # fmt: skip
    file = write_json(tmp_path / "bare.json", coco(["a.jpg"]))
    with pytest.raises(
        InputError, match=r"no annotation has a sentence: pass .* of categories \(see "
    ):
        read_custom(file)


def test_attributes_of_other_names_are_listed(tmp_path: Path) -> None:
    """An attribute of CVAT may be called anything."""
    names = ["a.jpg", "b.jpg"]
    for name in names:
        save_image(tmp_path, name)
    content = coco(names)
    first, second = content["annotations"]
    first["attributes"] = {"description": "the box", "occluded": False}
    second["phrase"] = "the box"
    file = write_json(tmp_path / "c.json", content)
    expected = "name a key or an attribute sentence, sentences or caption; found "
    with pytest.raises(InputError, match="no annotation has a sentence: pass a CSV") as error:
        read_custom(file)
    end = f". Or {expected}description, occluded, phrase{see('no-sentences')}"
    assert str(error.value).endswith(end)
    content["annotations"].append({**second, "id": 3, "sentence": "the box"})
    problems = read_custom(write_json(tmp_path / "c.json", content)).problems
    assert [(problem.line, problem.reason) for problem in problems] == [
        (1, f"it has no sentence: {expected}description, occluded"),
        (2, f"it has no sentence: {expected}phrase"),
    ]


@pytest.mark.parametrize("kind", ["COCO", "Label Studio", "JSON lines"])
def test_polygons_outside_of_the_image_are_a_problem_in_every_format(
    kind: str, tmp_path: Path
) -> None:
    save_image(tmp_path, "a.png")
    far = [x + 100 for x in POLYGON]
    drawn = polygon("a")
    drawn["value"]["points"] = [[100 * x / WIDTH + 200, y] for x, y in ((10, 5), (30, 5), (30, 25))]
    content = {
        "COCO": coco(["a.png"], sentence="the box", segmentation=[far]),
        "Label Studio": [task(1, "a.png", [drawn, text("a", "the box")])],
        "JSON lines": {"image": "a.png", "sentence": "the box", "polygons": [far]},
    }[kind]
    [problem] = read_custom(write_json(tmp_path / "c.json", content)).problems
    assert problem.reason.startswith(
        "its polygons lie outside of the image of 60 x 40 pixels (width x height), at x 1"
    )
    assert problem.reason.endswith("were they drawn on an image of another size?")


def test_parts_of_a_segmentation_are_united(tmp_path: Path) -> None:
    save_image(tmp_path, "a.png")
    parts = []
    for mask in (BOX, DISC):
        runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        parts.append({"size": runs["size"], "counts": runs["counts"].decode()})
    write_json(tmp_path / "c.json", coco(["a.png"], sentence="both", segmentation=parts))
    line = {"image": "a.png", "sentence": "both", "rle": parts}
    write_json(tmp_path / "d.jsonl", line)
    for name in ("c.json", "d.jsonl"):
        index = CustomSource(str(tmp_path / name)).open()
        assert np.array_equal(index.mask(0), BOX | DISC), name
    mixed = coco(["a.png"], sentence="both", segmentation=[POLYGON, parts[0]])
    [problem] = read_custom(write_json(tmp_path / "c.json", mixed)).problems
    assert problem.reason.startswith("its mask mixes polygons and run lengths")


def test_training_can_skip_annotations_of_train_but_not_of_val(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(4)]
    for name in names:
        save_image(tmp_path, name)
    content = coco(names, sentence="the box")
    for row, split in enumerate(("train", "train", "train", "val")):
        content["images"][row]["split"] = split
    content["annotations"][0]["sentence"] = ""
    content["annotations"][1]["sentence"] = 5
    source = CustomSource(write_json(tmp_path / "c.json", content))
    assert [(p.line, p.split) for p in read_custom(source.file).problems] == [
        (1, "train"),
        (2, "train"),
    ]
    with pytest.raises(InputError, match="2 annotations of"):
        source.open()
    index = source.open(skip_unusable=True)
    assert (len(index), len(index.skipped)) == (2, 2)
    content["annotations"][3]["sentence"] = ""
    write_json(tmp_path / "c.json", content)
    with pytest.raises(InputError, match=r"1 annotation of .* annotation 4: it has no sentence"):
        source.open(skip_unusable=True)


def test_each_file_of_a_folder_needs_a_sentence(tmp_path: Path) -> None:
    for split, more in (("train", {"sentence": 5}), ("valid", {})):
        save_image(tmp_path / split, "a.png")
        write_json(tmp_path / split / "_annotations.coco.json", coco(["a.png"], **more))
    with pytest.raises(InputError, match=r"valid/_annotations\.coco\.json: no annotation has a"):
        read_custom(str(tmp_path))


def write_roboflow(folder: Path) -> str:
    for split, digest in (("train", "1f"), ("valid", "2e"), ("test", "3d")):
        name = f"p0_jpg.rf.{digest * 16}.jpg"
        save_image(folder / split, name)
        write_json(folder / split / "_annotations.coco.json", coco([name]))
        (folder / split / "s.csv").write_text(f"ann_id,sentence\n1,the box of {split}\n")
    return str(folder)


def test_roboflow_folders_are_splits(tmp_path: Path) -> None:
    folder = write_roboflow(tmp_path)
    with pytest.raises(InputError, match="no annotation has a sentence"):
        read_custom(folder)
    data = read_custom(folder, "categories")
    assert {(split, sentences[0]) for _, split, sentences in listed(data)} == {
        ("train", "disc"), ("val", "disc"), ("test", "disc")
    }  # fmt: skip
    assert len(data.notes) == 1
    data = read_custom(folder, "s.csv")
    assert {(name.split("/")[0], split, *sentences) for name, split, sentences in listed(data)} == {
        ("train", "train", "the box of train"),
        ("valid", "val", "the box of valid"),
        ("test", "test", "the box of test"),
    }
    for table in (str(tmp_path / "train/s.csv"), "~/s.csv", "../train/s.csv", "train/s.csv"):
        with pytest.raises(InputError, match="needs the name of a CSV that lies in each of them"):
            read_custom(folder, table)
    (tmp_path / "valid/s.csv").write_text("ann_id,sentence\n9,the box\n")
    [problem] = read_custom(folder, "s.csv").problems
    assert problem.reason.startswith("valid/_annotations.coco.json: annotation 9 is not in")


def test_one_coco_file_per_split_beside_the_images(tmp_path: Path) -> None:
    for name in ("train", "val"):
        save_image(tmp_path / "images", f"{name}.png")
        write_json(tmp_path / f"{name}.json", coco([f"{name}.png"], caption="the box"))
    data = read_custom(str(tmp_path))
    assert sorted(listed(data)) == [
        ("images/train.png", "train", ["the box"]),
        ("images/val.png", "val", ["the box"]),
    ]


# -- SAM


def write_sam(folder: Path) -> None:
    for number in (1, 2):
        save_image(folder, f"sa_{number}.jpg")
        mask = coco_mask.encode(np.asfortranarray(DISC, dtype=np.uint8))
        runs = {"size": mask["size"], "counts": mask["counts"].decode()}
        image = {"image_id": number, "width": WIDTH, "height": HEIGHT}
        annotations = [
            {"id": 10 * number + i, "segmentation": runs, "area": int(DISC.sum()),
             "predicted_iou": 0.9, "stability_score": 0.97, "point_coords": [[40.0, 20.0]]}
            for i in range(2)
        ]  # fmt: skip
        content = {"image": {**image, "file_name": f"sa_{number}.jpg"}, "annotations": annotations}
        write_json(folder / f"sa_{number}.json", content)


def test_sam_needs_a_table_of_sentences(tmp_path: Path) -> None:
    write_sam(tmp_path)
    (tmp_path / "s.csv").write_text("ann_id,sentence,split\n10,the disc,train\n21,a disc,val\n")
    table = str(tmp_path / "s.csv")
    data = read_custom(str(tmp_path), table)
    assert listed(data) == [("sa_1.jpg", "train", ["the disc"]), ("sa_2.jpg", "val", ["a disc"])]
    assert np.array_equal(CustomSource(str(tmp_path), table).open().mask(1), DISC)
    (tmp_path / "s.csv").write_text("ann_id,sentence\n11,the disc\n")
    data = read_custom(str(tmp_path / "sa_1.json"), table)
    assert listed(data) == [("sa_1.jpg", "train", ["the disc"])]
    with pytest.raises(InputError, match="SAM's masks, which have no sentences: pass a CSV"):
        read_custom(str(tmp_path))
    with pytest.raises(InputError, match="no annotation has a sentence: pass a CSV"):
        read_custom(str(tmp_path / "sa_1.json"))


def test_a_folder_without_such_files_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds neither train/"):
        read_custom(str(tmp_path))


def test_the_commands_of_the_page_read_the_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "photos", "p0.jpg")
    tasks = [task(1, "/data/upload/1/0a1b2c3d-p0.jpg", [stroke("a"), text("a", "the disc")])]
    write_json(tmp_path / "project-1.json", tasks)
    save_image(tmp_path / "cvat-export/images", "p0.jpg")
    exported = coco(["p0.jpg"], attributes={"occluded": False, "sentence": "the man in red"})
    write_json(tmp_path / "cvat-export/annotations/instances_default.json", exported)
    write_roboflow(tmp_path / "roboflow-export")
    for table in (tmp_path / "roboflow-export").glob("*/s.csv"):
        table.rename(table.with_name("sentences.csv"))
    write_sam(tmp_path / "sam-output")
    (tmp_path / "sentences.csv").write_text("ann_id,sentence,split\n10,a disc,train\n")
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(lines) == 5
    for line in lines:
        program, *arguments = shlex.split(line.removeprefix("python -m crislit."))
        assert program == "check_data"
        check_data.main(arguments)
        assert re.search(r"^train: 1 object,", capsys.readouterr().out, re.MULTILINE)


# -- Masks of several objects, as CVAT and Pascal VOC write them


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_the_script_of_the_page_lists_the_objects_of_voc_masks(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [script] = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    save_image(tmp_path, "JPEGImages/p0.jpg")
    ring = (np.hypot(x - 40, y - 20) < 14) & ~DISC & ~BOX
    palette = [0, 0, 0, 128, 0, 0, 0, 128, 0, *[0] * 756, 224, 224, 192]
    for folder, second in (("SegmentationObject", 2), ("SegmentationClass", 1)):
        labels = np.select([BOX & ~DISC, DISC, ring], [1, second, 255], 0)
        image = PIL.Image.fromarray(labels.astype(np.uint8), "P")
        image.putpalette(palette)
        (tmp_path / folder).mkdir()
        image.convert(mode).save(tmp_path / folder / "p0.png")
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nthing:128,0,0::\n"
    )
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    data = read_custom("data.jsonl")
    assert not data.problems
    assert sorted(sentences for *_, sentences in listed(data)) == [["thing"], ["thing"]]
    index = CustomSource("data.jsonl").open()
    masks = [index.mask(ref).astype(bool) for ref in range(2)]  # sorted by color
    assert np.array_equal(masks[0], DISC)
    assert np.array_equal(masks[1], BOX & ~DISC)
