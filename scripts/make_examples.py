"""Draw the example images that ship with the package, and describe them.

The scenes are in none of the data sets. Each image has a text file with one sentence per line, and
examples.jsonl holds all sentences with their masks, as `dataset=custom` reads them.

python scripts/make_examples.py src/crislit/assets/examples
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask

from crislit.data.expressions import describe
from crislit.data.scenes import draw_scene
from crislit.data.shapes import SETS

EXAMPLES = {"places": "shapes", "attributes": "shapes+", "mixture": "shapes"}
"""Names of the images, and the data sets whose style of sentences describes them."""
SEED = 2_000_003
"""Differs from the seeds of all data sets."""


def draw_example(name: str) -> tuple[Any, list[tuple[str, Any]]]:
    """Return an example's image, and its sentences, each with the target's mask."""
    rng = np.random.default_rng([SEED, list(EXAMPLES).index(name)])
    image, drawn = draw_scene(rng)
    things = [item.seen() for item in drawn]
    style = SETS[EXAMPLES[name]].style
    return image, [
        (sentence, item.visible)
        for item, thing in zip(drawn, things, strict=True)
        for sentence in describe(rng, things, thing, style, 1)[:1]
    ]


def main(folder: Path) -> None:
    """Draw and describe every example."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in EXAMPLES:
        image, sentences = draw_example(name)
        PIL.Image.fromarray(image).save(folder / f"{name}.jpg", quality=90)
        text = "\n".join(sentence for sentence, _ in sentences)
        (folder / f"{name}.txt").write_text(text + "\n")
        split = "val" if name == "mixture" else "train"
        for sentence, mask in sentences:
            runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            rle = {"size": list(mask.shape), "counts": runs["counts"].decode()}
            line = {"image": f"{name}.jpg", "sentence": sentence, "split": split, "rle": rle}
            lines.append(json.dumps(line) + "\n")
    (folder / "examples.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
