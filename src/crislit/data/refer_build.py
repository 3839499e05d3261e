"""Builds the arrays of a ``ReferIndex`` from the parsed files of a REFER data set."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from crislit.data.refer_annotations import (
    Ints,
    index_by_id,
    name_of_ref,
    parse_file_name,
    parse_id,
    parse_image_id,
    parse_integer,
    parse_segmentation,
    parse_size,
    parse_text,
)
from crislit.data.refer_cache import MAX_INDEX, IndexArrays, SkippedSample, join_arrays
from crislit.errors import InputError, counted, first_line, require

log = logging.getLogger(__name__)

MALFORMED = (KeyError, TypeError, ValueError, OverflowError, RecursionError, AttributeError)
"""Raised by annotations that are not as REFER's; InputError is a ValueError."""


@dataclass(frozen=True)
class _Ref:
    """A parsed ref, with its image and annotation."""

    ref_id: int
    split: str
    image_id: int
    size: tuple[int, int]
    file_name: str
    polygons: list[npt.NDArray[np.float64]]
    runs: Ints
    sentences: list[tuple[str, int]]  # text and id

    @property
    def length(self) -> int:
        """Its share of ``MAX_INDEX``."""
        characters = sum(100 + len(sentence) for sentence, _ in self.sentences)
        return characters + 4 * (sum(map(len, self.polygons)) + len(self.runs))


def build_index(
    refs: Any,
    instances: Any,
    source: Path,
    plain_names: bool = True,
    skipped: list[SkippedSample] | None = None,
) -> IndexArrays:
    """Join refs and annotations by ``image_id`` and ``ann_id`` into flat arrays.

    Args:
        refs: The unpickled refs file.
        instances: The parsed ``instances.json``.
        source: Path of the refs file, for messages.
        plain_names: Whether file names of images must not be paths.
        skipped: Receives the training refs that cannot be used, and why. None: they are an error.

    Raises:
        InputError: If something is missing or malformed, with the ref's id.
    """
    path = source.with_name("instances.json")
    images = index_by_id(instances, "images", path)
    annotations = index_by_id(instances, "annotations", path)
    require(
        isinstance(refs, list),
        f"{source} should hold a list of refs, and holds {type(refs).__name__}",
    )
    parse_name = parse_file_name if plain_names else parse_text
    parsed: dict[int, _Ref] = {}
    length = 0
    is_short = len(refs) < 5000
    name = f"indexing {source.name}"
    progress = tqdm(refs, name, unit="ref", mininterval=1, disable=is_short or None)
    for place, item in enumerate(progress):
        try:
            ref = _parse_ref(item, images, annotations, parse_name, MAX_INDEX - length)
            if ref.ref_id in parsed:
                raise InputError("its ref_id occurs twice, and it would count twice")
        except MALFORMED as error:
            message = _explain(item, error)
            is_train = isinstance(item, dict) and item.get("split") in ("train", b"train")
            if skipped is None or not is_train:
                raise InputError(f"{source}: {message}") from error
            printed = message.encode("utf-8", "backslashreplace").decode()
            skipped.append(SkippedSample(f"entry {place + 1} of {source.name}", printed))
        else:
            length += ref.length
            parsed[ref.ref_id] = ref
    _warn_of_empty(parsed, source)
    return _to_arrays(list(parsed.values()))


def _explain(item: Any, error: Exception) -> str:
    """Return why a ref cannot be used."""
    malformed = f" or its image or annotation is malformed: {type(error).__name__}"
    problem = ":" if isinstance(error, InputError) else malformed
    return f"ref {name_of_ref(item)}{problem} {first_line(error)}"


def _warn_of_empty(parsed: dict[int, _Ref], source: Path) -> None:
    """Log the refs whose mask has no pixel."""
    empty = [str(i) for i, ref in parsed.items() if not ref.polygons and not len(ref.runs)]
    if empty:
        refs_have = counted(len(empty), "ref has", "refs have")
        log.warning("%s: %s an empty mask: ref_id %s", source, refs_have, ", ".join(empty[:20]))


def _parse_ref(
    ref: Any,
    images: Mapping[int | str, Any],
    annotations: Mapping[int | str, Any],
    parse_name: Callable[[Any], str],
    room: int,
) -> _Ref:
    image_key, ann_id = parse_id(ref["image_id"], "image_id"), parse_id(ref["ann_id"], "ann_id")
    image, annotation = images[image_key], annotations[ann_id]
    if parse_id(annotation["image_id"], "image_id of its annotation") != image_key:
        raise InputError(
            f"its annotation {ann_id} belongs to image {annotation['image_id']}, not {image_key}"
        )
    size = parse_size(image)
    polygons, runs = parse_segmentation(annotation["segmentation"], size)
    # A few bytes can name one sentence a million times.
    sentences = ref["sentences"] if 100 * len(ref["sentences"]) <= room else []
    parsed = _Ref(
        ref_id=parse_integer(ref["ref_id"], "ref_id"),
        split=parse_text(ref["split"]),
        image_id=parse_image_id(image_key),
        size=size,
        file_name=parse_name(image["file_name"]),
        polygons=polygons,
        runs=np.array(runs, dtype=np.int64),
        sentences=[(parse_text(s["sent"]), parse_integer(s["sent_id"])) for s in sentences],
    )
    if len(sentences) < len(ref["sentences"]) or parsed.length > room:
        raise InputError(f"up to it there are more than {MAX_INDEX:,} characters and numbers")
    if not sentences:
        raise InputError("it has no sentence")
    return parsed


def _to_arrays(refs: list[_Ref]) -> IndexArrays:
    images = {ref.image_id: ref for ref in refs}  # one ref of each image
    image_rows = {key: row for row, key in enumerate(images)}
    split_rows = {split: row for row, split in enumerate(dict.fromkeys(ref.split for ref in refs))}
    numbers = {
        "split": [split_rows[ref.split] for ref in refs],
        "ref_id": [ref.ref_id for ref in refs],
        "ref_image": [image_rows[ref.image_id] for ref in refs],
        "ref_sentences_ends": np.cumsum([len(ref.sentences) for ref in refs]),
        "ref_polygons_ends": np.cumsum([len(ref.polygons) for ref in refs]),
        "image_id": [image.image_id for image in images.values()],
        "image_size": np.reshape([image.size for image in images.values()], (-1, 2)),
        "sentence_id": [number for ref in refs for _, number in ref.sentences],
    }
    texts = {
        "split_names": list(split_rows),
        "file_names": [image.file_name for image in images.values()],
        "sentences": [sentence for ref in refs for sentence, _ in ref.sentences],
    }
    arrays: dict[str, Any] = {name: np.array(v, dtype=np.int64) for name, v in numbers.items()}
    for name, strings in texts.items():
        encoded = [np.frombuffer(string.encode(), dtype=np.uint8) for string in strings]
        arrays[name], arrays[name + "_ends"] = join_arrays(encoded, np.uint8)
    polygons = [polygon for ref in refs for polygon in ref.polygons]
    arrays["points"], arrays["polygons_ends"] = join_arrays(polygons, np.float64)
    arrays["runs"], arrays["ref_runs_ends"] = join_arrays([ref.runs for ref in refs], np.int64)
    return IndexArrays(**arrays)
