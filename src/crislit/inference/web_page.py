"""The Gradio page, and the filter in front of its requests."""

import contextlib
import functools
import itertools
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

from crislit.errors import InputError
from crislit.inference.masks import colour_of, safe_file_name
from crislit.inference.segmenter import Segmenter, truncation_warning
from crislit.io.assets import EXAMPLES, find_examples
from crislit.io.images import open_image

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # a page for oneself tells nobody


MAX_SENTENCES = 20
MAX_UPLOAD_PIXELS = 40_000_000
MAX_MAP_PIXELS = 120_000_000
"""Pixels times sentences: what one visitor's probability maps may take, four bytes each."""
CACHED_ANSWERS = 2
"""Answers kept, so that another threshold cuts the same maps anew."""
MAX_SENTENCE_LENGTH = 500
"""Of a sentence: far more than CLIP reads."""
DISPLAY_SIZE = 1280
"""Pixels of the longer side of what the page shows; masks are as large as the picture."""
MAX_QUEUE = 256
"""Requests in the queue; who comes later is told to come back."""
MAX_UPLOAD_BYTES = 20 * 2**20
MAX_REQUEST_BYTES = 2**20
"""Bytes of any other request, such as sentences."""
KEEP_SECONDS = 3600
"""Seconds for which uploads and masks are kept."""
ALLOWED_PATHS = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|pwa_icon(/\d+)?|robots\.txt|(assets|static|svelte)/.+)?"
    r"|/gradio_api/(info|upload|upload_progress|startup-events|app_id|queue/(join|data)|run/predict|call/mark(/\w+)?|cancel|reset"
    r"|heartbeat/\w+|file=(?!https?:).+)/?",
    re.IGNORECASE | re.DOTALL,
)
"""What the page needs of Gradio, which offers more: to fetch other addresses, to keep records, to run ffmpeg."""
Probability = npt.NDArray[np.float32]
Answer = tuple[npt.NDArray[np.uint8], list[str], list[Probability]]
"""A picture's pixels, the sentences, and a map of each."""


def build_page(segmenter: Segmenter) -> Any:
    """Build the page, a ``gradio.Blocks``.

    Raises:
        InputError: If Gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise InputError('Gradio is not installed: pip install "crislit[demo]"') from error

    remembered = functools.lru_cache(maxsize=CACHED_ANSWERS)(functools.partial(segment, segmenter))

    def mark(path: str | None, text: str, threshold: float) -> tuple[Any, ...]:
        try:
            marked = remembered(check_uploaded(path, picture.GRADIO_CACHE), text or "")
            annotated, maps, file = show(marked, threshold, folder)
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False, title="Please check") from error
        for sentence in marked[1]:
            if told := truncation_warning(sentence, segmenter.model.max_tokens):
                gradio.Warning(told)
        return (
            gradio.AnnotatedImage(
                annotated, color_map=colours([label for _, label in annotated[1]])
            ),
            maps,
            file,
        )

    def cut(path: str | None, text: str, threshold: float) -> tuple[Any, ...]:
        return mark(path, text, threshold) if path and text and text.strip() else (None, None, None)

    temporary = tempfile.TemporaryDirectory(prefix="crislit-")  # lives as long as the page
    folder = Path(temporary.name)

    with gradio.Blocks(
        title="crislit", analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)
    ) as page:
        gradio.Markdown(
            "# crislit\nA picture and sentences: what each sentence means is marked in its own colour."
        )
        with gradio.Row():
            with gradio.Column(min_width=300):
                picture = gradio.Image(
                    type="filepath",
                    image_mode=None,
                    label="Picture",
                    sources=["upload", "clipboard"],
                )
                picture.preprocess = uploaded_path  # type: ignore[method-assign]  # what is in the file is looked at where a message can be given
                text = gradio.Textbox(
                    label="Sentences, one a line",
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
        shown = [overlay, maps, masks]
        given = [picture, text, threshold]
        one = "one at a time"  # whichever of the two it is
        gradio.on(
            [button.click, text.submit], mark, given, shown, api_name="mark", concurrency_id=one
        )
        threshold.change(
            cut,
            given,
            shown,
            api_visibility="private",
            trigger_mode="always_last",
            show_progress="hidden",
            concurrency_id=one,
        )
        examples = [
            [str(path), "\n".join(sentences)] for path, sentences in find_examples(EXAMPLES)
        ]
        gradio.Examples(examples, [picture, text], label="Examples")
    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = local_files_only(
            block.async_move_resource_to_block_cache
        )
    page.temporary = temporary
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1, api_open=False)
    return page


class RequestFilter:
    """Refuses, before Gradio sees it, what the page does not need and what is too large, in one line of plain text."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer or pass on one request, as ASGI has it."""
        refusal = refuse(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
            return
        while (await receive()).get(
            "more_body"
        ):  # a browser shows no answer that comes before it has sent all
            pass
        status, reason = refusal
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": reason.encode()})


def refuse(scope: Any) -> tuple[int, str] | None:
    """Return the status and the reason why an HTTP request is not for the page, or None."""
    if not ALLOWED_PATHS.fullmatch(scope["path"]):
        return 404, "This page has nothing of that name."
    if scope["method"] in ("GET", "HEAD"):
        return None
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers or not length.isdigit():
        return 411, "A request has to say how long it is."
    most = MAX_UPLOAD_BYTES if scope["path"].startswith("/gradio_api/upload") else MAX_REQUEST_BYTES
    too_large = (
        len(length) > 15 or int(length) > most
    )  # Python refuses to read numbers of thousands of digits
    return (413, f"That is too large: at most {most >> 20} MB are taken.") if too_large else None


def local_files_only(move: Any) -> Any:
    """Have Gradio move files, but fetch none: a path can be an address."""

    async def moved(path: str | Path | None) -> Any:
        if isinstance(path, str) and "://" in path:
            raise ValueError("the page fetches nothing from other addresses")
        return await move(path)

    return moved


def uploaded_path(payload: Any) -> str | None:
    """Return where an uploaded file is said to lie, unread."""
    return payload.path if payload else None


def check_uploaded(path: str | None, folder: str) -> str | None:
    """Return the path of a file if it lies in the folder of uploads: a request can name any.

    Raises:
        InputError: If it does not, or no longer.
    """
    if path is None:
        return None
    with contextlib.suppress(OSError, ValueError):  # names that are too long, or no names
        real = Path(path).resolve(strict=True)
        if real.is_file() and real.is_relative_to(Path(folder).resolve()):
            return str(real)
    raise InputError("That picture is not among the uploads, or no longer: upload it again.")


def segment(segmenter: Segmenter, path: str | None, text: str) -> Answer:
    """Segment what the page's visitor gave.

    Raises:
        InputError: If there is no picture, no sentence, too much of either, or the picture cannot be read.
    """
    if path is None:
        raise InputError("There is no picture yet: drop one, or choose an example.")
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise InputError(
            "There is no sentence yet: write one a line, for example 'the man in red'."
        )
    if len(sentences) > MAX_SENTENCES:
        raise InputError(
            f"{len(sentences)} sentences are too many at once: at most {MAX_SENTENCES}."
        )
    if (longest := max(map(len, sentences))) > MAX_SENTENCE_LENGTH:
        raise InputError(
            f"A sentence of {longest:,} characters is too long: at most {MAX_SENTENCE_LENGTH}."
        )
    try:
        image = open_image(path, MAX_UPLOAD_PIXELS)
    except InputError as error:
        raise InputError(
            str(error).replace(str(path), "The file")
        ) from error  # where uploads lie is nobody's business
    if image.shape[0] * image.shape[1] * len(sentences) > MAX_MAP_PIXELS:
        raise InputError(
            f"{len(sentences)} sentences are too many for so large a picture: send a smaller one, or fewer."
        )
    return image, sentences, [result.probability for result in segmenter(image, sentences)]


def show(marked: Answer, threshold: float, folder: Path) -> tuple[Any, list[tuple[Any, str]], str]:
    """Return what the page shows: annotated picture, maps with captions, and a file of masks below a folder."""
    image, sentences, probabilities = marked
    labels: list[str] = []
    for sentence in sentences:
        names = itertools.chain(
            [sentence], (f"{sentence} ({number})" for number in itertools.count(2))
        )
        labels.append(
            next(name for name in names if name not in labels)
        )  # each has its own colour by it
    masks = [probability > threshold for probability in probabilities]
    seen = shrink(image)
    seen_probabilities = [shrink(probability) for probability in probabilities]
    annotations = [
        ((one > threshold).astype(np.float32), label)
        for one, label in zip(seen_probabilities, labels, strict=True)
    ]
    maps = [
        (
            draw_heat_map(seen, one),
            f"{label}: {'nothing' if not mask.any() else f'{100 * mask.mean():.1f} % of the picture'}",
        )
        for one, label, mask in zip(seen_probabilities, labels, masks, strict=True)
    ]
    return (seen, annotations), maps, str(save_masks(sentences, masks, folder))


def shrink(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a picture or map (h, w) or (h, w, 3) no larger than the page shows."""
    height, width = pixels.shape[:2]
    scale = DISPLAY_SIZE / max(height, width)
    if scale >= 1:
        return pixels
    return cv2.resize(
        pixels,
        (max(1, round(scale * width)), max(1, round(scale * height))),
        interpolation=cv2.INTER_AREA,
    )


def draw_heat_map(image: npt.NDArray[np.uint8], probability: Probability) -> npt.NDArray[np.uint8]:
    """Draw a probability map over a grey picture: dark where it is 0, bright yellow where it is 1."""
    levels = np.round(255 * probability).astype(np.uint8)
    coloured = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    return (0.35 * grey + 0.65 * coloured).astype(np.uint8)


def save_masks(
    sentences: Sequence[str], masks: Sequence[npt.NDArray[np.bool_]], root: Path
) -> Path:
    """Write masks as PNG, one as it is and several into an archive; those of an hour ago are deleted."""
    for old in root.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another request has deleted it
            if time.time() - old.stat().st_mtime > KEEP_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=root))
    taken: set[str] = set()
    files = []
    for sentence, mask in zip(sentences, masks, strict=True):
        path = folder / f"{safe_file_name('mask', sentence, taken)}.png"
        PIL.Image.fromarray(255 * mask.astype(np.uint8)).save(path)
        files.append(path)
    if len(files) == 1:
        return files[0]
    archive = folder / "masks.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for path in files:
            target.write(path, path.name)
    return archive


def colours(labels: Sequence[str]) -> dict[str, str]:
    """Return each label's colour, as the page wants it."""
    return {label: "#{:02x}{:02x}{:02x}".format(*colour_of(i)) for i, label in enumerate(labels)}
