"""Draws the README's picture: the example pictures, as they are and with the masks that shapes-tiny gives for their sentences.

python scripts/draw_masks.py docs/masks.jpg
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

import crislit
from crislit.overlay import colour_of, paint
from crislit.picture import open_picture
from crislit.quantise import EXAMPLES

SHOWN = 5
"""Sentences of each picture, its first ones."""


def main(path: Path) -> None:
    """Segment, draw and save."""
    segmenter = crislit.load("shapes-tiny")
    pictures = sorted(EXAMPLES.glob("*.jpg"))
    figure = Figure(figsize=(11, 7.1))
    figure.subplots_adjust(left=0, right=1, top=1, bottom=0.22, wspace=0.02, hspace=0.02)
    grid = figure.subplots(2, len(pictures))
    for (above, below), file in zip(grid.T, pictures, strict=True):
        image, sentences = open_picture(file), file.with_suffix(".txt").read_text().splitlines()[:SHOWN]
        above.imshow(image)
        below.imshow(paint(image, [result.mask for result in segmenter(image, sentences)]))
        for number, sentence in enumerate(sentences):
            place = {"xycoords": "axes fraction", "va": "top", "fontsize": 11}
            colour = tuple(part / 255 for part in colour_of(number))
            below.annotate("■", (0.01, -0.03 - 0.1 * number), color=colour, **place)
            below.annotate(f"“{sentence}”", (0.07, -0.03 - 0.1 * number), **place)
        above.axis("off")
        below.axis("off")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
