"""python -m crislit.check_data FILE: checks custom data and summarizes it."""

import argparse
from collections.abc import Sequence

from crislit.data import find_notes, find_unreadable, read_custom, summarize
from crislit.errors import one_line_errors, printable, require

EPILOG = """
Each line of a JSON-lines file is an object with an image and its sentences. Paths are relative to
the file:

  {"image": "photos/7.jpg", "sentences": ["the man in red"], "split": "val", "mask": "7.png"}
  {"image": "photos/8.jpg", "sentence": "leftmost dog", "polygons": [[10, 12, 80, 12, 80, 95]]}
  {"image": "photos/8.jpg", "sentence": "the cat", "rle": {"size": [480, 640], "counts": "..."}}

mask: an image of the same size. The marked pixels are those
of any colour but the first with a colour palette, 1 in an image of 0 and 1, and values above 127
otherwise. split: train by default; training needs val, too.

A COCO instances file needs a CSV table of sentences:

  ann_id,sentence,split
  17,the man in red,train

The exit code is 1 if a line cannot be used. To train on the data:

  python -m crislit.train dataset=custom dataset.file=FILE
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check custom data, and print problems, a summary and notes."""
    parser = argparse.ArgumentParser(
        "python -m crislit.check_data",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="a JSON-lines file, or a COCO instances file")
    add("--sentences", metavar="TABLE", help="CSV table of sentences, for a COCO file")
    add("--images", metavar="DIR", help="images of a COCO file (default: the file's folder)")
    add("--max-words", type=int, default=22, help="tokens per sentence in training (default: 22)")
    options = parser.parse_args(arguments)
    with one_line_errors():
        data = read_custom(options.file, options.sentences, options.images)
        problems = sorted([*data.problems, *find_unreadable(data)], key=lambda p: p.line)
        for line in (
            *(f"line {problem.line}: {problem.reason}" for problem in problems),
            *summarize(data),
            *(f"note: {note}" for note in find_notes(data, options.max_words)),
        ):
            print(printable(line).replace("\n", r"\n"))
        require(
            not problems,
            f"{len(problems)} problems in {options.sentences or options.file}, see above",
        )


if __name__ == "__main__":
    main()
