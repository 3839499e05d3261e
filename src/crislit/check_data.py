"""python -m crislit.check_data FILE: check somebody's own data, and print what it holds and what is wrong with it."""

import argparse
from collections import defaultdict
from collections.abc import Sequence

from tqdm import tqdm

from crislit.data.custom import OwnData, Problem, read
from crislit.data.dataset import decode_image
from crislit.data.tokenizer import cut_words
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
        "python -m crislit.check_data", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="a JSON-lines file, or a COCO instances file")
    parser.add_argument("--sentences", metavar="TABLE", help="the sentences of a COCO file's annotations, in CSV")
    parser.add_argument("--images", metavar="DIR", help="the pictures of a COCO file (default: its own folder)")
    parser.add_argument("--max-words", type=int, default=22, help="tokens of a sentence that training reads (default: 22)")
    options = parser.parse_args(arguments)
    with one_line_errors():
        data = read(options.file, options.sentences, options.images)
        problems = sorted([*data.problems, *unreadable(data)], key=lambda problem: problem.line)
        bad = [f"line {problem.line}: {problem.reason}" for problem in problems]
        for line in (*bad, *summary(data), *(f"note: {note}" for note in notes(data, options.max_words))):
            print(printable(line).replace("\n", r"\n"))
        if problems:
            raise InputError(f"{len(problems)} problems in {options.sentences or options.file}, see above")


def unreadable(data: OwnData) -> list[Problem]:
    """Return the lines whose picture has pixels that cannot be read."""
    lines: dict[int, set[int]] = defaultdict(set)
    for ref in data.refs:
        lines[ref["image_id"]].update(told["line"] for told in ref["sentences"])
    found = []
    for image in tqdm(data.instances["images"], "reading pictures", unit="picture", mininterval=1, disable=None):
        try:
            decode_image(data.folder / image["file_name"], (image["height"], image["width"]))
        except InputError as error:
            found += [Problem(line, str(error)) for line in lines[image["id"]]]
    return found


def summary(data: OwnData) -> list[str]:
    """Return, line by line, how many refs, sentences and pictures each split has."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    pictures: dict[str, set[int]] = defaultdict(set)
    for ref in data.refs:
        counts[ref["split"]][0] += 1
        counts[ref["split"]][1] += len(ref["sentences"])
        pictures[ref["split"]].add(ref["image_id"])
    lines = [
        f"{split}: {refs} objects, {sentences} sentences, {len(pictures[split])} pictures"
        for split, (refs, sentences) in sorted(counts.items())
    ]
    return lines or ["nothing that can be used"]


def notes(data: OwnData, max_words: int) -> list[str]:
    """Return what is no error and yet worth knowing."""
    found = []
    splits: dict[str, set[int]] = defaultdict(set)
    for ref in data.refs:
        splits[ref["split"]].add(ref["image_id"])
    for split in ("train", "val"):
        if split not in splits:
            found.append(f"there is no split {split!r}, which training needs")
    for split, images in sorted(splits.items(), key=lambda item: item[0]):
        if split != "train" and (shared := images & splits["train"]):
            found.append(f"{len(shared)} pictures of {split} are in train too: what is measured on {split} is too good")
    cut = [told["line"] for ref in data.refs for told in ref["sentences"] if cut_words(told["sent"], max_words)]
    if cut:
        lines = ", ".join(map(str, cut[:5])) + (", ..." if len(cut) > 5 else "")
        found.append(f"{len(cut)} sentences longer than {max_words} tokens are cut (lines {lines}): raise dataset.max_words")
    return found


if __name__ == "__main__":
    main()
