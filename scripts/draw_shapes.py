"""Draws the README's picture: nine embedded samples, three of each data set, their truths outlined and their sentences above.

python scripts/draw_shapes.py docs/shapes.jpg
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from crislit.data.shapes import SETS, make_scene


def main(path: Path) -> None:
    """Draw and save."""
    figure = Figure(figsize=(11, 9.2), layout="constrained")
    rows = figure.subplots(3, 3)
    for row, name in zip(rows, SETS, strict=True):
        for number, axes in enumerate(row):
            image, drawn, described = make_scene(seed=0, name=name, split="val", number=number)
            target, sentences = described[0]
            axes.imshow(image)
            axes.contour(drawn[target].visible, levels=[0.5], colors="black", linewidths=4)
            axes.contour(drawn[target].visible, levels=[0.5], colors="white", linewidths=2)
            axes.set_title("\n".join(f"“{sentence}”" for sentence in sentences[:2]), fontsize=7.5)
            axes.axis("off")
        row[0].text(-0.06, 0.5, name, transform=row[0].transAxes, rotation=90, va="center", ha="center", fontsize=12)
    figure.savefig(path, dpi=105)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
