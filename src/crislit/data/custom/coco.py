"""Reads COCO instances as custom data, with the sentences in a CSV, in the file, or categories."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crislit.data.custom.builder import CustomData, Problem, RefBuilder
from crislit.data.custom.table import Groups, group_rows
from crislit.data.custom.values import (
    SPLITS,
    parse_path,
    parse_sentences,
    parse_split,
    parse_whole,
)
from crislit.data.refer_annotations import index_by_id
from crislit.errors import InputError, require, see
from crislit.io import read_json

CATEGORIES = "categories"
"""The value of ``sentences`` that makes names of categories the sentences."""
CATEGORY_NOTE = (
    "names of categories serve as sentences: they do not tell two objects of one category apart"
)
SENTENCE_KEYS = ("sentence", "sentences", "caption")
"""Keys or attributes of an annotation that hold its sentences."""
NO_SENTENCES = (
    "no annotation has a sentence: pass a CSV with the columns ann_id,sentence,split "
    "(dataset.sentences=FILE), or dataset.sentences=categories to use the names of categories"
)
EXPECTED = "name a key or an attribute sentence, sentences or caption"


def read_coco(
    content: Any,
    path: Path,
    sentences: str | None = None,
    images: Path | None = None,
) -> CustomData:
    """Read one COCO instances file, or one file of SAM's.

    Args:
        content: The parsed file.
        path: Its path.
        sentences: The CSV of the sentences; ``categories``; or None, if annotations have them.
        images: The folder of the images. None: the file's.

    Raises:
        InputError: If a file is missing or is not of the expected format.
    """
    unit = "annotation" if sentences in (None, CATEGORIES) else "line"
    builder = RefBuilder(path.parent if images is None else images, unit)
    table = None if sentences is None else Path(sentences).expanduser()
    add_coco(builder, _from_sam([content]) if _is_sam(content) else content, path, table)
    return builder.build()


def read_coco_folder(folder: Path, sentences: str | None, images: Path | None) -> CustomData:
    """Read a folder with one COCO file per split, or with SAM's files.

    Args:
        folder: The folder. It holds ``train/_annotations.coco.json`` (Roboflow),
            ``annotations/instances_train.json`` (CVAT), ``train.json``, or SAM's ``*.json``.
        sentences: As in ``read_coco``; of splits, the name of a CSV beside each COCO file.
        images: The folder of SAM's images. None: the same.

    Raises:
        InputError: If there is no such file, or one cannot be used.
    """
    files = _find_splits(folder)
    if not files:
        return _read_sam_folder(folder, sentences, images)
    require(images is None, "dataset.images is for one COCO file; a folder has its images inside")
    # Ids of annotations start again in each split: one CSV for all would mix up objects.
    require(
        sentences in (None, CATEGORIES) or Path(sentences).name == sentences,
        f"a folder of splits needs the name of a CSV that lies in each of them, found {sentences}",
    )
    unit = "annotation" if sentences in (None, CATEGORIES) else "line"
    builder = RefBuilder(folder, unit)
    for path, split, image_folder in files:
        table = None if sentences is None else path.parent / sentences
        before = len(builder.problems)
        add_coco(builder, read_json(path), path, table, split, image_folder)
        name = path.relative_to(folder).as_posix()
        builder.problems[before:] = [
            Problem(problem.line, f"{name}: {problem.reason}", problem.split)
            for problem in builder.problems[before:]
        ]
    return builder.build()


def add_coco(
    builder: RefBuilder,
    content: Any,
    path: Path,
    table: Path | None,
    split: str = "train",
    image_folder: str = "",
) -> None:
    """Add the annotations of one COCO file that have sentences.

    Args:
        builder: Receives them.
        content: The parsed file.
        path: Its path, for messages.
        table: The CSV of sentences; ``categories``; None: annotations have sentences.
        split: The split of those that name none.
        image_folder: Folder of the images, relative to the builder's.

    Raises:
        InputError: If the file or the CSV is not of the expected format.
    """
    images = _index(content, "images", path)
    annotations = _index(content, "annotations", path)
    if table is not None and table.name != CATEGORIES:
        groups = group_rows(table, annotations, builder.problems, split)
    else:
        categories = _category_names(content, path) if table is not None else None
        if categories is not None and CATEGORY_NOTE not in builder.notes:
            builder.notes.append(CATEGORY_NOTE)
        has_sentences = categories is not None or any(map(_attributes, annotations.values()))
        if annotations and not has_sentences:
            found = _list_texts(annotations.values())
            other = f". Or {EXPECTED}{found}" if found else ""
            raise InputError(f"{path}: {NO_SENTENCES}{other}{see('no-sentences')}")
        groups = _own_sentences(annotations, images, categories, builder.problems, split)
    for ann_id, (name, sentences) in groups.items():
        try:
            annotation = annotations[ann_id]
            listed = _image_of(annotation, images)
            file_name = parse_path(listed, "file_name")
            image = builder.image(f"{image_folder}/{file_name}" if image_folder else file_name)
            _check_size(listed, image, path)
            if not annotation.get("segmentation"):
                raise InputError("the annotation has no segmentation, only a box")
            segmentation = builder.check_segmentation(annotation["segmentation"], image)
            builder.add(image, segmentation, sentences, name)
        except (InputError, ValueError) as error:
            builder.problems += [Problem(line, str(error), name) for line, _ in sentences]


def _index(content: Any, kind: str, path: Path) -> dict[int, dict[str, Any]]:
    """Return COCO's images or annotations by their ids."""
    items = index_by_id(content, kind, path)
    name = f"{path}: the id of one of the {kind}"
    return {parse_whole(number, name): item for number, item in items.items()}


def _image_of(annotation: dict[str, Any], images: dict[int, dict[str, Any]]) -> dict[str, Any]:
    number = parse_whole(annotation.get("image_id"), "image_id")
    if number not in images:
        raise InputError(
            f"annotation {annotation['id']} belongs to image {annotation['image_id']!r}, "
            "which is not listed"
        )
    return images[number]


def _check_size(listed: dict[str, Any], image: dict[str, Any], path: Path) -> None:
    for side in ("height", "width"):
        if side not in listed:
            continue
        if parse_whole(listed[side], f"{side} of {image['file_name']}") != image[side]:
            raise InputError(
                f"{image['file_name']} has {side} {image[side]}, expected {listed[side]} "
                f"as in {path.name}"
            )


# -- Sentences


def _own_sentences(
    annotations: dict[int, dict[str, Any]],
    images: dict[int, dict[str, Any]],
    categories: dict[int, str] | None,
    problems: list[Problem],
    default_split: str,
) -> Groups:
    """Return the sentences that annotations have themselves, or the names of their categories."""
    groups: Groups = {}
    for ann_id, annotation in annotations.items():
        split = None
        try:
            split = parse_split(_image_of(annotation, images).get("split"), default_split)
            if categories is None:
                sentences = _attributes(annotation)
                if not sentences:
                    raise InputError(f"it has no sentence: {EXPECTED}{_list_texts([annotation])}")
            else:
                number = parse_whole(annotation.get("category_id"), "category_id")
                require(number in categories, f"category {number} is not listed")
                sentences = [categories[number]]
            parse_sentences({"sentences": sentences})
            groups[ann_id] = split, [(ann_id, sentence) for sentence in sentences]
        except (InputError, ValueError) as error:
            problems.append(Problem(ann_id, str(error), split))
    return groups


def _attributes(annotation: dict[str, Any]) -> list[str]:
    """Return the sentences of an annotation, which may be attributes as CVAT writes them."""
    attributes = annotation.get("attributes")
    places = [annotation, attributes if isinstance(attributes, dict) else {}]
    for place in places:
        for key in SENTENCE_KEYS:
            value = place.get(key)
            if value not in (None, ""):
                return value if isinstance(value, list) else [value]
    return []


def _list_texts(annotations: Iterable[dict[str, Any]]) -> str:
    """Return the attributes and texts of annotations, among which the sentences may be."""
    names: dict[str, None] = {}
    for annotation in annotations:
        attributes = annotation.get("attributes")
        names |= dict.fromkeys(attributes if isinstance(attributes, dict) else ())
        names |= {key: None for key, value in annotation.items() if isinstance(value, str)}
    listed = ", ".join(name[:40] for name in list(names)[:10])
    return f"; found {listed}" if names else ""


def _category_names(content: dict[str, Any], path: Path) -> dict[int, str]:
    categories = _index(content, "categories", path)
    return {number: category.get("name", "") for number, category in categories.items()}


# -- Folders


def _find_splits(folder: Path) -> list[tuple[Path, str, str]]:
    """Return each COCO file of a folder with its split and the folder of its images."""
    found = []
    for path in sorted(folder.glob("*/_annotations.coco.json")):
        found.append((path, path.parent.name, path.parent.name))
    for path in sorted((folder / "annotations").glob("instances_*.json")):
        subset = path.stem.removeprefix("instances_")
        folders = [f"images/{subset}", "images", subset]
        inside = next((name for name in folders if (folder / name).is_dir()), "")
        found.append((path, re.sub(r"(default|\d{4})$", "", subset) or "train", inside))
    for path in sorted(folder.glob("*.json")):
        if path.stem.lower() in SPLITS:
            found.append((path, path.stem, "images" if (folder / "images").is_dir() else ""))
    return [(path, parse_split(split), images) for path, split, images in found]


def _read_sam_folder(folder: Path, sentences: str | None, images: Path | None) -> CustomData:
    lists = sorted(folder.glob("*.jsonl"))
    require(
        not lists, f"{folder} is a folder: name the file in it, {', '.join(map(str, lists[:3]))}"
    )
    paths = sorted(folder.glob("*.json"))
    contents = [read_json(path) for path in paths]
    require(
        contents and all(map(_is_sam, contents)),
        f"{folder} holds neither train/_annotations.coco.json, annotations/instances_*.json and "
        f"the like, nor SAM's *.json only: name {paths[0] if paths else 'a file'}, see "
        "`python -m crislit.check_data --help`",
    )
    require(
        sentences not in (None, CATEGORIES),
        f"{folder} has SAM's masks, which have no sentences: pass a CSV with the columns "
        "ann_id,sentence,split (dataset.sentences=FILE); ann_id is the id of an annotation",
    )
    builder = RefBuilder(folder if images is None else images)
    add_coco(builder, _from_sam(contents), folder, Path(str(sentences)).expanduser())
    return builder.build()


def _is_sam(content: Any) -> bool:
    """Whether a file is one that SAM's automatic mask generator wrote for an image."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("image"), dict)
        and isinstance(content.get("annotations"), list)
    )


def _from_sam(contents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return SAM's files as the content of one COCO file."""
    images, annotations = [], []
    for content in contents:
        image = content["image"]
        images.append({**image, "id": image.get("image_id", image.get("id"))})
        annotations += [
            {**annotation, "image_id": images[-1]["id"]}
            for annotation in content["annotations"]
            if isinstance(annotation, dict)
        ]
    return {"images": images, "annotations": annotations}
