"""The command line: files, JSON lines, standard input and output, folders, exit codes."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from pycocotools import mask as coco_mask

from crislit import predict
from crislit.checkpoints.checkpoint import Checkpoint, write_folder
from crislit.inference.masks import COLOURS, paint, safe_file_name
from crislit.inference.segmenter import Segmenter
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS
from tests.inference.test_segmenter import CLIP, photo
from tests.runs import environment

SENTENCES = ["the man in red", "leftmost dog"]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CRIS]:
    """A network in a folder; about half of the first sentence's probabilities are above its threshold."""
    torch.manual_seed(0)
    model = build_cris(
        CRISConfig(clip=CLIP, neck=(16, 64, 32), decoder_layers=1, decoder_heads=4, decoder_ffn=64)
    ).eval()
    found = Segmenter(model, image_size=64, device="cpu")(photo(), SENTENCES[0])[0]
    folder = tmp_path_factory.mktemp("networks") / "net"
    write_folder(
        Checkpoint(
            model.config, model.state_dict(), 64, float(np.median(found.probability)), "random"
        ),
        folder,
    )
    return str(folder), model


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    PIL.Image.fromarray(photo()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(
    capsys: pytest.CaptureFixture[str], network: tuple[str, CRIS], *arguments: str | Path
) -> list[dict[str, Any]]:
    predict.main([*map(str, arguments), "--checkpoint", network[0], "--device", "cpu"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_mask_an_overlay_and_a_line_for_every_sentence(
    picture: Path, network: tuple[str, CRIS], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep/out"
    lines = run(capsys, network, picture, *SENTENCES, "--output", out)
    threshold = json.loads((Path(network[0]) / "config.json").read_text())["threshold"]
    expected = Segmenter(network[1], image_size=64, threshold=threshold, device="cpu")(
        picture, SENTENCES
    )
    assert [line["sentence"] for line in lines] == SENTENCES
    assert 0.3 < expected[0].mask.mean() < 0.7
    for number, (line, result) in enumerate(zip(lines, expected, strict=True)):
        assert line["image"] == str(picture)
        assert np.array_equal(np.array(PIL.Image.open(line["mask"])), np.where(result.mask, 255, 0))
        assert np.array_equal(
            np.array(PIL.Image.open(line["overlay"])), paint(photo(), [result.mask], first=number)
        )
        runs = {
            "size": line["segmentation"]["size"],
            "counts": line["segmentation"]["counts"].encode(),
        }
        assert np.array_equal(coco_mask.decode(runs).astype(bool), result.mask)
        assert line["area"] == result.mask.sum()
        assert line["score"] == pytest.approx(result.score, abs=1e-6)
        if result.mask.any():
            ys, xs = np.nonzero(result.mask)
            assert line["box"] == [
                xs.min(),
                ys.min(),
                xs.max() + 1 - xs.min(),
                ys.max() + 1 - ys.min(),
            ]
        else:
            assert (line["box"], line["score"]) == ([0, 0, 0, 0], 0)
    assert sorted(path.name for path in out.iterdir()) == [
        f"photo.png-{words}-{kind}.png"
        for words in ("leftmost-dog", "the-man-in-red")
        for kind in ("mask", "overlay")
    ]


def test_the_threshold_can_be_chosen(
    picture: Path, network: tuple[str, CRIS], capsys: pytest.CaptureFixture[str]
) -> None:
    (low,) = run(capsys, network, picture, "star", "--output", "-", "--threshold", "0")
    (high,) = run(capsys, network, picture, "star", "--output", "-", "--threshold", "0.999")
    assert low["area"] > high["area"]


def test_without_files_nothing_is_written(
    picture: Path,
    network: tuple[str, CRIS],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = run(capsys, network, picture, "star", "--output", "-")
    assert "mask" not in line
    assert list(tmp_path.iterdir()) == [picture]


def test_options_may_stand_between_the_words(
    picture: Path, network: tuple[str, CRIS], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        len(run(capsys, network, "--output", "-", picture, "star", "--threshold", "0.5", "ring"))
        == 2
    )


def test_sentences_come_from_a_file_one_a_line(
    picture: Path, network: tuple[str, CRIS], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "said.txt").write_text(
        "the man in red\n\n  leftmost dog \r\nÉtoile\n", encoding="utf-8"
    )
    lines = run(capsys, network, picture, "--sentences", tmp_path / "said.txt", "--output", "-")
    assert [line["sentence"] for line in lines] == [*SENTENCES, "Étoile"]


def test_a_picture_comes_from_the_standard_input_of_a_process(
    picture: Path, network: tuple[str, CRIS], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(capsys, network, picture, *SENTENCES, "--output", "-")
    command = [
        sys.executable,
        "-m",
        "crislit.predict",
        "-",
        *SENTENCES,
        "--checkpoint",
        network[0],
        "--output",
        "-",
    ]
    done = subprocess.run(
        command, input=picture.read_bytes(), env=environment(), capture_output=True, check=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["area"] for line in lines] == [line["area"] for line in expected]
    assert lines[0]["image"] == "-"
    assert done.stderr == b""


def say(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Let this process's standard input hold something."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_sentences_come_from_the_standard_input_and_a_mark_of_byte_order_is_no_part_of_them(
    picture: Path,
    network: tuple[str, CRIS],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    say(monkeypatch, b"\xef\xbb\xbf" + "\n".join(SENTENCES).encode())
    lines = run(capsys, network, picture, "--sentences", "-", "--output", "-")
    assert [line["sentence"] for line in lines] == SENTENCES
    assert lines[0]["image"] == str(picture)


def test_one_bad_picture_of_a_folder_does_not_stop_the_rest(
    network: tuple[str, CRIS], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "a.png", "c.webp"):
        PIL.Image.fromarray(photo()).save(folder / name)
    (folder / "b.jpg").write_bytes((folder / "a.jpg").read_bytes()[:200])
    (folder / "notes.txt").write_text("not a picture")
    (folder / "sub.png").mkdir()
    with pytest.raises(SystemExit, match="1 of 4 pictures could not be segmented"):
        run(capsys, network, folder, "star", "--output", tmp_path / "out")
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["a.jpg", "a.png", "c.webp"]
    assert "b.jpg" in shown.err
    assert len(list((tmp_path / "out").iterdir())) == 6, (
        "a.jpg and a.png do not take each other's names"
    )


def test_sentences_that_look_alike_have_files_of_their_own() -> None:
    taken: set[str] = set()
    names = [
        safe_file_name("p.jpg", sentence, taken)
        for sentence in ("a star!", "A star?", "星", "../../etc", "x" * 500, "x" * 499)
    ]
    assert len(set(names)) == 6
    assert names[:3] == ["p.jpg-a-star", "p.jpg-a-star-2", "p.jpg-sentence"]
    assert all("/" not in name and len(name) < 80 for name in names)


@pytest.mark.filterwarnings("default:the network reads")  # as outside of the tests
def test_words_that_are_cut_off_are_told_once(
    network: tuple[str, CRIS], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.png"):
        PIL.Image.fromarray(photo()).save(tmp_path / name)
    predict.main(
        [str(tmp_path), "word " * 20 + "lost", "--output", "-", "--checkpoint", network[0]]
    )
    told = capsys.readouterr().err
    assert told.count("warning: the network reads 15 tokens") == 1
    assert "word lost" in told


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["PICTURE"], "expected sentences after the picture, or --sentences FILE"),
        (["PICTURE", "star", "--sentences", "-"], "not both"),
        (["-", "--sentences", "-"], "the standard input holds either"),
        (["PICTURE", "--sentences", "nowhere.txt"], "cannot read the sentences in nowhere.txt"),
        (["PICTURE", "--sentences", "EMPTY"], "there is no sentence in"),
        (["PICTURE", "star", " "], "a sentence is empty"),
        (["PICTURE", "star", "&nbsp;"], "a sentence is empty: .* not '&nbsp;'"),
        (["nowhere.jpg", "star"], "no image at nowhere.jpg"),
        (["FOLDER", "star"], "no picture in"),
        (["PICTURE", "star", "--output", "PICTURE"], "cannot write to"),
        (["PICTURE", "star", "--checkpoint", "nowhere"], "no network 'nowhere'"),
        (["PICTURE", "star", "--threshold", "2"], "threshold must be"),
        (["PICTURE", "star", "--device", "abacus"], "cannot compute on device 'abacus'"),
    ],
)
def test_bad_input_is_one_error_line(
    arguments: list[str],
    expected: str,
    picture: Path,
    network: tuple[str, CRIS],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "folder").mkdir()
    known = {"PICTURE": str(picture), "EMPTY": "empty.txt", "FOLDER": "folder"}
    filled = [known.get(argument, argument) for argument in arguments]
    if "--checkpoint" not in filled:
        filled += ["--checkpoint", network[0]]
    if "--output" not in filled:
        filled += ["--output", "-"]
    with pytest.raises(SystemExit, match=f"^error: .*{expected}") as caught:
        predict.main(filled)
    assert "\n" not in str(caught.value)


def test_paint_colours_the_mask_outlines_it_and_leaves_the_rest() -> None:
    image = np.full((40, 60, 3), 100, dtype=np.uint8)
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:20, 10:30] = True
    painted = paint(image, [mask, np.roll(mask, 15, axis=0)])
    assert (image == 100).all(), "the picture given stays as it is"
    assert painted[15, 20].tolist() == [round((100 + channel) / 2) for channel in COLOURS[0]]
    assert painted[30, 20].tolist() == [round((100 + channel) / 2) for channel in COLOURS[1]]
    assert painted[10, 15].tolist() == list(COLOURS[0])
    assert (painted[:9] == 100).all()
    assert np.array_equal(paint(image, [np.zeros_like(mask)]), image)


def test_pictures_of_a_pipe_are_read_whole(
    network: tuple[str, CRIS], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = io.BytesIO()
    PIL.Image.fromarray(photo(20, 30)).save(file, "BMP")
    say(monkeypatch, file.getvalue())
    (line,) = run(capsys, network, "-", "star", "--output", "-")
    assert line["segmentation"]["size"] == [20, 30]


@pytest.mark.skipif(sys.platform != "linux", reason="shells and devices differ")
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("PREDICT - star <&-", "error: the standard input is closed"),
        ("PREDICT a.png star --output - > /dev/full", "error: .*No space left on device"),
    ],
)
def test_what_the_shell_does_wrong_is_one_line(line: str, told: str, tmp_path: Path) -> None:
    PIL.Image.fromarray(photo()).save(tmp_path / "a.png")
    line = line.replace("PREDICT", f"{shlex.quote(sys.executable)} -m crislit.predict")
    done = subprocess.run(
        line,
        shell=True,
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.search(told, done.stderr)
    assert "Traceback" not in done.stderr


def test_a_closed_input_and_a_name_too_long_are_one_error(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # what Python makes of a closed one
    for arguments, told in (
        ([str(picture), "--sentences", "-"], "the standard input is closed"),
        (["x" * 300, "star"], "File name too long"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{told}"):
            predict.main(arguments)


def test_a_link_to_nothing_is_a_bad_file_of_a_folder_and_a_long_name_is_none(
    network: tuple[str, CRIS], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "gone.png").symlink_to("nowhere.png")
    PIL.Image.fromarray(photo()).save(folder / f"{'n' * 200}.png")
    with pytest.raises(SystemExit, match="error: 1 of 2 pictures could not be segmented"):
        predict.main(
            [
                str(folder),
                "word " * 10,
                "--checkpoint",
                network[0],
                "--output",
                str(tmp_path / "out"),
            ]
        )
    assert "no image at" in capsys.readouterr().err
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_picture_whose_name_is_no_text_is_segmented_too(
    network: tuple[str, CRIS], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in (b"\xff.png", b"\xff" * 200 + b".png"):
        PIL.Image.fromarray(photo()).save(folder / os.fsdecode(name), "PNG")
    predict.main(
        [str(folder), "star", "--checkpoint", network[0], "--output", str(tmp_path / "out")]
    )
    assert len(list((tmp_path / "out").iterdir())) == 4
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 2


def test_prediction_imports_nothing_that_takes_long_and_is_not_needed() -> None:
    code = "import json, sys, crislit.predict, open_clip; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment()
    )
    loaded = {module.split(".")[0] for module in json.loads(result.stdout)}
    needless = {
        "lightning",
        "pytorch_lightning",
        "torchmetrics",
        "hydra",
        "omegaconf",
        "matplotlib",
        "albumentations",
    }
    assert not loaded & needless
