"""python -m crislit.predict IMAGE SENTENCE...: masks of what the sentences mean in a picture, or in a folder of them."""

import argparse
import io
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crislit.errors import InputError, one_line_errors
from crislit.inference.masks import describe_result, safe_file_name, write_images
from crislit.inference.segmenter import Segmenter, check_sentences, load
from crislit.io.images import image_suffixes, open_image

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
        "python -m crislit.predict",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "image",
        metavar="IMAGE",
        help="a picture, a folder of pictures (not of the folders in it), or - for one on the standard input",
    )
    parser.add_argument("sentences", metavar="SENTENCE", nargs="*", help="what is to be marked")
    parser.add_argument(
        "--sentences",
        dest="file",
        metavar="FILE",
        help="sentences, one a line; - for the standard input",
    )
    parser.add_argument(
        "--checkpoint", default="shapes-tiny", help="the network (default: the shipped shapes-tiny)"
    )
    parser.add_argument(
        "--output",
        default="predictions",
        metavar="DIR",
        help="where to (default: predictions); - for no files",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="where a probability becomes a mask (default: the network's own)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "float32", "float16", "bfloat16")
    )
    options = parser.parse_intermixed_args(arguments)
    with one_line_errors(), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        sentences = read_sentences(options.sentences, options.file, options.image)
        pictures = find_images(options.image)
        output = prepare_output(options.output, options.image)
        segmenter = load(
            options.checkpoint,
            device=options.device,
            precision=options.precision,
            threshold=options.threshold,
        )
        bad = 0
        for name in tqdm(
            pictures, "segmenting", unit="picture", disable=True if len(pictures) == 1 else None
        ):
            try:
                for line in predict(segmenter, name, sentences, output):
                    print(json.dumps(line), flush=True)
            except InputError as error:
                if len(pictures) == 1:
                    raise
                bad += 1
                tqdm.write(f"error: {error}", file=sys.stderr)
        if bad:
            raise InputError(
                f"{bad} of {len(pictures)} pictures could not be segmented, see above; the others were"
            )


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
        text = (read_standard_input() if file == "-" else Path(file).read_bytes()).decode(
            "utf-8-sig"
        )
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the sentences in {file}: {error}") from error
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise InputError(f"there is no sentence in {file}: expected one a line")
    check_sentences(sentences)
    return sentences


def read_standard_input() -> bytes:
    """Read all of it.

    Raises:
        InputError: If it is closed.
    """
    if sys.stdin is None:
        raise InputError("the standard input is closed")
    return sys.stdin.buffer.read()


def find_images(image: str) -> list[str]:
    """Return the picture, or all pictures of a folder and not of the folders in it, in order.

    Raises:
        InputError: If a folder has none.
    """
    folder = Path(image)
    if image == "-" or not folder.is_dir():
        return [image]
    known = image_suffixes()
    pictures = (
        path
        for path in folder.iterdir()
        if path.suffix.lower() in known and path.name[0] != "." and not path.is_dir()
    )
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
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; choose another --output"
        ) from error
    return folder


def predict(
    segmenter: Segmenter, name: str, sentences: Sequence[str], output: Path | None
) -> Iterator[dict[str, Any]]:
    """Segment one picture, write its files, and yield a line for each sentence."""
    image = open_image(io.BytesIO(read_standard_input()) if name == "-" else name)
    stem = "picture" if name == "-" else Path(name).name
    taken: set[str] = set()
    for number, result in enumerate(segmenter.stream(image, sentences)):
        line = describe_result(name, result)
        if output is not None:
            base = safe_file_name(stem, result.sentence, taken)
            line |= write_images(output / base, image, result, number)
        yield line


if __name__ == "__main__":
    main()
