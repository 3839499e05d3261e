"""Figures 4 and 5 of the paper, attention to words, and mIoU against the threshold."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from crislit.data import ReferEvaluationSet
from crislit.errors import InputError
from crislit.experiments.failures import FAILURE_COLUMNS, draw_failures, find_failures
from crislit.experiments.subjects import (
    Subject,
    check_same_samples,
    evenly_spaced,
    make_grid,
    unique_titles,
)
from crislit.io import write_csv
from crislit.models import CRIS
from crislit.training import draw_mask, intersection_and_union, iou, readable_text
from crislit.transforms import normalize, restore

Curve = Sequence[tuple[float, float]]
"""Thresholds with the mIoU of each, in [0, 1]."""


def draw_figure(
    kind: str,
    checkpoints: Sequence[Path],
    root: str,
    split: str,
    count: int | None,
    output: Path,
    trust: Sequence[str] = (),
) -> None:
    """Draw a figure; failures and thresholds also write a table beside it.

    Args:
        kind: ``compare``, ``failures``, ``attention`` or ``threshold``.
        checkpoints: The networks; one for failures and attention.
        root: Folder of all data.
        split: Split of their data set.
        count: Number of samples, evenly spaced; None chooses it by the kind.
        output: The image.
        trust: Packages outside crislit whose classes the networks may have.

    Raises:
        InputError: If a checkpoint or its data cannot be used, or a file cannot be written.
    """
    subjects = [Subject(path, root, split, trust) for path in checkpoints]
    check_same_samples(subjects)
    first, total = subjects[0], len(subjects[0].data)
    default = total if kind in ("failures", "threshold") else 6
    numbers = evenly_spaced(total, count or default)
    output.parent.mkdir(parents=True, exist_ok=True)
    table = output.with_suffix(".csv")
    if kind == "compare":
        figure = draw_comparison(subjects, numbers)
    elif kind == "failures":
        failures = find_failures(first, numbers)
        figure = draw_failures(first, failures, per_kind=3)
        rows = [{name: failure[name] for name in FAILURE_COLUMNS} for failure in failures]
        write_csv(table, FAILURE_COLUMNS, rows)
    elif kind == "attention":
        figure = draw_attention(first, numbers)
    else:
        titles = unique_titles(subjects)
        curves = {
            title: threshold_curve(subject, numbers)
            for title, subject in zip(titles, subjects, strict=True)
        }
        write_csv(table, ("network", "threshold", "mIoU"), curve_rows(curves))
        figure = draw_threshold(curves)
    figure.savefig(output, dpi=110, bbox_inches="tight", pad_inches=0.1)


def draw_comparison(subjects: Sequence[Subject], numbers: Sequence[int]) -> Figure:
    """Draw the masks of several networks beside the image and the target (figure 4)."""
    data = subjects[0].data
    predictions = [dict(subject.predictions(numbers)) for subject in subjects]
    figure, grid = make_grid(len(numbers), 2 + len(subjects), 2.4, 2.0, 0.4, frame=True)
    for row, number in zip(grid, numbers, strict=True):
        image, target = data.image(number), data.target(number)
        row[0].imshow(image)
        text, fonts = readable_text(f"“{data.sentence(number)}”")
        row[0].set_xlabel(text, family=fonts, fontsize=8, parse_math=False, wrap=True)
        draw_mask(row[1], image, target, "lime")
        for axes, subject, maps in zip(row[2:], subjects, predictions, strict=True):
            mask = maps[number] > subject.checkpoint.threshold
            draw_mask(axes, image, mask, "orange")
            axes.set_xlabel(f"IoU {iou(*intersection_and_union(mask, target)):.2f}", fontsize=8)
    titles = ["image", "target", *(subject.title for subject in subjects)]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    return figure


@torch.no_grad()
def word_attention(model: CRIS, images: Tensor, tokens: Tensor) -> Tensor:
    """Return the attention of the last decoder layer's cells to each word.

    Args:
        model: A network with a decoder.
        images: (B, 3, H, W), normalized.
        tokens: (B, L).

    Returns:
        (B, L, h, w'), the mean over heads; the L values of a cell add up to 1.

    Raises:
        InputError: If the network has no such decoder.
    """
    attention = last_cross_attention(model)
    weights: list[Tensor] = []  # (B, h w', L)
    with (
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"need_weights": True}), with_kwargs=True
        ),
        attention.register_forward_hook(lambda module, args, output: weights.append(output[1])),
    ):
        model(images, tokens)
    return weights[0].transpose(1, 2).reshape(*tokens.shape, images.shape[-2] // 16, -1)


def last_cross_attention(model: CRIS) -> torch.nn.MultiheadAttention:
    """Return the attention of the last decoder layer from cells to words.

    Raises:
        InputError: If there is none.
    """
    decoder = model.decoder
    if decoder is None:
        raise InputError("this network has no decoder, and so no attention from cells to words")
    layers = getattr(decoder, "layers", None)
    attention = getattr(layers[-1], "cross_attention", None) if layers else None
    if not isinstance(attention, torch.nn.MultiheadAttention):
        raise InputError(
            f"attention maps need a decoder whose last layer has a cross_attention of PyTorch "
            f"(torch.nn.MultiheadAttention), as in crislit.models.decoder; this one is "
            f"{type(decoder).__name__}"
        )
    return attention


def draw_attention(subject: Subject, numbers: Sequence[int]) -> Figure:
    """Draw the attention of an image's cells to each word, beside the prediction.

    Each map has its own range of colors, which its title gives.
    """
    tokenizer = SimpleTokenizer()
    rows = []
    for number in numbers:
        batch = ReferEvaluationSet.collate([subject.data[number]])
        images, tokens = normalize(batch.images), batch.tokens[0]
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
            text, fonts = readable_text(word)
            axes.set_title(f"{text}\n{limits}", family=fonts, fontsize=8, parse_math=False)
    return figure


def threshold_curve(subject: Subject, numbers: Sequence[int]) -> Curve:
    """Return the mIoU at thresholds from 0.05 to 0.95."""
    thresholds = [round(0.05 * step, 2) for step in range(1, 20)]
    total = np.zeros(len(thresholds))
    for number, probability in subject.predictions(numbers):
        target = subject.data.target(number)
        total += [iou(*intersection_and_union(probability > t, target)) for t in thresholds]
    return list(zip(thresholds, (total / len(numbers)).tolist(), strict=True))


def curve_rows(curves: Mapping[str, Curve]) -> list[dict[str, str]]:
    """Return a row per network and threshold."""
    return [
        {"network": title, "threshold": str(threshold), "mIoU": f"{value:.4f}"}
        for title, curve in curves.items()
        for threshold, value in curve
    ]


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
