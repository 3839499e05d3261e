"""The Gradio page: its layout and its texts."""

import functools
import html
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crislit.errors import InputError, see
from crislit.inference.description import Description, looks_like_photo
from crislit.inference.segmenter import Segmenter, truncation_warning
from crislit.inference.web_answers import KEEP_SECONDS, Answer, label_colors, render, segment
from crislit.inference.web_requests import check_uploaded, local_files_only, uploaded_path
from crislit.io import EXAMPLES, find_examples

Mark = Callable[[str | None, str, float], tuple[Any, ...]]
"""Answers a request: from image, sentences and threshold to the contents of the results."""
CACHED_ANSWERS = 2
"""Answers kept in memory, so that another threshold needs no other forward pass."""
MAX_QUEUE = 256
"""Requests in the queue; further ones are asked to come back later."""
TITLE = """# crislit
Describe things in an image, and see them marked. Each sentence gets its own color."""
ADVICE = {
    "drawn": "For photos, train a network on photos, and start this page with --checkpoint FILE.",
    "photos": "Sentences like those of its training work best: they name one thing in the image.",
    "custom": "It knows what was in its training data, and sentences like those.",
    "unknown": "Ask whoever made it which images and sentences it knows.",
}
"""Advice for visitors, by the kind of the network's training images."""
PLACEHOLDERS = {
    "drawn": "the red star\nlowest blue circle",
    "photos": "the man in red\nleftmost dog",
    "custom": "a sentence like those of the training data",
    "unknown": "the man in red\nleftmost dog",
}
STYLE = """
/* texts have a contrast of at least 4.5 : 1, which Gradio's gray and orange do not */
:root {--body-text-color-subdued: #52525b !important; --block-info-text-color: #52525b !important;
  --input-placeholder-color: #6b6b74 !important}
.dark {--body-text-color-subdued: #d4d4d8 !important; --block-info-text-color: #d4d4d8 !important;
  --input-placeholder-color: #a1a1aa !important}
:root, .dark {--button-primary-background-fill: #c2410c !important;
  --button-primary-background-fill-hover: #9a3412 !important}
/* nothing is shown before the first result, and no "Error" in its place: a message says why */
body:not(.has-result) #results > *:not(#hint), body.has-result #hint {display: none !important}
@media (max-width: 799px) {#hint {display: none}}
#results .wrap:has(.error) {display: none !important}
/* captions of any length below whole probability maps, without an inner scroll bar */
#maps .grid-wrap, #maps .grid-container {height: auto !important; max-height: none !important;
  min-height: 0 !important; grid-auto-rows: auto !important; overflow: visible !important}
#maps .grid-wrap {padding-top: 2.5em}
#maps .thumbnail-lg {display: flex; flex-direction: column; height: auto; aspect-ratio: auto}
#maps .thumbnail-lg img {height: auto}
#maps .caption-label {position: static; max-width: none; white-space: normal; overflow: visible;
  text-align: left; border: none; box-shadow: none}
/* examples as cards, side by side where there is room, with one line per sentence */
#examples thead {display: none}
#examples tbody {display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr))}
#examples tr {display: flex; align-items: center}
#examples td {text-align: left}
#examples td {padding: 4px 8px}
#examples td .prose {font-size: 0.85em; line-height: 1.25}
#network .html-container {padding: 0}
#notes:not(:has(.note)) {display: none}
.note {padding: 0.5em 0.75em; border-left: 4px solid #d55e00}
"""
"""Style sheet of the web page."""
SHOW_RESULT = """() => {
  document.body.classList.add('has-result');
  const result = document.getElementById('results');
  if (window.innerWidth < 800) result.scrollIntoView({behavior: 'smooth', block: 'start'});
}"""
SHOW_BUTTON = """() => setTimeout(() => document.getElementById('mark').scrollIntoView(
  {behavior: 'smooth', block: 'nearest'}), 300)"""


def build_page(segmenter: Segmenter, description: Description) -> Any:
    """Build the page, a ``gradio.Blocks``. Gradio's analytics are disabled.

    Args:
        segmenter: The network.
        description: Its description, which the page shows.

    Raises:
        InputError: If Gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read by Gradio at launch
    try:
        import gradio
    except ImportError as error:
        raise InputError(
            f"Gradio is not installed: it comes with the extra demo{see('extras')}"
        ) from error

    with gradio.Blocks(
        title="crislit", analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)
    ) as page:
        page.temporary = tempfile.TemporaryDirectory(prefix="crislit-")  # deleted with the page
        gradio.Markdown(TITLE)
        gradio.HTML(banner(description), padding=False, elem_id="network")
        image, text = build_inputs(gradio, description)
        if description.images == "drawn":
            add_examples(gradio, image, text)
        with gradio.Row():
            with gradio.Column(min_width=300):
                image.render()
                text.render()
                threshold, button = add_controls(gradio, segmenter.threshold)
            with gradio.Column(min_width=300, elem_id="results"):
                outputs = add_results(gradio)
        folder = Path(page.temporary.name)
        mark = build_mark(gradio, segmenter, description, image.GRADIO_CACHE, folder)
        add_events(gradio, mark, button, [image, text, threshold], outputs)
    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = local_files_only(
            block.async_move_resource_to_block_cache
        )
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1, api_open=False)
    return page


def build_inputs(gradio: Any, description: Description) -> tuple[Any, Any]:
    """Return the fields for image and sentences, not yet placed on the page."""
    image = gradio.Image(
        type="filepath",
        image_mode=None,
        label="Image",
        sources=["upload", "clipboard"],
        height=280,
        render=False,
    )
    image.preprocess = uploaded_path  # only `mark` can report a file that cannot be read
    text = gradio.Textbox(
        label="Sentences, one per line",
        info="What do you want to see marked?",
        lines=3,
        placeholder=PLACEHOLDERS[description.images],
        render=False,
    )
    return image, text


def add_examples(gradio: Any, image: Any, text: Any) -> None:
    """Place the shipped examples, of drawn shapes, on the page: one tap fills both fields."""
    examples = find_examples(EXAMPLES)
    dataset = gradio.Dataset(
        components=["image", "html"],  # text would be cut after 60 characters
        samples=[
            [str(path), "<br>".join(map(html.escape, sentences))] for path, sentences in examples
        ],
        headers=["Image", "Sentences"],
        label="Examples: choose one, then Mark",
        type="index",
        elem_id="examples",
    )

    def load_example(number: int) -> tuple[str, str]:
        path, sentences = examples[number]
        return str(path), "\n".join(sentences)

    loaded = dataset.click(load_example, dataset, [image, text], api_visibility="private")
    loaded.then(None, js=SHOW_BUTTON, api_visibility="private")


def add_controls(gradio: Any, threshold: float) -> tuple[Any, Any]:
    """Place the threshold, with this initial value, and the button; return both."""
    slider = gradio.Slider(
        0.0,
        0.95,
        value=threshold,
        step=0.01,
        label="How sure must the network be?",
        info="Parts of the image are marked where it is surer than this: 0.35 is "
        "35 percent. A lower number marks more, a higher one less.",
    )
    return slider, gradio.Button("Mark", variant="primary", elem_id="mark")


def add_results(gradio: Any) -> list[Any]:
    """Place the results; return overlay, probability maps, masks and notes."""
    gradio.HTML("<p>The result appears here.</p>", elem_id="hint", padding=False)
    overlay = gradio.AnnotatedImage(label="Marked", color_map=None, show_legend=True)
    notes = gradio.HTML(padding=False, elem_id="notes")
    maps = gradio.Gallery(
        label="How sure the network is: yellow is sure, dark is not",
        columns=2,
        height="auto",
        object_fit="contain",
        elem_id="maps",
    )
    masks = gradio.File(label="Masks to download: white is marked, black is not", interactive=False)
    return [overlay, maps, masks, notes]


def build_mark(
    gradio: Any, segmenter: Segmenter, description: Description, uploads: str, folder: Path
) -> Mark:
    """Return the function that answers a request.

    Args:
        gradio: The imported module.
        segmenter: The network.
        description: Its description.
        uploads: The folder of uploaded files.
        folder: The folder of mask files.
    """
    cached_segment = functools.lru_cache(CACHED_ANSWERS)(functools.partial(segment, segmenter))

    def mark(path: str | None, text: str, threshold: float) -> tuple[Any, ...]:
        try:
            answer = cached_segment(check_uploaded(path, uploads), text or "")
            annotated, maps, file = render(answer, threshold, folder)
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False, title="Please check") from error
        colors = label_colors([label for _, label in annotated[1]])
        notes = find_notes(answer, threshold, description, segmenter.model.max_tokens)
        return gradio.AnnotatedImage(annotated, color_map=colors), maps, file, format_notes(notes)

    return mark


def add_events(
    gradio: Any, mark: Mark, button: Any, inputs: Sequence[Any], outputs: Sequence[Any]
) -> None:
    """Answer when the button is clicked, sentences are submitted, or the threshold changes.

    Args:
        gradio: The imported module.
        mark: The function that answers a request.
        button: The button.
        inputs: Image, sentences and threshold.
        outputs: See ``add_results``.
    """
    _, text, threshold = inputs
    queue = "one request at a time"  # shared by both events

    def change_threshold(path: str | None, text: str, threshold: float) -> tuple[Any, ...]:
        return mark(path, text, threshold) if path and text and text.strip() else (None,) * 4

    marked = gradio.on(
        [button.click, text.submit],
        mark,
        inputs,
        outputs,
        api_name="mark",
        concurrency_id=queue,
        show_progress_on=outputs[0],
    )
    marked.success(None, js=SHOW_RESULT, api_visibility="private")
    threshold.change(
        change_threshold,
        inputs,
        outputs,
        api_visibility="private",
        trigger_mode="always_last",
        show_progress="hidden",
        concurrency_id=queue,
    )


def banner(description: Description) -> str:
    """Return HTML with the description of the network and the advice."""
    return f"<p>Network: {html.escape(f'{description}. {ADVICE[description.images]}')}</p>"


def find_notes(
    answer: Answer, threshold: float, description: Description, max_tokens: int
) -> list[str]:
    """Return warnings about the image, the sentences and empty masks of an answer."""
    image, sentences, probabilities = answer
    notes = []
    if description.images == "drawn" and looks_like_photo(image):
        notes.append(
            f"This looks like a photo, and {description.name} knows drawn shapes only: its masks "
            "are meaningless here. A network trained on photos is needed."
        )
    for sentence, probability in zip(sentences, probabilities, strict=True):
        if warning := truncation_warning(sentence, max_tokens):
            notes.append(warning[0].upper() + warning[1:] + ".")
        if (most := probability.max()) <= threshold:
            notes.append(
                f"Nothing is marked for '{sentence}': the network is at most {100 * most:.0f} "
                f"percent sure, and must be surer than {100 * threshold:.0f} percent."
            )
    return notes


def format_notes(notes: Sequence[str]) -> str:
    """Return notes as HTML."""
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
