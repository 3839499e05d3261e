"""python -m crislit.predict IMAGE... SENTENCE...: segments what sentences refer to in images."""

import argparse
import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crislit.errors import InputError, one_line_errors, require, see, why_unwritten
from crislit.inference import add_trust, command_parser

if TYPE_CHECKING:
    from crislit.inference import Description, Segmenter

EXAMPLE = 'src/crislit/assets/examples/places.jpg "red disc"'
EPILOG = """
Images come first, then sentences. Whatever names a file or folder, or ends like an image (.jpg),
is an image; put a sentence that does into a file for --sentences.

Each image and sentence gets two files in the output folder, IMAGE-SENTENCE-mask.png (0 and 255, at
the image's own size) and IMAGE-SENTENCE-overlay.png, and one line of JSON on the standard output:
image, sentence, score, area in pixels, box [x, y, width, height], segmentation (COCO's compressed
run lengths), and the paths of the files. The score is the mean probability inside the mask, not the
probability that the mask is right.

shapes-tiny, the default network, knows drawn shapes only. For photos, train a network on photos
(python -m crislit.train), and give its checkpoint.

examples:
  python -m crislit.predict photo.jpg "the man in red" "leftmost dog" --checkpoint best.ckpt
  python -m crislit.predict photos/*.jpg "the man in red"
  python -m crislit.predict photos/ --sentences sentences.txt --output masks > masks.jsonl
  curl -s URL | python -m crislit.predict - "the man in red" --output -        # JSON lines only
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Segment images; the exit code is 1 if one of them cannot be read."""
    options = parse_options(arguments)
    with one_line_errors(), warnings.catch_warnings():
        # Imported here, because it takes seconds and the help does not need it.
        from tqdm import tqdm

        from crislit.inference import describe_network, load

        warnings.showwarning = lambda message, *_: warn(str(message))
        names, sentences = split_arguments(options.arguments)
        sentences = read_sentences(sentences, options.file, names)
        images = find_images(names)
        output = prepare_output(options.output, names)
        segmenter = load(
            options.checkpoint,
            device=options.device,
            precision=options.precision,
            threshold=options.threshold,
            trust=options.trust,
        )
        job = Job(segmenter, describe_network(segmenter, options.checkpoint), sentences, output)
        print(f"network: {job.network}", file=sys.stderr)
        failures = 0
        hide_progress = True if len(images) == 1 else None  # None: unless it is a terminal
        for name in tqdm(images, "segmenting", unit="image", disable=hide_progress):
            try:
                for line in job.segment(name):
                    print(json.dumps(line), flush=True)
            except InputError as error:
                if len(images) == 1:
                    raise
                failures += 1
                tqdm.write(f"error: {error}", file=sys.stderr)
        others = "; the others were" if failures < len(images) else ""
        require(
            not failures,
            f"{failures} of {len(images)} images could not be segmented, see above{others}",
        )


def warn(message: str) -> None:
    """Print a warning without disturbing the progress bar."""
    from tqdm import tqdm

    tqdm.write(f"warning: {message}", file=sys.stderr)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("predict", EXAMPLE, __doc__, EPILOG)
    parser.usage = (
        "%(prog)s IMAGE [IMAGE ...] SENTENCE [SENTENCE ...] [options]\n"
        "       %(prog)s IMAGE [IMAGE ...] --sentences FILE [options]"
    )
    add = parser.add_argument
    add(
        "arguments",
        metavar="IMAGE... SENTENCE...",
        nargs="+",
        help="images, folders of images without their subfolders, or - for stdin; then what to "
        "segment",
    )
    add(
        "--sentences",
        dest="file",
        metavar="FILE",
        help="file of sentences, one per line; - for stdin",
    )
    add("--checkpoint", default="shapes-tiny", help="network (default: the shipped shapes-tiny)")
    add(
        "--output",
        default="outputs/predictions",
        metavar="DIR",
        help="output folder (default: outputs/predictions); - for no files",
    )
    add(
        "--threshold",
        type=float,
        help="probability above which a pixel belongs to the mask, from 0 to 1 (default: the "
        "network's)",
    )
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    add(
        "--precision",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="auto: float16 on CUDA, float32 elsewhere (default)",
    )
    add_trust(parser)
    return parser.parse_intermixed_args(arguments)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the arguments into images, which come first, and sentences.

    Raises:
        InputError: If an image comes after a sentence, or does not exist.
    """
    from crislit.io import image_suffixes

    suffixes = image_suffixes()
    are_images = [
        text == "-" or os.path.lexists(text) or Path(text).suffix.lower() in suffixes
        for text in arguments
    ]
    count = next((i for i, is_image in enumerate(are_images) if i and not is_image), len(arguments))
    images, sentences = list(arguments[:count]), list(arguments[count:])
    for text, is_image in zip(sentences, are_images[count:], strict=True):
        require(
            not is_image,
            f"{text!r} names a file or an image, but comes after the sentence {sentences[0]!r}: "
            "images come first, and a sentence like this one goes into a file for --sentences",
        )
    require(all(images), f"the name of an image is empty; expected, for example: {example()}")
    for name, is_image in zip(images, are_images, strict=False):
        hint = "" if is_image else f"; images come first, then sentences: {example()}"
        check_exists(name, hint)
    require(images.count("-") <= 1, "the standard input holds one image: give - only once")
    return images, sentences


def example(image: str = "photo.jpg") -> str:
    """Return a command line that segments an image."""
    return f'python -m crislit.predict {shlex.quote(image)} "the man in red"'


def check_exists(image: str, hint: str) -> None:
    """Raise an ``InputError`` if there is no such file or folder."""
    try:
        if image != "-":
            Path(image).stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"no image at {image}{hint}") from error
    except OSError as error:
        raise InputError(f"cannot read {image}: {error.strerror}") from error


def read_sentences(sentences: Sequence[str], file: str | None, images: Sequence[str]) -> list[str]:
    """Return the sentences of the command line, or those of a file.

    Raises:
        InputError: If there are none, or both, or the file cannot be read.
    """
    from crislit.inference import check_sentences

    require(
        not sentences or file is None,
        "expected either sentences after the image, or --sentences FILE, not both",
    )
    if file is None and not any(map(str.strip, sentences)):
        hint = f" ({images[-1]!r} is taken for an image)" if len(images) > 1 else ""
        raise InputError(f"what to segment? Add a sentence{hint}: {example(images[0])}")
    if file == "-" and "-" in images:
        raise InputError("the standard input holds either the image or the sentences, not both")
    if file is not None:
        try:
            content = read_standard_input() if file == "-" else Path(file).read_bytes()
            lines = content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(
                f"cannot read the sentences in {file}: expected text in UTF-8 ({error}); save it "
                "in this encoding"
            ) from error
        except OSError as error:
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


def find_images(names: Sequence[str]) -> list[str]:
    """Return images, and the images of folders but not of their subfolders, in order.

    Raises:
        InputError: If a folder has none.
    """
    from crislit.io import image_suffixes

    suffixes = image_suffixes()
    images: list[str] = []
    for name in names:
        folder = Path(name)
        if name == "-" or not folder.is_dir():
            images.append(name)
            continue
        found = [
            str(path)
            for path in folder.iterdir()
            if path.suffix.lower() in suffixes and path.name[0] != "." and not path.is_dir()
        ]
        require(found, f"no image in {folder} itself: expected files such as .jpg or .png")
        images += sorted(found)
    return images


def prepare_output(output: str, names: Sequence[str]) -> Path | None:
    """Create the output folder; return None if no files are wanted.

    Raises:
        InputError: If it cannot be created, or holds the images: the next run would segment the
            masks.
    """
    if output == "-":
        return None
    folder = Path(output)
    paths = [Path(name) for name in names if name != "-"]
    sources = {path if path.is_dir() else path.parent for path in paths}
    is_single_file = len(paths) == 1 and not paths[0].is_dir()
    if folder.is_dir() and not is_single_file:
        is_source = folder.resolve() in {source.resolve() for source in sources}
        require(not is_source, f"{folder} holds the images: choose another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {why_unwritten(error)}; choose another --output"
        ) from error
    return folder


@dataclass
class Job:
    """Segments images, one after the other, with the same network and sentences.

    Attributes:
        segmenter: The network.
        network: Its description.
        sentences: The sentences.
        output: The folder of masks and overlays; None for none.
        taken: Names of files written, which several images may have in common.
        has_warned: Whether a warning of photos was printed.
    """

    segmenter: "Segmenter"
    network: "Description"
    sentences: list[str]
    output: Path | None
    taken: set[str] = field(default_factory=set)
    has_warned: bool = False

    def segment(self, name: str) -> Iterator[dict[str, Any]]:
        """Segment one image, write its files, and yield a JSON line per sentence."""
        from crislit.inference import (
            empty_mask_warning,
            photo_warning,
            safe_file_name,
            write_images,
        )
        from crislit.io import open_image

        image = open_image(io.BytesIO(read_standard_input()) if name == "-" else name)
        shown = "the standard input" if name == "-" else name
        if not self.has_warned and (message := photo_warning(self.network, image, shown)):
            warn(message)
            self.has_warned = True
        stem = "image" if name == "-" else Path(name).name
        for number, result in enumerate(self.segmenter.stream(image, self.sentences)):
            if message := empty_mask_warning(result, self.segmenter.threshold, shown):
                warn(f"{message}; lower it with --threshold{see('empty-mask')}")
            line = result.to_json(name)
            if self.output is not None:
                base = self.output / safe_file_name(stem, result.sentence, self.taken)
                line |= write_images(base, result, number)
            yield line


if __name__ == "__main__":
    main()
