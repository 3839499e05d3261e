"""Custom data: every form of mask, every kind of bad line, check_data, and a training run."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as coco_mask

import crislit
from crislit import check_data
from crislit.data.custom.reader import read_custom
from crislit.data.dataset import read_image
from crislit.data.refer_index import ReferIndex
from crislit.data.sources import CustomSource, build_source
from crislit.errors import InputError
from tests.runs import run

BOX = [[10, 5, 30, 5, 30, 25, 10, 25]]
"""A polygon of 20 x 20 pixels."""


def box_mask() -> np.ndarray:
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[5:25, 10:30] = 1
    return mask


def save_image(folder: Path, name: str, size: tuple[int, int] = (60, 40), **options: Any) -> str:
    """Save a random image of a width and height, and return its name."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(name))
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(folder / name, **options)
    return name


def write_lines(folder: Path, *samples: dict[str, Any] | str) -> str:
    lines = [sample if isinstance(sample, str) else json.dumps(sample) for sample in samples]
    path = folder / "mine.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def sentences_of(index: ReferIndex) -> list[list[str]]:
    rows = [index.sentence_rows(ref) for ref in range(len(index))]
    return [[index.sentence(row) for row in rows_of_ref] for rows_of_ref in rows]


def save_masks(folder: Path) -> list[str]:
    """Save the box in every form of mask image, and return the files' names."""
    box = box_mask()
    images = {
        "gray": PIL.Image.fromarray(255 * box),
        "ones": PIL.Image.fromarray(box),
        "bits": PIL.Image.fromarray(box.astype(bool)),
        "rgb": PIL.Image.fromarray(np.repeat(255 * box[..., None], 3, axis=2)),
    }
    palettes = {
        "palette": (3 * box, [0, 0, 0] * 256),
        "black first": (box, [0] * 3 + [255] * 3),
        "white first": (1 - box, [255] * 3 + [0] * 3),
        "colored": (2 * box, [255, 255, 255, 0, 0, 0, 0, 0, 128]),
    }
    for name, (entries, palette) in palettes.items():
        images[name] = PIL.Image.fromarray(entries, "P")
        images[name].putpalette(palette)
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return [f"{name}.png" for name in images]


def test_all_forms_of_masks_give_the_same_mask(tmp_path: Path) -> None:
    name = save_image(tmp_path, "photos/a.jpg")
    compressed = coco_mask.encode(np.asfortranarray(box_mask()))["counts"].decode()
    flat = np.concatenate([[0], box_mask().T.ravel(), [0]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [40 * 60]])).tolist()
    forms: list[dict[str, Any]] = [{"mask": mask} for mask in save_masks(tmp_path)]
    forms.append({"polygons": BOX})
    forms += [{"rle": {"size": [40, 60], "counts": runs}} for runs in (compressed, counts)]
    file = write_lines(tmp_path, *({"image": name, "sentence": "the box", **f} for f in forms))
    index = CustomSource(file).open()
    assert len(index) == len(forms)
    for ref in range(len(index)):
        assert np.array_equal(index.mask(ref), box_mask()), forms[ref]


def test_sentences_splits_and_paths_are_kept(tmp_path: Path) -> None:
    a, b = save_image(tmp_path, "deep/down/a.png"), save_image(tmp_path, "b.jpg")
    absolute = tmp_path / "elsewhere" / save_image(tmp_path / "elsewhere", "c.png")
    file = write_lines(
        tmp_path,
        {"image": a, "sentences": ["Étoile", "a  star"], "polygons": BOX},
        "",
        {"image": b, "sentence": "dog", "polygons": BOX, "split": "val"},
        {"image": str(absolute), "sentence": "cat", "polygons": BOX, "split": "val"},
        {"image": a, "sentence": "ring", "polygons": BOX},
    )
    index = CustomSource(file).open()
    assert index.splits == ("train", "val")
    assert index.split_refs("val").tolist() == [1, 2]
    assert sentences_of(index) == [["Étoile", "a  star"], ["dog"], ["cat"], ["ring"]]
    assert index.image_id(0) == index.image_id(3) != index.image_id(1)
    for ref in range(4):
        assert read_image(index, ref).shape == (40, 60, 3)
    index.check_images(np.arange(4))


def write_coco(
    folder: Path, rows: Sequence[Sequence[Any]], header: str = "ann_id,sentence,split"
) -> tuple[str, str, str]:
    """Write annotations 5 to 7 of two images, 8 of none, and a CSV; return the three arguments."""
    names = [save_image(folder / "photos", f"{name}.jpg") for name in "ab"]
    size = {"height": 40, "width": 60}
    images = [{"id": 70 + i, "file_name": name, **size} for i, name in enumerate(names)]
    annotations = [{"id": 5 + i, "image_id": 70 + i % 2, "segmentation": BOX} for i in range(3)]
    annotations.append({"id": 8, "image_id": 99, "segmentation": BOX})
    instances, table = folder / "instances.json", folder / "sentences.csv"
    instances.write_text(json.dumps({"images": images, "annotations": annotations}))
    with table.open("w", newline="") as file:
        file.write(header + "\n")
        csv.writer(file).writerows(rows)
    return str(instances), str(table), str(folder / "photos")


def test_a_coco_file_with_a_csv_of_sentences(tmp_path: Path) -> None:
    rows: list[list[Any]] = [
        [6, 'the "big", red dog', "val"],
        [5, "cat", "train"],
        [6, "dog", "val"],
        [7, "bird", ""],
    ]
    index = CustomSource(*write_coco(tmp_path, rows)).open()
    assert sentences_of(index) == [['the "big", red dog', "dog"], ["cat"], ["bird"]]
    assert index.split_refs("train").tolist() == [1, 2]
    assert index.image_path(0) == tmp_path / "photos/b.jpg"
    assert np.array_equal(index.mask(0), box_mask())


def test_the_default_split_of_a_csv_is_train(tmp_path: Path) -> None:
    index = CustomSource(*write_coco(tmp_path, [[6, "dog"]], "ann_id,sentence")).open()
    assert index.splits == ("train",)


def test_bad_rows_of_a_csv_are_reported_with_their_line_numbers(tmp_path: Path) -> None:
    rows: list[list[Any]] = [
        ["x", "dog", "val"],
        [50, "dog", "val"],
        [6, " ", "val"],
        [6, "dog", "val"],
        [6, "dog", "test"],
        [8, "bird", "val"],
        ["²", "dog", "val"],
        [7, "dog", "val"],
        [6, "dog\n6,cat", "val"],
    ]
    file, table, folder = write_coco(tmp_path, rows)
    content = json.loads(Path(file).read_text())
    content["images"][0]["height"] = 80  # of annotations 5 and 7
    content["annotations"][1]["image_id"] = "71"  # an id as text, as some programs write it
    Path(file).write_text(json.dumps(content))
    problems = read_custom(file, table, folder).problems
    assert [(problem.line, problem.reason.split(", found")[0]) for problem in problems] == [
        (2, "ann_id must be a number"),
        (3, "annotation 50 is not in the instances file"),
        (4, "a sentence must be non-empty text"),
        (6, "annotation 6 has split 'test' here, and 'val' in line 5"),
        (7, "annotation 8 belongs to image 99, which is not listed"),
        (8, "ann_id must be a number"),
        (9, "a.jpg has height 40, expected 80 as in instances.json"),
        (11, "a sentence spans several lines, is a quote missing? Found 'dog\\n6,cat'"),
    ]


GOOD = {"image": "a.png", "sentence": "dog", "polygons": BOX}
NO_MASK = {"image": "a.png", "sentence": "dog"}
NO_SENTENCE = {"image": "a.png", "polygons": BOX}
POLYGON = "expected each polygon as a list x, y, x, y, ..."
BAD: list[tuple[Any, str]] = [
    ("{", "Expecting property name"),
    ("[1]", "expected an object, {...}, found list"),
    ("NaN", "expected an object"),
    ("[" * 100_000, "recursion"),
    ({**GOOD, "label": 1}, "unknown key 'label'"),
    ({**GOOD, "image": None}, "image must be a path, found None"),
    ({**GOOD, "image": 7}, "image must be a path, found 7"),
    ({**GOOD, "image": "nowhere.png"}, "no image at"),
    ({**GOOD, "image": "notes.txt"}, "is not an image that can be read"),
    ({**GOOD, "image": "turned.jpg"}, "stored rotated (EXIF orientation 6)"),
    ({**GOOD, "image": "glass.png"}, "has transparent pixels"),
    ({**GOOD, "image": "drawn.eps"}, "is not an image that can be read"),
    ({**GOOD, "sentence": ""}, "must be non-empty text"),
    ({**GOOD, "sentence": 5}, "must be non-empty text"),
    ({**GOOD, "sentence": " &nbsp;"}, "must be non-empty text"),
    ({**GOOD, "sentences": ["dog"]}, "either sentence or sentences, found both"),
    (NO_SENTENCE, "either sentence or sentences, found neither"),
    ({**NO_SENTENCE, "sentences": None}, "either sentence or sentences, found neither"),
    ({**NO_SENTENCE, "sentences": "dog"}, 'must be a list, found text: write "sentences": ["..."]'),
    ({**NO_SENTENCE, "sentences": ""}, "sentences must be a list, found text"),
    ({**NO_SENTENCE, "sentences": 5}, "sentences must be a list of at least one text, found 5"),
    ({**NO_SENTENCE, "sentences": {}}, "sentences must be a list of at least one text, found {}"),
    ({**NO_SENTENCE, "sentences": []}, "sentences must be a list of at least one text, found []"),
    ({**NO_SENTENCE, "sentences": ["dog", 5]}, "a sentence must be non-empty text, found 5"),
    ({**NO_SENTENCE, "sentences": ["dog", None]}, "must be non-empty text, found None"),
    ({**NO_SENTENCE, "sentences": ["dog", ["a"]]}, "must be non-empty text, found ['a']"),
    ({**NO_SENTENCE, "sentences": ["dog", " "]}, "a sentence must be non-empty text, found ' '"),
    ({**NO_SENTENCE, "sentence": ["dog"]}, 'found a list: write "sentences" for several'),
    ({**GOOD, "split": 3}, "split must be a name"),
    ({**GOOD, "split": " "}, "split must be a name"),
    (NO_MASK, "expected one of mask, polygons and rle, found none"),
    ({**GOOD, "mask": "m.png"}, "found mask and polygons"),
    ({**GOOD, "polygons": [[1, 2, 3]]}, f"{POLYGON}, found [1, 2, 3]"),
    ({**GOOD, "polygons": [*BOX, [[1, 2], [9, 2], [9, 9]]]}, POLYGON),
    ({**GOOD, "polygons": [*BOX, [1, 2, 9, 2, 9]]}, POLYGON),
    ({**GOOD, "polygons": [["a", 2, 3, 4, 5, 6]]}, POLYGON),
    ({**GOOD, "polygons": [[1, 2, 9, 2]]}, "marks no pixel"),
    ({**GOOD, "polygons": []}, "marks no pixel"),
    (
        {**GOOD, "polygons": [[100, 90, 120.5, 90, 120, 120]]},
        "at x 100 to 120.5 and y 90 to 120: were",
    ),
    ({**GOOD, "polygons": [[-9, 5, -1, 5, -1, 9]]}, "outside of the image of 60 x 40 pixels"),
    ({**GOOD, "polygons": [[5, 40, 9, 40, 9, 50]]}, "outside of the image of 60 x 40 pixels"),
    ({**GOOD, "polygons": [[1e9, 2, 3, 4, 5, 6]]}, "far outside"),
    ({**GOOD, "polygons": 5}, "neither COCO polygons nor run lengths"),
    ({**NO_MASK, "rle": {"size": [40, 60]}}, "neither COCO polygons nor run lengths"),
    ({**NO_MASK, "rle": {"size": [9, 9], "counts": [81]}}, "do not fill"),
    ({**NO_MASK, "mask": "glass.png"}, "the mask"),
    ({**NO_MASK, "mask": "nowhere.png"}, "no mask at"),
    ({**NO_MASK, "mask": "notes.txt"}, "not a mask that can be read"),
    ({**NO_MASK, "mask": "small.png"}, "has (10, 10) pixels (height, width), its image (40, 60)"),
    ({**NO_MASK, "mask": "black.png"}, "marks no pixel: its values are 0;"),
    ({**NO_MASK, "mask": "classes.png"}, "values are 0, 2; marked pixels need values above 127"),
    ({"images": [], "annotations": []}, "a COCO instances file, which needs a CSV of sentences"),
]


def test_bad_lines_are_reported_with_their_numbers_and_good_lines_are_kept(tmp_path: Path) -> None:
    save_image(tmp_path, "a.png")
    (tmp_path / "notes.txt").write_text("not an image")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    save_image(tmp_path, "turned.jpg", exif=exif)
    save_image(tmp_path, "small.png", (10, 10))
    PIL.Image.new("L", (60, 40)).save(tmp_path / "black.png")
    PIL.Image.fromarray(2 * box_mask()).save(tmp_path / "classes.png")
    PIL.Image.new("RGBA", (60, 40), (255, 255, 255, 128)).save(tmp_path / "glass.png")
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "drawn.eps")
    data = read_custom(write_lines(tmp_path, *(line for bad, _ in BAD for line in (GOOD, bad))))
    assert [problem.line for problem in data.problems] == list(range(2, 2 * len(BAD) + 1, 2))
    for problem, (bad, expected) in zip(data.problems, BAD, strict=True):
        assert expected in problem.reason, (bad, problem.reason)
        assert len(problem.reason) < 300
    kept = [sentence["line"] for ref in data.refs for sentence in ref["sentences"]]
    assert kept == list(range(1, 2 * len(BAD), 2))


def test_training_refuses_bad_lines_and_names_the_command_that_lists_them(tmp_path: Path) -> None:
    save_image(tmp_path, "a.png")
    source = CustomSource(write_lines(tmp_path, GOOD, {**GOOD, "sentence": ""}))
    expected = r"1 line of .*mine\.jsonl cannot be used: line 2: a sentence.*check_data` lists all"
    with pytest.raises(InputError, match=expected):
        source.open()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("mine.jsonl", None, r"mine\.jsonl not found"),
        ("mine.jsonl", b"\n\n", "is empty, expected one JSON object per line"),
        ("mine.jsonl", b"\xff\xfe\x00", "is not UTF-8"),
        ("mine.jsonl", b'{\n"images": []\n}', "is one JSON document over several lines"),
        ("instances.json", b"{}", "should hold a list 'images'"),
        ("instances.json", b"{", "cannot read"),
        ("sentences.csv", b'ann_id,sentence\n5,"open\n6,dog\n', "is not a CSV file"),
        ("sentences.csv", b"id,text\n1,dog\n", "columns ann_id, sentence, split, found id, text"),
        ("sentences.csv", b"", "found none"),
    ],
)
def test_a_file_of_the_wrong_format_is_one_error(
    name: str, content: bytes | None, expected: str, tmp_path: Path
) -> None:
    file, table, _ = write_coco(tmp_path, [[6, "dog", "val"]])
    if content is not None:
        (tmp_path / name).write_bytes(content)
    is_lines = name == "mine.jsonl"
    with pytest.raises(InputError, match=expected):
        read_custom(str(tmp_path / name) if is_lines else file, None if is_lines else table)


def test_folder_and_file_exclude_each_other(tmp_path: Path) -> None:
    both = {"folder": "refcoco", "refs": "refs(unc).p", "file": "mine.jsonl"}
    for dataset in (both, {}):
        with pytest.raises(InputError, match=r"either dataset\.file"):
            build_source(dataset, tmp_path)
    file = write_lines(tmp_path, GOOD)
    with pytest.raises(InputError, match=r"dataset\.images is for COCO files; "):
        read_custom(file, images="photos")
    with pytest.raises(InputError, match=r"dataset\.sentences is for COCO files; "):
        read_custom(file, sentences="s.csv")


# -- check_data


def test_check_data_counts_each_split_and_notes_pitfalls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image(tmp_path, "a.png")
    save_image(tmp_path, "b.png")
    long = {**GOOD, "image": "b.png", "sentence": "word " * 30, "split": "val"}
    check_data.main([write_lines(tmp_path, GOOD, {**GOOD, "split": "val"}, long)])
    assert capsys.readouterr().out.splitlines() == [
        "train: 1 object, 1 sentence, 1 image",
        "val: 2 objects, 2 sentences, 2 images",
        "split  sentences/image  target area: min   median      max  sentences cut off",
        "train              1.0           16.67 %  16.67 %  16.67 %                  0",
        "val                1.0           16.67 %  16.67 %  16.67 %                  1",
        "note: 1 image of val is also in train, so metrics on val will be too high",
        "note: 1 image of val has the same content as images of train (b.png and a.png), so "
        "metrics on val will be too high",
        "note: val has few images (2), so its scores depend on chance",
        "note: 1 mask is that of another object of the image (line 2): list all sentences of one "
        "object together, each object once",
        "note: 1 sentence is longer than 22 tokens and truncated (line 3): raise dataset.max_words",
    ]
    check_data.main([write_lines(tmp_path, GOOD)])
    assert "note: split 'val' is missing, which training needs" in capsys.readouterr().out


def test_check_data_prints_every_bad_line_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image(tmp_path, "a.png")
    content = (tmp_path / save_image(tmp_path, "b.png", (300, 200))).read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])  # the header is intact
    damaged = {"image": "b.png", "sentence": "cat", "polygons": BOX}
    file = write_lines(tmp_path, GOOD, {**GOOD, "sentence": " "}, damaged, "nonsense")
    with pytest.raises(SystemExit, match="error: 3 problems in"):
        check_data.main([file])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["line 2", "line 3", "line 4"]
    assert "damaged" in lines[1]
    assert lines[3] == "train: 2 objects, 2 sentences, 2 images"


def test_check_data_escapes_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "\x1b[2Jno\u202e\ud800\nline 9: forged.png"
    file = write_lines(tmp_path, {**GOOD, "image": name})
    with pytest.raises(SystemExit):
        check_data.main([file])
    output = capsys.readouterr().out
    assert r"\x1b[2Jno\u202e\ud800\nline 9: forged.png" in output
    assert all(line.isprintable() for line in output.splitlines())


def test_check_data_of_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, table, folder = write_coco(tmp_path, [[6, "dog", "val"], [5, "cat", "train"]])
    check_data.main([file, "--sentences", table, "--images", folder])
    assert "val: 1 object, 1 sentence, 1 image" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: nowhere\.jsonl not found"):
        check_data.main(["nowhere.jsonl"])


def test_every_row_of_a_bad_annotation_or_image_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        [8, "bird", "val"],
        [6, "dog", "val"],
        [8, "small bird", "val"],
        [5, "cat", "val"],
        [6, "a dog", "val"],
    ]
    file, table, folder = write_coco(tmp_path, rows)  # annotation 8 has no image
    image = tmp_path / "photos/b.jpg"  # of annotation 6
    image.write_bytes(image.read_bytes()[:-300])  # the header is intact
    with pytest.raises(SystemExit, match="error: 4 problems in"):
        check_data.main([file, "--sentences", table, "--images", folder])
    lines = capsys.readouterr().out.splitlines()
    bad = [line.split(":")[0] for line in lines if line.startswith("line ")]
    assert bad == ["line 2", "line 3", "line 4", "line 6"]


# -- Training


def test_training_on_custom_data_writes_a_checkpoint_that_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = ["train"] * 6 + ["val"] * 2
    names = [save_image(tmp_path, f"{i:02}.png") for i in range(len(splits))]
    samples = [
        {**GOOD, "image": name, "split": split} for name, split in zip(names, splits, strict=True)
    ]
    results = run(
        monkeypatch,
        tmp_path / "run",
        "dataset=custom",
        f"dataset.file={write_lines(tmp_path, *samples)}",
        "model=tiny",
        "model.clip_weights=null",
        "image_size=64",
        "batch_size=2",
        "trainer.max_epochs=1",
    )
    assert results["splits"]["val"]["samples"] == 2
    segmenter = crislit.load(tmp_path / "run/checkpoints/best.ckpt", device="cpu")
    assert segmenter(tmp_path / "00.png", "dog")[0].mask.shape == (40, 60)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [([], "dataset.file"), (["dataset.file=nowhere.jsonl"], "nowhere.jsonl not found")],
)
def test_a_missing_file_is_one_line(
    overrides: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "run", "dataset=custom", *overrides)
    assert end.value.code == 1
    errors = capsys.readouterr().err
    assert expected in errors
    assert "Traceback" not in errors
