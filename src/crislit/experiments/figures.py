"""Figures 4 and 5 of the paper, attention to words, and mIoU against the threshold."""

from collections.abc import Iterator, Mapping, Sequence
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

from crislit.checkpoints import Checkpoint, read_checkpoint
from crislit.data import ReferEvaluationSet, parse_segmentation, rasterize
from crislit.errors import InputError, require
from crislit.io import read_json
from crislit.models import CRIS
from crislit.training import CRISTask, build_data, draw_mask, intersection_and_union, iou
from crislit.transforms import normalise, restore

BoolMask = npt.NDArray[np.bool_]
Curve = Sequence[tuple[float, float]]
"""Thresholds with the mIoU of each, in [0, 1]."""
COVERED_SHARE = 0.5
"""Share of an object's pixels that a prediction must contain to cover the object."""
FAILURE_KINDS = {
    "ambiguous sentence": "the prediction covers the target and another object",
    "wrong object": "it covers another object, and not the target",
    "poor boundary": "it covers the target and no other object, but fits badly",
    "missed": "it covers no object",
}
"""Kinds of failures with their rules. An object is covered if half of its pixels are predicted."""
FAILURE_COLUMNS = ("sample", "name", "sentence", "IoU", "sort")
Failure = dict[str, Any]
"""The columns of a failure, and its prediction as COCO's run lengths."""


class Subject:
    """A trained network with a split of its data set.

    Args:
        path: Its checkpoint.
        root: Folder of all data.
        split: Split of its data set.

    Raises:
        InputError: If the checkpoint does not record its data set, or a file cannot be read.
    """

    def __init__(self, path: Path, root: str, split: str) -> None:
        self.checkpoint: Checkpoint = read_checkpoint(path)
        require(
            self.checkpoint.config,
            f"{path} does not say what data it was trained on: figures need checkpoints of "
            "crislit.train",
        )
        self.model: CRIS = self.checkpoint.build()
        self.task = CRISTask(self.model, threshold=self.checkpoint.threshold).eval()
        self.module = build_data(self.checkpoint.config | {"data_root": root, "workers": 0})
        self.data: ReferEvaluationSet = self.module.evaluation_set(split)

    @property
    def source(self) -> str:
        """The settings that decide which samples the data set has."""
        dataset = self.checkpoint.config["dataset"]
        names = ("name", "folder", "refs", "file")
        return " ".join(str(dataset[name]) for name in names if dataset.get(name))

    @property
    def title(self) -> str:
        """The network's name as in figure 4."""
        network = self.checkpoint.network
        layers = f"n = {network.decoder_layers}" if network.decoder_layers else ""
        if network.contrastive:
            return f"full, {layers}" if layers else "without decoder"
        return f"without contrastive, {layers}" if layers else "baseline"

    @torch.no_grad()
    def predictions(
        self, numbers: Sequence[int], batch_size: int = 16
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield samples' numbers with their probability maps, (h, w)."""
        batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
        for chunk in tqdm(batches, self.title, leave=False, disable=None):
            batch = ReferEvaluationSet.collate([self.data[number] for number in chunk])
            yield from zip(chunk, self.task.predict_probabilities(batch), strict=True)


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return at most ``count`` integers, evenly spaced from 0 to ``total - 1``."""
    return [int(number) for number in np.linspace(0, total - 1, min(count, total), dtype=int)]


def check_same_samples(subjects: Sequence[Subject]) -> None:
    """Check that a sample's number means the same sample for every network.

    Raises:
        InputError: If data set, protocol or choice of images differ.
    """
    first = subjects[0]
    for other in subjects[1:]:
        require(
            other.source == first.source,
            f"checkpoints of different data cannot be compared: {first.source} and {other.source}",
        )
        options = [
            f"protocol={subject.module.protocol} max_images={subject.module.max_images}"
            for subject in (first, other)
        ]
        require(
            np.array_equal(other.data.samples, first.data.samples),
            f"checkpoints of different samples cannot be compared: {' and '.join(options)}",
        )


def make_grid(
    rows: int, columns: int, width: float, height: float, margin: float, frame: bool
) -> tuple[Figure, Any]:
    """Return a figure and its axes, (rows, columns), without ticks; sizes per panel in inches."""
    figure = Figure(figsize=(width * columns, height * rows + margin), layout="constrained")
    properties = {"xticks": [], "yticks": [], "frame_on": frame}
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw=properties)


def draw_comparison(subjects: Sequence[Subject], numbers: Sequence[int]) -> Figure:
    """Draw the masks of several networks beside the image and the target (figure 4)."""
    data = subjects[0].data
    predictions = [dict(subject.predictions(numbers)) for subject in subjects]
    figure, grid = make_grid(len(numbers), 2 + len(subjects), 2.4, 2.0, 0.4, frame=True)
    for row, number in zip(grid, numbers, strict=True):
        image, target = data.image(number), data.target(number)
        row[0].imshow(image)
        row[0].set_xlabel(f"“{data.sentence(number)}”", fontsize=8, parse_math=False, wrap=True)
        draw_mask(row[1], image, target, "lime")
        for axes, subject, maps in zip(row[2:], subjects, predictions, strict=True):
            mask = maps[number] > subject.checkpoint.threshold
            draw_mask(axes, image, mask, "orange")
            axes.set_xlabel(f"IoU {iou(*intersection_and_union(mask, target)):.2f}", fontsize=8)
    titles = ["image", "target", *(subject.title for subject in subjects)]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    return figure


def classify_failure(prediction: BoolMask, target: BoolMask, others: Sequence[BoolMask]) -> str:
    """Return the kind of a failure, see :data:`FAILURE_KINDS`."""

    def covers(mask: BoolMask) -> bool:
        return bool(mask.any() and prediction[mask].mean() >= COVERED_SHARE)

    # Pixels shared with the target do not count, such as a tie's on the man who wears it.
    covers_other = any(covers(mask & ~target) for mask in others)
    if covers(target):
        return "ambiguous sentence" if covers_other else "poor boundary"
    return "wrong object" if covers_other else "missed"


def annotations_by_image(subject: Subject) -> dict[int, list[dict[str, Any]]]:
    """Return all annotated objects by image id, also those that no sentence describes.

    Raises:
        InputError: If the data set has no list of all objects.
    """
    path = subject.module.index.annotations_path
    if path is None:
        raise InputError(
            "failures are classified by all objects of an image, but this data set lists only "
            "those that sentences describe"
        )
    annotations: dict[int, list[dict[str, Any]]] = {}
    for annotation in read_json(path)["annotations"]:
        if not annotation.get("iscrowd"):
            annotations.setdefault(int(annotation["image_id"]), []).append(annotation)
    return annotations


def decode_annotation(annotation: Mapping[str, Any], height: int, width: int) -> BoolMask:
    """Return an annotation's mask, as the data set draws its refs.

    Raises:
        InputError: If it has no valid mask.
    """
    try:
        polygons, runs = parse_segmentation(annotation["segmentation"], (height, width))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"annotation {annotation.get('id')} cannot be drawn: {error!r}") from error
    outlines = [polygon.tolist() for polygon in polygons]
    return rasterize(outlines, np.array(runs, dtype=np.int64), height, width).astype(bool)


def find_failures(subject: Subject, numbers: Sequence[int]) -> list[Failure]:
    """Find and classify the samples with an IoU below one half, the worst first."""
    annotations = annotations_by_image(subject)
    failures = []
    for number, probability in subject.predictions(numbers):
        prediction = probability > subject.checkpoint.threshold
        target = subject.data.target(number).astype(bool)
        score = iou(*intersection_and_union(prediction, target))
        if score >= 0.5:
            continue
        image_id = subject.module.index.image_id(int(subject.data.samples[number, 0]))
        objects = [decode_annotation(a, *target.shape) for a in annotations.get(image_id, [])]
        # The target is annotated too.
        others = [mask for mask in objects if iou(*intersection_and_union(mask, target)) < 0.9]
        failures.append(
            {
                "sample": number,
                "name": subject.data.name(number),
                "sentence": subject.data.sentence(number),
                "IoU": score,
                "sort": classify_failure(prediction, target, others),
                # The masks of a whole split would fill the memory.
                "prediction": coco_mask.encode(np.asfortranarray(prediction, dtype=np.uint8)),
            }
        )
    return sorted(failures, key=lambda failure: failure["IoU"])


def draw_failures(subject: Subject, failures: Sequence[Failure], per_kind: int) -> Figure:
    """Draw the first failures of each kind, the target beside the prediction (figure 5)."""
    figure, grid = make_grid(len(FAILURE_KINDS), 2 * per_kind, 2.6, 2.35, 0.3, frame=False)
    for row, (kind, rule) in zip(grid, FAILURE_KINDS.items(), strict=True):
        members = [failure for failure in failures if failure["sort"] == kind]
        row[0].set_ylabel(f"{kind}\n{len(members)} of {len(failures)}", fontsize=9)
        row[0].set_title(rule, fontsize=8, loc="left")
        for i, failure in enumerate(members[:per_kind]):
            image, (left, right) = subject.data.image(failure["sample"]), row[2 * i : 2 * i + 2]
            draw_mask(left, image, subject.data.target(failure["sample"]), "lime")
            draw_mask(right, image, coco_mask.decode(failure["prediction"]), "orange")
            left.set_xlabel(f"“{failure['sentence']}”", fontsize=8, parse_math=False, wrap=True)
            right.set_xlabel(f"predicted, IoU {failure['IoU']:.2f}", fontsize=8)
    return figure


@torch.no_grad()
def word_attention(model: CRIS, images: Tensor, tokens: Tensor) -> Tensor:
    """Return the attention of the last decoder layer's cells to each word.

    Args:
        model: A network with a decoder.
        images: (B, 3, H, W), normalised.
        tokens: (B, L).

    Returns:
        (B, L, h, w'), the mean over heads; the L values of a cell add up to 1.

    Raises:
        InputError: If the network has no decoder.
    """
    if model.decoder is None:
        raise InputError("this network has no decoder, and so no attention from pixels to words")
    attention = model.decoder.layers[-1].get_submodule("cross_attention")
    weights: list[Tensor] = []  # (B, h w', L)
    with (
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"need_weights": True}), with_kwargs=True
        ),
        attention.register_forward_hook(lambda module, args, output: weights.append(output[1])),
    ):
        model(images, tokens)
    return weights[0].transpose(1, 2).reshape(*tokens.shape, images.shape[-2] // 16, -1)


def draw_attention(subject: Subject, numbers: Sequence[int]) -> Figure:
    """Draw the attention of an image's cells to each word, beside the prediction.

    Each map has its own range of colors, which its title gives.
    """
    tokenizer = SimpleTokenizer()
    rows = []
    for number in numbers:
        batch = ReferEvaluationSet.collate([subject.data[number]])
        images, tokens = normalise(batch.images), batch.tokens[0]
        (probability,) = subject.task.predict_probabilities(batch)
        end = int(tokens.argmax())
        words = [tokenizer.decode([int(token)]).strip() for token in tokens[1:end]]
        cells = word_attention(subject.model, images, batch.tokens)[:, 1:end]
        squares = torch.nn.functional.interpolate(cells, images.shape[-2:], mode="bilinear")[0]
        maps = [restore(square, *probability.shape) for square in squares.numpy()]
        rows.append((number, probability > subject.checkpoint.threshold, words, maps))
    columns = 1 + max(len(words) for _, _, words, _ in rows)
    figure, grid = make_grid(len(rows), columns, 1.9, 1.62, 0.2, frame=False)
    for line, (number, mask, words, maps) in zip(grid, rows, strict=True):
        image = subject.data.image(number)
        draw_mask(line[0], image, mask, "orange")
        line[0].set_title("prediction", fontsize=8)
        for axes, word, attention in zip(line[1:], words, maps, strict=False):
            low, high = np.percentile(attention, [2, 98])
            axes.imshow(image.mean(axis=2), cmap="gray", alpha=0.6)
            axes.imshow(attention, cmap="inferno", alpha=0.65, vmin=low, vmax=high)
            limits = f"{100 * low:.1f} to {100 * high:.1f} %"
            axes.set_title(f"{word}\n{limits}", fontsize=8, parse_math=False)
    return figure


def threshold_curve(subject: Subject, numbers: Sequence[int]) -> Curve:
    """Return the mIoU at thresholds from 0.05 to 0.95."""
    thresholds = [round(0.05 * step, 2) for step in range(1, 20)]
    total = np.zeros(len(thresholds))
    for number, probability in subject.predictions(numbers):
        target = subject.data.target(number)
        total += [iou(*intersection_and_union(probability > t, target)) for t in thresholds]
    return list(zip(thresholds, (total / len(numbers)).tolist(), strict=True))


def draw_threshold(curves: Mapping[str, Curve]) -> Figure:
    """Draw mIoU against the threshold, and mark the paper's 0.35."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for title, curve in curves.items():
        thresholds, values = zip(*curve, strict=True)
        axes.plot(thresholds, [100 * value for value in values], "o-", markersize=3, label=title)
    axes.axvline(0.35, color="black", linestyle="--", linewidth=1, label="0.35, the paper's")
    axes.set(xlabel="threshold", ylabel="mIoU, percent")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
