"""The page under load and under attack: right masks and clear messages in bounded memory, and no file but uploads."""

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
from crislit.inference.web_page import (
    MAX_MAP_PIXELS,
    MAX_SENTENCE_LENGTH,
    MAX_SENTENCES,
    MAX_UPLOAD_PIXELS,
    check_uploaded,
    refuse,
)
from tests.inference.test_segmenter import photo
from tests.inference.test_web_page import serve, write_network

httpx = pytest.importorskip("httpx", reason="Gradio brings it")

GOOD, BAD = 100, 100
LIMITS = httpx.Limits(
    max_connections=None, max_keepalive_connections=0
)  # an idle connection may be closed at any time
MOST_GROWTH, MOST_GROWTH_OF_LARGEST = 600, 4000
"""Megabytes that the server may take for all of them beyond what it takes at rest: for small pictures, and for the largest."""
WORDS = (
    "the man in red",
    "leftmost dog",
    "star",
    "the big blue circle",
    "the cup that is behind the plate",
)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("networks") / "net")


@pytest.fixture(scope="module")
def served(network: Path) -> Iterator[tuple[str, int]]:
    with serve(network) as (address, process):
        yield address, process


# -- Requests -----------------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """What a visitor gives: a file's name and bytes, and sentences; and what the message must say, if it is to be refused."""

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
    """Pictures of many sizes and kinds, each its own, with one to three sentences."""
    for i in range(GOOD):
        pixels = photo(60 + 7 * (i % 11), 70 + 5 * (i % 13), seed=i)
        text = "\n".join(itertools.islice(itertools.cycle(WORDS), i % 5, i % 5 + 1 + i % 3))
        yield Request(
            f"photo.{'png' if i % 2 else 'bmp'}", encoded(pixels, "PNG" if i % 2 else "BMP"), text
        )


def bad() -> Iterator[Request]:
    """Everything a stranger may send instead."""
    picture = encoded(photo(60, 80))
    kinds = [
        Request("none", None, "star", "There is no picture yet"),
        Request("notes.png", b"not a picture", "star", "The file is not an image that can be read"),
        Request(
            "script.svg",
            b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>",
            "star",
            "The file is not an image",
        ),
        Request(
            "page.eps",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "star",
            "The file is not an image",
        ),
        Request("nothing.png", b"", "star", "The file is not an image that can be read"),
        Request("half.png", picture[: len(picture) // 2], "star", "The file is damaged"),
        Request("half.jpg", encoded(photo(200, 200), "JPEG")[:2000], "star", "The file is damaged"),
        Request("wide.png", claiming(30_000, 30_000), "star", "The file is too large: "),
        Request(
            "bomb.png",
            encoded(np.zeros((7000, 7000), np.uint8)),
            "star",
            "The file is too large: 7000 x 7000 pixels",
        ),
        Request(
            "dot.png",
            encoded(photo(1, 1)),
            "star",
            "The file has 1 x 1 pixels; both sides need at least 8",
        ),
        Request("big.png", bytes(21 * 2**20), "star", "That is too large: at most 20 MB are taken"),
        Request("photo.png", picture, " \n\t\n", "There is no sentence yet"),
        Request("photo.png", picture, None, "There is no sentence yet"),
        Request("photo.png", picture, "a\n" * (MAX_SENTENCES + 1), f"at most {MAX_SENTENCES}"),
        Request("photo.png", picture, "word " * 10_000, f"too long: at most {MAX_SENTENCE_LENGTH}"),
        Request(
            "photo.png", picture, "star " * 300_000, "That is too large: at most 1 MB are taken"
        ),
        Request("photo.png", picture, "star", "greater than maximum", threshold=5),
    ]
    return itertools.islice(itertools.cycle(kinds), BAD)


@dataclass
class Answer:
    """What came back: the masks, or the message; and all that the browser was sent."""

    masks: list[np.ndarray] | None
    message: str
    seen: str


async def ask(client: Any, request: Request) -> Answer:
    """Do what the page's script does: upload, join the queue, wait, fetch the masks."""
    seen = ""
    given = None
    if request.content is not None:
        answer = await client.post(
            "/gradio_api/upload", files={"files": (request.name, request.content)}
        )
        seen += answer.text
        if answer.status_code != 200:
            return Answer(None, answer.text, seen)
        given = {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}
    return await mark(client, [given, request.text, request.threshold], seen)


async def mark(client: Any, data: Any, seen: str = "") -> Answer:
    """Have a picture marked."""
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
    """Read the offered file: a mask, or an archive of some."""
    files = [content]
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = [archive.read(name) for name in archive.namelist()]
    return [np.array(PIL.Image.open(io.BytesIO(file))) > 0 for file in files]


def visitor(address: str) -> Any:
    """A client with a connection of its own for each request under way."""
    return httpx.AsyncClient(base_url=address, timeout=300, limits=LIMITS)


def megabytes(process: int, what: str) -> float:
    """Return VmRSS (resident now) or VmHWM (resident at most) of a process, as Linux counts."""
    status = Path(f"/proc/{process}/status")
    if not status.is_file():
        pytest.skip("memory is measured where there is /proc")
    found = re.search(rf"{what}:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found[1]) / 1024


def check_silent(text: str) -> None:
    """Nothing of the program's inside reaches the browser."""
    for telling in (
        "Traceback",
        "site-packages",
        'File "',
        str(Path(crislit.__file__).parent),
        str(Path.cwd()),
    ):
        assert telling not in text, text[:2000]


# -- Load ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_under_200_requests_at_once_each_gets_its_own_masks_or_a_clear_message(
    served: tuple[str, int], network: Path
) -> None:
    """``PAGE_LOAD=results/page_load.json`` in the environment has the figures written there."""
    address, process = served
    requests = [request for pair in zip(good(), bad(), strict=True) for request in pair]
    segmenter = crislit.load(network, device="cpu")

    async def visit() -> list[Answer]:
        async with visitor(address) as client:
            assert (
                await ask(client, requests[0])
            ).masks is not None  # what is loaded on first use is loaded
            return await asyncio.gather(*(ask(client, request) for request in requests))

    before = megabytes(process, "VmRSS")
    start = time.monotonic()
    answers = asyncio.run(visit())
    seconds = time.monotonic() - start
    peak = megabytes(process, "VmHWM")
    for request, answer in zip(requests, answers, strict=True):
        check_silent(answer.seen)
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
        about = {name: version(name) for name in ("gradio", "torch")} | {
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
        }
        Path(record).write_text(json.dumps(measured | about, indent=1) + "\n")
    assert peak - before < MOST_GROWTH
    # The page still answers, and the next visitor is served.
    assert "crislit" in httpx.get(address).text
    last = Request("last.png", encoded(photo(90, 90, seed=999)), "star")

    async def once() -> Answer:
        async with visitor(address) as client:
            return await ask(client, last)

    check_masks(segmenter, last, asyncio.run(once()))


@pytest.mark.slow
def test_the_largest_pictures_that_are_taken_are_marked_in_bounded_memory(network: Path) -> None:
    side = math.isqrt(MAX_UPLOAD_PIXELS)
    text = "\n".join(WORDS[: MAX_MAP_PIXELS // side**2])
    requests = [
        Request("photo.jpg", encoded(np.full((side, side, 3), 40 * i, np.uint8), "JPEG"), text)
        for i in range(3)
    ]  # two are remembered
    with serve(network) as (address, process):

        async def visit() -> list[Answer]:
            async with visitor(address) as client:
                return await asyncio.gather(*(ask(client, request) for request in requests))

        before = megabytes(process, "VmRSS")
        answers = asyncio.run(visit())
        growth = megabytes(process, "VmHWM") - before
    for answer in answers:
        check_silent(answer.seen)
        assert answer.masks is not None, answer.message
        assert [mask.shape for mask in answer.masks] == [(side, side)] * len(text.splitlines())
    assert growth < MOST_GROWTH_OF_LARGEST


def check_masks(segmenter: Segmenter, request: Request, answer: Answer) -> None:
    """The masks are the Segmenter's for this very picture and these sentences."""
    assert request.content is not None
    assert answer.masks is not None, answer.message
    sentences = request.text.splitlines()
    expected = segmenter(PIL.Image.open(io.BytesIO(request.content)), sentences)
    assert len(answer.masks) == len(sentences)
    for mask, result in zip(answer.masks, expected, strict=True):
        assert np.array_equal(mask, result.probability > request.threshold)


# -- Attack -------------------------------------------------------------------------------------------------------------------


def run(address: str, visit: Any) -> Any:
    """Run a visit, given a client."""

    async def inside() -> Any:
        async with visitor(address) as client:
            return await visit(client)

    return asyncio.run(inside())


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that nobody uploaded, in the temporary folder, where uploads are too."""
    path = tmp_path_factory.mktemp("private") / "secret.png"
    path.write_bytes(encoded(photo()))
    return path


@pytest.mark.slow
def test_no_picture_but_an_upload_is_read_however_it_is_named(
    served: tuple[str, int], secret: Path
) -> None:
    address, _ = served
    meta = {"meta": {"_type": "gradio.FileData"}}

    async def visit(client: Any) -> list[tuple[Any, Answer]]:
        upload = await client.post(
            "/gradio_api/upload", files={"files": ("a.png", encoded(photo()))}
        )
        mine = Path(upload.json()[0])
        link = mine.with_name("link.png")
        link.symlink_to(secret)
        assert (await mark(client, [{"path": str(mine)}, "star", 0.5])).masks is not None
        up = "/".join([".."] * (len(mine.parent.parts) - 1))
        paths = [
            str(secret),
            "/etc/passwd",
            f"{mine.parent}/{up}{secret}",
            f"{mine}/{up}{secret}",
            os.path.relpath(secret),
            str(secret).replace("/", "%2f"),
            f"file://{secret}",
            f"{address}/robots.txt",
            "http://localhost/x.png",
            "http://[::1]/x.png",
            "http://2130706433/x.png",
            str(link),
            str(mine.parent),
            "",
            "\0",
            "x" * 5000,
        ]
        given: list[Any] = []
        for path in paths:
            given += [
                path,
                {"path": path},
                {"path": path, "meta": {}},
                {"path": path} | meta,
                {"path": str(mine), "url": path},
            ]
            given += [{"path": None, "url": path} | meta, [path], {"path": {"path": path} | meta}]
        return [(one, await mark(client, [one, "star", 0.5])) for one in given]

    for given, answer in run(address, visit):
        own = (
            isinstance(given, dict) and "url" in given and given["path"] is not None
        )  # and the address is not asked
        assert (answer.masks is not None) == own, given
        check_silent(answer.seen)


@pytest.mark.slow
def test_sentences_and_thresholds_of_every_kind_end_in_silence(
    served: tuple[str, int], secret: Path
) -> None:
    address, _ = served

    async def visit(client: Any) -> None:
        upload = await client.post(
            "/gradio_api/upload", files={"files": ("a.png", encoded(photo()))}
        )
        mine = {"path": upload.json()[0]}
        hostile = {"path": "http://127.0.0.1/x", "meta": {"_type": "gradio.FileData"}}
        markup, marks = ("<script>alert(1)</script>", "\x1b[31m", "\0"), ("‮star", "🟦" * 99)
        texts: tuple[Any, ...] = (5, [], {"a": 1}, *markup, *marks, "../../x", hostile)
        for text in texts:
            check_silent((await mark(client, [mine, text, 0.5])).seen)
        thresholds: tuple[Any, ...] = (None, "x", -1, 5, [], {"path": str(secret)}, 1e999)
        for threshold in thresholds:
            with_it = json.dumps({"data": [mine, "star", threshold]})
            joined = await client.post(
                "/gradio_api/call/mark",
                content=with_it,
                headers={"content-type": "application/json"},
            )
            check_silent(joined.text)
        for data in ([], [mine], [mine, "star", 0.5, 1, 2], {"a": 1}, None):
            check_silent((await client.post("/gradio_api/call/mark", json={"data": data})).text)
        for name in (
            "../../../../x.png",
            "/tmp/x.png",
            "a\0.png",
            "x" * 300 + ".png",
            "CON",
            "a\nb.png",
        ):
            upload = await client.post(
                "/gradio_api/upload", files={"files": (name, encoded(photo()))}
            )
            check_silent(upload.text)
            if upload.status_code == 200:  # and lies beside the others
                assert Path(upload.json()[0]).parent.parent == Path(mine["path"]).parent.parent

    run(address, visit)


@pytest.mark.slow
def test_no_address_of_the_page_serves_a_file_that_is_no_upload(
    served: tuple[str, int], secret: Path
) -> None:
    address, _ = served
    roots = (
        "/gradio_api/file=",
        "/gradio_api/file/",
        "/file=",
        "/static/",
        "/assets/",
        "/svelte/",
        "/gradio_api/proxy=",
        "/",
    )
    paths = (
        str(secret),
        "/etc/passwd",
        "/proc/self/environ",
        crislit.__file__,
        "pyproject.toml",
        f"{address}/config",
    )

    async def visit(client: Any) -> None:
        for root, path in itertools.product(roots, paths):
            bare = path.lstrip("/")
            ups = (up * 9 + bare for up in ("../", "..%2f", "%2e%2e/", "..%252f", "..\\"))
            for form in (
                path,
                bare,
                *ups,
                path.replace("/", "%2f"),
                path.replace("/", "\\"),
                f"//{path}",
                f"file://{path}",
            ):
                target = (root + form).encode()
                answer = await client.get(
                    "/", extensions={"target": target}
                )  # as it is written, ".." and all
                assert answer.status_code in (400, 403, 404), target
                assert secret.read_bytes() not in answer.content
                assert "Traceback" not in answer.text
        # What Gradio offers beyond what the page needs.
        body = {"data": [{"path": str(secret)}, "star", 0.5]}
        for path in (
            "run/mark",
            "api/mark",
            "component_server",
            "process_recording",
            "run-history/connect",
            "vibe-edit",
        ):
            assert (await client.post(f"/gradio_api/{path}", json=body)).status_code == 404
        for path in (
            "runs",
            "deep_link?session_hash=x",
            "openapi.json",
            "custom_component/x/client/y/z",
            "dev/reload",
        ):
            assert (await client.get(f"/gradio_api/{path}")).status_code == 404
        shown = 0
        for number in range(8):  # examples are shown out of turn, and nothing else is
            direct = {
                "data": [{"path": str(secret)}, "star", 0.5],
                "fn_index": number,
                "session_hash": "x",
            }
            for data in (
                direct,
                direct | {"data": [0]},
                direct | {"data": [{"path": str(secret)}]},
            ):
                answer = await client.post("/gradio_api/run/predict", json=data)
                check_silent(answer.text)
                assert secret.name not in answer.text
                if answer.status_code == 200:
                    shown += 1
                    assert "attributes.jpg" in answer.text
        assert shown == 1
        for bad_json in (b"{", b"[" * 100_000, b"\xff"):
            kind = {"content-type": "application/json"}
            broken = await client.post("/gradio_api/call/mark", content=bad_json, headers=kind)
            assert broken.status_code in (400, 422)
            check_silent(broken.text)

        async def endless() -> Any:
            for _ in range(100):
                yield bytes(2**16)

        assert (await client.post("/gradio_api/upload", content=endless())).status_code == 411
        unknown = await client.post(
            "/gradio_api/queue/join", json={"data": [], "session_hash": "x", "fn_index": 99}
        )
        check_silent(unknown.text)
        assert "crislit" in (await client.get("/")).text

    run(address, visit)


def scope(path: str, method: str = "GET", **headers: str) -> dict[str, Any]:
    encoded_headers = [
        (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
    ]
    return {"type": "http", "path": path, "method": method, "headers": encoded_headers}


def test_only_what_the_page_needs_is_let_through() -> None:
    for path in (
        "/",
        "/config",
        "/assets/index-1.js",
        "/gradio_api/info",
        "/gradio_api/file=/tmp/gradio/a b.png",
    ):
        assert refuse(scope(path)) is None
    assert refuse(scope("/gradio_api/run/predict", "POST", content_length="9")) is None
    fetching = (
        "/gradio_api/proxy=http://a",
        "/gradio_api/file=http://a/b",
        "/gradio_api/file=HTTPS://a/b",
    )
    for path in (*fetching, "/gradio_api/run/mark", "/monitoring", "//", ""):
        assert refuse(scope(path)) == (404, "This page has nothing of that name.")
    for path, most in (("/gradio_api/upload", 20 * 2**20), ("/gradio_api/queue/join", 2**20)):
        assert refuse(scope(path, "POST", content_length=str(most))) is None
        too_large = refuse(scope(path, "POST", content_length=str(most + 1)))
        assert too_large == (413, f"That is too large: at most {most // 2**20} MB are taken.")
        assert refuse(scope(path, "POST", content_length="9" * 5000)) == too_large
        for other in (
            scope(path, "POST", content_length="-1"),
            scope(path, "POST", content_length="9", transfer_encoding="chunked"),
        ):
            assert (
                refuse(other)
                == refuse(scope(path, "POST"))
                == (411, "A request has to say how long it is.")
            )


def test_only_files_in_the_folder_of_uploads_are_uploads(tmp_path: Path) -> None:
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "a.png").touch()
    (tmp_path / "b.png").touch()
    (folder / "link.png").symlink_to(tmp_path / "b.png")
    assert check_uploaded(None, str(folder)) is None
    assert check_uploaded(str(folder / "a.png"), str(folder)) == str((folder / "a.png").resolve())
    for path in (
        "b.png",
        "uploads/../b.png",
        "uploads/link.png",
        "uploads",
        "uploads/gone.png",
        "\0",
        "x" * 5000,
    ):
        with pytest.raises(InputError, match="That picture is not among the uploads, or no longer"):
            check_uploaded(str(tmp_path / path), str(folder))
