"""python -m crislit.check_data FILE: check somebody's own data, and print what it holds and what is wrong with it."""

import argparse
from collections.abc import Sequence

from crislit.data.custom import read_custom
from crislit.data.custom_check import find_notes, find_unreadable, summarize
from crislit.errors import InputError, one_line_errors, printable

EPILOG = """
A JSON-lines file has an object of a picture in each line, with what is said of it; paths are relative to the file:

  {"image": "photos/7.jpg", "sentences": ["the man in red"], "split": "train", "mask": "masks/7.png"}
  {"image": "photos/8.jpg", "sentence": "leftmost dog", "split": "val", "polygons": [[10, 12, 80, 12, 80, 95]]}
  {"image": "photos/8.jpg", "sentence": "the cat", "rle": {"size": [480, 640], "counts": "..."}}

mask: a picture of the same size, what is marked brighter than half (or 1 where it holds 0 and 1, or any but the first entry of
a palette with colours). split: train where none is given; training needs a val too. A COCO instances file comes with a table:

  ann_id,sentence,split
  17,the man in red,train

The exit code is 1 if a line cannot be used. Then: python -m crislit.train dataset=custom dataset.file=FILE
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check what the command line names."""
    parser = argparse.ArgumentParser(
        "python -m crislit.check_data",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="a JSON-lines file, or a COCO instances file")
    parser.add_argument(
        "--sentences", metavar="TABLE", help="the sentences of a COCO file's annotations, in CSV"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="the pictures of a COCO file (default: its own folder)"
    )
    parser.add_argument(
        "--max-words",
        type=int,
        default=22,
        help="tokens of a sentence that training reads (default: 22)",
    )
    options = parser.parse_args(arguments)
    with one_line_errors():
        data = read_custom(options.file, options.sentences, options.images)
        problems = sorted(
            [*data.problems, *find_unreadable(data)], key=lambda problem: problem.line
        )
        bad = [f"line {problem.line}: {problem.reason}" for problem in problems]
        for line in (
            *bad,
            *summarize(data),
            *(f"note: {note}" for note in find_notes(data, options.max_words)),
        ):
            print(printable(line).replace("\n", r"\n"))
        if problems:
            raise InputError(
                f"{len(problems)} problems in {options.sentences or options.file}, see above"
            )


if __name__ == "__main__":
    main()
