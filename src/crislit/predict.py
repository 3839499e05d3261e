"""python -m crislit.predict IMAGE SENTENCE...: masks of what the sentences mean in a picture, or in a folder of them."""

import argparse
import hashlib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from crislit.data.letterbox import Image
from crislit.errors import InputError, one_line_errors
from crislit.overlay import paint
from crislit.picture import open_picture, suffixes
from crislit.segmenter import Segmentation, Segmenter, check_sentences, load

EPILOG = """
For each picture and sentence two files go to the output folder, IMAGE-SENTENCE-mask.png (0 and 255, at the picture's own
size) and IMAGE-SENTENCE-overlay.png, and a line of JSON to the standard output: image, sentence, score (mean probability inside
the mask), area in pixels, box [x, y, width, height], segmentation (COCO's compressed run lengths), and the files' names.

examples:
  python -m crislit.predict photo.jpg "the man in red" "leftmost dog"
  python -m crislit.predict photos/ --sentences sentences.txt --output masks > masks.jsonl
  curl -s URL | python -m crislit.predict - "the man in red" --output -        # JSON lines alone
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Segment what the command line says; the exit code is 1 if a picture could not be read."""
    parser = argparse.ArgumentParser(
        "python -m crislit.predict", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "image",
        metavar="IMAGE",
        help="a picture, a folder of pictures (not of the folders in it), or - for one on the standard input",
    )
    parser.add_argument("sentences", metavar="SENTENCE", nargs="*", help="what is to be marked")
    parser.add_argument("--sentences", dest="file", metavar="FILE", help="sentences, one a line; - for the standard input")
    parser.add_argument("--checkpoint", default="shapes-tiny", help="the network (default: the shipped shapes-tiny)")
    parser.add_argument(
        "--output", default="predictions", metavar="DIR", help="where to (default: predictions); - for no files"
    )
    parser.add_argument("--threshold", type=float, help="where a probability becomes a mask (default: the network's own)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    options = parser.parse_intermixed_args(arguments)
    with one_line_errors(), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        sentences = read_sentences(options.sentences, options.file, options.image)
        pictures = find_pictures(options.image)
        output = prepare_output(options.output, options.image)
        segmenter = load(options.checkpoint, device=options.device, precision=options.precision, threshold=options.threshold)
        bad = 0
        for name in tqdm(pictures, "segmenting", unit="picture", disable=True if len(pictures) == 1 else None):
            try:
                for line in predict(segmenter, name, sentences, output):
                    print(json.dumps(line), flush=True)
            except InputError as error:
                if len(pictures) == 1:
                    raise
                bad += 1
                tqdm.write(f"error: {error}", file=sys.stderr)
        if bad:
            raise InputError(f"{bad} of {len(pictures)} pictures could not be segmented, see above; the others were")


def read_sentences(given: Sequence[str], file: str | None, image: str) -> list[str]:
    """Return the sentences of the command line, or those of a file.

    Raises:
        InputError: If there are none, or both, or the file cannot be read.
    """
    if bool(given) == bool(file):
        raise InputError("expected sentences after the picture, or --sentences FILE, and not both")
    if file is None:
        check_sentences(given)
        return list(given)
    if file == image == "-":
        raise InputError("the standard input holds either the picture or the sentences, not both")
    try:
        text = (standard_input() if file == "-" else Path(file).read_bytes()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the sentences in {file}: {error}") from error
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise InputError(f"there is no sentence in {file}: expected one a line")
    check_sentences(sentences)
    return sentences


def standard_input() -> bytes:
    """Read all of it.

    Raises:
        InputError: If it is closed.
    """
    if sys.stdin is None:
        raise InputError("the standard input is closed")
    return sys.stdin.buffer.read()


def find_pictures(image: str) -> list[str]:
    """Return the picture, or all pictures of a folder and not of the folders in it, in order.

    Raises:
        InputError: If a folder has none.
    """
    folder = Path(image)
    if image == "-" or not folder.is_dir():
        return [image]
    known = suffixes()
    pictures = (path for path in folder.iterdir() if path.suffix.lower() in known and path.name[0] != "." and not path.is_dir())
    found = sorted(map(str, pictures))
    if not found:
        raise InputError(f"no picture in {folder} itself: expected files such as .jpg or .png")
    return found


def prepare_output(output: str, image: str) -> Path | None:
    """Make the output folder; None where no files are wanted.

    Raises:
        InputError: If it cannot be made, or is the pictures' own, where the next run would take masks for pictures.
    """
    if output == "-":
        return None
    folder = Path(output)
    if folder.is_dir() and folder.resolve() == Path(image).resolve():
        raise InputError(f"{folder} holds the pictures: choose another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error
    return folder


def predict(segmenter: Segmenter, name: str, sentences: Sequence[str], output: Path | None) -> Iterator[dict[str, Any]]:
    """Segment one picture, write its files, and yield a line for each sentence."""
    image = open_picture(io.BytesIO(standard_input()) if name == "-" else name)
    stem = "picture" if name == "-" else Path(name).name
    taken: set[str] = set()
    for number, result in enumerate(segmenter.stream(image, sentences)):
        line = describe(name, result)
        if output is not None:
            base = file_name(stem, result.sentence, taken)
            line |= write_pictures(output / base, image, result, number)
        yield line


def describe(name: str, result: Segmentation) -> dict[str, Any]:
    """Return what the JSON line says about a result."""
    runs = coco_mask.encode(np.asfortranarray(result.mask, dtype=np.uint8))
    return {
        "image": name,
        "sentence": result.sentence,
        "score": round(result.score, 6),
        "area": int(result.mask.sum()),
        "box": [int(side) for side in coco_mask.toBbox(runs)],
        "segmentation": {"size": list(map(int, runs["size"])), "counts": runs["counts"].decode()},
    }


def file_name(stem: str, sentence: str, taken: set[str]) -> str:
    """Return how the files of a sentence begin: safe on every system, and no other sentence's."""
    name = os.fsencode(stem)  # which need not be text
    if len(name) > 150:  # of the 255 that a name may have
        stem = f"{name[:140].decode(errors='ignore')}-{hashlib.sha256(name).hexdigest()[:8]}"
    words = re.sub(r"[^a-z0-9]+", "-", sentence.lower()).strip("-")[:60] or "sentence"
    chosen, number = f"{stem}-{words}", 2
    while chosen in taken:
        chosen, number = f"{stem}-{words}-{number}", number + 1
    taken.add(chosen)
    return chosen


def write_pictures(base: Path, image: Image, result: Segmentation, number: int) -> dict[str, str]:
    """Write mask and overlay, and return their names."""
    pictures = {"mask": 255 * result.mask.astype(np.uint8), "overlay": paint(image, [result.mask], first=number)}
    names = {}
    for kind, picture in pictures.items():
        path = base.with_name(f"{base.name}-{kind}.png")
        try:
            PIL.Image.fromarray(picture).save(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error}") from error
        names[kind] = str(path)
    return names


if __name__ == "__main__":
    main()
