"""Draw the README's figure: the example images, and below them the masks of shapes-tiny.

Each sentence is shown with its mask's IoU. Prints how many masks are right.

python scripts/draw_masks.py docs/masks.jpg
"""

import sys
from pathlib import Path

from make_examples import EXAMPLES as NAMES
from make_examples import draw_example
from matplotlib.figure import Figure

import crislit
from crislit.inference.masks import color_of, paint
from crislit.io.assets import EXAMPLES
from crislit.io.images import open_image
from crislit.training.metrics import intersection_and_union, iou

MAX_SENTENCES = 5
"""The number of sentences shown per image."""


def main(path: Path) -> None:
    """Segment the examples, draw them, save the figure and print the wrong masks."""
    segmenter = crislit.load("shapes-tiny")
    figure = Figure(figsize=(11, 7.1))
    figure.subplots_adjust(left=0, right=1, top=1, bottom=0.22, wspace=0.02, hspace=0.02)
    grid = figure.subplots(2, len(NAMES))
    scores: dict[str, float] = {}
    for (above, below), name in zip(grid.T, sorted(NAMES), strict=True):
        image = open_image(EXAMPLES / f"{name}.jpg")
        sentences = draw_example(name)[1][:MAX_SENTENCES]
        results = segmenter(image, [sentence for sentence, _ in sentences])
        above.imshow(image)
        below.imshow(paint(image, [result.mask for result in results]))
        for number, ((sentence, target), result) in enumerate(zip(sentences, results, strict=True)):
            scores[sentence] = iou(*intersection_and_union(result.mask, target))
            style = {"xycoords": "axes fraction", "va": "top", "fontsize": 11}
            color = tuple(channel / 255 for channel in color_of(number))
            text = f"“{sentence}”, IoU {scores[sentence]:.2f}"
            below.annotate("■", (0.01, -0.03 - 0.1 * number), color=color, **style)
            below.annotate(text, (0.07, -0.03 - 0.1 * number), **style)
        above.axis("off")
        below.axis("off")
    figure.savefig(path, dpi=100)
    wrong = {sentence: f"{score:.2f}" for sentence, score in scores.items() if score <= 0.5}
    print(f"{len(scores) - len(wrong)} of {len(scores)} masks have an IoU above 0.5")
    if wrong:
        print(f"not {wrong}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
