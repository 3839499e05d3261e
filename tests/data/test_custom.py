"""Somebody's own data: every way to give a mask, every way to get it wrong, and a training on twenty pictures."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as coco_mask

from crislit import check_data
from crislit.data.custom import read_custom
from crislit.data.datamodule import ReferDataModule
from crislit.data.dataset import read_image
from crislit.data.refer_index import ReferIndex
from crislit.errors import InputError
from tests.runs import run

BOX = [[10, 5, 30, 5, 30, 25, 10, 25]]
"""A polygon of 20 x 20 pixels."""


def marked() -> np.ndarray:
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[5:25, 10:30] = 1
    return mask


def picture(folder: Path, name: str, size: tuple[int, int] = (60, 40), **options: Any) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(name))
    PIL.Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
        folder / name, **options
    )
    return name


def write(folder: Path, *lines: dict[str, Any] | str) -> str:
    path = folder / "mine.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n",
        encoding="utf-8",
    )
    return str(path)


def index_of(file: str, sentences: str | None = None, images: str | None = None) -> ReferIndex:
    return ReferDataModule(root=Path(), file=file, sentences=sentences, images=images).index


def test_every_way_to_give_a_mask_gives_the_same_mask(tmp_path: Path) -> None:
    a = picture(tmp_path, "photos/a.jpg")
    PIL.Image.fromarray(255 * marked()).save(tmp_path / "grey.png")
    PIL.Image.fromarray(marked()).save(tmp_path / "ones.png")
    PIL.Image.fromarray(marked().astype(bool)).save(tmp_path / "bits.png")
    PIL.Image.fromarray(np.repeat(255 * marked()[..., None], 3, axis=2)).save(tmp_path / "rgb.png")
    palette = PIL.Image.fromarray(3 * marked(), "P")
    palette.putpalette([0, 0, 0] * 256)
    palette.save(tmp_path / "palette.png")
    for name, (off, on) in {"black first": (0, 255), "white first": (255, 0)}.items():
        grey = PIL.Image.fromarray((marked() == (0 if off else 1)).astype(np.uint8), "P")
        grey.putpalette([off] * 3 + [on] * 3)
        grey.save(tmp_path / f"{name}.png")
    coloured = PIL.Image.fromarray(2 * marked(), "P")
    coloured.putpalette([255, 255, 255, 0, 0, 0, 0, 0, 128])
    coloured.save(tmp_path / "coloured.png")
    rle = coco_mask.encode(np.asfortranarray(marked()))
    runs = {"size": [40, 60], "counts": rle["counts"].decode()}
    flat = np.concatenate([[0], marked().T.ravel(), [0]])
    plain = np.diff(
        np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]), [40 * 60]])
    ).tolist()
    ways = [
        {"mask": f"{name}.png"}
        for name in (
            "grey",
            "ones",
            "bits",
            "rgb",
            "palette",
            "black first",
            "white first",
            "coloured",
        )
    ]
    ways += [{"polygons": BOX}, {"rle": runs}, {"rle": {"size": [40, 60], "counts": plain}}]  # type: ignore[dict-item]
    file = write(tmp_path, *({"image": a, "sentence": "the box", **way} for way in ways))
    index = index_of(file)
    assert len(index) == len(ways)
    for ref in range(len(index)):
        assert np.array_equal(index.mask(ref), marked()), ways[ref]


def test_sentences_splits_and_paths_are_kept(tmp_path: Path) -> None:
    a, b = picture(tmp_path, "deep/down/a.png"), picture(tmp_path, "b.jpg")
    absolute = picture(tmp_path / "elsewhere", "c.png")
    file = write(
        tmp_path,
        {"image": a, "sentences": ["Étoile", "a  star"], "polygons": BOX},
        "",
        {"image": b, "sentence": "dog", "polygons": BOX, "split": "val"},
        {
            "image": str(tmp_path / "elsewhere" / absolute),
            "sentence": "cat",
            "polygons": BOX,
            "split": "val",
        },
        {"image": a, "sentence": "ring", "polygons": BOX},
    )
    index = index_of(file)
    assert index.splits == ("train", "val")
    assert index.split_refs("val").tolist() == [1, 2]
    said = [[index.sentence(row) for row in index.sentence_rows(ref)] for ref in range(4)]
    assert said == [["Étoile", "a  star"], ["dog"], ["cat"], ["ring"]]
    assert index.image_id(0) == index.image_id(3) != index.image_id(1)
    for ref in range(4):
        assert read_image(index, ref).shape == (40, 60, 3)
    index.check_images(np.arange(4))


def coco(
    folder: Path, rows: Sequence[Sequence[Any]], header: str = "ann_id,sentence,split"
) -> tuple[str, str]:
    names = [picture(folder / "photos", f"{name}.jpg") for name in "ab"]
    images = [
        {"id": 70 + i, "file_name": name, "height": 40, "width": 60} for i, name in enumerate(names)
    ]
    annotations = [{"id": 5 + i, "image_id": 70 + i % 2, "segmentation": BOX} for i in range(3)]
    annotations.append({"id": 8, "image_id": 99, "segmentation": BOX})
    (folder / "instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    with (folder / "said.csv").open("w", newline="") as file:
        file.write(header + "\n")
        csv.writer(file).writerows(rows)
    return str(folder / "instances.json"), str(folder / "said.csv")


def test_a_coco_file_with_a_table_of_sentences(tmp_path: Path) -> None:
    rows: list[list[Any]] = [
        [6, 'the "big", red dog', "val"],
        [5, "cat", "train"],
        [6, "dog", "val"],
        [7, "bird", ""],
    ]
    index = index_of(*coco(tmp_path, rows), images=str(tmp_path / "photos"))
    said = {
        index.ref_id(ref): [index.sentence(row) for row in index.sentence_rows(ref)]
        for ref in range(3)
    }
    assert list(said.values()) == [['the "big", red dog', "dog"], ["cat"], ["bird"]]
    assert index.split_refs("train").tolist() == [1, 2]
    assert index.image_path(0) == tmp_path / "photos/b.jpg"
    assert np.array_equal(index.mask(0), marked())


def test_a_table_without_splits_is_all_training(tmp_path: Path) -> None:
    index = index_of(
        *coco(tmp_path, [[6, "dog"]], "ann_id,sentence"), images=str(tmp_path / "photos")
    )
    assert index.splits == ("train",)


def test_bad_rows_of_a_table_are_told_with_their_numbers(tmp_path: Path) -> None:
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
    file, table = coco(tmp_path, rows)
    content = json.loads(Path(file).read_text())
    content["images"][0]["height"] = 80  # of annotations 5 and 7
    content["annotations"][1]["image_id"] = "71"  # an id as text, as some programs write it
    Path(file).write_text(json.dumps(content))
    found = read_custom(file, table, str(tmp_path / "photos")).problems
    assert [(problem.line, problem.reason.split("found")[0].strip()) for problem in found] == [
        (2, "ann_id must be a number,"),
        (3, "there is no annotation 50 in instances.json"),
        (4, "a sentence must be text that is not empty,"),
        (6, "annotation 6 is of split 'val' in line 5, and of 'test' here"),
        (7, "annotation 8 belongs to image 99, which is not listed"),
        (8, "ann_id must be a number,"),
        (9, "a.jpg has height 40, and its annotations are for 80"),
        (11, "a sentence over several lines: is a quotation mark missing? Found 'dog\\n6,cat'"),
    ]


GOOD = {"image": "a.png", "sentence": "dog", "polygons": BOX}
BAD: list[tuple[Any, str]] = [
    ("{", "Expecting property name"),
    ("[1]", "expected an object, {...}, found list"),
    ("NaN", "expected an object"),
    ("[" * 100_000, "recursion"),
    ({**GOOD, "label": 1}, "unknown key 'label'"),
    ({**GOOD, "image": None}, "image must be a path, found None"),
    ({**GOOD, "image": 7}, "image must be a path, found 7"),
    ({**GOOD, "image": "nowhere.png"}, "there is no picture"),
    ({**GOOD, "image": "notes.txt"}, "is no picture that can be read"),
    ({**GOOD, "image": "turned.jpg"}, "stored turned (EXIF orientation 6)"),
    ({**GOOD, "sentence": ""}, "text that is not empty"),
    ({**GOOD, "sentence": 5}, "text that is not empty"),
    ({**GOOD, "sentence": " &nbsp;"}, "text that is not empty"),
    ({**GOOD, "sentences": ["dog"]}, "either sentence or sentences"),
    ({"image": "a.png", "polygons": BOX}, "either sentence or sentences"),
    ({"image": "a.png", "polygons": BOX, "sentences": []}, "text that is not empty"),
    ({"image": "a.png", "polygons": BOX, "sentences": "dog"}, "text that is not empty"),
    ({**GOOD, "split": 3}, "split must be a name"),
    ({**GOOD, "split": " "}, "split must be a name"),
    ({"image": "a.png", "sentence": "dog"}, "expected one of mask, polygons and rle, found none"),
    ({**GOOD, "mask": "m.png"}, "found mask and polygons"),
    (
        {**GOOD, "polygons": [[1, 2, 3]]},
        "a polygon is a list x, y, x, y, ... of numbers, found [1, 2, 3]",
    ),
    (
        {**GOOD, "polygons": [*BOX, [[1, 2], [9, 2], [9, 9]]]},
        "a polygon is a list x, y, x, y, ... of numbers",
    ),
    (
        {**GOOD, "polygons": [*BOX, [1, 2, 9, 2, 9]]},
        "a polygon is a list x, y, x, y, ... of numbers",
    ),
    ({**GOOD, "polygons": [[1, 2, 9, 2]]}, "marks no pixel"),
    ({**GOOD, "polygons": []}, "marks no pixel"),
    ({**GOOD, "polygons": [[100, 100, 120, 100, 120, 120]]}, "marks no pixel"),
    ({**GOOD, "polygons": [[1e9, 2, 3, 4, 5, 6]]}, "far outside"),
    (
        {**GOOD, "polygons": [["a", 2, 3, 4, 5, 6]]},
        "a polygon is a list x, y, x, y, ... of numbers",
    ),
    ({**GOOD, "image": "glass.png"}, "has transparent pixels"),
    ({**GOOD, "image": "drawn.eps"}, "is no picture that can be read"),
    ({"image": "a.png", "sentence": "dog", "mask": "glass.png"}, "the mask"),
    (
        {"images": [], "annotations": []},
        "this is a COCO instances file, which needs a table of sentences",
    ),
    ({**GOOD, "polygons": 5}, "neither polygons nor run lengths"),
    (
        {"image": "a.png", "sentence": "dog", "rle": {"size": [40, 60]}},
        "neither polygons nor run lengths",
    ),
    ({"image": "a.png", "sentence": "dog", "rle": {"size": [9, 9], "counts": [81]}}, "do not fill"),
    ({"image": "a.png", "sentence": "dog", "mask": "nowhere.png"}, "there is no mask"),
    ({"image": "a.png", "sentence": "dog", "mask": "notes.txt"}, "no mask that can be read"),
    (
        {"image": "a.png", "sentence": "dog", "mask": "small.png"},
        "has (10, 10) pixels (height, width), its picture (40, 60)",
    ),
    (
        {"image": "a.png", "sentence": "dog", "mask": "black.png"},
        "marks no pixel: its values are 0;",
    ),
    (
        {"image": "a.png", "sentence": "dog", "mask": "classes.png"},
        "its values are 0, 2; what marks is above 127, or 1 beside 0",
    ),
]


def test_bad_lines_are_told_with_their_numbers_and_the_good_ones_kept(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path, "turned.jpg", exif=exif)
    picture(tmp_path, "small.png", (10, 10))
    PIL.Image.new("L", (60, 40)).save(tmp_path / "black.png")
    PIL.Image.fromarray(2 * marked().astype(np.uint8)).save(tmp_path / "classes.png")
    PIL.Image.new("RGBA", (60, 40), (255, 255, 255, 128)).save(tmp_path / "glass.png")
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "drawn.eps")
    lines: list[Any] = []
    for bad, _ in BAD:
        lines += [GOOD, bad]
    data = read_custom(write(tmp_path, *lines))
    assert [problem.line for problem in data.problems] == list(range(2, 2 * len(BAD) + 1, 2))
    for problem, (bad, expected) in zip(data.problems, BAD, strict=True):
        assert expected in problem.reason, (bad, problem.reason)
        assert len(problem.reason) < 300
    assert [told["line"] for ref in data.refs for told in ref["sentences"]] == list(
        range(1, 2 * len(BAD), 2)
    )


def test_training_refuses_bad_lines_and_says_how_to_see_them_all(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    file = write(tmp_path, GOOD, {**GOOD, "sentence": ""})
    with pytest.raises(
        InputError,
        match=r"1 lines of .*mine\.jsonl cannot serve: line 2: a sentence.*check_data` shows all",
    ):
        index_of(file)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("mine.jsonl", None, "there is no file"),
        ("mine.jsonl", b"\n\n", "holds no line"),
        ("mine.jsonl", b"\xff\xfe\x00", "is not UTF-8"),
        ("instances.json", b"{}", "should hold a list 'images'"),
        ("instances.json", b"{", "cannot read"),
        ("mine.jsonl", b'{\n"images": []\n}', "is one JSON document over several lines"),
        ("said.csv", b'ann_id,sentence\n5,"open\n6,dog\n', "is no table in CSV"),
        (
            "said.csv",
            b"id,text\n1,dog\n",
            "should begin with the columns ann_id, sentence, split, and begins with id, text",
        ),
        ("said.csv", b"", "and begins with nothing"),
    ],
)
def test_a_file_that_is_none_of_its_kind_is_one_error(
    name: str, content: bytes | None, expected: str, tmp_path: Path
) -> None:
    file, table = coco(tmp_path, [[6, "dog", "val"]])
    if content is not None:
        (tmp_path / name).write_bytes(content)
    given = (str(tmp_path / "mine.jsonl"),) if name == "mine.jsonl" else (file, table)
    with pytest.raises(InputError, match=expected):
        read_custom(*given)


def test_folder_and_file_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"either dataset\.file"):
        ReferDataModule(root=tmp_path, folder="refcoco", refs="refs(unc).p", file="mine.jsonl")
    with pytest.raises(InputError, match=r"either dataset\.file"):
        ReferDataModule(root=tmp_path)
    with pytest.raises(InputError, match="for COCO files"):
        read_custom("mine.jsonl", images="photos")


# -- check_data ---------------------------------------------------------------------------------------------------------------


def test_check_data_counts_a_sound_set_and_notes_what_may_surprise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path, "a.png")
    picture(tmp_path, "b.png")
    long = "word " * 30
    file = write(
        tmp_path,
        GOOD,
        {**GOOD, "split": "val"},
        {**GOOD, "image": "b.png", "sentence": long, "split": "val"},
    )
    check_data.main([file])
    assert capsys.readouterr().out.splitlines() == [
        "train: 1 objects, 1 sentences, 1 pictures",
        "val: 2 objects, 2 sentences, 2 pictures",
        "note: 1 pictures of val are in train too: what is measured on val is too good",
        "note: 1 sentences longer than 22 tokens are cut (lines 3): raise dataset.max_words",
    ]
    check_data.main([write(tmp_path, GOOD)])
    assert "note: there is no split 'val', which training needs" in capsys.readouterr().out


def test_check_data_prints_every_bad_line_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path, "a.png")
    whole = (tmp_path / picture(tmp_path, "b.png", (300, 200))).read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])  # its head is sound
    good = {"image": "b.png", "sentence": "cat", "polygons": BOX}
    file = write(tmp_path, GOOD, {**GOOD, "sentence": " "}, good, "nonsense")
    with pytest.raises(SystemExit, match="error: 3 problems in"):
        check_data.main([file])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown[:3]] == ["line 2", "line 3", "line 4"]
    assert "damaged" in shown[1]
    assert shown[3] == "train: 2 objects, 2 sentences, 2 pictures"


def test_check_data_obeys_no_control_character_of_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, {**GOOD, "image": "\x1b[2Jno\u202e\ud800\nline 9: forged.png"})
    with pytest.raises(SystemExit):
        check_data.main([file])
    said = capsys.readouterr().out
    assert r"\x1b[2Jno\u202e\ud800\nline 9: forged.png" in said
    assert all(line.isprintable() for line in said.splitlines())


def test_check_data_of_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, table = coco(tmp_path, [[6, "dog", "val"], [5, "cat", "train"]])
    check_data.main([file, "--sentences", table, "--images", str(tmp_path / "photos")])
    assert "val: 1 objects, 1 sentences, 1 pictures" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: there is no file nowhere"):
        check_data.main(["nowhere.jsonl"])


def test_every_row_of_a_bad_annotation_or_picture_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        [8, "bird", "val"],
        [6, "dog", "val"],
        [8, "small bird", "val"],
        [5, "cat", "val"],
        [6, "a dog", "val"],
    ]
    file, table = coco(tmp_path, rows)  # annotation 8 belongs to no picture
    broken = tmp_path / "photos/b.jpg"
    broken.write_bytes(
        broken.read_bytes()[:-300]
    )  # annotation 6's: its head is sound, its pixels are not
    with pytest.raises(SystemExit, match="error: 4 problems in"):
        check_data.main([file, "--sentences", table, "--images", str(tmp_path / "photos")])
    told = [
        line.split(":")[0]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("line ")
    ]
    assert told == ["line 2", "line 3", "line 4", "line 6"]


# -- Training -----------------------------------------------------------------------------------------------------------------


def test_training_on_own_data_leaves_a_network_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import crislit

    splits = ["train"] * 6 + ["val"] * 2
    lines = [
        {**GOOD, "image": picture(tmp_path, f"{i:02}.png"), "split": split}
        for i, split in enumerate(splits)
    ]
    file = write(tmp_path, *lines)
    options = [
        "dataset=custom",
        f"dataset.file={file}",
        "model=tiny",
        "image_size=64",
        "batch_size=2",
        "trainer.max_epochs=1",
    ]
    found = run(monkeypatch, tmp_path / "run", *options, "model.clip_weights=null")
    assert found["splits"]["val"]["samples"] == 2
    segmenter = crislit.load(tmp_path / "run/checkpoints/best.ckpt", device="cpu")
    assert segmenter(tmp_path / "00.png", "dog")[0].mask.shape == (40, 60)


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], "dataset.file"), (["dataset.file=nowhere.jsonl"], "there is no file nowhere.jsonl")],
)
def test_a_missing_file_is_one_line(
    given: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "run", "dataset=custom", *given)
    assert end.value.code == 1
    told = capsys.readouterr().err
    assert expected in told
    assert "Traceback" not in told
