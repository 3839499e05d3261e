"""Parses the values of custom data: numbers, paths, splits, sentences and polygons."""

from typing import Any

from crislit.data.refer_annotations import parse_integer
from crislit.errors import InputError, require
from crislit.transforms import has_words

SPLITS = {
    **{"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"},
    "test": "test",
}
"""Names of splits as labeling tools write them, in lower case. Other names stay as they are."""


def parse_whole(value: Any, name: str) -> int:
    """Return a whole number from 0, however it is written: 17, 17.0, "17" or " 17.0 ".

    Raises:
        InputError: If it is not one.
    """
    is_decimal = isinstance(value, str) and len(value) < 20 and value.strip().isdecimal()
    try:
        number = parse_integer(int(value) if is_decimal else value, name)  # digits of any script
    except InputError:
        number = -1
    if number < 0:
        raise InputError(
            f"{name} must be a number, found {value!r:.60}: write whole numbers, such as 0, 1, 2"
        )
    return number


def parse_path(sample: dict[str, Any], key: str) -> str:
    """Return a path of a sample.

    Raises:
        InputError: If it is not text, or empty.
    """
    value = sample.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f"{key} must be a path, found {value!r:.200}")
    return value


def parse_split(value: Any, default: str = "train") -> str:
    """Return the name of a split: ``train``, ``val``, ``test`` or another.

    Raises:
        InputError: If it is not text, or empty.
    """
    split = default if value is None else value
    if not isinstance(split, str) or not split.strip():
        raise InputError(f"split must be a name such as train, val or test, found {split!r:.60}")
    return SPLITS.get(split.strip().lower(), split.strip())


def parse_sentences(sample: dict[str, Any]) -> list[str]:
    """Return the sentences of a sample.

    Raises:
        InputError: If it has none, or one that is not text or has no words.
    """
    sentence, sentences = sample.get("sentence"), sample.get("sentences")
    if (sentence is None) == (sentences is None):
        found = "neither" if sentence is None else "both"
        raise InputError(f"expected either sentence or sentences, found {found}")
    if isinstance(sentence, list):
        raise InputError('sentence must be text, found a list: write "sentences" for several')
    if isinstance(sentences, str):
        raise InputError(
            'sentences must be a list, found text: write "sentences": ["..."], or "sentence": "..."'
        )
    sentences = [sentence] if sentences is None else sentences
    if not isinstance(sentences, list) or not sentences:
        raise InputError(f"sentences must be a list of at least one text, found {sentences!r:.60}")
    for sentence in sentences:
        if not isinstance(sentence, str) or not has_words(sentence):
            raise InputError(f"a sentence must be non-empty text, found {sentence!r:.100}")
    try:
        "".join(sentences).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"a sentence has an unpaired surrogate: {error}"[:200]) from error
    return sentences


def check_polygons(polygons: list[Any]) -> None:
    """Raise an ``InputError`` unless each polygon is a flat list of coordinate pairs."""
    for polygon in polygons:
        is_flat = isinstance(polygon, list) and all(
            isinstance(x, (int, float)) and not isinstance(x, bool) for x in polygon
        )
        if not is_flat or len(polygon) % 2:
            raise InputError(
                f"expected each polygon as a list x, y, x, y, ..., found {polygon!r}"[:200]
            )
    points = [x for polygon in polygons for x in polygon]
    require(
        not points or any(not 0 <= x <= 1 for x in points),
        "its polygons lie within one pixel: multiply shares of the image by its width and height",
    )
