"""The Gradio page, and the filter in front of its requests."""

import contextlib
import functools
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image

from crislit.errors import InputError, require
from crislit.inference.masks import colour_of, number_repeated, safe_file_name
from crislit.inference.segmenter import Segmenter, truncation_warning
from crislit.io import EXAMPLES, Image, find_examples, open_image

MAX_SENTENCES = 20
MAX_UPLOAD_PIXELS = 40_000_000
MAX_MAP_PIXELS = 120_000_000
"""Limit of pixels times sentences per request: probability maps take four bytes for each."""
CACHED_ANSWERS = 2
"""Answers kept in memory, so that another threshold needs no other forward pass."""
MAX_SENTENCE_LENGTH = 500
"""Characters per sentence, far more than CLIP reads."""
DISPLAY_SIZE = 1280
"""Longer side of the displayed images in pixels; masks have the size of the uploaded image."""
MAX_QUEUE = 256
"""Requests in the queue; further ones are asked to come back later."""
MAX_UPLOAD_BYTES = 20 * 2**20
MAX_REQUEST_BYTES = 2**20
"""Bytes of requests other than uploads, such as sentences."""
KEEP_SECONDS = 3600
"""Seconds for which uploads and masks are kept."""
ALLOWED_PATHS = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|pwa_icon(/\d+)?|robots\.txt"
    r"|(assets|static|svelte)/.+)?"
    r"|/gradio_api/(info|upload|upload_progress|startup-events|app_id|queue/(join|data)"
    r"|run/predict|call/mark(/\w+)?|cancel|reset|heartbeat/\w+|file=(?!https?:).+)/?",
    re.IGNORECASE | re.DOTALL,
)
"""Addresses that the page needs. Gradio's others download files, keep records and run ffmpeg."""
Probability = npt.NDArray[np.float32]
Answer = tuple[Image, list[str], list[Probability]]
"""An image, the sentences, and a probability map per sentence."""


def build_page(segmenter: Segmenter) -> Any:
    """Build the page, a ``gradio.Blocks``. Gradio's analytics are disabled.

    Raises:
        InputError: If Gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read by Gradio at launch
    try:
        import gradio
    except ImportError as error:
        raise InputError('Gradio is not installed: pip install "crislit[demo]"') from error

    cached_segment = functools.lru_cache(CACHED_ANSWERS)(functools.partial(segment, segmenter))

    def mark(path: str | None, text: str, threshold: float) -> tuple[Any, ...]:
        try:
            answer = cached_segment(check_uploaded(path, image.GRADIO_CACHE), text or "")
            annotated, maps, file = render(answer, threshold, Path(page.temporary.name))
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False, title="Please check") from error
        for sentence in answer[1]:
            if message := truncation_warning(sentence, segmenter.model.max_tokens):
                gradio.Warning(message)
        colours = label_colours([label for _, label in annotated[1]])
        return gradio.AnnotatedImage(annotated, color_map=colours), maps, file

    def change_threshold(path: str | None, text: str, threshold: float) -> tuple[Any, ...]:
        return mark(path, text, threshold) if path and text and text.strip() else (None, None, None)

    with gradio.Blocks(
        title="crislit", analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)
    ) as page:
        gradio.Markdown(
            "# crislit\nSegments what each sentence refers to in an image, in its own colour."
        )
        with gradio.Row():
            with gradio.Column(min_width=300):
                image = gradio.Image(
                    type="filepath",
                    image_mode=None,
                    label="Image",
                    sources=["upload", "clipboard"],
                )
                # Only `mark` can report a file that cannot be read.
                image.preprocess = uploaded_path  # type: ignore[method-assign]
                text = gradio.Textbox(
                    label="Sentences, one per line",
                    lines=3,
                    placeholder="the man in red\nleftmost dog",
                )
                threshold = gradio.Slider(
                    0.0, 0.95, value=segmenter.threshold, step=0.01, label="Threshold"
                )
                button = gradio.Button("Mark", variant="primary")
            with gradio.Column(min_width=300):
                overlay = gradio.AnnotatedImage(label="Marked", color_map=None, show_legend=True)
                maps = gradio.Gallery(
                    label="Probability", columns=2, height="auto", object_fit="contain"
                )
                masks = gradio.File(label="Masks, as PNG", interactive=False)
        inputs, outputs = [image, text, threshold], [overlay, maps, masks]
        queue = "one request at a time"  # shared by both events
        events = [button.click, text.submit]
        gradio.on(events, mark, inputs, outputs, api_name="mark", concurrency_id=queue)
        threshold.change(
            change_threshold,
            inputs,
            outputs,
            api_visibility="private",
            trigger_mode="always_last",
            show_progress="hidden",
            concurrency_id=queue,
        )
        gradio.Examples(
            [[str(path), "\n".join(texts)] for path, texts in find_examples(EXAMPLES)],
            [image, text],
            label="Examples",
        )
    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = local_files_only(
            block.async_move_resource_to_block_cache
        )
    page.temporary = tempfile.TemporaryDirectory(prefix="crislit-")  # deleted with the page
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1, api_open=False)
    return page


# -- Requests


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


# -- Answers


def segment(segmenter: Segmenter, path: str | None, text: str) -> Answer:
    """Segment an uploaded image.

    Raises:
        InputError: If the image or the sentences are missing, too large, or cannot be read.
    """
    if path is None:
        raise InputError("Upload an image first, or choose an example.")
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    require(sentences, "Write a sentence first, one per line, for example 'the man in red'.")
    require(
        len(sentences) <= MAX_SENTENCES,
        f"{len(sentences)} sentences are too many: at most {MAX_SENTENCES}.",
    )
    longest = max(map(len, sentences))
    require(
        longest <= MAX_SENTENCE_LENGTH,
        f"A sentence of {longest:,} characters is too long: at most {MAX_SENTENCE_LENGTH}.",
    )
    try:
        image = open_image(path, MAX_UPLOAD_PIXELS)
    except InputError as error:  # does not reveal where uploads are stored
        raise InputError(str(error).replace(path, "The file")) from error
    require(
        image.shape[0] * image.shape[1] * len(sentences) <= MAX_MAP_PIXELS,
        f"{len(sentences)} sentences are too many for such a large image: send a smaller one, "
        "or fewer sentences.",
    )
    return image, sentences, [result.probability for result in segmenter(image, sentences)]


def render(
    answer: Answer, threshold: float, folder: Path
) -> tuple[Any, list[tuple[Any, str]], str]:
    """Return an annotated image, probability maps with captions, and the path of the masks.

    Args:
        answer: The answer.
        threshold: Probability above which a pixel belongs to a mask.
        folder: The folder of mask files.
    """
    image, sentences, probabilities = answer
    labels: list[str] = []
    for sentence in sentences:  # the page assigns colours by label
        labels.append(number_repeated(sentence, " ({})", labels))
    masks = [probability > threshold for probability in probabilities]
    small_image, small_maps = shrink(image), [shrink(x) for x in probabilities]
    annotations = [
        ((small > threshold).astype(np.float32), label)
        for small, label in zip(small_maps, labels, strict=True)
    ]
    shares = [f"{100 * x.mean():.1f} % of the image" if x.any() else "nothing" for x in masks]
    maps = [
        (draw_heat_map(small_image, small), f"{label}: {share}")
        for small, label, share in zip(small_maps, labels, shares, strict=True)
    ]
    return (small_image, annotations), maps, str(save_masks(sentences, masks, folder))


def label_colours(labels: Sequence[str]) -> dict[str, str]:
    """Return each label's colour in hexadecimal."""
    return {label: "#{:02x}{:02x}{:02x}".format(*colour_of(i)) for i, label in enumerate(labels)}


def shrink(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Shrink an image (h, w, 3) or map (h, w) to :data:`DISPLAY_SIZE`, if it is larger."""
    height, width = pixels.shape[:2]
    scale = DISPLAY_SIZE / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def draw_heat_map(image: Image, probability: Probability) -> Image:
    """Draw a probability map over a grey image, from dark (0) to bright yellow (1)."""
    levels = np.round(255 * probability).astype(np.uint8)
    coloured = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    return (0.35 * grey + 0.65 * coloured).astype(np.uint8)


def save_masks(
    sentences: Sequence[str], masks: Sequence[npt.NDArray[np.bool_]], root: Path
) -> Path:
    """Write one mask as PNG, or several to an archive, and delete outdated files."""
    for old in root.iterdir():
        with contextlib.suppress(FileNotFoundError):  # deleted by another request
            if time.time() - old.stat().st_mtime > KEEP_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=root))
    taken: set[str] = set()
    files = [folder / f"{safe_file_name('mask', sentence, taken)}.png" for sentence in sentences]
    for file, mask in zip(files, masks, strict=True):
        PIL.Image.fromarray(255 * mask.astype(np.uint8)).save(file)
    if len(files) == 1:
        return files[0]
    archive = folder / "masks.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for file in files:
            target.write(file, file.name)
    return archive
