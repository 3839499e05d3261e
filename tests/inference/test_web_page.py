"""The demo's web page: what it computes, and how it behaves in a real browser."""

import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import crislit
from crislit import demo
from crislit.checkpoints.checkpoint import Checkpoint, write_folder
from crislit.errors import InputError, see
from crislit.inference import describe_network, web_answers
from crislit.inference.masks import COLORS, outline
from crislit.inference.segmenter import Segmenter
from crislit.inference.web_answers import (
    DISPLAY_SIZE,
    MAX_SENTENCE_LENGTH,
    MAX_SENTENCES,
    label_colors,
    marked_share,
    render,
    save_masks,
    segment,
)
from crislit.inference.web_page import build_mark
from crislit.io.assets import EXAMPLES
from crislit.models.build import build_cris
from tests.inference.test_segmenter import TINY
from tests.io.test_images import photo
from tests.runs import command, environment

SENTENCES = ["the man in red", "leftmost dog"]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("networks") / "net")


def write_network(folder: Path) -> Path:
    """Write a network with about half of the first sentence's probabilities above its threshold."""
    torch.manual_seed(0)
    model = build_cris(TINY)
    with torch.no_grad():
        model.head.linear.weight.mul_(5)  # type: ignore[union-attr, operator]
    result = Segmenter(model, image_size=64, device="cpu")(photo(120, 160), SENTENCES)[0]
    threshold = round(float(np.median(result.probability)), 2)
    write_folder(Checkpoint(model.config, model.state_dict(), 64, threshold, "random"), folder)
    return folder


@pytest.fixture(scope="module")
def segmenter(network: Path) -> Segmenter:
    return crislit.load(network, device="cpu")


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    PIL.Image.fromarray(photo(120, 160)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# -- Results


def test_the_page_shows_the_segmenters_results(
    segmenter: Segmenter, image_path: Path, tmp_path: Path
) -> None:
    answer = segment(segmenter, str(image_path), " the man in red \n\nleftmost dog\nleftmost dog")
    (image, annotations), maps, file = render(answer, segmenter.threshold, tmp_path)
    expected = segmenter(image_path, [*SENTENCES, SENTENCES[1]])
    shown = photo(120, 160)
    for result in expected:
        outline(shown, result.mask)
    assert np.array_equal(image, shown), "a mask is visible on an object of any color"
    assert [label for _, label in annotations] == [*SENTENCES, "leftmost dog (2)"]
    for (mask, _), result in zip(annotations, expected, strict=True):
        assert np.array_equal(mask, result.mask)
    assert [caption.split(":")[0] for _, caption in maps] == [*SENTENCES, "leftmost dog (2)"]
    assert maps[0][1].endswith(f"{100 * expected[0].mask.mean():.1f} % of the image")
    with zipfile.ZipFile(file) as archive:
        names = ["mask-the-man-in-red.png", "mask-leftmost-dog.png", "mask-leftmost-dog-2.png"]
        assert archive.namelist() == names
        saved = np.array(PIL.Image.open(io.BytesIO(archive.read("mask-the-man-in-red.png"))))
    assert np.array_equal(saved, np.where(expected[0].mask, 255, 0))
    _, maps, file = render(segment(segmenter, str(image_path), "star"), 0.999999, tmp_path)
    assert maps[0][1] == "star: nothing marked"
    assert not np.array(PIL.Image.open(file)).any()


def test_a_large_image_is_shown_small_and_keeps_the_size_of_its_masks(
    segmenter: Segmenter, tmp_path: Path
) -> None:
    # Gradio shows images as WebP, which is at most 16383 pixels wide.
    PIL.Image.fromarray(photo(400, 17_000)).save(tmp_path / "wide.png")
    answer = segment(segmenter, str(tmp_path / "wide.png"), "star")
    probability = segmenter(tmp_path / "wide.png", "star")[0].probability
    threshold = float(np.median(probability))  # the mask is neither empty nor full
    (image, annotations), maps, file = render(answer, threshold, tmp_path)
    assert image.shape == (30, DISPLAY_SIZE, 3)
    assert annotations[0][0].shape == maps[0][0].shape[:2] == (30, DISPLAY_SIZE)
    assert np.array_equal(np.array(PIL.Image.open(file)), np.where(probability > threshold, 255, 0))
    assert maps[0][1].endswith(f"{100 * (probability > threshold).mean():.1f} % of the image")


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        (0, "nothing marked"),
        (1, "less than 0.1 % of the image"),
        (9, "less than 0.1 % of the image"),
        (10, "0.1 % of the image"),
        (100, "1.0 % of the image"),
        (723, "7.2 % of the image"),
        (9990, "99.9 % of the image"),
        (9991, "more than 99.9 % of the image"),
        (10_000, "all of the image"),
    ],
)
def test_captions_read_well_for_any_share(marked: int, expected: str) -> None:
    assert marked_share(np.arange(10_000).reshape(100, 100) < marked) == expected


def test_colors_are_those_of_the_overlays() -> None:
    assert label_colors(["a", "b"]) == {"a": "#e69f00", "b": "#56b4e9"}
    assert label_colors(["a"] * 8)["a"] == "#{:02x}{:02x}{:02x}".format(*COLORS[0])


def test_masks_are_deleted_after_an_hour(tmp_path: Path) -> None:
    masks = [np.ones((8, 8), dtype=bool)]
    old, new = save_masks(["old"], masks, tmp_path), save_masks(["new"], masks, tmp_path)
    os.utime(old.parent, (0, 0))
    save_masks(["newest"], masks, tmp_path)
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" \n", "Write a sentence first"),
        ("a\n" * (MAX_SENTENCES + 1), f"at most {MAX_SENTENCES}"),
        ("a" * (MAX_SENTENCE_LENGTH + 1), "of 501 characters is too long: at most 500"),
    ],
)
def test_bad_requests_are_one_clear_message(
    text: str,
    expected: str,
    segmenter: Segmenter,
    image_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match=expected):
        segment(segmenter, str(image_path), text)
    with pytest.raises(InputError, match=r"^Upload an image first\.$"):
        segment(segmenter, None, "star")
    with pytest.raises(InputError, match=r"^Upload an image first\. Then write a sentence"):
        segment(segmenter, None, " \n")
    (tmp_path / "notes.png").write_text("not an image")
    with pytest.raises(InputError, match=r"^The file is not an image that can be read$"):
        segment(segmenter, str(tmp_path / "notes.png"), "star")  # does not reveal the path
    monkeypatch.setattr(web_answers, "MAX_MAP_PIXELS", 30_000)
    with pytest.raises(InputError, match="2 sentences are too many for such a large image"):
        segment(segmenter, str(image_path), "star\ndog")
    monkeypatch.setattr(web_answers, "MAX_UPLOAD_PIXELS", 10_000)
    message = r"^The file is too large: 160 x 120 pixels, at most 10,000 are read"
    with pytest.raises(InputError, match=message):
        segment(segmenter, str(image_path), "star")


def test_a_bad_command_line_is_one_error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error: no network 'nowhere'"):
        demo.main(["--checkpoint", "nowhere"])
    with pytest.raises(SystemExit, match="error: --port must be between 1 and 65535, got 99999"):
        demo.main(["--port", "99999"])


@pytest.mark.parametrize("proxy", ["", "http://proxy.example:3128"])
def test_an_address_that_cannot_be_served_is_one_error_line(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: Any) -> None:
        assert (options["server_name"], options["server_port"]) == ("0.0.0.1", 7000)
        assert options["share"] is False
        raise OSError("the port is in use")

    for name in demo.PROXIES:
        monkeypatch.delenv(name, raising=False)
    if proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
    hint = "; set NO_PROXY=localhost,127.0.0.1 to bypass the proxy" if proxy else ""
    message = f"cannot serve at 0.0.0.1: the port is in use{hint}{see('port')}"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        demo.launch(SimpleNamespace(launch=fail), "0.0.0.1", 7000)


def test_another_threshold_needs_no_other_forward_pass_and_errors_are_messages(
    segmenter: Segmenter, image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, original = [], Segmenter.__call__

    def count(self: Segmenter, *args: Any) -> Any:
        passes.append(args)
        return original(self, *args)

    monkeypatch.setattr(Segmenter, "__call__", count)
    shown = SimpleNamespace(
        AnnotatedImage=lambda value, color_map: (value, color_map),
        Error=lambda message, **_: RuntimeError(message),
    )
    folder = tmp_path / "masks"
    folder.mkdir()
    description = describe_network(segmenter, "net")
    mark = build_mark(shown, segmenter, description, str(image_path.parent), folder)
    expected = original(segmenter, image_path, SENTENCES)
    for threshold in (0.0, segmenter.threshold, 0.95):
        (annotated, colors), maps, file, notes = mark(
            str(image_path), "\n".join(SENTENCES), threshold
        )
        for (mask, label), result in zip(annotated[1], expected, strict=True):
            assert np.array_equal(mask, result.probability > threshold)
            assert label in colors
        assert (len(maps), Path(file).parents[1]) == (2, folder)
        empty = sum(result.probability.max() <= threshold for result in expected)
        assert notes.count("Nothing is marked for") == empty
    assert len(passes) == 1
    with pytest.raises(RuntimeError, match=r"^Write a sentence first"):
        mark(str(image_path), " ", 0.5)
    with pytest.raises(RuntimeError, match=r"^That image is not among the uploads"):
        mark(__file__, "star", 0.5)


# -- In a browser


@pytest.fixture(scope="module")
def address(network: Path) -> Iterator[str]:
    with serve(network) as (address, _):
        yield address


@contextlib.contextmanager
def serve(network: Path | None) -> Iterator[tuple[str, int]]:
    """Run the demo, with its default network for None; yield its address and process id."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--port", str(port), "--device", "cpu"]
    if network is not None:
        arguments += ["--checkpoint", str(network)]
    with subprocess.Popen(
        command("demo", *arguments),
        cwd=tempfile.gettempdir(),  # the examples are not below the working directory
        env=environment([("PYTHONPATH", str(Path(crislit.__file__).parents[1]))]),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            assert (
                "the page is at" in server.stdout.readline()
            )  # or empty, if the server has exited
            yield f"http://127.0.0.1:{port}", server.pid
        finally:
            server.terminate()
            server.wait(timeout=60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    options = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=options)
        yield running
        running.close()


@pytest.fixture(params=[1366, 390], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    """The page, as wide as a desktop's and a phone's screen."""
    page = browser.new_page(viewport={"width": request.param, "height": 800})
    page.set_default_timeout(30_000)
    page.goto(address)
    page.get_by_role("button", name="Mark", exact=True).wait_for()
    yield page
    page.close()


def ask(page: Any, image_path: Path | None, text: str) -> None:
    """Upload an image, type sentences and click."""
    if image_path is not None:
        page.set_input_files("input[type=file]", str(image_path))
        page.get_by_role("button", name="Remove").or_(page.get_by_label("Clear")).first.wait_for()
    page.get_by_label("Sentences, one per line").fill(text)
    page.get_by_role("button", name="Mark", exact=True).click()


def assert_in_view(page: Any, selector: str) -> None:
    """Check that the top of an element is on the screen, once scrolling has ended."""
    script = f"""() => {{
        const top = document.querySelector('{selector}').getBoundingClientRect().top;
        return top > -10 && top < window.innerHeight - 30;
    }}"""
    page.wait_for_function(script)


CONTRASTS = """() => {
  const numbers = (text) => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const level = (x) => x <= 10 ? x / 3295 : ((x / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * level(r) + 0.7152 * level(g) + 0.0722 * level(b) + 0.05;
  const background = (node) => {
    const color = node ? numbers(getComputedStyle(node).backgroundColor) : [255, 255, 255, 1];
    return color[3] == 1 ? color : background(node.parentElement);
  };
  const ratio = (node, style) => {
    const [a, b] = [light(numbers(style.color)), light(background(node))];
    return Math.max(a, b) / Math.min(a, b);
  };
  const texts = [...document.querySelectorAll('.gradio-container *')].filter((node) =>
    node.checkVisibility({visibilityProperty: true}) &&
    [...node.childNodes].some((x) => x.nodeType == Node.TEXT_NODE && x.data.trim()));
  const fields = [...document.querySelectorAll('textarea')];
  return [
    ...texts.map((node) => [node.textContent, ratio(node, getComputedStyle(node))]),
    ...fields.map((node) =>
      [node.placeholder, ratio(node, getComputedStyle(node, '::placeholder'))]),
  ];
}"""
"""Returns each text and placeholder on the page with its contrast, by the definition of WCAG 2."""


def download(page: Any, name: str) -> bytes:
    """Download the offered file once it has this name."""
    link = page.locator(f"a[download='{name}']").first
    link.wait_for()
    with page.expect_download() as event:
        link.click()
    return Path(event.value.path()).read_bytes()


@pytest.mark.slow
def test_an_uploaded_image_gets_the_segmenters_mask(
    page: Any, image_path: Path, segmenter: Segmenter
) -> None:
    ask(page, image_path, "the man in red")
    if page.viewport_size["width"] < 800:
        assert_in_view(page, "#results")
    mask = np.array(PIL.Image.open(io.BytesIO(download(page, "mask-the-man-in-red.png"))))
    expected = segmenter(image_path, "the man in red")[0]
    assert 0.1 < expected.mask.mean() < 0.9
    assert np.array_equal(mask, np.where(expected.mask, 255, 0))
    # Another threshold applies to the same probabilities.
    page.get_by_role("slider").first.press("ArrowRight")
    another = round(segmenter.threshold + 0.01, 2)
    share = f"{100 * (expected.probability > another).mean():.1f} % of the image"
    page.get_by_text(share).first.wait_for()
    mask = np.array(PIL.Image.open(io.BytesIO(download(page, "mask-the-man-in-red.png"))))
    assert np.array_equal(mask > 0, expected.probability > another)
    assert not np.array_equal(mask > 0, expected.mask)
    contrasts = page.evaluate(CONTRASTS)
    assert "What do you want to see marked?" in dict(contrasts)
    assert [text for text, contrast in contrasts if contrast < 4.5] == []
    wide = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    assert not wide, "the page fits the width of the screen"
    assert page.get_by_text("Network: net, training data unknown; 5.0 million").is_visible()
    assert page.locator("#examples").count() == 0, "the examples are of drawn shapes"
    (caption,) = page.locator("#maps .caption-label").all()
    assert caption.evaluate("n => n.scrollWidth <= n.clientWidth"), "the caption is whole"
    below = "n => n.getBoundingClientRect().bottom"
    empty = page.locator("#maps .grid-wrap").evaluate(below) - caption.evaluate(below)
    assert empty < 40, "there is no empty area below the probability maps"


@pytest.mark.slow
def test_by_default_the_page_serves_this_machine_only_and_leaves_no_files(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the server
    example = EXAMPLES / "places.jpg"
    sentences = example.with_suffix(".txt").read_text().splitlines()
    with serve(None) as (address, _):
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.goto(address)
        page.get_by_text("trained on shapes (knows drawn shapes only)").wait_for()
        card = page.locator("tr.tr-body").filter(has_text=sentences[0])
        assert card.inner_text().split("\n")[-len(sentences) :] == sentences, "one per line"
        assert card.bounding_box()["y"] < 800, "examples are above the fold"
        card.click()
        page.get_by_role("button", name="Remove").or_(page.get_by_label("Clear")).first.wait_for()
        assert_in_view(page, "#mark")
        page.get_by_role("button", name="Mark", exact=True).click()
        with zipfile.ZipFile(io.BytesIO(download(page, "masks.zip"))) as archive:
            files = [io.BytesIO(archive.read(name)) for name in archive.namelist()]
        masks = [np.array(PIL.Image.open(file)) > 0 for file in files]
        page.close()
        port = int(address.rsplit(":", 1)[1])
        # A page that serves all addresses would answer here, too.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)
        assert list(tmp_path.glob("crislit-*"))
    assert not list(tmp_path.glob("crislit-*"))
    expected = crislit.load("shapes-tiny", device="cpu")(example, sentences)
    assert len(masks) == len(sentences) > 1
    for mask, result in zip(masks, expected, strict=True):
        assert np.array_equal(mask, result.mask)


@pytest.mark.slow
def test_several_sentences_get_their_own_colors_and_an_archive(
    page: Any, image_path: Path, segmenter: Segmenter
) -> None:
    ask(page, image_path, "\n".join(SENTENCES))
    with zipfile.ZipFile(io.BytesIO(download(page, "masks.zip"))) as archive:
        for name, result in zip(archive.namelist(), segmenter(image_path, SENTENCES), strict=True):
            mask = np.array(PIL.Image.open(io.BytesIO(archive.read(name)))) > 0
            assert np.array_equal(mask, result.mask)
    background = "getComputedStyle(n).backgroundColor"
    script = f"n => {{ while ({background}.endsWith(', 0)')) n = n.parentElement;"
    script += f" return {background} }}"
    for sentence, color in zip(SENTENCES, COLORS, strict=False):
        found = page.get_by_text(sentence, exact=True).last.evaluate(script)
        assert re.findall(r"\d+", found)[:3] == [str(channel) for channel in color]
    page.get_by_label("Sentences, one per line").fill("word " * 15 + "lost")
    page.get_by_role("button", name="Mark", exact=True).click()
    page.get_by_text("not read is 'lost'").first.wait_for()
    page.get_by_role("slider").first.press("End")
    page.get_by_text("Nothing is marked for").wait_for()


@pytest.mark.slow
def test_a_bad_upload_gets_a_message_without_paths_and_the_page_still_works(
    page: Any, image_path: Path, tmp_path: Path
) -> None:
    ask(page, None, "star")
    page.get_by_text("Upload an image first").wait_for()
    assert page.get_by_text("Error", exact=True).filter(visible=True).count() <= 1, (
        "one message per mistake"
    )
    content = page.content()
    page.get_by_label("Sentences, one per line").fill("star")
    (tmp_path / "broken.png").write_bytes(image_path.read_bytes()[:300])
    (tmp_path / "notes.png").write_text("not an image")
    for name, message in (
        ("broken.png", "The file is damaged"),
        ("notes.png", "The file is not an image that can be read"),
    ):
        page.set_input_files("input[type=file]", str(tmp_path / name))
        page.wait_for_timeout(1500)
        page.get_by_role("button", name="Mark", exact=True).click()
        page.get_by_text(message).first.wait_for()
        content += page.content()
        page.reload()
        page.get_by_label("Sentences, one per line").fill("star")
    assert "The file is damaged" in content
    for internal in ("Traceback", "site-packages", "File &quot;"):
        assert internal not in content
