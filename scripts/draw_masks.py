"""Draws the README's picture: the example pictures, as they are and with the masks that shapes-tiny gives for their sentences.

python scripts/draw_masks.py docs/masks.jpg
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

import crislit
from crislit.demo import EXAMPLES
from crislit.overlay import colour_of, paint
from crislit.picture import open_picture

SHOWN = 5
"""Sentences of each picture, its first ones."""


def main(path: Path) -> None:
    """Segment, draw and save."""
    segmenter = crislit.load("shapes-tiny")
    pictures = sorted(EXAMPLES.glob("*.jpg"))
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    grid = figure.subplots(2, len(pictures))
    for (above, below), file in zip(grid.T, pictures, strict=True):
        image, sentences = open_picture(file), file.with_suffix(".txt").read_text().splitlines()[:SHOWN]
        above.imshow(image)
        below.imshow(paint(image, [result.mask for result in segmenter(image, sentences)]))
        for number, sentence in enumerate(sentences):
            red, green, blue = (part / 255 for part in colour_of(number))
            place = {"xy": (0, -0.06 - 0.085 * number), "xycoords": "axes fraction", "va": "top", "fontsize": 11}
            below.annotate("■", color=(red, green, blue), **place)
            below.annotate(f"     “{sentence}”", **place)
        above.axis("off")
        below.axis("off")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
