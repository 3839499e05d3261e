"""python -m crislit.predict IMAGE SENTENCE...: segments what sentences refer to in images."""

import argparse
import io
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crislit.errors import InputError, one_line_errors, require
from crislit.inference import (
    Segmenter,
    check_sentences,
    load,
    safe_file_name,
    to_json,
    write_images,
)
from crislit.io import image_suffixes, open_image

EPILOG = """
Each image and sentence gets two files in the output folder, IMAGE-SENTENCE-mask.png (0 and 255, at
the image's own size) and IMAGE-SENTENCE-overlay.png, and one line of JSON on the standard output:
image, sentence, score (mean probability inside the mask), area in pixels, box [x, y, width,
height], segmentation (COCO's compressed run lengths), and the paths of the files.

examples:
  python -m crislit.predict photo.jpg "the man in red" "leftmost dog"
  python -m crislit.predict photos/ --sentences sentences.txt --output masks > masks.jsonl
  curl -s URL | python -m crislit.predict - "the man in red" --output -        # JSON lines only
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Segment images; the exit code is 1 if one of them cannot be read."""
    options = parse_options(arguments)
    with one_line_errors(), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        sentences = read_sentences(options.sentences, options.file, options.image)
        images = find_images(options.image)
        output = prepare_output(options.output, options.image)
        segmenter = load(
            options.checkpoint,
            device=options.device,
            precision=options.precision,
            threshold=options.threshold,
        )
        failures = 0
        hide_progress = True if len(images) == 1 else None  # None: unless it is a terminal
        for name in tqdm(images, "segmenting", unit="image", disable=hide_progress):
            try:
                for line in predict(segmenter, name, sentences, output):
                    print(json.dumps(line), flush=True)
            except InputError as error:
                if len(images) == 1:
                    raise
                failures += 1
                tqdm.write(f"error: {error}", file=sys.stderr)
        require(
            not failures,
            f"{failures} of {len(images)} images could not be segmented, see above; the others "
            "were",
        )


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m crislit.predict",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "image",
        metavar="IMAGE",
        help="an image, a folder of images without its subfolders, or - for stdin",
    )
    add("sentences", metavar="SENTENCE", nargs="*", help="what to segment")
    add(
        "--sentences",
        dest="file",
        metavar="FILE",
        help="file of sentences, one per line; - for stdin",
    )
    add("--checkpoint", default="shapes-tiny", help="network (default: the shipped shapes-tiny)")
    add(
        "--output",
        default="predictions",
        metavar="DIR",
        help="output folder (default: predictions); - for no files",
    )
    add(
        "--threshold",
        type=float,
        help="probability above which a pixel belongs to the mask (default: the network's)",
    )
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    add("--precision", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    return parser.parse_intermixed_args(arguments)


def read_sentences(sentences: Sequence[str], file: str | None, image: str) -> list[str]:
    """Return the sentences of the command line, or those of a file.

    Raises:
        InputError: If there are none, or both, or the file cannot be read.
    """
    require(
        bool(sentences) != bool(file),
        "expected either sentences after the image, or --sentences FILE, not both",
    )
    if file == image == "-":
        raise InputError("the standard input holds either the image or the sentences, not both")
    if file is not None:
        try:
            content = read_standard_input() if file == "-" else Path(file).read_bytes()
            lines = content.decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the sentences in {file}: {error}") from error
        sentences = [line.strip() for line in lines if line.strip()]
        require(sentences, f"{file} holds no sentence: expected one per line")
    check_sentences(sentences)
    return list(sentences)


def read_standard_input() -> bytes:
    """Read the standard input to its end.

    Raises:
        InputError: If it is closed.
    """
    require(sys.stdin is not None, "the standard input is closed")
    return sys.stdin.buffer.read()


def find_images(image: str) -> list[str]:
    """Return the image, or the images of a folder but not of its subfolders, in order.

    Raises:
        InputError: If a folder has none.
    """
    folder = Path(image)
    if image == "-" or not folder.is_dir():
        return [image]
    suffixes = image_suffixes()
    images = [
        str(path)
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and path.name[0] != "." and not path.is_dir()
    ]
    require(images, f"no image in {folder} itself: expected files such as .jpg or .png")
    return sorted(images)


def prepare_output(output: str, image: str) -> Path | None:
    """Create the output folder; return None if no files are wanted.

    Raises:
        InputError: If it cannot be created, or holds the images: the next run would segment the
            masks.
    """
    if output == "-":
        return None
    folder = Path(output)
    if folder.is_dir() and folder.resolve() == Path(image).resolve():
        raise InputError(f"{folder} holds the images: choose another --output")
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
    """Segment one image, write its files, and yield a JSON line per sentence."""
    image = open_image(io.BytesIO(read_standard_input()) if name == "-" else name)
    stem = "image" if name == "-" else Path(name).name
    taken: set[str] = set()
    for number, result in enumerate(segmenter.stream(image, sentences)):
        line = to_json(name, result)
        if output is not None:
            base = output / safe_file_name(stem, result.sentence, taken)
            line |= write_images(base, image, result, number)
        yield line


if __name__ == "__main__":
    main()
