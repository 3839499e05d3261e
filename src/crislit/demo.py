"""``python -m crislit.demo``: a page in the browser, where sentences mark what they mean in a picture."""

import argparse
import os
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

from crislit.errors import InputError, one_line_errors
from crislit.overlay import colour_of
from crislit.picture import open_picture
from crislit.predict import file_name
from crislit.segmenter import Segmenter, load

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # a page for oneself tells nobody

EXAMPLES = Path(__file__).parent / "assets/examples"
MOST_SENTENCES = 20
MOST_PIXELS = 40_000_000
MOST_WAITING = 32
"""Requests in the queue; who comes later is told to come back."""
LARGEST_UPLOAD = "20mb"
KEPT = 3600
"""Seconds for which uploads and masks are kept."""

Probability = npt.NDArray[np.float32]
Marked = tuple[npt.NDArray[np.uint8], list[str], list[Probability]]
"""What the page remembers of a picture: its pixels, the sentences, and a map of each."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the page until interrupted."""
    parser = argparse.ArgumentParser("python -m crislit.demo", description=__doc__)
    parser.add_argument("--checkpoint", default="shapes-tiny", help="the network (default: the shipped shapes-tiny)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: this machine alone; 0.0.0.0: all)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860 on)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    options = parser.parse_args(arguments)
    with one_line_errors():
        page = build_page(load(options.checkpoint, device=options.device))
        try:
            _, address, _ = page.launch(
                server_name=options.host,
                server_port=options.port,
                max_file_size=LARGEST_UPLOAD,
                share=False,
                footer_links=[],
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise InputError(f"cannot serve at {options.host}: {error}") from error
        print(f"the page is at {address} until Ctrl-C", flush=True)
        page.block_thread()


def build_page(segmenter: Segmenter) -> Any:
    """Build the page, a ``gradio.Blocks``.

    Raises:
        InputError: If Gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise InputError('Gradio is not installed: pip install "crislit[demo]"') from error

    def mark(path: str | None, text: str, threshold: float) -> tuple[Any, ...]:
        try:
            marked = segment(segmenter, path, text)
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False, title="Please check") from error
        return marked, *cut(marked, threshold)

    def cut(marked: Marked | None, threshold: float) -> tuple[Any, ...]:
        if marked is None:
            return None, None, None
        annotated, maps, file = show(marked, threshold, folder)
        return gradio.AnnotatedImage(annotated, color_map=colours([label for _, label in annotated[1]])), maps, file

    temporary = tempfile.TemporaryDirectory(prefix="crislit-")  # lives as long as the page
    folder = Path(temporary.name)

    with gradio.Blocks(title="crislit", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gradio.Markdown("# crislit\nA picture and sentences: what each sentence means is marked in its own colour.")
        remembered = gradio.State()
        with gradio.Row():
            with gradio.Column(min_width=300):
                picture = gradio.Image(type="filepath", image_mode=None, label="Picture", sources=["upload", "clipboard"])
                text = gradio.Textbox(label="Sentences, one a line", lines=3, placeholder="the man in red\nleftmost dog")
                threshold = gradio.Slider(0.0, 0.95, value=segmenter.threshold, step=0.01, label="Threshold")
                button = gradio.Button("Mark", variant="primary")
            with gradio.Column(min_width=300):
                overlay = gradio.AnnotatedImage(label="Marked", color_map=None, show_legend=True)
                maps = gradio.Gallery(label="Probability", columns=2, height="auto", object_fit="contain")
                masks = gradio.File(label="Masks, as PNG", interactive=False)
        shown = [overlay, maps, masks]
        gradio.on([button.click, text.submit], mark, [picture, text, threshold], [remembered, *shown], api_name="mark")
        threshold.release(cut, [remembered, threshold], shown, api_visibility="private")
        examples = [[str(path), path.with_suffix(".txt").read_text()] for path in sorted(EXAMPLES.glob("*.jpg"))]
        if examples:
            gradio.Examples(examples, [picture, text], label="Examples")
    page.temporary = temporary
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1)
    return page


def segment(segmenter: Segmenter, path: str | None, text: str) -> Marked:
    """Segment what the page's visitor gave.

    Raises:
        InputError: If there is no picture, no sentence, too much of either, or the picture cannot be read.
    """
    if path is None:
        raise InputError("There is no picture yet: drop one, or choose an example.")
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise InputError("There is no sentence yet: write one a line, for example 'the man in red'.")
    if len(sentences) > MOST_SENTENCES:
        raise InputError(f"{len(sentences)} sentences are too many at once: at most {MOST_SENTENCES}.")
    try:
        image = open_picture(path)
    except InputError as error:
        raise InputError(str(error).replace(str(path), "The file")) from error  # where uploads lie is nobody's business
    if image.shape[0] * image.shape[1] > MOST_PIXELS:
        raise InputError(f"The picture has more than {MOST_PIXELS // 10**6} million pixels: send a smaller one.")
    return image, sentences, [result.probability for result in segmenter(image, sentences)]


def show(marked: Marked, threshold: float, folder: Path) -> tuple[Any, list[tuple[Any, str]], str]:
    """Return what the page shows: annotated picture, maps with captions, and a file of masks below a folder."""
    image, sentences, probabilities = marked
    labels = [sentence if sentences.index(sentence) == i else f"{sentence} ({i + 1})" for i, sentence in enumerate(sentences)]
    masks = [probability > threshold for probability in probabilities]
    annotations = [(mask.astype(np.float32), label) for mask, label in zip(masks, labels, strict=True)]
    maps = [
        (heat(image, probability), f"{label}: {'nothing' if not mask.any() else f'{100 * mask.mean():.1f} % of the picture'}")
        for probability, label, mask in zip(probabilities, labels, masks, strict=True)
    ]
    return (image, annotations), maps, str(save_masks(sentences, masks, folder))


def heat(image: npt.NDArray[np.uint8], probability: Probability) -> npt.NDArray[np.uint8]:
    """Draw a probability map over a grey picture: dark where it is 0, bright yellow where it is 1."""
    levels = np.round(255 * probability).astype(np.uint8)
    coloured = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    return (0.35 * grey + 0.65 * coloured).astype(np.uint8)


def save_masks(sentences: Sequence[str], masks: Sequence[npt.NDArray[np.bool_]], root: Path) -> Path:
    """Write masks as PNG, one as it is and several into an archive; those of an hour ago are deleted."""
    for old in root.iterdir():
        if time.time() - old.stat().st_mtime > KEPT:
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=root))
    taken: set[str] = set()
    files = []
    for sentence, mask in zip(sentences, masks, strict=True):
        path = folder / f"{file_name('mask', sentence, taken)}.png"
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


if __name__ == "__main__":
    main()
