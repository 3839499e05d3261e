"""The page under load and under attack: correct masks, bounded memory, no files but uploads."""

import asyncio
import io
import itertools
import json
import math
import os
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import crislit
from crislit.errors import InputError
from crislit.inference.segmenter import Segmenter
from crislit.inference.web_answers import (
    MAX_MAP_PIXELS,
    MAX_SENTENCE_LENGTH,
    MAX_SENTENCES,
    MAX_UPLOAD_PIXELS,
)
from crislit.inference.web_requests import check_uploaded, refuse
from tests.inference.test_web_page import serve, write_network
from tests.io.test_images import photo

httpx = pytest.importorskip("httpx", reason="Gradio brings it")

GOOD, BAD = 100, 100
# Idle connections may be closed at any time.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)
MAX_GROWTH, MAX_GROWTH_OF_LARGEST = 600, 4000
"""Megabytes that the server may take in addition, for small images and for the largest ones."""
PHRASES = (
    *("the man in red", "leftmost dog", "star", "the big blue circle"),
    "the cup that is behind the plate",
)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("networks") / "net")


@pytest.fixture(scope="module")
def served(network: Path) -> Iterator[tuple[str, int]]:
    with serve(network) as (address, process):
        yield address, process


# -- Requests


@dataclass
class Request:
    """A file's name and content, and sentences.

    If the request must be refused, ``refusal`` is a part of the expected message.
    """

    name: str
    content: bytes | None
    text: Any
    refusal: str | None = None
    threshold: Any = 0.5


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, data)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def good() -> Iterator[Request]:
    """Different images of many sizes and formats, with one to three sentences each."""
    for i in range(GOOD):
        pixels = photo(60 + 7 * (i % 11), 70 + 5 * (i % 13), seed=i)
        text = "\n".join(itertools.islice(itertools.cycle(PHRASES), i % 5, i % 5 + 1 + i % 3))
        kind = "PNG" if i % 2 else "BMP"
        yield Request(f"photo.{kind.lower()}", encoded(pixels, kind), text)


def bad() -> Iterator[Request]:
    """Everything an untrusted visitor may send instead."""
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>"
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    half_png = encoded(photo(60, 80))
    half_png = half_png[: len(half_png) // 2]
    half_jpeg = encoded(photo(200, 200), "JPEG")[:2000]
    black, dot = encoded(np.zeros((7000, 7000), np.uint8)), encoded(photo(1, 1))
    bad_files = [
        ("none", None, "Upload an image first"),
        ("notes.png", b"not an image", "The file is not an image that can be read"),
        ("script.svg", svg, "The file is not an image"),
        ("page.eps", eps, "The file is not an image"),
        ("nothing.png", b"", "The file is not an image that can be read"),
        ("half.png", half_png, "The file is damaged"),
        ("half.jpg", half_jpeg, "The file is damaged"),
        ("wide.png", claiming(30_000, 30_000), "The file is too large: "),
        ("bomb.png", black, "The file is too large: 7000 x 7000 pixels"),
        ("dot.png", dot, "The file has 1 x 1 pixels; both sides need at least 8"),
        ("big.png", bytes(21 * 2**20), "The request is too large: at most 20 MB are accepted"),
    ]
    bad_texts = [
        (" \n\t\n", "Write a sentence first"),
        (None, "Write a sentence first"),
        ("a\n" * (MAX_SENTENCES + 1), f"at most {MAX_SENTENCES}"),
        ("word " * 10_000, f"too long: at most {MAX_SENTENCE_LENGTH}"),
        ("star " * 300_000, "The request is too large: at most 1 MB are accepted"),
    ]
    image = encoded(photo(60, 80))
    requests = [Request(name, content, "star", refusal) for name, content, refusal in bad_files]
    requests += [Request("photo.png", image, text, refusal) for text, refusal in bad_texts]
    requests.append(Request("photo.png", image, "star", "greater than maximum", threshold=5))
    return itertools.islice(itertools.cycle(requests), BAD)


@dataclass
class Answer:
    """The masks or the message, and the text of all responses."""

    masks: list[np.ndarray] | None
    message: str
    seen: str


async def ask(client: Any, request: Request) -> Answer:
    """Do what the page's script does: upload, join the queue, wait, download the masks."""
    seen, file = "", None
    if request.content is not None:
        response = await upload(client, request.name, request.content)
        seen += response.text
        if response.status_code != 200:
            return Answer(None, response.text, seen)
        file = {"path": response.json()[0], "meta": {"_type": "gradio.FileData"}}
    return await mark(client, [file, request.text, request.threshold], seen)


async def upload(client: Any, name: str, content: bytes) -> Any:
    """Upload a file."""
    return await client.post("/gradio_api/upload", files={"files": (name, content)})


async def mark(client: Any, data: Any, seen: str = "") -> Answer:
    """Request the masks of an upload."""
    joined = await client.post("/gradio_api/call/mark", json={"data": data})
    seen += joined.text
    if joined.status_code != 200:
        return Answer(None, joined.text, seen)
    events = await client.get(f"/gradio_api/call/mark/{joined.json()['event_id']}")
    seen += events.text
    kind, line = re.findall(r"event: (complete|error)\ndata: (.*)", events.text)[-1]
    result = json.loads(line)
    if kind == "error":
        return Answer(None, str(result["error"]), seen)
    masks = await client.get("/gradio_api/file=" + result[2]["path"])
    assert masks.status_code == 200
    return Answer(read_masks(masks.content), "", seen)


def read_masks(content: bytes) -> list[np.ndarray]:
    """Read the offered file: a mask, or an archive of masks."""
    files = [content]
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = [archive.read(name) for name in archive.namelist()]
    return [np.array(PIL.Image.open(io.BytesIO(file))) > 0 for file in files]


def visitor(address: str) -> Any:
    """A client that opens a connection per request."""
    return httpx.AsyncClient(base_url=address, timeout=300, limits=LIMITS)


def megabytes(process: int, field: str) -> float:
    """Return VmRSS (resident now) or VmHWM (highest so far) of a process, as Linux counts."""
    status = Path(f"/proc/{process}/status")
    if not status.is_file():
        pytest.skip("memory is measured in /proc")
    match = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
    assert match is not None
    return int(match[1]) / 1024


def assert_no_internals(text: str) -> None:
    """Check that no traceback or path of the program reaches the browser."""
    paths = (str(Path(crislit.__file__).parent), str(Path.cwd()))
    for internal in ("Traceback", "site-packages", 'File "', *paths):
        assert internal not in text, text[:2000]


# -- Load


@pytest.mark.slow
def test_200_requests_at_once_get_their_own_masks_or_a_clear_message(
    served: tuple[str, int], network: Path
) -> None:
    """``PAGE_LOAD=results/page_load.json`` in the environment writes the measurements there."""
    address, process = served
    requests = [request for pair in zip(good(), bad(), strict=True) for request in pair]
    segmenter = crislit.load(network, device="cpu")

    async def visit() -> list[Answer]:
        async with visitor(address) as client:
            first = await ask(client, requests[0])  # loads what is loaded on first use
            assert first.masks is not None
            return await asyncio.gather(*(ask(client, request) for request in requests))

    before = megabytes(process, "VmRSS")
    start = time.monotonic()
    answers = asyncio.run(visit())
    seconds = time.monotonic() - start
    peak = megabytes(process, "VmHWM")
    for request, answer in zip(requests, answers, strict=True):
        assert_no_internals(answer.seen)
        if request.refusal is None:
            check_masks(segmenter, request, answer)
        else:
            assert answer.masks is None, request.name
            assert request.refusal in answer.message, (request.name, answer.message)
    measured = {
        "requests": len(requests),
        "right_masks": sum(answer.masks is not None for answer in answers),
        "clear_refusals": sum(answer.masks is None for answer in answers),
        "seconds": round(seconds, 1),
        "server_megabytes_before": round(before),
        "server_megabytes_peak": round(peak),
        "server_megabytes_after": round(megabytes(process, "VmRSS")),
    }
    if record := os.environ.get("PAGE_LOAD"):
        machine = {"cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
        versions = {name: version(name) for name in ("gradio", "torch")}
        Path(record).write_text(json.dumps(measured | versions | machine, indent=1) + "\n")
    assert peak - before < MAX_GROWTH
    # The page still answers, and serves the next visitor.
    assert "crislit" in httpx.get(address).text
    last = Request("last.png", encoded(photo(90, 90, seed=999)), "star")

    check_masks(segmenter, last, run(address, lambda client: ask(client, last)))


@pytest.mark.slow
def test_the_largest_images_are_segmented_in_bounded_memory(network: Path) -> None:
    side = math.isqrt(MAX_UPLOAD_PIXELS)
    text = "\n".join(PHRASES[: MAX_MAP_PIXELS // side**2])
    images = [np.full((side, side, 3), 40 * i, np.uint8) for i in range(3)]  # more than are cached
    requests = [Request("photo.jpg", encoded(image, "JPEG"), text) for image in images]
    with serve(network) as (address, process):

        async def visit() -> list[Answer]:
            async with visitor(address) as client:
                return await asyncio.gather(*(ask(client, request) for request in requests))

        before = megabytes(process, "VmRSS")
        answers = asyncio.run(visit())
        growth = megabytes(process, "VmHWM") - before
    for answer in answers:
        assert_no_internals(answer.seen)
        assert answer.masks is not None, answer.message
        assert [mask.shape for mask in answer.masks] == [(side, side)] * len(text.splitlines())
    assert growth < MAX_GROWTH_OF_LARGEST


def check_masks(segmenter: Segmenter, request: Request, answer: Answer) -> None:
    """Check that the masks are those of the Segmenter for this image and these sentences."""
    assert request.content is not None
    assert answer.masks is not None, answer.message
    sentences = request.text.splitlines()
    expected = segmenter(PIL.Image.open(io.BytesIO(request.content)), sentences)
    assert len(answer.masks) == len(sentences)
    for mask, result in zip(answer.masks, expected, strict=True):
        assert np.array_equal(mask, result.probability > request.threshold)


# -- Attack


def run(address: str, visit: Any) -> Any:
    """Run a visit with a client."""

    async def open_client() -> Any:
        async with visitor(address) as client:
            return await visit(client)

    return asyncio.run(open_client())


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image in the folder for temporary files, like uploads, but not uploaded."""
    path = tmp_path_factory.mktemp("private") / "secret.png"
    path.write_bytes(encoded(photo()))
    return path


@pytest.mark.slow
def test_only_uploads_are_read_whatever_path_a_request_names(
    served: tuple[str, int], secret: Path
) -> None:
    address, _ = served
    meta = {"meta": {"_type": "gradio.FileData"}}

    async def visit(client: Any) -> list[tuple[Any, Answer]]:
        mine = Path((await upload(client, "a.png", encoded(photo()))).json()[0])
        link = mine.with_name("link.png")
        link.symlink_to(secret)
        assert (await mark(client, [{"path": str(mine)}, "star", 0.5])).masks is not None
        up = "/".join([".."] * (len(mine.parent.parts) - 1))
        paths = [str(secret), "/etc/passwd", f"{mine.parent}/{up}{secret}", f"{mine}/{up}{secret}"]
        paths += [os.path.relpath(secret), str(secret).replace("/", "%2f"), f"file://{secret}"]
        paths += [f"{address}/robots.txt", "http://localhost/x.png", "http://[::1]/x.png"]
        paths += ["http://2130706433/x.png", str(link), str(mine.parent), "", "\0", "x" * 5000]
        files: list[Any] = []
        for path in paths:
            files += [path, {"path": path}, {"path": path, "meta": {}}, {"path": path} | meta]
            files += [{"path": str(mine), "url": path}, {"path": None, "url": path} | meta]
            files += [[path], {"path": {"path": path} | meta}]
        return [(file, await mark(client, [file, "star", 0.5])) for file in files]

    for file, answer in run(address, visit):
        # The url beside a valid path is ignored.
        is_mine = isinstance(file, dict) and "url" in file and file["path"] is not None
        assert (answer.masks is not None) == is_mine, file
        assert_no_internals(answer.seen)


@pytest.mark.slow
def test_no_sentence_or_threshold_reveals_internals(served: tuple[str, int], secret: Path) -> None:
    address, _ = served

    async def visit(client: Any) -> None:
        mine = {"path": (await upload(client, "a.png", encoded(photo()))).json()[0]}
        hostile = {"path": "http://127.0.0.1/x", "meta": {"_type": "gradio.FileData"}}
        markup, marks = ("<script>alert(1)</script>", "\x1b[31m", "\0"), ("‮star", "🟦" * 99)
        texts: tuple[Any, ...] = (5, [], {"a": 1}, *markup, *marks, "../../x", hostile)
        for text in texts:
            assert_no_internals((await mark(client, [mine, text, 0.5])).seen)
        thresholds: tuple[Any, ...] = (None, "x", -1, 5, [], {"path": str(secret)}, 1e999)
        for threshold in thresholds:
            body = json.dumps({"data": [mine, "star", threshold]})
            kind = {"content-type": "application/json"}
            joined = await client.post("/gradio_api/call/mark", content=body, headers=kind)
            assert_no_internals(joined.text)
        for data in ([], [mine], [mine, "star", 0.5, 1, 2], {"a": 1}, None):
            response = await client.post("/gradio_api/call/mark", json={"data": data})
            assert_no_internals(response.text)
        names = (
            "../../../../x.png",
            "/tmp/x.png",
            "a\0.png",
            "x" * 300 + ".png",
            "CON",
            "a\nb.png",
        )
        for name in names:
            response = await upload(client, name, encoded(photo()))
            assert_no_internals(response.text)
            if response.status_code == 200:  # it is stored beside the other uploads
                assert Path(response.json()[0]).parent.parent == Path(mine["path"]).parent.parent

    run(address, visit)


@pytest.mark.slow
def test_no_address_of_the_page_serves_a_file_that_was_not_uploaded(
    served: tuple[str, int], secret: Path
) -> None:
    address, _ = served
    roots = (
        *("/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/", "/assets/", "/svelte/"),
        *("/gradio_api/proxy=", "/"),
    )
    paths = (
        *(str(secret), "/etc/passwd", "/proc/self/environ", crislit.__file__, "pyproject.toml"),
        f"{address}/config",
    )

    async def visit(client: Any) -> None:
        for root, path in itertools.product(roots, paths):
            bare = path.lstrip("/")
            ups = (up * 9 + bare for up in ("../", "..%2f", "%2e%2e/", "..%252f", "..\\"))
            encoded_slashes = (path.replace("/", "%2f"), path.replace("/", "\\"))
            for form in (path, bare, *ups, *encoded_slashes, f"//{path}", f"file://{path}"):
                target = (root + form).encode()  # sent as it is, with ".."
                response = await client.get("/", extensions={"target": target})
                assert response.status_code in (400, 403, 404), target
                assert secret.read_bytes() not in response.content
                assert "Traceback" not in response.text
        # Addresses of Gradio that the page does not need.
        data: list[Any] = [{"path": str(secret)}, "star", 0.5]
        posted = ("run/mark", "api/mark", "component_server", "process_recording", "vibe-edit")
        for path in (*posted, "run-history/connect"):
            response = await client.post(f"/gradio_api/{path}", json={"data": data})
            assert response.status_code == 404
        gotten = ("runs", "deep_link?session_hash=x", "openapi.json", "dev/reload")
        for path in (*gotten, "custom_component/x/client/y/z"):
            assert (await client.get(f"/gradio_api/{path}")).status_code == 404
        # No function can be called without the queue.
        for number, inputs in itertools.product(range(8), (data, [0], data[:1])):
            body = {"data": inputs, "fn_index": number, "session_hash": "x"}
            response = await client.post("/gradio_api/run/predict", json=body)
            assert response.status_code in (404, 500)
            assert_no_internals(response.text)
            assert secret.name not in response.text
        for bad_json in (b"{", b"[" * 100_000, b"\xff"):
            kind = {"content-type": "application/json"}
            response = await client.post("/gradio_api/call/mark", content=bad_json, headers=kind)
            assert response.status_code in (400, 422)
            assert_no_internals(response.text)

        async def endless() -> Any:
            for _ in range(100):
                yield bytes(2**16)

        assert (await client.post("/gradio_api/upload", content=endless())).status_code == 411
        unknown = {"data": [], "session_hash": "x", "fn_index": 99}
        response = await client.post("/gradio_api/queue/join", json=unknown)
        assert_no_internals(response.text)
        assert "crislit" in (await client.get("/")).text

    run(address, visit)


def scope(path: str, method: str = "GET", **headers: str) -> dict[str, Any]:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "path": path, "method": method, "headers": pairs}


def test_only_requests_that_the_page_needs_are_passed_on() -> None:
    needed = ("/", "/config", "/assets/index-1.js", "/gradio_api/info")
    for path in (*needed, "/gradio_api/file=/tmp/gradio/a b.png"):
        assert refuse(scope(path)) is None
    assert refuse(scope("/gradio_api/run/predict", "POST", content_length="9")) is None
    remote = ("proxy=http://a", "file=http://a/b", "file=HTTPS://a/b")
    unneeded = [*(f"/gradio_api/{path}" for path in (*remote, "run/mark")), "/monitoring", "//", ""]
    for path in unneeded:
        assert refuse(scope(path)) == (404, "There is no such address on this page.")
    for path, limit in (("/gradio_api/upload", 20 * 2**20), ("/gradio_api/queue/join", 2**20)):
        assert refuse(scope(path, "POST", content_length=str(limit))) is None
        refusal = (413, f"The request is too large: at most {limit // 2**20} MB are accepted.")
        for length in (str(limit + 1), "9" * 5000):
            assert refuse(scope(path, "POST", content_length=length)) == refusal
        chunked = {"content_length": "9", "transfer_encoding": "chunked"}
        for headers in ({}, {"content_length": "-1"}, chunked):
            refusal = (411, "A request needs a Content-Length.")
            assert refuse(scope(path, "POST", **headers)) == refusal


def test_only_files_in_the_folder_of_uploads_are_uploads(tmp_path: Path) -> None:
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "a.png").touch()
    (tmp_path / "b.png").touch()
    (folder / "link.png").symlink_to(tmp_path / "b.png")
    assert check_uploaded(None, str(folder)) is None
    assert check_uploaded(str(folder / "a.png"), str(folder)) == str((folder / "a.png").resolve())
    others = ["b.png", "uploads/../b.png", "uploads/link.png", "uploads", "uploads/gone.png"]
    for path in [*others, "\0", "x" * 5000]:
        with pytest.raises(InputError, match="That image is not among the uploads, or was deleted"):
            check_uploaded(str(tmp_path / path), str(folder))
