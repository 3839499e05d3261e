"""The page in a real browser: upload, type, click, and the mask is the Segmenter's."""

import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import crislit
from crislit import demo
from crislit.checkpoints.checkpoint import Checkpoint, write_folder
from crislit.errors import InputError
from crislit.inference import web_page
from crislit.inference.masks import COLOURS
from crislit.inference.segmenter import Segmenter
from crislit.inference.web_page import (
    DISPLAY_SIZE,
    MAX_SENTENCE_LENGTH,
    MAX_SENTENCES,
    colours,
    save_masks,
    segment,
    show,
)
from crislit.io.assets import EXAMPLES
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from tests.inference.test_segmenter import CLIP, photo
from tests.runs import command, environment

SENTENCES = ["the man in red", "leftmost dog"]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("networks") / "net")


def write_network(folder: Path) -> Path:
    """Write a network about half of whose first probabilities are above its threshold."""
    torch.manual_seed(0)
    model = build_cris(
        CRISConfig(clip=CLIP, neck=(16, 64, 32), decoder_layers=1, decoder_heads=4, decoder_ffn=64)
    )
    with torch.no_grad():
        model.head.linear.weight.mul_(5)  # type: ignore[union-attr, operator]
    median = float(
        np.median(
            Segmenter(model, image_size=64, device="cpu")(photo(120, 160), SENTENCES)[0].probability
        )
    )
    write_folder(
        Checkpoint(model.config, model.state_dict(), 64, round(median, 2), "random"), folder
    )
    return folder


@pytest.fixture(scope="module")
def segmenter(network: Path) -> Segmenter:
    return crislit.load(network, device="cpu")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    PIL.Image.fromarray(photo(120, 160)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# -- What the page computes ---------------------------------------------------------------------------------------------------


def test_what_is_shown_is_the_segmenters(
    segmenter: Segmenter, picture: Path, tmp_path: Path
) -> None:
    marked = segment(segmenter, str(picture), " the man in red \n\nleftmost dog\nleftmost dog")
    (image, annotations), maps, file = show(marked, segmenter.threshold, tmp_path)
    expected = segmenter(picture, [*SENTENCES, SENTENCES[1]])
    assert np.array_equal(image, photo(120, 160))
    assert [label for _, label in annotations] == [*SENTENCES, "leftmost dog (2)"]
    for (mask, _), result in zip(annotations, expected, strict=True):
        assert np.array_equal(mask, result.mask)
    assert [caption.split(":")[0] for _, caption in maps] == [*SENTENCES, "leftmost dog (2)"]
    assert maps[0][1].endswith(f"{100 * expected[0].mask.mean():.1f} % of the picture")
    with zipfile.ZipFile(file) as archive:
        assert archive.namelist() == [
            "mask-the-man-in-red.png",
            "mask-leftmost-dog.png",
            "mask-leftmost-dog-2.png",
        ]
        saved = np.array(PIL.Image.open(io.BytesIO(archive.read("mask-the-man-in-red.png"))))
    assert np.array_equal(saved, np.where(expected[0].mask, 255, 0))
    _, maps, file = show(segment(segmenter, str(picture), "star"), 0.999999, tmp_path)
    assert maps[0][1] == "star: nothing"
    assert not np.array(PIL.Image.open(file)).any()


def test_a_large_picture_is_shown_small_and_its_masks_are_as_large_as_it_is(
    segmenter: Segmenter, tmp_path: Path
) -> None:
    PIL.Image.fromarray(photo(400, 17_000)).save(
        tmp_path / "wide.png"
    )  # wider than the WebP that Gradio makes of it can be
    marked = segment(segmenter, str(tmp_path / "wide.png"), "star")
    probability = segmenter(tmp_path / "wide.png", "star")[0].probability
    threshold = float(np.median(probability))  # so that there is something to see
    (image, annotations), maps, file = show(marked, threshold, tmp_path)
    assert image.shape == (30, DISPLAY_SIZE, 3)
    assert annotations[0][0].shape == maps[0][0].shape[:2] == (30, DISPLAY_SIZE)
    assert np.array_equal(np.array(PIL.Image.open(file)), np.where(probability > threshold, 255, 0))
    assert maps[0][1].endswith(f"{100 * (probability > threshold).mean():.1f} % of the picture")


def test_colours_are_those_of_the_overlays() -> None:
    assert colours(["a", "b"]) == {"a": "#e69f00", "b": "#56b4e9"}
    assert colours(["a"] * 8)["a"] == "#{:02x}{:02x}{:02x}".format(*COLOURS[0])


def test_masks_of_an_hour_ago_are_deleted(tmp_path: Path) -> None:
    masks = [np.ones((8, 8), dtype=bool)]
    old, new = save_masks(["old"], masks, tmp_path), save_masks(["new"], masks, tmp_path)
    os.utime(old.parent, (0, 0))
    save_masks(["newest"], masks, tmp_path)
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" \n", "no sentence yet"),
        ("a\n" * (MAX_SENTENCES + 1), f"at most {MAX_SENTENCES}"),
        (
            "a" * (MAX_SENTENCE_LENGTH + 1),
            f"of 501 characters is too long: at most {MAX_SENTENCE_LENGTH}",
        ),
    ],
)
def test_bad_requests_are_one_clear_message(
    text: str,
    expected: str,
    segmenter: Segmenter,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match=expected):
        segment(segmenter, str(picture), text)
    with pytest.raises(InputError, match="no picture yet"):
        segment(segmenter, None, "star")
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(
        InputError, match=r"^The file is not an image that can be read$"
    ):  # and not where it lies
        segment(segmenter, str(tmp_path / "notes.png"), "star")
    monkeypatch.setattr(web_page, "MAX_MAP_PIXELS", 30_000)
    with pytest.raises(
        InputError,
        match="2 sentences are too many for so large a picture: send a smaller one, or fewer",
    ):
        segment(segmenter, str(picture), "star\ndog")
    monkeypatch.setattr(web_page, "MAX_UPLOAD_PIXELS", 10_000)
    with pytest.raises(
        InputError, match=r"^The file is too large: 160 x 120 pixels, at most 10,000 are read"
    ):
        segment(segmenter, str(picture), "star")


def test_the_command_line_says_what_is_wrong_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error: no network 'nowhere'"):
        demo.main(["--checkpoint", "nowhere"])
    with pytest.raises(SystemExit, match="error: --port must be between 1 and 65535, got 99999"):
        demo.main(["--port", "99999"])


# -- In a browser -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(network: Path) -> Iterator[str]:
    with serve(network) as (address, _):
        yield address


@contextlib.contextmanager
def serve(network: Path | None) -> Iterator[tuple[str, int]]:
    """Serve the page by the command, with its own network if none is given; its address and process id."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = command(
        "demo",
        *(("--checkpoint", str(network)) if network else ()),
        "--port",
        str(port),
        "--device",
        "cpu",
    )
    with subprocess.Popen(
        served, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as page:
        try:
            assert page.stdout is not None
            assert (
                "the page is at" in page.stdout.readline()
            )  # which waits until it says so, or has ended
            yield f"http://127.0.0.1:{port}", page.pid
        finally:
            page.terminate()
            page.wait(timeout=60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(
        (
            found
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (found := shutil.which(name))
        ),
        None,
    )
    if path is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    options = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=options)
        yield running
        running.close()


@pytest.fixture(params=[1200, 390], ids=["desk", "phone"])
def visit(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    """The page, at a desk's and at a phone's width."""
    visit = browser.new_page(viewport={"width": request.param, "height": 800})
    visit.set_default_timeout(30_000)
    visit.goto(address)
    visit.get_by_role("button", name="Mark", exact=True).wait_for()
    yield visit
    visit.close()


def ask(visit: Any, picture: Path | None, text: str) -> None:
    """Upload, type, click."""
    if picture is not None:
        visit.set_input_files("input[type=file]", str(picture))
        visit.get_by_role("button", name="Remove").or_(visit.get_by_label("Clear")).first.wait_for()
    visit.get_by_label("Sentences, one a line").fill(text)
    visit.get_by_role("button", name="Mark", exact=True).click()


def download(visit: Any, name: str) -> bytes:
    """Fetch the offered file once it has this name."""
    link = visit.locator(f"a[download='{name}']").first
    link.wait_for()
    with visit.expect_download() as found:
        link.click()
    return Path(found.value.path()).read_bytes()


@pytest.mark.slow
def test_upload_type_click_and_the_mask_is_the_segmenters(
    visit: Any, picture: Path, segmenter: Segmenter
) -> None:
    ask(visit, picture, "the man in red")
    mask = np.array(PIL.Image.open(io.BytesIO(download(visit, "mask-the-man-in-red.png"))))
    expected = segmenter(picture, "the man in red")[0]
    assert 0.1 < expected.mask.mean() < 0.9
    assert np.array_equal(mask, np.where(expected.mask, 255, 0))
    # Another threshold cuts the same probabilities anew.
    visit.get_by_role("slider").first.press("ArrowRight")
    another = round(segmenter.threshold + 0.01, 2)
    visit.get_by_text(
        f"{100 * (expected.probability > another).mean():.1f} % of the picture"
    ).first.wait_for()
    mask = np.array(PIL.Image.open(io.BytesIO(download(visit, "mask-the-man-in-red.png"))))
    assert np.array_equal(mask > 0, expected.probability > another)
    assert not np.array_equal(mask > 0, expected.mask)
    wide = visit.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    assert not wide, "nothing has to be scrolled to the side"


@pytest.mark.slow
def test_the_page_as_it_comes_marks_its_example_answers_this_machine_alone_and_leaves_nothing(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the page's; this process knows its own already
    example = EXAMPLES / "places.jpg"
    sentences = example.with_suffix(".txt").read_text().splitlines()
    with serve(None) as (address, _):
        visit = browser.new_page()
        visit.goto(address)
        visit.locator("tr.tr-body").filter(has_text=sentences[0]).click()
        visit.get_by_role("button", name="Remove").or_(visit.get_by_label("Clear")).first.wait_for()
        visit.get_by_role("button", name="Mark", exact=True).click()
        with zipfile.ZipFile(io.BytesIO(download(visit, "masks.zip"))) as archive:
            masks = [
                np.array(PIL.Image.open(io.BytesIO(archive.read(name)))) > 0
                for name in archive.namelist()
            ]
        visit.close()
        port = int(address.rsplit(":", 1)[1])
        with pytest.raises(
            ConnectionRefusedError
        ):  # where a page that served all addresses would answer, too
            socket.create_connection(("127.0.0.2", port), timeout=5)
        assert list(tmp_path.glob("crislit-*"))
    assert not list(tmp_path.glob("crislit-*"))
    expected = crislit.load("shapes-tiny", device="cpu")(example, sentences)
    assert len(masks) == len(sentences) > 1
    assert all(
        np.array_equal(mask, result.mask) for mask, result in zip(masks, expected, strict=True)
    )


@pytest.mark.slow
def test_several_sentences_have_their_own_colours_and_an_archive(
    visit: Any, picture: Path, segmenter: Segmenter
) -> None:
    ask(visit, picture, "\n".join(SENTENCES))
    with zipfile.ZipFile(io.BytesIO(download(visit, "masks.zip"))) as archive:
        for name, result in zip(archive.namelist(), segmenter(picture, SENTENCES), strict=True):
            assert np.array_equal(
                np.array(PIL.Image.open(io.BytesIO(archive.read(name)))) > 0, result.mask
            )
    shades = (
        "n => { while (getComputedStyle(n).backgroundColor.endsWith(', 0)')) n = n.parentElement;"
    )
    shades += " return getComputedStyle(n).backgroundColor }"
    found = [
        visit.get_by_text(sentence, exact=True).last.evaluate(shades) for sentence in SENTENCES
    ]
    painted = [re.findall(r"\d+", shade)[:3] for shade in found]
    assert painted == [[str(part) for part in COLOURS[i]] for i in range(len(SENTENCES))]
    visit.get_by_label("Sentences, one a line").fill("word " * 15 + "lost")
    visit.get_by_role("button", name="Mark", exact=True).click()
    visit.get_by_text("not read is 'lost'").first.wait_for()


@pytest.mark.slow
def test_a_bad_upload_gets_a_message_without_paths_and_the_page_goes_on(
    visit: Any, picture: Path, tmp_path: Path
) -> None:
    ask(visit, None, "star")
    visit.get_by_text("There is no picture yet").wait_for()
    content = visit.content()
    visit.get_by_label("Sentences, one a line").fill("star")
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:300])
    (tmp_path / "notes.png").write_text("not a picture")
    for name, message in (
        ("broken.png", "The file is damaged"),
        ("notes.png", "The file is not an image that can be read"),
    ):
        visit.set_input_files("input[type=file]", str(tmp_path / name))
        visit.wait_for_timeout(1500)
        visit.get_by_role("button", name="Mark", exact=True).click()
        visit.get_by_text(message).first.wait_for()
        content += visit.content()
        visit.reload()
        visit.get_by_label("Sentences, one a line").fill("star")
    assert "The file is damaged" in content
    for telling in ("Traceback", "site-packages", "File &quot;"):
        assert telling not in content
