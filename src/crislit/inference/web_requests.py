"""The filter in front of the page's requests, and the uploads that they may name."""

import contextlib
import re
from pathlib import Path
from typing import Any

from crislit.errors import InputError

MAX_UPLOAD_BYTES = 20 * 2**20
"""Bytes of a request that uploads an image."""
MAX_REQUEST_BYTES = 2**20
"""Bytes of requests other than uploads, such as sentences."""
ALLOWED_PATHS = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|pwa_icon(/\d+)?|robots\.txt"
    r"|(assets|static|svelte)/.+)?"
    r"|/gradio_api/(info|upload|upload_progress|startup-events|app_id|queue/(join|data)"
    r"|run/predict|call/mark(/\w+)?|cancel|reset|heartbeat/\w+|file=(?!https?:).+)/?",
    re.IGNORECASE | re.DOTALL,
)
"""Addresses that the page needs. Gradio's others download files, keep records and run ffmpeg."""


class RequestFilter:
    """ASGI middleware that refuses requests before Gradio sees them, with one line of text.

    Refused are addresses that the page does not need, and requests that are too large.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, or pass it on."""
        refusal = refuse(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            while (await receive()).get("more_body"):
                pass  # browsers ignore an answer that arrives before they have sent everything
            status, reason = refusal
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": reason.encode()})


def refuse(scope: Any) -> tuple[int, str] | None:
    """Return the status and the reason if a request is refused, else None."""
    if not ALLOWED_PATHS.fullmatch(scope["path"]):
        return 404, "There is no such address on this page."
    if scope["method"] in ("GET", "HEAD"):
        return None
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers or not length.isdigit():
        return 411, "A request needs a Content-Length."
    is_upload = scope["path"].startswith("/gradio_api/upload")
    limit = MAX_UPLOAD_BYTES if is_upload else MAX_REQUEST_BYTES
    if len(length) > 15 or int(length) > limit:  # Python refuses to parse thousands of digits
        return 413, f"The request is too large: at most {limit >> 20} MB are accepted."
    return None


def local_files_only(move: Any) -> Any:
    """Wrap Gradio's function that moves files, which would also download addresses."""

    async def move_local(path: str | Path | None) -> Any:
        if isinstance(path, str) and "://" in path:
            raise ValueError("the page downloads nothing from other addresses")
        return await move(path)

    return move_local


def uploaded_path(payload: Any) -> str | None:
    """Return the path that a request names as its upload, without reading the file."""
    return payload.path if payload else None


def check_uploaded(path: str | None, folder: str) -> str | None:
    """Return the path of an upload. Requests can name any file, but only uploads are read.

    Raises:
        InputError: If the file is not in the folder of uploads, or was deleted.
    """
    if path is None:
        return None
    with contextlib.suppress(OSError, ValueError):  # names that are too long or not valid
        real = Path(path).resolve(strict=True)
        if real.is_file() and real.is_relative_to(Path(folder).resolve()):
            return str(real)
    raise InputError("That image is not among the uploads, or was deleted: upload it again.")
