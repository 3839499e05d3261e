"""scripts/download_refer.py: whatever mirrors do, only complete, correct files get their names."""

import hashlib
import importlib.util
import io
import json
import os
import pickle
import re
import runpy
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from tqdm import tqdm

from crislit.data.refer_index import IMAGE_FOLDERS
from crislit.errors import InputError
from tests.refer_data import Counts, count_refs
from tests.runs import environment

SCRIPT = Path(__file__).parents[2] / "scripts/download_refer.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("download_refer", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


download = load_script()

SIZE = 2 * 2**20 + 12_345
CONTENT = np.random.default_rng(0).bytes(SIZE)
OTHER = np.random.default_rng(1).bytes(SIZE)
"""Another file of the same size."""
NAME = "refcoco.zip"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep proxies and caches of this machine out of the tests."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# -- A server with the faults of real ones


class Request(NamedTuple):
    """A request, and how many bytes of the answer were sent."""

    path: str
    range: str | None
    sent: int


@dataclass
class Resource:
    """A file on the server, and how the server behaves.

    Attributes:
        content: The file.
        status: The status of answers, if not 200 or 206.
        ranges: How requests of a range are answered: "kept", "ignored", or as partial content
            "from the start".
        breaks: Number of bytes after which the next answers break off; later ones are complete.
        end: How an incomplete answer ends: "closed", "reset" or "stalled".
        announced: Whether answers have a Content-Length.
        length: Replaces the true Content-Length.
        location: Target of a redirection.
        on_request: Called at every request.
    """

    content: bytes = CONTENT
    status: int = 200
    ranges: str = "kept"
    breaks: list[int] = field(default_factory=list)
    end: str = "closed"
    announced: bool = True
    length: str = ""
    location: str = ""
    on_request: Callable[[], object] = lambda: None


class Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for answers in progress

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.resources: dict[str, Resource] = {}
        self.requests: list[Request] = []
        self.closing = threading.Event()

    def add(self, path: str, resource: Resource) -> str:
        self.resources[path] = resource
        return f"http://127.0.0.1:{self.server_port}{path}"

    def ranges(self, path: str) -> list[str | None]:
        return [request.range for request in self.requests if request.path == path]

    def sent(self, path: str) -> list[int]:
        return [request.sent for request in self.requests if request.path == path]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        resource, wanted = self.server.resources[self.path], self.headers["Range"]
        resource.on_request()
        begin = 0
        if wanted and resource.ranges == "kept":
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        status = 206 if wanted and resource.ranges != "ignored" else 200
        body = resource.content[begin:]
        if begin >= len(resource.content):
            status, body = 416, b""
        if resource.location:
            status, body = 302, b""
        if resource.status != 200:
            status, body = resource.status, b"<html>no</html>"
        sent = resource.breaks.pop(0) if resource.breaks else len(body)
        self.server.requests.append(Request(self.path, wanted, sent))
        try:
            self.send_response(status)
            if status == 206:
                size = len(resource.content)
                self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
            if resource.location:
                self.send_header("Location", resource.location)
            if resource.announced:
                self.send_header("Content-Length", resource.length or str(len(body)))
            self.end_headers()
            self.wfile.write(body[:sent])
            if sent < len(body) and resource.end == "stalled":
                self.server.closing.wait()
            if sent < len(body) and resource.end == "reset":
                no_linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        except ConnectionError:  # the client has closed the connection
            pass

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def dead() -> str:
    """An address without a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/dead"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The script's pauses, recorded instead of taken."""
    taken: list[float] = []
    monkeypatch.setattr(download.time, "sleep", taken.append)
    return taken


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tqdm]:
    """The script's progress bars, counting without a terminal."""
    made: list[tqdm] = []

    def make(**options: Any) -> tqdm:
        made.append(tqdm(**options | {"file": io.StringIO(), "disable": False}))
        return made[-1]

    monkeypatch.setattr(download, "tqdm", make)
    return made


def archive_of(
    *urls: str, content: bytes = CONTENT, algorithm: str = "sha256", place: str = "refcoco"
) -> Any:
    digest = hashlib.new(algorithm, content).hexdigest()
    return download.Archive(NAME, "refcoco", place, len(content), f"{algorithm}:{digest}", urls)


def fetch(folder: Path, *urls: str, tries: int = 3) -> Path:
    path = download.fetch(archive_of(*urls), folder, tries=tries, pause=0)
    assert isinstance(path, Path)
    return path


def leave_part(folder: Path, content: bytes) -> Path:
    """Write a partial download, as an interrupted run leaves it."""
    folder.mkdir(exist_ok=True)
    part = folder / f"{NAME}.part"
    part.write_bytes(content)
    return part


def assert_complete(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == [NAME]
    assert (folder / NAME).read_bytes() == CONTENT


# -- Fetching: one mirror


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_a_complete_download_has_its_final_name_and_leaves_nothing_else(
    algorithm: str, server: Server, tmp_path: Path
) -> None:
    url = server.add("/a", Resource())
    folder = tmp_path / "new/downloads"
    assert download.fetch(archive_of(url, algorithm=algorithm), folder, pause=0) == folder / NAME
    assert_complete(folder)
    assert server.requests == [Request("/a", None, SIZE)]


@pytest.mark.parametrize("begun", [1, 1000, 2**20, SIZE - 1])
def test_a_partial_download_is_continued(begun: int, server: Server, tmp_path: Path) -> None:
    leave_part(tmp_path, CONTENT[:begun])
    fetch(tmp_path, server.add("/a", Resource()))
    assert_complete(tmp_path)
    assert server.requests == [Request("/a", f"bytes={begun}-", SIZE - begun)]


def test_an_empty_partial_download_requests_no_range(server: Server, tmp_path: Path) -> None:
    leave_part(tmp_path, b"")
    fetch(tmp_path, server.add("/a", Resource()))
    assert_complete(tmp_path)
    assert server.requests == [Request("/a", None, SIZE)]


@pytest.mark.parametrize("ranges", ["ignored", "from the start"])
def test_a_server_that_ignores_the_range_starts_over(
    ranges: str, server: Server, tmp_path: Path
) -> None:
    leave_part(tmp_path, CONTENT[:1000])
    fetch(tmp_path, server.add("/a", Resource(ranges=ranges)), tries=1)
    assert_complete(tmp_path)
    assert server.requests == [Request("/a", "bytes=1000-", SIZE)]


def test_a_server_that_ignores_ranges_and_breaks_off_starts_over(
    server: Server, tmp_path: Path
) -> None:
    fetch(tmp_path, server.add("/a", Resource(ranges="ignored", breaks=[5000, 3000])))
    assert_complete(tmp_path)
    assert server.requests == [
        Request("/a", None, 5000),
        Request("/a", "bytes=5000-", 3000),
        Request("/a", "bytes=3000-", SIZE),
    ]


def test_a_closed_connection_is_continued_where_it_ended(server: Server, tmp_path: Path) -> None:
    first, second = 2**20 + 17, 70_000
    fetch(tmp_path, server.add("/a", Resource(breaks=[first, second])))
    assert_complete(tmp_path)
    assert server.requests == [
        Request("/a", None, first),
        Request("/a", f"bytes={first}-", second),
        Request("/a", f"bytes={first + second}-", SIZE - first - second),
    ]


def test_a_reset_connection_is_continued(server: Server, tmp_path: Path) -> None:
    fetch(tmp_path, server.add("/a", Resource(breaks=[2**20 + 17, 70_000], end="reset")))
    assert_complete(tmp_path)
    assert len(server.requests) == 3


def test_a_stalled_connection_times_out_and_is_continued(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, timeouts = urllib.request.urlopen, []

    def shortened(request: urllib.request.Request, timeout: float) -> Any:
        timeouts.append(timeout)
        return real(request, timeout=0.3)

    monkeypatch.setattr(urllib.request, "urlopen", shortened)
    fetch(tmp_path, server.add("/a", Resource(breaks=[2**20 + 17], end="stalled")))
    assert_complete(tmp_path)
    assert server.ranges("/a") == [None, f"bytes={2**20}-"], "complete chunks are kept"
    assert all(1 <= timeout <= 300 for timeout in timeouts)


def test_every_try_but_the_first_is_preceded_by_a_pause(
    server: Server, tmp_path: Path, pauses: list[float]
) -> None:
    url = server.add("/a", Resource(breaks=[1000, 1000]))
    download.fetch(archive_of(url), tmp_path, pause=7.5)
    assert_complete(tmp_path)
    assert pauses == [7.5, 7.5]


def test_a_redirection_is_followed_with_the_same_range(server: Server, tmp_path: Path) -> None:
    leave_part(tmp_path, CONTENT[:1000])
    fetch(tmp_path, server.add("/a", Resource(location=server.add("/b", Resource()))))
    assert_complete(tmp_path)
    assert server.requests == [
        Request("/a", "bytes=1000-", 0),
        Request("/b", "bytes=1000-", SIZE - 1000),
    ]


@pytest.mark.parametrize("begun", [0, 1000])
def test_a_server_without_content_length_is_continued_too(
    begun: int, server: Server, tmp_path: Path
) -> None:
    leave_part(tmp_path, CONTENT[:begun])
    fetch(tmp_path, server.add("/a", Resource(announced=False, breaks=[5000])))
    assert_complete(tmp_path)
    assert server.sent("/a") == [5000, SIZE - begun - 5000]


def test_the_progress_bar_starts_at_the_partial_download_and_ends_at_the_full_size(
    server: Server, tmp_path: Path, bars: list[tqdm]
) -> None:
    leave_part(tmp_path, CONTENT[:1000])
    fetch(tmp_path, server.add("/a", Resource()))
    (bar,) = bars
    assert (bar.initial, bar.n, bar.total) == (1000, SIZE, SIZE)


def test_a_complete_partial_download_is_checked_and_not_fetched(
    server: Server, tmp_path: Path
) -> None:
    leave_part(tmp_path, CONTENT)
    fetch(tmp_path, server.add("/a", Resource()))
    assert_complete(tmp_path)
    assert not server.requests


def test_an_existing_archive_is_not_fetched(server: Server, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(CONTENT)
    fetch(tmp_path, server.add("/a", Resource()))
    assert_complete(tmp_path)
    assert not server.requests


LEFTOVERS = {
    "the beginning of another file": (OTHER[:1000], ["bytes=1000-", None]),
    "another file of the same size": (OTHER, [None]),
    "the archive with a byte changed": (
        CONTENT[:500] + bytes([CONTENT[500] ^ 1]) + CONTENT[501:],
        [None],
    ),
    "more than the archive": (CONTENT + b"x", [None]),
}


@pytest.mark.parametrize(("leftover", "ranges"), LEFTOVERS.values(), ids=LEFTOVERS)
def test_a_partial_download_of_another_file_starts_over(
    leftover: bytes, ranges: list[str | None], server: Server, tmp_path: Path
) -> None:
    leave_part(tmp_path, leftover)
    fetch(tmp_path, server.add("/a", Resource()))
    assert_complete(tmp_path)
    assert server.ranges("/a") == ranges


# -- Fetching: several mirrors


def test_mirrors_are_tried_in_order_up_to_the_first_good_one(
    server: Server, tmp_path: Path
) -> None:
    fetch(
        tmp_path,
        server.add("/a", Resource(status=404)),
        server.add("/b", Resource()),
        server.add("/c", Resource()),
    )
    assert_complete(tmp_path)
    assert [request.path for request in server.requests] == ["/a", "/b"]


def test_a_mirror_that_breaks_off_too_often_is_continued_by_the_next(
    server: Server, tmp_path: Path
) -> None:
    bad, good = server.add("/a", Resource(breaks=[100_000] * 3)), server.add("/b", Resource())
    fetch(tmp_path, bad, good)
    assert_complete(tmp_path)
    assert server.ranges("/a") == [None, "bytes=100000-", "bytes=200000-"]
    assert server.requests[-1] == Request("/b", "bytes=300000-", SIZE - 300_000)


def test_an_unreachable_mirror_is_replaced_by_the_next(
    server: Server, dead: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_part(tmp_path, CONTENT[:1000])
    fetch(tmp_path, dead, server.add("/a", Resource()))
    assert_complete(tmp_path)
    assert server.ranges("/a") == ["bytes=1000-"]
    assert dead in capsys.readouterr().err, "the user sees it"


@pytest.mark.parametrize("status", [403, 404, 416, 500, 503])
def test_a_mirror_that_refuses_is_tried_once_and_replaced_by_the_next(
    status: int, server: Server, tmp_path: Path
) -> None:
    leave_part(tmp_path, CONTENT[:1000])
    fetch(tmp_path, server.add("/a", Resource(status=status)), server.add("/b", Resource()))
    assert_complete(tmp_path)
    assert server.ranges("/a") == ["bytes=1000-"]
    assert server.ranges("/b") == ["bytes=1000-"], "the page of an error is not saved"


@pytest.mark.parametrize("announced", [True, False])
def test_another_file_of_the_same_size_is_removed_before_the_next_mirror_is_tried(
    announced: bool, server: Server, tmp_path: Path
) -> None:
    seen: list[list[str]] = []
    bad = server.add("/a", Resource(OTHER, announced=announced))
    good = server.add("/b", Resource(on_request=lambda: seen.append(os.listdir(tmp_path))))  # noqa: PTH208
    fetch(tmp_path, bad, good)
    assert_complete(tmp_path)
    assert seen == [[]]
    assert server.requests == [Request("/a", None, SIZE), Request("/b", None, SIZE)]


def test_another_file_is_left_neither_under_the_archives_name_nor_as_its_part(
    server: Server, tmp_path: Path
) -> None:
    url = server.add("/a", Resource(OTHER))
    with pytest.raises(InputError, match=re.escape(hashlib.sha256(OTHER).hexdigest())):
        fetch(tmp_path, url)
    assert not list(tmp_path.iterdir())
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "content",
    [CONTENT[:-1], CONTENT + b"x", b"<html>gone</html>"],
    ids=["shorter", "longer", "a page"],
)
@pytest.mark.parametrize("ranges", ["kept", "ignored"])
def test_a_file_of_another_size_is_refused_before_anything_is_written(
    content: bytes, ranges: str, server: Server, tmp_path: Path
) -> None:
    part = leave_part(tmp_path, CONTENT[:10])
    url = server.add("/a", Resource(content, ranges=ranges))
    with pytest.raises(
        InputError, match=f"another file, of {len(content):,} bytes instead of {SIZE:,}"
    ):
        fetch(tmp_path, url)
    assert [path.name for path in tmp_path.iterdir()] == [part.name]
    assert part.read_bytes() == CONTENT[:10]
    fetch(tmp_path, url, server.add("/b", Resource()))
    assert_complete(tmp_path)
    assert server.ranges("/b") == ["bytes=10-"]


@pytest.mark.parametrize(
    "content", [CONTENT + b"x", CONTENT * 2], ids=["a byte more", "twice the archive"]
)
def test_a_longer_file_without_content_length_never_gets_the_archives_name(
    content: bytes, server: Server, tmp_path: Path
) -> None:
    bad = server.add("/a", Resource(content, announced=False))
    with pytest.raises(InputError, match="no mirror provided"):
        fetch(tmp_path, bad)
    assert not list(tmp_path.iterdir())
    fetch(tmp_path, bad, server.add("/b", Resource()))
    assert_complete(tmp_path)


def test_a_partial_download_from_a_wrong_mirror_does_not_affect_the_right_one(
    server: Server, tmp_path: Path
) -> None:
    fetch(
        tmp_path, server.add("/a", Resource(OTHER, breaks=[1000] * 3)), server.add("/b", Resource())
    )
    assert_complete(tmp_path)
    assert server.ranges("/b") == ["bytes=3000-", None]


def test_if_all_mirrors_fail_the_error_names_each_with_its_reason_and_the_part_stays(
    server: Server, dead: str, tmp_path: Path
) -> None:
    reasons = {
        server.add("/gone", Resource(status=404)): "404",
        server.add("/broken", Resource(status=500)): "500",
        dead: "refused",
        server.add("/longer", Resource(CONTENT + b"x")): f"{SIZE + 1:,} bytes",
        server.add("/cut", Resource(breaks=[1000] * 3)): "the connection ended at byte",
    }
    part = leave_part(tmp_path, CONTENT[:1000])
    with pytest.raises(InputError, match=f"no mirror provided {NAME}") as caught:
        fetch(tmp_path, *reasons)
    (message,) = str(caught.value).splitlines()
    assert str(part) in message
    starts = [message.index(url) for url in reasons]
    assert starts == sorted(starts)
    for reason, start, end in zip(reasons.values(), starts, [*starts[1:], None], strict=True):
        assert reason in message[start:end]
    assert [path.name for path in tmp_path.iterdir()] == [part.name]
    assert part.read_bytes() == CONTENT[:4000]
    fetch(tmp_path, server.add("/good", Resource()))
    assert_complete(tmp_path)
    assert server.ranges("/good") == ["bytes=4000-"]


@pytest.mark.parametrize(
    ("leftover", "end"), [(b"", 3000), (OTHER, 2000)], ids=["nothing", "no part of the archive"]
)
def test_a_mirrors_reason_is_that_of_the_last_try(
    leftover: bytes, end: int, server: Server, tmp_path: Path
) -> None:
    url = server.add("/a", Resource(breaks=[1000] * 3))
    leave_part(tmp_path, leftover)
    with pytest.raises(InputError, match=f"ended at byte {end:,} of {SIZE:,}"):
        fetch(tmp_path, url)


def test_the_error_speaks_of_a_part_only_if_there_is_one(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no mirror provided {NAME}") as caught:
        fetch(tmp_path, server.add("/a", Resource(status=404)))
    assert ".part" not in str(caught.value)


def test_an_invalid_content_length_is_ignored_or_left_to_the_next_mirror(
    server: Server, tmp_path: Path
) -> None:
    fetch(tmp_path, server.add("/a", Resource(length="many")), server.add("/b", Resource()))
    assert_complete(tmp_path)


def test_at_most_the_archive_and_one_chunk_are_written(
    server: Server, tmp_path: Path, bars: list[tqdm]
) -> None:
    with pytest.raises(InputError, match="no mirror provided"):
        fetch(tmp_path, server.add("/a", Resource(CONTENT * 4, announced=False)))
    assert sum(bar.n for bar in bars) <= SIZE + download.CHUNK


# -- Fetching: the disk, and the end of the process


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> list[Path]:
    """Simulate the free bytes of the disk; return the paths that they are asked of."""
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(Path(path))
        return Usage(10**12, 10**12 - free, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return asked


@pytest.mark.parametrize("begun", [0, 1000])
def test_too_little_space_is_an_error_before_anything_is_requested_or_written(
    begun: int, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = leave_part(tmp_path, CONTENT[:begun])
    url = server.add("/a", Resource())
    asked = set_free(monkeypatch, SIZE - begun + download.SPARE - 1)
    with pytest.raises(
        InputError,
        match=rf"{NAME} needs .* GB below {re.escape(str(tmp_path))}, and .* GB are free",
    ):
        fetch(tmp_path, url, url)
    assert asked == [tmp_path]
    assert not server.requests
    assert [path.name for path in tmp_path.iterdir()] == [part.name]
    assert part.read_bytes() == CONTENT[:begun]


@pytest.mark.parametrize("begun", [0, 1000])
def test_space_for_the_remainder_is_enough(
    begun: int, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_part(tmp_path, CONTENT[:begun])
    set_free(monkeypatch, SIZE - begun + download.SPARE)
    fetch(tmp_path, server.add("/a", Resource()))
    assert_complete(tmp_path)
    assert download.SPARE > 0


FETCHING = f"""
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

spec = spec_from_file_location("download_refer", {str(SCRIPT)!r})
sys.modules["download_refer"] = script = module_from_spec(spec)
spec.loader.exec_module(script)
folder, size, checksum, url = sys.argv[1:]
archive = script.Archive({NAME!r}, "refcoco", "refcoco", int(size), checksum, (url,))
script.fetch(archive, Path(folder))
"""


def test_a_killed_download_does_not_have_its_final_name_and_is_continued(
    server: Server, tmp_path: Path
) -> None:
    url = server.add("/a", Resource(breaks=[2**20 + 17], end="stalled"))
    archive, part = archive_of(url), tmp_path / f"{NAME}.part"
    child = subprocess.Popen(
        [sys.executable, "-c", FETCHING, str(tmp_path), str(archive.size), archive.checksum, url],
        env=environment(),
    )
    deadline = time.monotonic() + 60
    while (
        not (part.is_file() and part.stat().st_size)
        and child.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    child.kill()
    child.wait()
    begun = part.stat().st_size
    assert begun == 2**20
    assert [path.name for path in tmp_path.iterdir()] == [part.name]
    fetch(tmp_path, url)
    assert_complete(tmp_path)
    assert server.requests[1:] == [Request("/a", f"bytes={begun}-", SIZE - begun)]


# -- Unpacking


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder, including hidden ones."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="session")
def shapes_root(small_shapes: Path) -> Path:
    (root,) = small_shapes.glob("shapes-v*")
    return root


@pytest.fixture(scope="session")
def set_files(shapes_root: Path) -> dict[str, bytes]:
    """The two files of `shapes`, under the names that RefCOCO uses."""
    folder = shapes_root / "shapes"
    return {
        "instances.json": (folder / "instances.json").read_bytes(),
        "refs(unc).p": (folder / "refs(crislit).p").read_bytes(),
    }


def packed(files: dict[str, bytes], inside: str = "refcoco") -> dict[str, bytes]:
    """Return files as in an archive: in a folder, beside others that are not wanted."""
    extra = {
        f"__MACOSX/{inside}/._x": b"x",
        "README": b"read me",
        f"{inside}_more/x": b"x",
        "../outside": b"x",
    }
    return {f"{inside}/": b""} | {f"{inside}/{name}": data for name, data in files.items()} | extra


def unpack(root: Path, content: bytes, place: str = "refcoco") -> Path:
    file = root / "downloads" / NAME
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    path = download.unpack(archive_of(content=content, place=place), file, root)
    assert isinstance(path, Path)
    return path


def assert_nothing_unpacked(root: Path) -> None:
    """Check that neither the final folder nor temporary files exist."""
    assert sorted(path.name for path in root.iterdir()) == ["downloads"]
    assert [path.name for path in (root / "downloads").iterdir()] == [NAME]


@pytest.mark.parametrize("place", ["refcoco", "images/train2014"])
def test_only_the_wanted_folder_is_unpacked_to_its_place(
    place: str, set_files: dict[str, bytes], tmp_path: Path
) -> None:
    files = set_files | {"deeper/file": b"deep", "empty": b""}
    root = tmp_path / "data"
    assert unpack(root, zipped(packed(files)), place) == root / place
    assert contents(root / place) == files
    assert sorted(path.name for path in root.iterdir()) == sorted(
        ["downloads", place.split("/")[0]]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_unpacked_folder_has_the_usual_permissions(
    set_files: dict[str, bytes], tmp_path: Path
) -> None:
    place = unpack(tmp_path, zipped(packed(set_files)))
    assert place.stat().st_mode == (tmp_path / "downloads").stat().st_mode


def test_the_folder_gets_its_name_when_it_is_complete(
    set_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract, there = zipfile.ZipFile.extract, []

    def watched(archive: zipfile.ZipFile, *arguments: Any) -> str:
        path = extract(archive, *arguments)
        there.append((tmp_path / "refcoco").exists())
        return path

    monkeypatch.setattr(zipfile.ZipFile, "extract", watched)
    unpack(tmp_path, zipped(packed(set_files)))
    assert (tmp_path / "refcoco").is_dir()
    assert there == [False] * 3


@pytest.mark.parametrize("reason", [KeyboardInterrupt, OSError])
def test_interrupted_unpacking_leaves_neither_a_final_folder_nor_temporary_files(
    reason: type[BaseException],
    set_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extract, calls = zipfile.ZipFile.extract, []

    def interrupted(archive: zipfile.ZipFile, *arguments: Any) -> str:
        calls.append(extract(archive, *arguments))
        if len(calls) == 2:
            raise reason
        return calls[-1]

    content = zipped(packed(set_files))
    monkeypatch.setattr(zipfile.ZipFile, "extract", interrupted)
    with pytest.raises((reason, InputError)):
        unpack(tmp_path, content)
    assert len(calls) == 2
    assert tmp_path in Path(calls[0]).parents, "on the same disk, so that renaming completes it"
    assert_nothing_unpacked(tmp_path)
    monkeypatch.setattr(zipfile.ZipFile, "extract", extract)
    download.unpack(archive_of(), tmp_path / "downloads" / NAME, tmp_path)
    assert contents(tmp_path / "refcoco") == set_files


PAYLOAD = CONTENT[:5000]
STORED = zipped({"refcoco/x": PAYLOAD}, zipfile.ZIP_STORED)
DEFLATED = zipped({"refcoco/x": bytes(range(256)) * 40})
BEGIN = DEFLATED.index(b"refcoco/x") + len("refcoco/x")
"""Offset of the deflated data."""
TABLE = DEFLATED.index(b"PK\1\2")
"""Offset of the zip's directory: version at byte 6, flags at 8, compression method at 10."""


def changed(content: bytes, at: int, data: bytes) -> bytes:
    return content[:at] + data + content[at + len(data) :]


DAMAGED = {
    "emptied": b"",
    "not a zip": PAYLOAD,
    "truncated": STORED[:-100],
    "stored bytes changed": changed(STORED, STORED.index(PAYLOAD) + 2000, b"damage"),
    "deflated bytes changed": changed(DEFLATED, BEGIN + 4, bytes(8)),
}
DAMAGED_OTHERWISE = {
    "an invalid block": changed(DEFLATED, BEGIN, b"\xff" * 20),
    "without its beginning": STORED[1000:],
    "marked as encrypted": changed(changed(DEFLATED, TABLE + 8, b"\1"), 6, b"\1"),
    "an unknown method": changed(changed(DEFLATED, TABLE + 10, b"\x63"), 8, b"\x63"),
    "of a future version": changed(DEFLATED, TABLE + 6, b"\x63"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_archive_is_an_error_that_names_it_and_nothing_is_left(
    content: bytes, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError,
        match=rf"{re.escape(str(tmp_path / 'downloads' / NAME))} is damaged: .*Delete it",
    ):
        unpack(tmp_path, content)
    assert_nothing_unpacked(tmp_path)


@pytest.mark.parametrize("content", DAMAGED_OTHERWISE.values(), ids=DAMAGED_OTHERWISE)
def test_an_archive_damaged_in_rarer_ways_is_an_error_that_names_it_too(
    content: bytes, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "downloads" / NAME))):
        unpack(tmp_path, content)
    assert_nothing_unpacked(tmp_path)


@pytest.mark.parametrize("name", ["refcoco/../../evil", "refcoco/..", "refcoco/x/../../../evil"])
def test_an_archive_that_would_leave_its_folder_is_refused_and_nothing_is_written(
    name: str, set_files: dict[str, bytes], tmp_path: Path
) -> None:
    root = tmp_path / "a/b"
    with pytest.raises(
        InputError, match=f"holds '{re.escape(name)}', which would leave its folder"
    ):
        unpack(root, zipped(packed(set_files) | {name: b"evil"}))
    assert_nothing_unpacked(root)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [NAME]


def test_an_archive_without_the_wanted_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"refcoco\.zip does not have the folder refcoco/"):
        unpack(tmp_path, zipped({"refcoco+/x": b"x", "refcoco": b"a file"}))
    assert_nothing_unpacked(tmp_path)


def test_too_little_space_to_unpack_is_an_error_and_nothing_is_written(
    set_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(map(len, set_files.values())) + download.SPARE
    content = zipped(packed(set_files))
    set_free(monkeypatch, needed - 1)
    with pytest.raises(InputError, match=f"unpacking {NAME} needs"):
        unpack(tmp_path / "little", content)
    assert_nothing_unpacked(tmp_path / "little")
    set_free(monkeypatch, needed)
    assert contents(unpack(tmp_path / "enough", content)) == set_files


# -- All together


@pytest.fixture(scope="session")
def zips(shapes_root: Path, set_files: dict[str, bytes]) -> dict[str, bytes]:
    """All four archives, with the small set and its images."""
    both = dict.fromkeys(("refs(umd).p", "refs(google).p"), set_files["refs(unc).p"])
    images = contents(shapes_root / "images/train2014")
    return {
        "refcoco": zipped(packed(set_files)),
        "refcoco+": zipped(packed(set_files, "refcoco+")),
        "refcocog": zipped(
            packed(both | {"instances.json": set_files["instances.json"]}, "refcocog")
        ),
        "images": zipped(packed(images, "train2014"), zipfile.ZIP_STORED),
    }


@pytest.fixture
def archives(zips: dict[str, bytes], server: Server, dead: str) -> dict[str, Any]:
    """The built-in archives with other contents, on two mirrors; the first is unreachable."""
    found = {}
    for name, real in download.ARCHIVES.items():
        urls = (dead, server.add(f"/{real.name}", Resource(zips[name])))
        checksum = f"md5:{hashlib.md5(zips[name]).hexdigest()}"
        found[name] = download.Archive(
            real.name, real.inside, real.place, len(zips[name]), checksum, urls
        )
    return found


@pytest.mark.usefixtures("pauses")
def test_everything_is_fetched_and_unpacked_once(
    archives: dict[str, Any],
    server: Server,
    shapes_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "new/data"
    download.main([str(root)], archives)
    assert Counter(request.path for request in server.requests) == {
        "/refcoco.zip": 1,
        "/refcoco+.zip": 1,
        "/refcocog.zip": 1,
        "/train2014.zip": 1,
    }
    assert sorted(contents(root)) == sorted(
        [
            "refcoco/instances.json",
            "refcoco/refs(unc).p",
            "refcoco+/instances.json",
            "refcoco+/refs(unc).p",
        ]
        + ["refcocog/instances.json", "refcocog/refs(umd).p", "refcocog/refs(google).p"]
        + [f"images/train2014/{path.name}" for path in (shapes_root / "images/train2014").iterdir()]
    ), "the archives are deleted"
    first = capsys.readouterr().out
    assert [line for line in first.splitlines() if line.endswith("is complete")] == [
        f"{root / place} is complete"
        for place in ("refcoco", "refcoco+", "refcocog", "images/train2014")
    ]

    before, asked = contents(root), len(server.requests)
    download.main([str(root)], archives)
    assert contents(root) == before
    assert len(server.requests) == asked
    assert capsys.readouterr().out.count("is there already") == 4

    counts = count_refs(shapes_root, *SET)
    monkeypatch.setattr(download, "EXPECTED", dict.fromkeys(download.EXPECTED, counts))
    download.main([str(root), "--verify"])
    output = capsys.readouterr().out
    assert "the data have the published counts" in output
    assert len(table_rows(output)) == 4 * len(counts)
    assert "DIFFERENT" not in output
    assert len(server.requests) == asked


@pytest.mark.usefixtures("pauses")
@pytest.mark.parametrize("keep", [False, True])
def test_one_set_is_fetched_alone_and_its_archive_kept_on_request(
    keep: bool,
    archives: dict[str, Any],
    server: Server,
    set_files: dict[str, bytes],
    zips: dict[str, bytes],
    tmp_path: Path,
) -> None:
    download.main([str(tmp_path), "--only", "refcoco", *["--keep"] * keep], archives)
    expected = {f"refcoco/{name}": data for name, data in set_files.items()}
    assert contents(tmp_path) == expected | (
        {"downloads/refcoco.zip": zips["refcoco"]} if keep else {}
    )
    assert [request.path for request in server.requests] == ["/refcoco.zip"]


def test_only_missing_sets_are_fetched_and_existing_ones_stay_unchanged(
    archives: dict[str, Any], server: Server, tmp_path: Path, pauses: list[float]
) -> None:
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco/mine").write_bytes(b"mine")
    download.install(["refcoco", "refcoco+"], tmp_path, archives, keep=False)
    assert contents(tmp_path / "refcoco") == {"mine": b"mine"}
    assert [request.path for request in server.requests] == ["/refcoco+.zip"]
    assert len(pauses) == 2, "between three tries of the unreachable mirror"


def test_an_archive_fetched_by_an_interrupted_run_is_unpacked_without_the_network(
    archives: dict[str, Any],
    server: Server,
    zips: dict[str, bytes],
    set_files: dict[str, bytes],
    tmp_path: Path,
) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/refcoco.zip").write_bytes(zips["refcoco"])
    download.main([str(tmp_path), "--only", "refcoco"], archives)
    assert contents(tmp_path / "refcoco") == set_files
    assert not server.requests


@pytest.mark.usefixtures("pauses")
def test_images_in_the_other_usual_folder_are_not_fetched_again(
    archives: dict[str, Any], server: Server, tmp_path: Path
) -> None:
    (tmp_path / IMAGE_FOLDERS[1]).mkdir(parents=True)
    download.main([str(tmp_path), "--only", "images"], archives)
    assert not server.requests


@pytest.mark.usefixtures("pauses")
def test_a_failed_fetch_ends_with_one_line_and_exit_code_1(dead: str, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=rf"^error: no mirror provided {NAME}.*{dead}: .*refused[^\n]*$"
    ):
        download.main([str(tmp_path), "--only", "refcoco"], {"refcoco": archive_of(dead)})


@pytest.mark.parametrize("inside", ["", "data"])
def test_a_root_that_cannot_be_a_folder_is_a_one_line_error(
    inside: str, archives: dict[str, Any], server: Server, tmp_path: Path
) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(SystemExit, match=r"^error: [^\n]*a file[^\n]*$"):
        download.main([str(tmp_path / "a file" / inside), "--only", "refcoco"], archives)
    assert not server.requests


def test_an_interruption_ends_with_one_line_and_keeps_the_partial_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    set_free(monkeypatch, 10**11)
    monkeypatch.setattr(urllib.request, "urlopen", interrupted)
    monkeypatch.setattr(sys, "argv", ["download_refer.py", str(tmp_path), "--only", "refcoco"])
    (tmp_path / "downloads").mkdir()
    part = leave_part(tmp_path / "downloads", b"begun")
    with pytest.raises(
        (SystemExit, KeyboardInterrupt), match=r"^interrupted; start it again to continue$"
    ):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert contents(tmp_path) == {f"downloads/{part.name}": b"begun"}


# -- Built-in facts


PUBLISHED = """
refcoco  refs(unc).p    train 42404 120624 16994 val 3811 10834 1500 testA 1975 5657 750 \
                        testB 1810 5095 750
refcoco+ refs(unc).p    train 42278 120191 16992 val 3805 10758 1500 testA 1975 5726 750 \
                        testB 1798 4889 750
refcocog refs(umd).p    train 42226 80512 21899  val 2573 4896 1300  test 5023 9602 2600
refcocog refs(google).p train 44822 85474 24698  val 5000 9536 4650
"""
"""Refs, sentences and images of each split, as the authors published them."""


def test_the_expected_counts_are_the_published_ones() -> None:
    published: dict[tuple[str, str], Counts] = {}
    for line in PUBLISHED.strip().splitlines():
        folder, file, *rest = line.split()
        groups = zip(*[iter(rest)] * 4, strict=True)
        published[folder, file] = {split: (int(r), int(s), int(i)) for split, r, s, i in groups}
    assert published == download.EXPECTED
    assert sum(len(splits) for splits in published.values()) == 13


def test_every_built_in_archive_has_several_mirrors_a_size_and_a_checksum() -> None:
    lengths = {"sha256": 64, "md5": 32}
    for archive in download.ARCHIVES.values():
        assert len(set(archive.urls)) == len(archive.urls) >= 3
        assert len({url.split("/")[2] for url in archive.urls}) >= 2, "on different hosts"
        assert all(
            url.startswith(("https://", "http://")) and url.endswith(f"/{archive.name}")
            for url in archive.urls
        )
        algorithm, digest = archive.checksum.split(":")
        assert re.fullmatch(rf"[0-9a-f]{{{lengths[algorithm]}}}", digest)
        assert archive.size > 40_000_000
    for what in ("name", "place", "size", "checksum", "urls"):
        assert len({getattr(archive, what) for archive in download.ARCHIVES.values()}) == len(
            download.ARCHIVES
        )


def test_annotations_come_by_https_and_first_from_the_web_archives_copy() -> None:
    for name in ("refcoco", "refcoco+", "refcocog"):
        archive = download.ARCHIVES[name]
        assert all(url.startswith("https://") for url in archive.urls)
        assert re.fullmatch(
            rf"https://web\.archive\.org/web/\d{{14}}id_/{re.escape(archive.urls[-1])}",
            archive.urls[0],
        )
        assert archive.checksum.startswith("sha256:")


def test_archives_are_unpacked_to_the_folders_that_are_read() -> None:
    places = {name: archive.place for name, archive in download.ARCHIVES.items()}
    images = places.pop("images")
    assert images == IMAGE_FOLDERS[0]
    assert {name: name for name, _ in download.EXPECTED} == places
    assert all(archive.inside == Path(archive.place).name for archive in download.ARCHIVES.values())


# -- Verifying


SET = ("shapes", "refs(crislit).p")


@pytest.fixture
def copied(shapes_root: Path, tmp_path: Path) -> Path:
    """A copy of the root with `shapes`, to be damaged."""
    return Path(
        shutil.copytree(shapes_root, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    )


@pytest.fixture
def counts(shapes_root: Path) -> Counts:
    return count_refs(shapes_root, *SET)


def verify(root: Path, expected: dict[tuple[str, str], Counts]) -> tuple[list[list[str]], bool]:
    """Return the rows of the table, and whether all counts are right."""
    table, fine = download.verify(root, expected)
    assert str(root) in table.title
    return [
        list(row) for row in zip(*(column.cells for column in table.columns), strict=True)
    ], fine


def table_rows(output: str) -> list[list[str]]:
    """Return the cells of a printed table's body."""
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in output.splitlines()
        if line.startswith("│")
    ]


def as_expected(counts: Counts) -> list[list[str]]:
    return [
        ["/".join(SET), split, *(f"{n:,}" for n in numbers), "0", "0", ""]
        for split, numbers in counts.items()
    ]


def test_right_counts_are_accepted_and_printed_once(shapes_root: Path, counts: Counts) -> None:
    assert counts["train"] == (48, 144, 12), "the counts that the fixture documents"
    assert list(counts) == ["train", "val", "testA", "testB"]
    rows, fine = verify(shapes_root, {SET: counts})
    assert fine
    assert rows == as_expected(counts)


@pytest.mark.parametrize("split", ["train", "testB"])
@pytest.mark.parametrize("column", [0, 1, 2], ids=["refs", "sentences", "images"])
@pytest.mark.parametrize("by", [-1, 1])
def test_any_wrong_count_is_a_difference_with_both_numbers(
    split: str, column: int, by: int, shapes_root: Path, counts: Counts
) -> None:
    found = counts[split]
    wrong = [n + by * (i == column) for i, n in enumerate(found)]
    expected: Counts = {**counts, split: (wrong[0], wrong[1], wrong[2])}
    rows, fine = verify(shapes_root, {SET: expected})
    assert not fine
    expected_rows = as_expected(counts)
    row = expected_rows[list(counts).index(split)]
    row[2 + column], row[-1] = f"{wrong[column]:,} -> {found[column]:,}", "DIFFERENT"
    assert rows == expected_rows


def test_a_missing_image_with_several_refs_is_counted_once(copied: Path, counts: Counts) -> None:
    refs = pickle.loads(copied.joinpath(*SET).read_bytes())
    names = {
        image["id"]: image["file_name"]
        for image in json.loads((copied / "shapes/instances.json").read_text())["images"]
    }
    gone = [
        image
        for image, n in Counter(ref["image_id"] for ref in refs if ref["split"] == "val").items()
        if n > 1
    ][:2]
    for image in gone:
        (copied / "images/train2014" / names[image]).unlink()
    rows, fine = verify(copied, {SET: counts})
    assert not fine
    expected = as_expected(counts)
    expected[1][-3:] = ["2", "0", "DIFFERENT"]
    assert rows == expected


def test_empty_masks_are_counted(copied: Path, counts: Counts) -> None:
    refs = pickle.loads(copied.joinpath(*SET).read_bytes())
    emptied = [ref["ann_id"] for ref in refs if ref["split"] == "testA"][1:4]
    path = copied / "shapes/instances.json"
    instances = json.loads(path.read_text())
    for annotation in instances["annotations"]:
        if annotation["id"] in emptied:
            annotation["segmentation"] = []
    path.write_text(json.dumps(instances))
    rows, fine = verify(copied, {SET: counts})
    assert not fine
    expected = as_expected(counts)
    expected[2][-3:] = ["0", "3", "DIFFERENT"]
    assert rows == expected


def test_an_unpublished_split_is_a_difference(shapes_root: Path, counts: Counts) -> None:
    expected = as_expected(counts)
    extra = counts.pop("testB")
    rows, fine = verify(shapes_root, {SET: counts})
    assert not fine
    expected[3][2:5] = [f"0 -> {n:,}" for n in extra]
    expected[3][-1] = "DIFFERENT"
    assert rows == expected


def test_a_missing_split_is_a_difference(shapes_root: Path, counts: Counts) -> None:
    rows, fine = verify(shapes_root, {SET: {**counts, "test": (1, 2_000, 3)}})
    assert not fine
    assert rows == [
        *as_expected(counts),
        ["/".join(SET), "test", "1 -> 0", "2,000 -> 0", "3 -> 0", "0", "0", "DIFFERENT"],
    ]


@pytest.mark.parametrize("first", [True, False])
def test_a_missing_set_is_reported_in_its_row_and_the_others_are_counted(
    first: bool, shapes_root: Path, counts: Counts
) -> None:
    absent = ("refcoco", "refs(unc).p")
    expected = {absent: counts, SET: counts} if first else {SET: counts, absent: counts}
    rows, fine = verify(shapes_root, expected)
    assert not fine
    row = rows.pop(0 if first else -1)
    assert row[:-1] == ["refcoco/refs(unc).p", "", "", "", "", "", ""]
    assert re.match(
        rf"refcoco is not at {re.escape(str(shapes_root))}: .*refs\(unc\)\.p.* not found", row[-1]
    )
    assert "\n" not in row[-1]
    assert rows == as_expected(counts)


def test_a_damaged_set_is_reported_in_its_row(copied: Path, counts: Counts) -> None:
    copied.joinpath(*SET).write_bytes(b"damaged")
    rows, fine = verify(copied, {SET: counts})
    assert not fine
    (row,) = rows
    assert row[0] == "/".join(SET)
    assert row[-1].startswith(f"cannot read {copied.joinpath(*SET)}")


def test_verifying_other_data_exits_with_1_and_prints_expected_and_actual_counts(
    refer_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # the table keeps its width in a narrow terminal
    with pytest.raises(SystemExit) as caught:
        download.main([str(refer_root), "--verify"])
    assert str(caught.value.code).startswith("error: "), "Python prints it, and exits with 1"
    rows = {(row[0], row[1]): row[2:] for row in table_rows(capsys.readouterr().out)}
    assert len(rows) == 13
    for (folder, file), splits in download.EXPECTED.items():
        actual = count_refs(refer_root, folder, file)
        for split, expected in splits.items():
            pairs = zip(expected, actual.get(split, (0, 0, 0)), strict=True)
            cells = [f"{e:,} -> {a:,}" for e, a in pairs]
            assert rows[f"{folder}/{file}", split] == [*cells, "0", "0", "DIFFERENT"]
    assert rows["refcoco/refs(unc).p", "train"][0].startswith("42,404 -> ")


def test_only_the_named_sets_are_verified(
    generated_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^error: "):
        download.main([str(generated_root), "--verify", "--only", "refcocog", "images"])
    names = {row[0] for row in table_rows(capsys.readouterr().out)}
    assert names == {"refcocog/refs(umd).p", "refcocog/refs(google).p"}


def test_verifying_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        download.main([str(tmp_path / "none"), "--verify", "--only", "images"])
    assert caught.value.code not in (0, None)
    assert "have the published counts" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["[old]", "[/x]", "a[bold]b"])
def test_a_root_with_brackets_is_printed_unchanged(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: "):
        download.main([name, "--verify", "--only", "refcoco"])
    output = capsys.readouterr().out
    assert f"below {name}" in output
    assert f"{name}/refcoco/instances.json" in output


def test_long_paths_of_missing_files_are_printed_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / ("long" * 30)
    with pytest.raises(SystemExit, match=r"^error: "):
        download.main([str(root), "--verify", "--only", "refcoco"])
    message = "".join(row[-1] for row in table_rows(capsys.readouterr().out))
    for missing in ("refcoco/instances.json", "refcoco/refs(unc).p", "images/train2014"):
        assert str(root / missing) in message


# -- The command line


def run_script(*arguments: str, data: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment([("CRISLIT_DATA", str(data))]),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_explains_the_options(tmp_path: Path) -> None:
    done = run_script("--help", data=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(word in done.stdout for word in ("--verify", "--only", "--keep", "DATA"))
    assert not list(tmp_path.iterdir())


def test_verifying_an_empty_folder_ends_with_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = run_script("--verify", data=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert all(
        f"{folder} is not at" in done.stdout for folder in ("refcoco", "refcoco+", "refcocog")
    )
    assert str(tmp_path) in done.stdout, "the folder in CRISLIT_DATA"
    assert not list(tmp_path.iterdir())


def test_a_manually_added_archive_is_used_if_it_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(OTHER)
    with pytest.raises(InputError, match=r"is not the published archive"):
        download.fetch(archive_of(), tmp_path, pause=0)
    assert (tmp_path / NAME).read_bytes() == OTHER
    (tmp_path / NAME).write_bytes(CONTENT)
    assert download.fetch(archive_of(), tmp_path, pause=0) == tmp_path / NAME
