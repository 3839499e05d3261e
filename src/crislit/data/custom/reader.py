"""Custom data: converts what users and labeling tools write to refs and annotations.

Each line of a JSON-lines file describes one object of an image:

    {"image": "photos/7.jpg", "sentences": ["the man in red"], "split": "train", "mask": "7.png"}

``sentence`` may replace ``sentences``, and ``polygons`` ([[x, y, x, y, ...], ...]) or ``rle``
({"size", "counts"} as in COCO, a list of them, or Label Studio's list) may replace ``mask``.
``mask_value`` names the object's value in a mask of several. Paths are relative to the file. The
default split is train.
"""

import difflib
import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crislit.data.custom.builder import CustomData, Problem, RefBuilder
from crislit.data.custom.coco import read_coco, read_coco_folder
from crislit.data.custom.files import parse_json, read_text
from crislit.data.custom.label_studio import is_label_studio, read_label_studio
from crislit.data.custom.values import parse_path, parse_sentences, parse_split
from crislit.errors import InputError, counted, require
from crislit.io import MaskValue, parse_mask_value, read_json

EXPECTED = (
    "expected a JSON-lines file of images, masks and sentences, or what a labeling tool wrote; "
    "`python -m crislit.check_data --help` describes both"
)
KEYS = ("image", "sentence", "sentences", "split", "mask", "mask_value", "polygons", "rle")
COCO_KEYS = {"images", "annotations"}


def read_custom(
    file: str,
    sentences: str | None = None,
    images: str | None = None,
    val_share: float | None = None,
    mask_value: Any = None,
) -> CustomData:
    """Read custom data.

    Args:
        file: A JSON-lines file, a COCO instances file, a folder of one per split or of SAM's
            files, or a JSON export of Label Studio.
        sentences: The CSV of a COCO file's sentences; or ``categories``, to use the names of
            categories (in Label Studio, labels) as sentences. None: the file has the sentences.
        images: The folder of the images of COCO and Label Studio. None: the folder of ``file``.
        val_share: Share of the training images to move to val, if the data have no val.
        mask_value: What marks objects in mask images with several values: one of them, or a color
            ("#rrggbb" or [r, g, b]).

    Raises:
        InputError: If a file is missing or is not of the expected format.
    """
    for name, text in (("file", file), ("sentences", sentences), ("images", images)):
        require(text is None or text.strip(), f"dataset.{name} (check_data: {name}) is empty")
    path = Path(file).expanduser()
    require(path.exists(), f"{path} not found: {EXPECTED}")
    folder = None if images is None else Path(images).expanduser()
    value = parse_mask_value(mask_value)
    if path.is_dir():
        data = read_coco_folder(path, sentences, folder)
    else:
        data = _read_file(path, sentences, folder, value)
    require(
        value is None or data.mask_values or data.problems,
        "dataset.mask_value is for mask images, and these data have none: leave it out",
    )
    return data if val_share is None else split_by_image(data, val_share)


def _read_file(
    path: Path, sentences: str | None, images: Path | None, mask_value: MaskValue | None
) -> CustomData:
    text = read_text(path)
    document = _parse_document(text, path)
    if is_label_studio(document):
        return read_label_studio(document, path, sentences, images)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    require(lines, f"{path} is empty, expected one JSON object per line")
    _check_starts([line for _, line in lines], path)
    is_coco = isinstance(document, dict) and _is_coco(document)
    if is_coco or (sentences is not None and not _is_sample_line(lines[0][1])):
        return read_coco(document if is_coco else read_json(path), path, sentences, images)
    for name, value in (("sentences", sentences), ("images", images)):
        require(
            value is None,
            f"dataset.{name} is for COCO files; {path} is a JSON-lines file, which has its "
            "sentences itself and paths of images that are relative to it",
        )
    if document is not None:
        require(
            isinstance(document, list),
            f"{path} is one JSON document over several lines: expected one JSON object per line, "
            "or COCO instances with a CSV of sentences (see check_data --help)",
        )
        return _read_samples(enumerate(document, 1), path, "item", len(document), mask_value)
    return _read_samples(lines, path, "line", len(lines), mask_value)


def _check_starts(lines: list[str], path: Path) -> None:
    """Check that lines start like JSON: else one error is better than one per line.

    Raises:
        InputError: If none does.
    """
    if any(line.lstrip()[0] in "{[" for line in lines):
        return
    first = lines[0].strip()
    found = f"starts with {first!r:.60}"
    if first.startswith("<"):
        found = "is XML: export COCO 1.0 from CVAT, or write the masks as images"
    elif any(mark in first for mark in ",;\t"):
        found = (
            f"is a CSV table ({first:.60}): write one JSON object per line. If it has the "
            "sentences of a COCO file, name that file, and the table as dataset.sentences "
            "(check_data: --sentences)"
        )
    raise InputError(f"{path} is neither JSON nor JSON lines, but {found}")


def _is_sample_line(line: str) -> bool:
    """Whether a line is an object of a JSON-lines file."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not _is_coco(value) and bool(value.keys() & set(KEYS))


def _is_coco(document: dict[str, Any]) -> bool:
    """Whether a JSON object is a COCO file, or one of SAM's."""
    return document.keys() >= COCO_KEYS or document.keys() >= {"image", "annotations"}


def _parse_document(text: str, path: Path) -> Any:
    """Return the content of a file that is one JSON document; None if each line is an object.

    Raises:
        InputError: If it is one document, but not valid JSON.
    """
    first, _, rest = text.strip().partition("\n")
    is_one_line = not rest
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        value = None
    is_sample = isinstance(value, dict) and not _is_coco(value) and not is_label_studio(value)
    if is_one_line and isinstance(value, (dict, list)) and not is_sample:
        return value
    if value is not None or is_one_line:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if first.strip() in ("{", "["):
            try:
                parse_json(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path} is not valid JSON: {error}") from error
        return None


def _read_samples(
    samples: Iterable[tuple[int, Any]],
    path: Path,
    unit: str,
    count: int,
    mask_value: MaskValue | None,
) -> CustomData:
    """Read samples: lines of text, or objects of a list."""
    builder = RefBuilder(path.parent, unit, mask_value)
    for number, item in tqdm(
        samples, f"reading {path.name}", total=count, unit=unit, mininterval=1, disable=None
    ):
        split = None
        try:
            sample = _check_sample(parse_json(item) if unit == "line" else item)
            split = parse_split(sample.get("split"))
            image = builder.image(parse_path(sample, "image"))
            segmentation = builder.segmentation(sample, image)
            sentences = [(number, sentence) for sentence in parse_sentences(sample)]
            builder.add(image, segmentation, sentences, split)
        except (InputError, ValueError, RecursionError) as error:
            builder.problems.append(Problem(number, str(error), split))
    return builder.build()


def _check_sample(sample: Any) -> dict[str, Any]:
    if not isinstance(sample, dict):
        raise InputError(f"expected an object, {{...}}, found {type(sample).__name__}")
    if set(sample) >= COCO_KEYS:
        raise InputError(
            "this is a COCO instances file, which needs a CSV of sentences: see check_data --help"
        )
    if unknown := sorted(set(sample) - set(KEYS)):
        similar = difflib.get_close_matches(unknown[0], KEYS, 1)
        hint = f" (did you mean {similar[0]!r}?)" if similar else ""
        raise InputError(
            f"unknown key {unknown[0]!r:.60}{hint}; the keys are {', '.join(sorted(KEYS))}"
        )
    return sample


def split_by_image(data: CustomData, share: float) -> CustomData:
    """Move a share of the training images with all their objects to val.

    Which ones depends on the names of the images only, and is the same in every run.

    Raises:
        InputError: If the share is not between 0 and 1, the data have a val, or one image only.
    """
    is_share = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share < 1
    require(is_share, f"dataset.val_share must be above 0 and below 1, got {share!r:.60}")
    splits = [ref["split"] for ref in data.refs] + [problem.split for problem in data.problems]
    require(
        "val" not in splits,
        "dataset.val_share is for data without val, and these have it: leave one of them out",
    )
    names = {image["id"]: image["file_name"] for image in data.instances["images"]}
    train = {ref["image_id"] for ref in data.refs if ref["split"] == "train"}
    count = max(1, round(share * len(train)))
    require(
        len(train) > count,
        f"dataset.val_share needs more images: {count} of {len(train)} would go to val",
    )
    # A digest instead of random numbers: added images change as little as possible.
    ranked = sorted(train, key=lambda i: hashlib.sha256(names[i].encode()).hexdigest())
    val = set(itertools.islice(ranked, count))
    refs = [
        {**ref, "split": "val"} if ref["split"] == "train" and ref["image_id"] in val else ref
        for ref in data.refs
    ]
    images = f"{count} of {counted(len(train), 'training image')}"
    note = f"{images} {'was' if count == 1 else 'were'} moved to val (val_share={share})"
    return replace(data, refs=refs, notes=[*data.notes, note])
