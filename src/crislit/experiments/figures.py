"""Figures 4 and 5 of the paper, word attention, and mIoU against the threshold."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from open_clip.tokenizer import SimpleTokenizer
from pycocotools import mask as coco_mask
from torch import Tensor
from tqdm import tqdm

from crislit.checkpoints.checkpoint import Checkpoint, read_checkpoint
from crislit.data.dataset import ReferEvaluationSet
from crislit.data.refer_annotations import parse_segmentation, rasterize
from crislit.errors import InputError
from crislit.io.files import read_json
from crislit.models.cris import CRIS
from crislit.models.decoder import DecoderLayer
from crislit.training.build import build_data
from crislit.training.callbacks import draw_mask
from crislit.training.metrics import intersection_and_union, iou
from crislit.training.task import CRISTask
from crislit.transforms.letterbox import normalise, probability_maps, restore

Mask = npt.NDArray[np.bool_]
Probability = npt.NDArray[np.float32]
COVERED_SHARE = 0.5
"""An object counts as covered if the prediction has at least this share of its pixels."""
FAILURE_KINDS = {
    "ambiguous sentence": "the prediction covers the target and another object",
    "wrong object": "it covers another object, and not the target",
    "poor boundary": "it covers the target and no other object, and still fits badly",
    "missed": "it covers no object",
}
"""Sorts of failures and the rule of each; an object is covered if half of its pixels are predicted."""


class Subject:
    """A trained network with the data that it is looked at on.

    Args:
        path: Its checkpoint.
        root: Data root.
        split: Split of its data set.
    """

    def __init__(self, path: Path, root: str, split: str) -> None:
        self.checkpoint: Checkpoint = read_checkpoint(path)
        if not self.checkpoint.config:
            raise InputError(
                f"{path} does not say what data it was trained on: figures are drawn of crislit.train's networks"
            )
        self.model: CRIS = self.checkpoint.build()
        self.task = CRISTask(self.model, threshold=self.checkpoint.threshold).eval()
        self.module = build_data(self.checkpoint.config | {"data_root": root, "workers": 0})
        self.data: ReferEvaluationSet = self.module.evaluation_set(split)

    @property
    def source(self) -> str:
        """What the network was trained on, as far as it decides which samples there are."""
        dataset = self.checkpoint.config["dataset"]
        return " ".join(
            str(dataset[name]) for name in ("name", "folder", "refs", "file") if dataset.get(name)
        )

    @property
    def title(self) -> str:
        """How figure 4 calls such a network."""
        network = self.checkpoint.network
        contrastive, layers = network.contrastive, network.decoder_layers
        if contrastive:
            return f"full, n = {layers}" if layers else "without decoder"
        return f"without contrastive, n = {layers}" if layers else "baseline"

    @torch.no_grad()
    def predictions(
        self, numbers: Sequence[int], at_once: int = 16
    ) -> Iterator[tuple[int, Probability]]:
        """Yield samples' numbers with their probabilities, (h, w)."""
        parts = [numbers[i : i + at_once] for i in range(0, len(numbers), at_once)]
        for part in tqdm(parts, self.title, leave=False, disable=None):
            batch = ReferEvaluationSet.collate([self.data[number] for number in part])
            yield from zip(part, self.task.predict_probabilities(batch), strict=True)


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return so many numbers below a total, evenly over it."""
    return [int(number) for number in np.linspace(0, total - 1, min(count, total), dtype=int)]


def check_same_samples(subjects: Sequence[Subject]) -> None:
    """Make sure that a sample's number means the same for every network.

    Raises:
        InputError: If they are of different data sets, or of another protocol or choice of images.
    """
    first = subjects[0]
    for other in subjects[1:]:
        if other.source != first.source:
            raise InputError(
                f"checkpoints of different data cannot be compared: {first.source} and {other.source}"
            )
        if not np.array_equal(other.data.samples, first.data.samples):
            found = [
                f"protocol={s.module.protocol} max_images={s.module.max_images}"
                for s in (first, other)
            ]
            raise InputError(
                f"checkpoints of different samples cannot be compared: {' and '.join(found)}"
            )


def draw_comparison(subjects: Sequence[Subject], numbers: Sequence[int]) -> Figure:
    """Draw the same samples' masks by several networks side by side, after the picture and the truth (figure 4)."""
    first = subjects[0]
    masks = [dict(subject.predictions(numbers)) for subject in subjects]
    figure = Figure(
        figsize=(2.4 * (2 + len(subjects)), 2.0 * len(numbers) + 0.4), layout="constrained"
    )
    grid = figure.subplots(len(numbers), 2 + len(subjects), squeeze=False)
    for row, number in zip(grid, numbers, strict=True):
        image, target = first.data.image(number), first.data.target(number).astype(bool)
        row[0].imshow(image)
        draw_mask(row[1], image, target, "lime")
        for axes, subject, found in zip(row[2:], subjects, masks, strict=True):
            mask = found[number] > subject.checkpoint.threshold
            draw_mask(axes, image, mask, "orange")
            axes.set_xlabel(f"IoU {iou(*intersection_and_union(mask, target)):.2f}", fontsize=8)
        row[0].set_xlabel(
            f"“{first.data.sentence(number)}”", fontsize=8, parse_math=False, wrap=True
        )
    for axes, title in zip(
        grid[0], ["image", "truth", *(subject.title for subject in subjects)], strict=True
    ):
        axes.set_title(title, fontsize=9)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def classify_failure(prediction: Mask, target: Mask, others: Sequence[Mask]) -> str:
    """Return the sort of a failure, see :data:`SORTS`."""

    def covered(mask: Mask) -> bool:
        return bool(
            mask.any()
            and np.count_nonzero(prediction & mask) >= COVERED_SHARE * np.count_nonzero(mask)
        )

    on_target, other = (
        covered(target),
        any(covered(mask & ~target) for mask in others),
    )  # a tie is part of the man who wears it
    if on_target:
        return "ambiguous sentence" if other else "poor boundary"
    return "wrong object" if other else "missed"


def other_objects(subject: Subject) -> dict[int, list[dict[str, Any]]]:
    """Return every annotation of each picture, by image id: described or not, any object may be taken for the target."""
    path = subject.module.index.annotations_path
    found: dict[int, list[dict[str, Any]]] = {}
    if path is None:
        raise InputError(
            "failures are sorted by all objects of a picture, and this data set lists none but those described"
        )
    for annotation in read_json(path)["annotations"]:
        if annotation.get("iscrowd"):  # many things at once
            continue
        found.setdefault(int(annotation["image_id"]), []).append(annotation)
    return found


def decode_annotation(annotation: dict[str, Any], height: int, width: int) -> Mask:
    """Return an annotation's mask, as the reader draws a ref's.

    Raises:
        InputError: If it has none that can be read.
    """
    try:
        polygons, runs = parse_segmentation(annotation["segmentation"], (height, width))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"annotation {annotation.get('id')} cannot be drawn: {error!r}") from error
    return rasterize(
        [polygon.tolist() for polygon in polygons], np.array(runs, dtype=np.int64), height, width
    ).astype(bool)


def draw_failures(
    subject: Subject, numbers: Sequence[int], each: int
) -> tuple[Figure, list[dict[str, Any]]]:
    """Find the worst samples (IoU below a half), sort them, and draw the worst of each sort (figure 5).

    Returns:
        The figure, and all failures with number, sentence, IoU and sort, the worst first.
    """
    annotations = other_objects(subject)
    found: list[dict[str, Any]] = []
    for number, probability in subject.predictions(numbers):
        prediction, target = (
            probability > subject.checkpoint.threshold,
            subject.data.target(number).astype(bool),
        )
        score = iou(*intersection_and_union(prediction, target))
        if score >= 0.5:
            continue
        image_id = subject.module.index.image_id(int(subject.data.samples[number, 0]))
        masks = [
            decode_annotation(annotation, *target.shape)
            for annotation in annotations.get(image_id, [])
        ]
        others = [
            mask for mask in masks if iou(*intersection_and_union(mask, target)) < 0.9
        ]  # not the target itself
        sort = classify_failure(prediction, target, others)
        name, runs = (
            subject.data.name(number),
            coco_mask.encode(np.asfortranarray(prediction, dtype=np.uint8)),
        )
        found.append(
            {
                "sample": number,
                "name": name,
                "sentence": subject.data.sentence(number),
                "IoU": score,
                "sort": sort,
            }
            | {"prediction": runs}  # packed: a whole split's would fill the memory
        )
    found.sort(key=lambda failure: failure["IoU"])
    figure = Figure(figsize=(2.6 * 2 * each, 2.35 * len(FAILURE_KINDS) + 0.3), layout="constrained")
    grid = figure.subplots(len(FAILURE_KINDS), 2 * each, squeeze=False)
    for row, (sort, rule) in zip(grid, FAILURE_KINDS.items(), strict=True):
        members = [failure for failure in found if failure["sort"] == sort]
        row[0].set_ylabel(f"{sort}\n{len(members)} of {len(found)}", fontsize=9)
        row[0].set_title(rule, fontsize=8, loc="left")
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_frame_on(False)
        for i, failure in enumerate(members[:each]):
            image = subject.data.image(failure["sample"])
            draw_mask(row[2 * i], image, subject.data.target(failure["sample"]), "lime")
            draw_mask(row[2 * i + 1], image, coco_mask.decode(failure["prediction"]), "orange")
            row[2 * i].set_xlabel(
                f"“{failure['sentence']}”", fontsize=8, parse_math=False, wrap=True
            )
            row[2 * i + 1].set_xlabel(f"predicted, IoU {failure['IoU']:.2f}", fontsize=8)
    return figure, [
        {key: value for key, value in failure.items() if key != "prediction"} for failure in found
    ]


@torch.no_grad()
def word_attention(model: CRIS, images: Tensor, tokens: Tensor) -> Tensor:
    """Return how much each cell of the last decoder layer attends to each word: (B, L, h, w'), a distribution over words.

    Raises:
        InputError: If the network has no decoder.
    """
    if model.decoder is None:
        raise InputError(
            "this network has no decoder, and so no attention between words and pixels"
        )
    layer = model.decoder.layers[-1]
    assert isinstance(layer, DecoderLayer)
    attention = layer.cross_attention
    caught: list[Tensor] = []
    hooks = [
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"need_weights": True}), with_kwargs=True
        ),
        attention.register_forward_hook(lambda module, args, output: caught.append(output[1])),
    ]
    try:
        model(images, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    h, w = images.shape[-2] // 16, images.shape[-1] // 16
    return caught[0].transpose(1, 2).reshape(len(tokens), -1, h, w)  # heads averaged


def draw_attention(subject: Subject, numbers: Sequence[int]) -> Figure:
    """Draw, for each word of a sentence, where in the picture cells attend to it, beside the prediction."""
    tokenizer = SimpleTokenizer()
    rows = []
    for number in numbers:
        batch = ReferEvaluationSet.collate([subject.data[number]])
        images, tokens, target = normalise(batch.images), batch.tokens[0], batch.targets[0]
        maps = word_attention(subject.model, images, batch.tokens)[0]
        with torch.no_grad():
            logits = subject.model(images, batch.tokens)
        (probability,) = probability_maps(logits, images.shape[-1], [target.shape])
        mask = probability > subject.checkpoint.threshold
        length = int(tokens.argmax())
        words = [tokenizer.decode([int(token)]).strip() for token in tokens[1:length]]
        sized = torch.nn.functional.interpolate(
            maps[None, 1:length], size=images.shape[-2:], mode="bilinear"
        )[0].numpy()
        rows.append((number, mask, words, [restore(m, *target.shape) for m in sized]))
    most = max(len(words) for _, _, words, _ in rows)
    figure = Figure(figsize=(1.9 * (1 + most), 1.62 * len(rows) + 0.2), layout="constrained")
    grid = figure.subplots(len(rows), 1 + most, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for line, (number, mask, words, maps_of) in zip(grid, rows, strict=True):
        picture = subject.data.image(number)
        draw_mask(line[0], picture, mask, "orange")
        line[0].set_title("prediction", fontsize=8)
        for axes, word, attention in zip(line[1:], words, maps_of, strict=False):
            axes.imshow(picture.mean(axis=2), cmap="gray", alpha=0.6)
            low, high = np.percentile(
                attention, [2, 98]
            )  # each map's own range, which its title tells
            axes.imshow(attention, cmap="inferno", alpha=0.65, vmin=low, vmax=high)
            axes.set_title(
                f"{word}\n{100 * low:.1f} to {100 * high:.1f} %", fontsize=8, parse_math=False
            )
    return figure


def threshold_curve(subject: Subject, numbers: Sequence[int]) -> list[tuple[float, float]]:
    """Return (threshold, mIoU) over a range of thresholds."""
    thresholds = [round(0.05 * step, 2) for step in range(1, 20)]
    total = np.zeros(len(thresholds))
    for number, probability in subject.predictions(numbers):
        target = subject.data.target(number)
        total += [
            iou(*intersection_and_union(probability > threshold, target))
            for threshold in thresholds
        ]
    return list(zip(thresholds, (total / len(numbers)).tolist(), strict=True))


def draw_threshold(curves: dict[str, list[tuple[float, float]]]) -> Figure:
    """Draw mIoU against the threshold, the paper's 0.35 marked."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for title, curve in curves.items():
        axes.plot(
            *zip(*[(threshold, 100 * value) for threshold, value in curve], strict=True),
            "o-",
            markersize=3,
            label=title,
        )
    axes.axvline(0.35, color="black", linestyle="--", linewidth=1, label="0.35, the paper's")
    axes.set_xlabel("threshold")
    axes.set_ylabel("mIoU, percent")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV beside the picture."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
