"""Draw the example images that ship with the package, each with a text file of sentences.

The scenes are in none of the data sets. The text files have one sentence per line.

python scripts/make_examples.py src/crislit/assets/examples
"""

import sys
from pathlib import Path

import numpy as np
import PIL.Image

from crislit.data.expressions import describe
from crislit.data.scenes import draw_scene
from crislit.data.shapes import SETS

EXAMPLES = {"places": "shapes", "attributes": "shapes+", "mixture": "shapes"}
"""Names of the images, and the data sets whose style of sentences describes them."""
SEED = 2_000_003
"""Differs from the seeds of all data sets."""


def main(folder: Path) -> None:
    """Draw and describe every example."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, dataset) in enumerate(EXAMPLES.items()):
        rng = np.random.default_rng([SEED, number])
        image, drawn = draw_scene(rng)
        things = [item.seen() for item in drawn]
        lines: list[str] = []
        for thing in things:
            lines += describe(rng, things, thing, SETS[dataset].style, 1)[:1]
        PIL.Image.fromarray(image).save(folder / f"{name}.jpg", quality=90)
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
