"""Reads JSON exports of Label Studio: brush strokes and polygons with sentences."""

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from crislit.data.custom.builder import CustomData, Problem, RefBuilder
from crislit.data.custom.coco import CATEGORIES, CATEGORY_NOTE
from crislit.data.custom.label_studio_runs import decode_runs
from crislit.data.custom.values import parse_sentences, parse_split, parse_whole
from crislit.errors import InputError, require
from crislit.io import image_suffixes

REGIONS = ("brushlabels", "brush", "polygonlabels", "polygon", "labels")
"""Types of results that may draw a region."""
LOOSE = ("textarea", "choices", "taxonomy", "rating", "number", "datetime", "pairwise", "ranker")
"""Types of results that draw no region: they belong to one drawn elsewhere, or to the image."""
IMAGE_KEYS = ("image", "img")
"""Usual keys of a task's image."""


def is_label_studio(document: Any) -> bool:
    """Whether a JSON document is an export of Label Studio: a task, or a list of tasks."""
    tasks = document if isinstance(document, list) else [document]
    first = tasks[0] if tasks else None
    return isinstance(first, dict) and (
        (isinstance(first.get("data"), dict) and ("annotations" in first or "predictions" in first))
        or {"annotator", "annotation_id"} <= set(first)  # JSON-MIN
    )


def read_label_studio(
    document: Any, path: Path, sentences: str | None, images: Path | None
) -> CustomData:
    """Read an export of Label Studio.

    The sentences of a region are its text area, or its meta information; with
    ``sentences="categories"``, its labels.

    Args:
        document: The parsed file.
        path: Its path.
        sentences: None or ``categories``.
        images: The folder of the images. None: the file's.

    Raises:
        InputError: If it is not of the expected format.
    """
    tasks = document if isinstance(document, list) else [document]
    require(
        all(isinstance(task, dict) and isinstance(task.get("annotations"), list) for task in tasks),
        f"{path} is Label Studio's, but has no annotations: export it as JSON, not as JSON-MIN",
    )
    require(
        sentences in (None, CATEGORIES),
        "Label Studio's file has the sentences: leave out dataset.sentences, or set it to "
        "categories to use labels as sentences",
    )
    builder = RefBuilder(path.parent if images is None else images, "task")
    if sentences == CATEGORIES:
        builder.notes.append(CATEGORY_NOTE)
    for place, task in enumerate(tasks, 1):
        number, split = place, None
        try:
            number = parse_whole(task.get("id", place), "id of a task")
            split = parse_split(_data(task).get("split"))
            for regions in _regions(task).values():
                _add_region(builder, task, regions, number, split, sentences == CATEGORIES)
        except (InputError, ValueError) as error:
            builder.problems.append(Problem(number, str(error), split))
    return builder.build()


def _add_region(
    builder: RefBuilder,
    task: dict[str, Any],
    results: list[dict[str, Any]],
    number: int,
    split: str,
    use_labels: bool,
) -> None:
    """Add one region: the results with one id, such as a polygon, its labels and its text."""
    try:
        drawn = next((result for result in results if result.get("type") in REGIONS), None)
        if drawn is None:
            kinds = ", ".join(str(result.get("type")) for result in results)
            raise InputError(f"a region is neither a brush stroke nor a polygon but {kinds}")
        image = builder.image(_image_name(builder, task))
        found = _labels(results) if use_labels else _texts(results)
        if not found:
            raise InputError(
                "a region has no sentence: expected a text area per region, or meta information; "
                "dataset.sentences=categories uses labels"
            )
        sentences = [(number, sentence) for sentence in parse_sentences({"sentences": found})]
        segmentation = builder.check_segmentation(_segmentation(drawn, image), image)
        builder.add(image, segmentation, sentences, split)
    except (InputError, ValueError) as error:
        builder.problems.append(Problem(number, str(error), split))


def _data(task: dict[str, Any]) -> dict[str, Any]:
    data = task.get("data")
    if not isinstance(data, dict):
        raise InputError("the task has no data")
    return data


def _regions(task: dict[str, Any]) -> dict[Any, list[dict[str, Any]]]:
    """Return the results of a task's annotation by region.

    Raises:
        InputError: If it has several annotations, of which none is the ground truth.
    """
    annotations = [
        annotation
        for annotation in task["annotations"]
        if isinstance(annotation, dict) and not annotation.get("was_cancelled")
    ]
    if len(annotations) > 1:
        chosen = [annotation for annotation in annotations if annotation.get("ground_truth")]
        if len(chosen) != 1:
            raise InputError(
                f"the task has {len(annotations)} annotations: delete all but one, or mark one as "
                "ground truth"
            )
        annotations = chosen
    regions: dict[Any, list[dict[str, Any]]] = {}
    for annotation in annotations:
        for result in _as_list(annotation.get("result")):
            if isinstance(result, dict) and result.get("type") == "relation":
                continue  # an arrow between two regions
            if not isinstance(result, dict) or not isinstance(result.get("value"), dict):
                raise InputError("a result of the task is not as in Label Studio's exports")
            regions.setdefault(str(result.get("id")), []).append(result)
    return _attach_texts(regions)


def _attach_texts(
    regions: dict[Any, list[dict[str, Any]]],
) -> dict[Any, list[dict[str, Any]]]:
    """Return the regions; the text of a whole image belongs to its region, if it has only one."""
    loose = [key for key, results in regions.items() if all(map(_is_loose, results))]
    texts = [result for key in loose for result in regions.pop(key) if _texts([result])]
    if texts and len(regions) != 1:
        raise InputError(
            f"a text belongs to the whole image, which has {len(regions)} regions: set "
            'perRegion="true" in the text area'
        )
    for results in regions.values():
        results += texts
    return regions


def _is_loose(result: dict[str, Any]) -> bool:
    """Whether a result says something about the whole image, or about a region drawn elsewhere."""
    return result.get("type") in LOOSE


def _texts(results: list[dict[str, Any]]) -> list[Any]:
    """Return the texts of a region: of its text areas, or else its meta information."""
    areas = [result["value"].get("text") for result in results if result.get("type") == "textarea"]
    metas = [
        result["meta"].get("text") for result in results if isinstance(result.get("meta"), dict)
    ]
    for values in (areas, metas):
        texts = [text for value in values for text in _as_list(value)]
        if texts:
            return texts
    return []


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _labels(results: list[dict[str, Any]]) -> list[Any]:
    labels = [
        label
        for result in results
        for key in ("brushlabels", "polygonlabels", "labels")
        for label in _as_list(result["value"].get(key))
        if isinstance(label, str)
    ]
    return list(dict.fromkeys(labels))


def _segmentation(result: dict[str, Any], image: dict[str, Any]) -> Any:
    """Return a region as a COCO segmentation."""
    value = result["value"]
    if result.get("image_rotation"):
        raise InputError("the image was rotated in Label Studio: rotate the file instead")
    for side in ("height", "width"):
        if result.get(f"original_{side}", image[side]) != image[side]:
            raise InputError(
                f"{image['file_name']} has {side} {image[side]}, expected "
                f"{result[f'original_{side}']} as in the export"
            )
    if "rle" in value:
        return decode_runs(value["rle"], (image["height"], image["width"]))
    points = value.get("points")
    if not isinstance(points, list) or not all(
        isinstance(point, list) and len(point) == 2 and all(type(x) in (int, float) for x in point)
        for point in points
    ):
        raise InputError("a region has neither rle nor points")
    scale = image["width"] / 100, image["height"] / 100
    return [[x * scale[axis] for point in points for axis, x in enumerate(point)]]


def _path_of(url: str) -> str:
    """Return the path of a URL; of ``/data/local-files/?d=photos/7.jpg``, ``photos/7.jpg``."""
    address = urlsplit(url)
    return parse_qs(address.query).get("d", [""])[0] or unquote(address.path)


def _image_name(builder: RefBuilder, task: dict[str, Any]) -> str:
    """Return the file of a task's image, whose name Label Studio puts a prefix before.

    ``/data/upload/1/0a1b2c3d-my%20photo.png`` is ``my photo.png``, with the prefix or without.
    """
    data = _data(task)
    urls = [data[key] for key in IMAGE_KEYS if isinstance(data.get(key), str)]
    urls = urls or [url for url in data.values() if isinstance(url, str) and "." in url]
    require(urls, "the task has no image: its data should have the key image")
    suffixes = image_suffixes()
    # The first that ends like an image: sentences have dots, too.
    path = max(map(_path_of, urls), key=lambda path: PurePosixPath(path).suffix.lower() in suffixes)
    name = posixpath.basename(path.replace("\\", "/"))
    short = re.sub(r"^[0-9a-f]{8}-", "", name)
    candidates = dict.fromkeys((path.lstrip("/"), name, short))
    return next((n for n in candidates if builder.has_file(n)), short)
