"""python -m crislit.check_data FILE: checks custom data, summarizes and draws it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from crislit.errors import counted, one_line_errors, printable, require
from crislit.inference import command_parser

EXAMPLE = "src/crislit/assets/examples/examples.jsonl"
EPILOG = """
Each line of a JSON-lines file is an object with an image and its sentences. Paths are relative to
the file:

  {"image": "photos/7.jpg", "sentences": ["the man in red"], "split": "val", "mask": "7.png"}
  {"image": "photos/8.jpg", "sentence": "leftmost dog", "polygons": [[10, 12, 80, 12, 80, 95]]}
  {"image": "photos/8.jpg", "sentence": "the cat", "rle": {"size": [480, 640], "counts": "..."}}

mask: an image of the same size with two values: 0 and 1, black and white, or black (else white)
and another color; edges may be soft. With more values, "mask_value" names the object's: a number
(in a palette image, the index) or a color, "#800000".
split: train by default; training needs val, too.

FILE may also be a COCO instances file whose annotations have a sentence, or with a CSV table:

  ann_id,sentence,split
  17,"the man in red, on the left",train

or a folder with one COCO file per split (train/_annotations.coco.json of Roboflow,
annotations/instances_train.json of CVAT), a folder of SAM's sa_*.json with a CSV, or a JSON export
of Label Studio.

The exit code is 1 if a line cannot be used. To train on the data:

  python -m crislit.train dataset=custom dataset.file=FILE
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check custom data, and print problems, a summary and notes."""
    parser = command_parser("check_data", EXAMPLE, __doc__, EPILOG)
    add = parser.add_argument
    add("file", metavar="FILE", help="a JSON-lines file, or what a labeling tool wrote, see below")
    add(
        "--sentences",
        metavar="TABLE",
        help="CSV table of sentences, for a COCO file; or categories: their names are sentences",
    )
    add("--images", metavar="DIR", help="images of a COCO file (default: the file's folder)")
    add("--val-share", type=float, metavar="X", help="share of the images of train to move to val")
    add("--mask-value", metavar="VALUE", help="the object's value in masks of several: 1, #800000")
    add("--max-words", type=int, default=22, help="tokens per sentence in training (default: 22)")
    add("--figures", metavar="DIR", help="draw contact sheets of images, targets and sentences")
    options = parser.parse_args(arguments)
    with one_line_errors():
        check(options)


def check(options: argparse.Namespace) -> None:
    """Print problems, a summary and notes, and draw contact sheets.

    Raises:
        InputError: If the data cannot be read, or a line cannot be used.
    """
    # Imported here, because it takes seconds and the help does not need it.
    from crislit.data import (
        draw_sheets,
        find_remarks,
        measure_targets,
        read_custom,
        read_images,
        summarize,
        tabulate,
    )

    data = read_custom(
        options.file, options.sentences, options.images, options.val_share, options.mask_value
    )
    unreadable, digests = read_images(data)
    problems = sorted([*data.problems, *unreadable], key=lambda problem: problem.line)
    targets = measure_targets(data)
    remarks = find_remarks(data, targets, digests, options.max_words)
    for line in (
        *(f"{data.unit} {problem.line}: {problem.reason}" for problem in problems),
        *summarize(data),
        *tabulate(data, [target.area for target in targets], options.max_words),
        *(f"note: {remark.text}" for remark in remarks),
    ):
        print_line(line)
    if options.figures is not None:
        paths, notes = draw_sheets(data, remarks, Path(options.figures).expanduser())
        for line in (*map(str, paths), *(f"note: {note}" for note in notes)):
            print_line(line)
    require(data.refs or problems, f"{options.file} has no sentence")
    require(
        not problems,
        f"{counted(len(problems), 'problem')} in {options.sentences or options.file}, see above",
    )


def print_line(line: str) -> None:
    """Print one line, with control characters escaped."""
    print(printable(line).replace("\n", r"\n"))


if __name__ == "__main__":
    main()
