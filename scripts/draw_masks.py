"""Draw the README's figure: the example images, and below them the masks of shapes-tiny.

python scripts/draw_masks.py docs/masks.jpg
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

import crislit
from crislit.inference.masks import colour_of, paint
from crislit.io.assets import EXAMPLES
from crislit.io.images import open_image

MAX_SENTENCES = 5
"""The number of sentences shown per image."""


def main(path: Path) -> None:
    """Segment the examples, draw them and save the figure."""
    segmenter = crislit.load("shapes-tiny")
    files = sorted(EXAMPLES.glob("*.jpg"))
    figure = Figure(figsize=(11, 7.1))
    figure.subplots_adjust(left=0, right=1, top=1, bottom=0.22, wspace=0.02, hspace=0.02)
    grid = figure.subplots(2, len(files))
    for (above, below), file in zip(grid.T, files, strict=True):
        image = open_image(file)
        sentences = file.with_suffix(".txt").read_text().splitlines()[:MAX_SENTENCES]
        above.imshow(image)
        below.imshow(paint(image, [result.mask for result in segmenter(image, sentences)]))
        for number, sentence in enumerate(sentences):
            style = {"xycoords": "axes fraction", "va": "top", "fontsize": 11}
            color = tuple(channel / 255 for channel in colour_of(number))
            below.annotate("■", (0.01, -0.03 - 0.1 * number), color=color, **style)
            below.annotate(f"“{sentence}”", (0.07, -0.03 - 0.1 * number), **style)
        above.axis("off")
        below.axis("off")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
