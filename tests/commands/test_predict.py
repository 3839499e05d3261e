"""Predictions as files and JSON lines, from files, folders and the standard input."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from pycocotools import mask as coco_mask

from crislit import predict
from crislit.checkpoints.checkpoint import Checkpoint, write_folder
from crislit.inference.masks import COLORS, paint, safe_file_name
from crislit.inference.segmenter import Segmenter
from crislit.io.assets import EXAMPLES
from crislit.models.build import build_cris
from crislit.models.cris import CRIS
from tests.inference.test_segmenter import TINY
from tests.io.test_images import photo
from tests.runs import command, environment

SENTENCES = ["the man in red", "leftmost dog"]
Network = tuple[str, CRIS]
"""A folder, and the network in it."""
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    """A network with about half of the first sentence's probabilities above its threshold."""
    torch.manual_seed(0)
    model = build_cris(TINY).eval()
    (result,) = Segmenter(model, image_size=64, device="cpu")(photo(), SENTENCES[0])
    threshold = float(np.median(result.probability))
    folder = tmp_path_factory.mktemp("networks") / "net"
    write_folder(Checkpoint(model.config, model.state_dict(), 64, threshold, "random"), folder)
    return str(folder), model


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    PIL.Image.fromarray(photo()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(capsys: Capture, network: Network, *arguments: str | Path) -> list[dict[str, Any]]:
    predict.main([*map(str, arguments), "--checkpoint", network[0], "--device", "cpu"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_sentence_gets_a_mask_an_overlay_and_a_line(
    image_path: Path, network: Network, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "deep/out"
    lines = run(capsys, network, image_path, *SENTENCES, "--output", out)
    threshold = json.loads((Path(network[0]) / "config.json").read_text())["threshold"]
    segmenter = Segmenter(network[1], image_size=64, threshold=threshold, device="cpu")
    expected = segmenter(image_path, SENTENCES)
    assert [line["sentence"] for line in lines] == SENTENCES
    assert 0.3 < expected[0].mask.mean() < 0.7
    for number, (line, result) in enumerate(zip(lines, expected, strict=True)):
        assert line["image"] == str(image_path)
        mask, overlay = (np.array(PIL.Image.open(line[kind])) for kind in ("mask", "overlay"))
        assert np.array_equal(mask, np.where(result.mask, 255, 0))
        assert np.array_equal(overlay, paint(photo(), [result.mask], first=number))
        segmentation = line["segmentation"]
        runs = {"size": segmentation["size"], "counts": segmentation["counts"].encode()}
        assert np.array_equal(coco_mask.decode(runs).astype(bool), result.mask)
        assert line["area"] == result.mask.sum()
        assert line["score"] == pytest.approx(result.score, abs=1e-6)
        if result.mask.any():
            ys, xs = np.nonzero(result.mask)
            width, height = xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()
            assert line["box"] == [xs.min(), ys.min(), width, height]
        else:
            assert (line["box"], line["score"]) == ([0, 0, 0, 0], 0)
    assert sorted(path.name for path in out.iterdir()) == [
        f"photo.png-{words}-{kind}.png"
        for words in ("leftmost-dog", "the-man-in-red")
        for kind in ("mask", "overlay")
    ]


def test_several_images_come_before_the_sentences(
    network: Network, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, folder in enumerate(("one", "two", "three")):
        (tmp_path / folder).mkdir()
        PIL.Image.fromarray(photo(seed=number)).save(tmp_path / folder / "a.png")
    (tmp_path / "sentences.txt").write_text("star\nring\n")
    images = ["one/a.png", "two/a.png", "three"]
    lines = run(capsys, network, *images, "star", "ring")
    names = ["one/a.png", "two/a.png", str(Path("three/a.png"))]
    assert [line["image"] for line in lines] == [name for name in names for _ in range(2)]
    assert [line["sentence"] for line in lines] == 3 * ["star", "ring"]
    for line in lines:  # images of the same name do not overwrite each other's masks
        mask = np.array(PIL.Image.open(line["mask"])) > 0
        assert mask.sum() == line["area"]
        assert Path(line["mask"]).parent == Path("outputs/predictions"), "the default"
    assert len({line["mask"] for line in lines}) == 6
    again = run(capsys, network, *images, "--sentences", "sentences.txt", "--output", "-")
    assert [line["area"] for line in again] == [line["area"] for line in lines]
    with pytest.raises(SystemExit, match="one holds the images"):
        run(capsys, network, "one/a.png", "two/a.png", "star", "--output", "one")


def test_an_option_given_twice_is_a_usage_error(
    image_path: Path, network: Network, capsys: Capture
) -> None:
    for options in (["--threshold", "0.1", "--threshold", "0.2"], 2 * ["--sentences", "x.txt"]):
        with pytest.raises(SystemExit) as caught:
            run(capsys, network, image_path, "star", *options)
        assert caught.value.code == 2
        assert "given twice" in capsys.readouterr().err


def test_the_default_network_warns_of_photos_once_and_of_empty_masks(
    tmp_path: Path, capsys: Capture
) -> None:
    for name in ("a.png", "b.png"):  # smooth noise has as many colors as a photo
        noise = PIL.Image.fromarray(photo(12, 16)).resize((320, 240), PIL.Image.Resampling.BICUBIC)
        noise.save(tmp_path / name)
    options = ["--output", "-", "--device", "cpu"]
    predict.main([str(tmp_path), "the red star", *options, "--threshold", "0.9999"])
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    first, *rest = shown.err.splitlines()
    assert first.startswith("network: shapes-tiny, trained on shapes (knows drawn shapes only); ")
    assert first.endswith("images of 192 pixels")
    assert sum("looks like a photo" in line for line in rest) == 1
    empty = [line for line in rest if "is empty" in line]
    assert len(empty) == 2
    assert re.fullmatch(
        r"warning: the mask of 'the red star' in .*a\.png is empty: the highest probability is "
        r"0\.\d{3}, and the threshold 1; lower it with --threshold \(see .*#empty-mask\)",
        empty[0],
    )
    predict.main([str(EXAMPLES / "places.jpg"), "red disc", *options])
    assert "photo" not in capsys.readouterr().err


def test_the_threshold_can_be_chosen(image_path: Path, network: Network, capsys: Capture) -> None:
    (low,) = run(capsys, network, image_path, "star", "--output", "-", "--threshold", "0")
    (high,) = run(capsys, network, image_path, "star", "--output", "-", "--threshold", "0.999")
    assert low["area"] > high["area"]


def test_a_dash_as_output_writes_no_files(
    image_path: Path,
    network: Network,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = run(capsys, network, image_path, "star", "--output", "-")
    assert "mask" not in line
    assert list(tmp_path.iterdir()) == [image_path]


def test_options_may_stand_between_sentences(
    image_path: Path, network: Network, capsys: Capture
) -> None:
    options = ("--output", "-", image_path, "star", "--threshold", "0.5", "ring")
    assert len(run(capsys, network, *options)) == 2


def test_sentences_come_from_a_file_with_one_per_line(
    image_path: Path, network: Network, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "sentences.txt"
    file.write_text("the man in red\n\n  leftmost dog \r\nÉtoile\n", encoding="utf-8")
    lines = run(capsys, network, image_path, "--sentences", file, "--output", "-")
    assert [line["sentence"] for line in lines] == [*SENTENCES, "Étoile"]


def test_an_image_comes_from_the_standard_input_of_a_process(
    image_path: Path, network: Network, capsys: Capture
) -> None:
    expected = run(capsys, network, image_path, *SENTENCES, "--output", "-")
    line = command("predict", "-", *SENTENCES, "--checkpoint", network[0], "--output", "-")
    content = image_path.read_bytes()
    done = subprocess.run(line, input=content, env=environment(), capture_output=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["area"] for line in lines] == [line["area"] for line in expected]
    assert lines[0]["image"] == "-"
    network_line, *warnings = done.stderr.decode().splitlines()
    assert network_line.startswith("network: net, training data unknown; ")
    empty = [line for line in lines if not line["area"]]
    assert len(warnings) == len(empty)
    assert all("in the standard input is empty" in warning for warning in warnings)


def set_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Replace the standard input of this process."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_sentences_come_from_the_standard_input_without_a_byte_order_mark(
    image_path: Path,
    network: Network,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_stdin(monkeypatch, b"\xef\xbb\xbf" + "\n".join(SENTENCES).encode())
    lines = run(capsys, network, image_path, "--sentences", "-", "--output", "-")
    assert [line["sentence"] for line in lines] == SENTENCES
    assert lines[0]["image"] == str(image_path)


def test_a_bad_image_in_a_folder_does_not_stop_the_others(
    network: Network, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "a.png", "c.webp"):
        PIL.Image.fromarray(photo()).save(folder / name)
    (folder / "b.jpg").write_bytes((folder / "a.jpg").read_bytes()[:200])
    (folder / "notes.txt").write_text("not an image")
    (folder / "sub.png").mkdir()
    message = "1 of 4 images could not be segmented, see above; the others were$"
    with pytest.raises(SystemExit, match=message):
        run(capsys, network, folder, "star", "--output", tmp_path / "out")
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["a.jpg", "a.png", "c.webp"]
    assert "b.jpg" in shown.err
    assert len(list((tmp_path / "out").iterdir())) == 6, "a.jpg and a.png get different names"
    broken = [folder / "b.jpg", folder / "b.jpg"]
    with pytest.raises(SystemExit, match=r"2 of 2 images could not be segmented, see above$"):
        run(capsys, network, *broken, "star", "--output", "-")


def test_similar_sentences_get_different_files() -> None:
    taken: set[str] = set()
    sentences = ("a star!", "A star?", "星", "../../etc", "x" * 500, "x" * 499)
    names = [safe_file_name("p.jpg", sentence, taken) for sentence in sentences]
    assert len(set(names)) == 6
    assert names[:3] == ["p.jpg-a-star", "p.jpg-a-star-2", "p.jpg-星"]
    assert all("/" not in name and len(name) < 80 for name in names)


@pytest.mark.parametrize(
    ("stem", "sentence", "expected"),
    [
        ("a.png", "Красный круг", "a.png-красный-круг"),
        ("a.png", "红色的圆圈", "a.png-红色的圆圈"),
        ("a.png", "القرص الأحمر", "a.png-القرص-الأحمر"),
        ("a.png", "लाल गेंद", "a.png-लाल-गेंद"),  # the vowels are marks
        ("a.png", "e\u0301toile", "a.png-\u00e9toile"),
        ("a.png", "the 🟥 one ❤️", "a.png-the-one"),
        ("a.png", "🟥", "a.png-sentence"),
        ("a.png", "\u202ered/../x", "a.png-red-x"),
        ("a:b?.png", "star", "a_b_.png-star"),
        ("NUL.png", "star", "_NUL.png-star"),
        ("nullable.png", "star", "nullable.png-star"),
        ("a\udcff.png", "star", "a_.png-star"),
    ],
)
def test_file_names_keep_letters_of_any_script_and_are_valid_everywhere(
    stem: str, sentence: str, expected: str
) -> None:
    assert safe_file_name(stem, sentence, set()) == expected


def test_file_names_differ_on_file_systems_that_ignore_case_and_composition() -> None:
    taken: set[str] = set()
    stems = ("A.png", "a.png", "\u00e9.png", "e\u0301.png")
    names = [safe_file_name(stem, "star", taken) for stem in stems]
    assert [name.endswith("-2") for name in names] == [False, True, False, True]
    long = [safe_file_name(f"{'星' * 90}{i}.png", "界" * 90, taken) for i in range(3)]
    assert len(set(long)) == 3
    assert all(len(f"{name}-overlay.png".encode()) <= 255 for name in long)


@pytest.mark.filterwarnings("default:the network reads")  # as outside of tests
def test_truncated_words_are_reported_once(
    network: Network, tmp_path: Path, capsys: Capture
) -> None:
    for name in ("a.png", "b.png"):
        PIL.Image.fromarray(photo()).save(tmp_path / name)
    sentence = "word " * 20 + "lost"
    predict.main([str(tmp_path), sentence, "--output", "-", "--checkpoint", network[0]])
    message = capsys.readouterr().err
    assert message.count("warning: the network reads 15 tokens") == 1
    assert "word lost" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["IMAGE"], 'Add a sentence: python -m crislit.predict .*photo.png "the man in red"$'),
        (["IMAGE", ""], 'Add a sentence: python -m crislit.predict .*photo.png "the man in red"$'),
        (["IMAGE", "  ", "\t"], 'Add a sentence: python -m crislit.predict .*photo.png "the man'),
        (["-"], 'Add a sentence: python -m crislit.predict - "the man in red"$'),
        (["FOLDER"], 'Add a sentence: python -m crislit.predict folder "the man in red"$'),
        (["", "star"], "the name of an image is empty; .* python -m crislit.predict photo.jpg"),
        (["star"], "no image at star; images come first, .* python -m crislit.predict photo.jpg"),
        (["IMAGE", "star", "--sentences", "-"], "not both"),
        (["-", "--sentences", "-"], "the standard input holds either"),
        (["IMAGE", "--sentences", "nowhere.txt"], "cannot read the sentences in nowhere.txt"),
        (["IMAGE", "--sentences", "EMPTY"], "holds no sentence"),
        (["IMAGE", "star", " "], "a sentence is empty"),
        (["IMAGE", "star", "&nbsp;"], "a sentence is empty: .* not '&nbsp;'"),
        (["nowhere.jpg", "star"], "no image at nowhere.jpg"),
        (["FOLDER", "star"], "no image in"),
        (["IMAGE", "star", "--output", "IMAGE"], "cannot write to"),
        (["IMAGE", "star", "--checkpoint", "nowhere"], "no network 'nowhere'"),
        (["IMAGE", "star", "--threshold", "2"], "threshold must be"),
        (["IMAGE", "star", "--threshold", "35"], "got 35.0; 35 percent is 0.35"),
        (["IMAGE", "star", "--threshold", "nan"], "threshold must be"),
        (["IMAGE", "IMAGE"], r"Add a sentence \(.*photo.png' is taken for an image\): python -m"),
        (["IMAGE", "99.png", "star"], "no image at 99.png"),
        (["IMAGE", "star", "IMAGE"], "comes after the sentence 'star': images come first"),
        (["IMAGE", "star", "99.JPG"], "'99.JPG' names a file or an image, but comes after"),
        (["IMAGE", "star", "FOLDER"], "'folder' names a file or an image, but comes after"),
        (["red star", "IMAGE"], "no image at red star; images come first, then sentences"),
        (["IMAGE", "FOLDER", "star"], "no image in folder itself"),
        (["-", "IMAGE", "-", "star"], "give - only once"),
        (["IMAGE", "-", "--sentences", "-"], "the standard input holds either"),
        (["IMAGE", "star", "--sentences", "EMPTY"], "not both"),
        (["IMAGE", "--sentences", "UTF16"], "expected text in UTF-8 .* save it in this encoding"),
        (["IMAGE", "star", "--device", "abacus"], "cannot compute on device 'abacus'"),
    ],
)
def test_bad_input_is_one_error_line(
    arguments: list[str],
    expected: str,
    image_path: Path,
    network: Network,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "utf16.txt").write_text("star", encoding="utf-16")
    files = {"IMAGE": str(image_path), "EMPTY": "empty.txt", "FOLDER": "folder"}
    files["UTF16"] = "utf16.txt"
    filled = [files.get(argument, argument) for argument in arguments]
    if "--checkpoint" not in filled:
        filled += ["--checkpoint", network[0]]
    if "--output" not in filled:
        filled += ["--output", "-"]
    with pytest.raises(SystemExit, match=f"^error: .*{expected}") as caught:
        predict.main(filled)
    assert "\n" not in str(caught.value)


def test_paint_colors_and_outlines_the_mask_only() -> None:
    image = np.full((40, 60, 3), 100, dtype=np.uint8)
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:20, 10:30] = True
    painted = paint(image, [mask, np.roll(mask, 15, axis=0)])
    assert (image == 100).all(), "the image itself does not change"
    assert painted[15, 20].tolist() == [round((100 + channel) / 2) for channel in COLORS[0]]
    assert painted[30, 20].tolist() == [round((100 + channel) / 2) for channel in COLORS[1]]
    assert painted[10, 15].tolist() == list(COLORS[0])
    assert (painted[9, 15] == 255).all()
    assert (painted[7:9, 15] == 0).all()
    assert (painted[:7] == 100).all()
    assert np.array_equal(paint(image, [np.zeros_like(mask)]), image)


OBJECTS = [(255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255), (128, 128, 128), *COLORS]


@pytest.mark.parametrize("object_color", OBJECTS)
@pytest.mark.parametrize("number", range(len(COLORS)))
def test_a_mask_is_visible_on_an_object_of_any_color(
    object_color: tuple[int, int, int], number: int
) -> None:
    image = np.full((60, 80, 3), object_color, dtype=np.uint8)
    y, x = np.mgrid[:60, :80]
    masks = {
        "disc": np.hypot(x - 40, y - 30) < 15,
        "ring": (np.hypot(x - 40, y - 30) < 20) & (np.hypot(x - 40, y - 30) > 10),
        "line": (x == 40) & (y > 10) & (y < 50),
        "corner": (x > 50) & (y > 40),
        "all of the image": np.ones((60, 80), dtype=bool),
    }
    for name, mask in masks.items():
        painted = paint(image, [mask], first=number)
        black, white = ((painted == value).all(axis=2) for value in (0, 255))
        around = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
        assert (painted[~around] == object_color).all(), f"{name}: beyond the lines"
        border = np.ones_like(mask)
        border[1:-1, 1:-1] = False
        nearest = cv2.dilate(mask.astype(np.uint8), cv2.getStructuringElement(1, (3, 3))) > 0
        assert white[nearest & ~mask & ~border].all(), f"{name}: the white line closes"
        assert black[mask & border].all(), f"{name}: the line along the image's border"
        assert black[around].any(), name
    center = paint(image, [masks["disc"]], first=number)[30, 40]
    mixed = (np.array(object_color) + COLORS[number]) / 2
    assert np.abs(center - mixed).max() <= 0.5
    thin = paint(image, [masks["line"]], first=number)[30, 40]
    assert thin.tolist() == list(COLORS[number]), "a thin mask keeps its color"


def test_an_image_of_another_format_comes_from_the_standard_input(
    network: Network, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = io.BytesIO()
    PIL.Image.fromarray(photo(20, 30)).save(file, "BMP")
    set_stdin(monkeypatch, file.getvalue())
    (line,) = run(capsys, network, "-", "star", "--output", "-")
    assert line["segmentation"]["size"] == [20, 30]


@pytest.mark.skipif(sys.platform != "linux", reason="shells and devices differ")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("PREDICT - star <&-", "error: the standard input is closed"),
        ("PREDICT a.png star --output - > /dev/full", "error: .*No space left on device"),
    ],
)
def test_bad_redirections_are_one_error_line(line: str, message: str, tmp_path: Path) -> None:
    PIL.Image.fromarray(photo()).save(tmp_path / "a.png")
    shell = ["sh", "-c", line.replace("PREDICT", shlex.join(command("predict")))]
    done = subprocess.run(
        shell, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


def test_a_closed_input_and_a_name_too_long_are_one_error_line(
    image_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as Python does if it is closed
    for arguments, message in (
        ([str(image_path), "--sentences", "-"], "the standard input is closed"),
        (["x" * 300, "star"], "File name too long"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            predict.main(arguments)


def test_a_folder_may_contain_broken_links_and_long_names(
    network: Network, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "gone.png").symlink_to("nowhere.png")
    PIL.Image.fromarray(photo()).save(folder / f"{'n' * 200}.png")
    with pytest.raises(SystemExit, match="error: 1 of 2 images could not be segmented"):
        run(capsys, network, folder, "word " * 10, "--output", tmp_path / "out")
    assert "no image at" in capsys.readouterr().err
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_an_image_whose_name_is_not_text_is_segmented(
    network: Network, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"\xff.png", b"\xff" * 200 + b".png"):
        PIL.Image.fromarray(photo()).save(folder / os.fsdecode(name), "PNG")
    assert len(run(capsys, network, folder, "star", "--output", tmp_path / "out")) == 2
    assert len(list((tmp_path / "out").iterdir())) == 4


@pytest.mark.parametrize("program", ["predict", "demo", "convert", "export"])
def test_a_command_parses_its_arguments_before_it_imports_large_libraries(program: str) -> None:
    code = f"import json, sys, crislit.{program}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = {module.split(".")[0] for module in json.loads(done.stdout)}
    assert not loaded & {"torch", "numpy", "cv2", "PIL", "open_clip", "gradio"}


def test_prediction_imports_no_large_library_that_it_does_not_need() -> None:
    code = "import json, sys, crislit.predict, open_clip; from crislit.inference import load"
    code += "; print(json.dumps(sorted(sys.modules)))"
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env=environment())
    loaded = {module.split(".")[0] for module in json.loads(done.stdout)}
    assert not loaded & {"lightning", "pytorch_lightning", "torchmetrics", "hydra", "omegaconf"}
    assert not loaded & {"matplotlib", "albumentations"}
