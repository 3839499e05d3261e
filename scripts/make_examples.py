"""Draws the pictures that ship as examples: scenes of no data set, each with a text file of sentences, one a line.

python scripts/make_examples.py src/crislit/assets/examples
"""

import sys
from pathlib import Path

import numpy as np
import PIL.Image

from crislit.data.expressions import describe
from crislit.data.shapes import SETS, draw_scene

EXAMPLES = {"places": "shapes", "attributes": "shapes+", "mixture": "shapes"}
"""The pictures' names, and the data sets in whose language they are described."""
SEED = 2_000_003
"""Apart from all data sets' scenes."""


def main(folder: Path) -> None:
    """Draw and describe."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, language) in enumerate(EXAMPLES.items()):
        rng = np.random.default_rng([SEED, number])
        image, drawn = draw_scene(rng)
        things = [d.seen() for d in drawn]
        said = [describe(rng, things, thing, SETS[language].style, 1) for thing in things]
        PIL.Image.fromarray(image).save(folder / f"{name}.jpg", quality=90)
        (folder / f"{name}.txt").write_text("\n".join(sentence for one in said for sentence in one[:1]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
