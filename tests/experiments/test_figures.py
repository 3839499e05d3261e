"""Figures 4 and 5, attention, and the threshold, of a barely trained network."""

import csv
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from pycocotools import mask as coco_mask

from crislit import figures as figures_command
from crislit.checkpoints.checkpoint import KEY
from crislit.errors import InputError
from crislit.experiments import figures
from crislit.experiments.figures import (
    Subject,
    classify_failure,
    evenly_spaced,
    other_objects,
    threshold_curve,
    word_attention,
)
from crislit.training.metrics import intersection_and_union, iou
from crislit.transforms.tokenizer import tokenize


def squares(*places: tuple[int, int]) -> list[np.ndarray]:
    """Masks of 4 x 4 pixels at these rows and columns of a 20 x 20 picture."""
    masks = []
    for row, column in places:
        mask = np.zeros((20, 20), dtype=bool)
        mask[row : row + 4, column : column + 4] = True
        masks.append(mask)
    return masks


def test_failures_are_sorted_by_what_the_prediction_covers() -> None:
    target, other = squares((2, 2), (10, 10))
    nothing = np.zeros_like(target)
    assert classify_failure(target | other, target, [other]) == "ambiguous sentence"
    assert classify_failure(other, target, [other]) == "wrong object"
    assert classify_failure(target, target, [other]) == "poor boundary"
    assert (
        classify_failure(np.roll(target, 2, axis=0), target, [other]) == "poor boundary"
    )  # half of it
    assert (
        classify_failure(np.roll(target, 3, axis=0), target, [other]) == "missed"
    )  # a quarter of it
    assert classify_failure(nothing, target, [other]) == "missed"
    assert (
        classify_failure(other, target, [nothing]) == "missed"
    )  # an object without pixels is never covered
    assert classify_failure(target, target, []) == "poor boundary"
    part = target.copy()
    part[:, :4] = False  # a thing within the target, and predicted with it
    assert classify_failure(target, target, [part]) == "poor boundary"
    assert classify_failure(target | other, target, [part | other]) == "ambiguous sentence"


def test_attention_over_words_is_a_distribution_and_padding_gets_none(
    four_networks: list[Path], small_shapes: Path
) -> None:
    subject = Subject(four_networks[3], str(small_shapes), "val")
    tokens = tokenize(["red star", "the big blue circle on the left"], 12)
    images = torch.randn(2, 3, 64, 96)
    maps = word_attention(subject.model, images, tokens)
    assert maps.shape == (2, 12, 4, 6)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 4, 6))
    ends = tokens.argmax(dim=1)
    assert float(maps[0, ends[0] + 1 :].abs().max()) == 0
    assert float(maps[1, : ends[1] + 1].min()) > 0
    # Looking changes nothing.
    before = subject.model(images, tokens)
    word_attention(subject.model, images, tokens)
    torch.testing.assert_close(subject.model(images, tokens), before)


def test_a_network_without_decoder_has_no_attention_to_show(
    four_networks: list[Path], small_shapes: Path
) -> None:
    subject = Subject(four_networks[1], str(small_shapes), "val")
    with pytest.raises(InputError, match="no decoder"):
        word_attention(subject.model, torch.zeros(1, 3, 64, 64), tokenize(["star"], 12))


def test_networks_are_called_as_in_figure_4(four_networks: list[Path], small_shapes: Path) -> None:
    titles = [Subject(path, str(small_shapes), "val").title for path in four_networks]
    assert titles == ["baseline", "without decoder", "without contrastive, n = 1", "full, n = 3"]


def test_every_annotated_object_may_be_taken_for_the_target(
    four_networks: list[Path], small_shapes: Path
) -> None:
    subject = Subject(four_networks[0], str(small_shapes), "val")
    annotations = other_objects(subject)
    for number in range(0, len(subject.data), 5):
        target = subject.data.target(number).astype(bool)
        image = subject.module.index.image_id(int(subject.data.samples[number, 0]))
        masks = [
            figures.decode_annotation(annotation, *target.shape)
            for annotation in annotations[image]
        ]
        assert len(masks) >= 4
        assert sum(np.array_equal(mask, target) for mask in masks) == 1


def test_the_threshold_curve_agrees_with_masks_cut_by_hand(
    four_networks: list[Path], small_shapes: Path
) -> None:
    subject = Subject(four_networks[3], str(small_shapes), "val")
    numbers = [0, 7, 11]
    curve = dict(threshold_curve(subject, numbers))
    assert list(curve) == [round(0.05 * step, 2) for step in range(1, 20)]
    for threshold in (0.05, 0.35, 0.5):
        by_hand = [
            iou(*intersection_and_union(probability > threshold, subject.data.target(number)))
            for number, probability in subject.predictions(numbers)
        ]
        assert curve[threshold] == pytest.approx(np.mean(by_hand))


def test_samples_are_spread_over_the_split() -> None:
    assert evenly_spaced(10, 3) == [0, 4, 9]
    assert evenly_spaced(2, 6) == [0, 1]


def shown(axes: Axes) -> np.ndarray:
    """The picture on some axes, as it was handed over."""
    return np.asarray(axes.images[0].get_array())


def darkened(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture as it is drawn with a mask."""
    return (image * np.where(mask, 1.0, 0.3)[..., None]).astype(np.uint8)


def predicting(
    subject: Subject, maps: dict[int, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have a network predict these probabilities."""
    monkeypatch.setattr(
        subject,
        "predictions",
        lambda numbers, at_once=16: ((number, maps[number]) for number in numbers),
    )


def test_figure_4_shows_each_networks_mask_of_the_same_samples(
    four_networks: list[Path], small_shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects, numbers = [Subject(path, str(small_shapes), "val") for path in four_networks], [0, 7]
    data = subjects[0].data
    given = {}
    for i, subject in enumerate(subjects):
        maps = {number: np.full(data.target(number).shape, 0.34, np.float32) for number in numbers}
        for number in numbers:
            maps[number][: 30 * (i + 1), : 50 + number] = 0.36  # the threshold is 0.35
            given[i, number] = maps[number] == np.float32(0.36)
        predicting(subject, maps, monkeypatch)
    grid = np.array(figures.draw_comparison(subjects, numbers).axes).reshape(2, 6)
    names = ["baseline", "without decoder", "without contrastive, n = 1", "full, n = 3"]
    assert [axes.get_title() for axes in grid[0]] == ["image", "truth", *names]
    for row, number in zip(grid, numbers, strict=True):
        image, target = data.image(number), data.target(number).astype(bool)
        assert row[0].get_xlabel() == f"“{data.sentence(number)}”"
        assert np.array_equal(shown(row[0]), image)
        assert np.array_equal(shown(row[1]), darkened(image, target))
        for i, axes in enumerate(row[2:]):
            assert np.array_equal(shown(axes), darkened(image, given[i, number]))
            assert (
                axes.get_xlabel()
                == f"IoU {iou(*intersection_and_union(given[i, number], target)):.2f}"
            )


def test_figure_5_shows_the_worst_of_each_sort(
    four_networks: list[Path], small_shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(four_networks[3], str(small_shapes), "val")
    numbers = [
        int(np.flatnonzero(subject.data.image_ids == picture)[0])
        for picture in np.unique(subject.data.image_ids)
    ]
    sorts = ["right", "ambiguous sentence", "wrong object", "poor boundary", "missed", "missed"]
    annotations, predicted = other_objects(subject), {}
    for number, sort in zip(numbers, sorts, strict=True):
        target = subject.data.target(number).astype(bool)
        drawn = annotations[subject.module.index.image_id(int(subject.data.samples[number, 0]))]
        masks = [figures.decode_annotation(annotation, *target.shape) for annotation in drawn]
        others = [mask & ~target for mask in masks if not np.array_equal(mask, target)]
        background = ~(target | np.logical_or.reduce(others))
        predicted[number] = {
            "right": target,
            "ambiguous sentence": target | np.logical_or.reduce(others),
            "wrong object": max(others, key=np.count_nonzero),
            "poor boundary": target | background,
            "missed": np.zeros_like(target),
        }[sort]
    predicting(
        subject,
        {number: mask.astype(np.float32) for number, mask in predicted.items()},
        monkeypatch,
    )
    figure, found = figures.draw_failures(subject, numbers, each=2)
    assert sorted((row["sample"], row["sort"]) for row in found) == sorted(
        zip(numbers[1:], sorts[1:], strict=True)
    )
    assert [row["IoU"] for row in found] == sorted(row["IoU"] for row in found)
    for line, (sort, rule) in zip(
        np.array(figure.axes).reshape(4, 4), figures.FAILURE_KINDS.items(), strict=True
    ):
        members = [row for row in found if row["sort"] == sort]
        assert line[0].get_ylabel() == f"{sort}\n{len(members)} of 5"
        assert line[0].get_title(loc="left") == rule
        for i, row in enumerate(members):
            image, target = (
                subject.data.image(row["sample"]),
                subject.data.target(row["sample"]).astype(bool),
            )
            assert np.array_equal(shown(line[2 * i]), darkened(image, target))
            assert np.array_equal(shown(line[2 * i + 1]), darkened(image, predicted[row["sample"]]))
            score = iou(*intersection_and_union(predicted[row["sample"]], target))
            assert line[2 * i + 1].get_xlabel() == f"predicted, IoU {score:.2f}"
            assert row["IoU"] == pytest.approx(score)
        assert not any(axes.images for axes in line[2 * len(members) :])


def test_attention_is_the_softmax_over_words_of_queries_and_keys(
    four_networks: list[Path], small_shapes: Path
) -> None:
    model = Subject(four_networks[3], str(small_shapes), "val").model
    assert model.decoder is not None
    images, tokens = torch.randn(2, 3, 64, 96), tokenize(["red star", "the big blue circle"], 12)
    layer = model.decoder.layers[-1].cross_attention
    assert isinstance(layer, torch.nn.MultiheadAttention)
    given: dict[str, torch.Tensor] = {}
    catch = layer.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(
            cells=args[0], words=args[1], padding=kwargs["key_padding_mask"]
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(images, tokens)
        catch.remove()
        width, heads = layer.embed_dim, layer.num_heads
        weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
        queries, keys = (
            (given[name] @ weights[i].T + biases[i])
            .reshape(2, -1, heads, width // heads)
            .transpose(1, 2)
            for i, name in enumerate(("cells", "words"))
        )
        scores = queries @ keys.transpose(2, 3) / (width // heads) ** 0.5
        by_hand = (
            scores.masked_fill(given["padding"][:, None, None], -torch.inf).softmax(-1).mean(1)
        )  # (B, cells, L)
        maps = word_attention(model, images, tokens)
    for y, x in ((0, 0), (0, 5), (3, 0), (2, 4)):
        torch.testing.assert_close(maps[:, :, y, x], by_hand[:, 6 * y + x])


def test_attention_has_a_panel_a_word_with_its_range(
    four_networks: list[Path], small_shapes: Path
) -> None:
    subject, numbers = Subject(four_networks[3], str(small_shapes), "val"), [0, 9]
    lines = np.array(figures.draw_attention(subject, numbers).axes).reshape(2, -1)
    for line, number in zip(lines, numbers, strict=True):
        panels = [axes for axes in line[1:] if axes.images]
        titles = [axes.get_title().split("\n") for axes in panels]
        assert [word for word, _ in titles] == subject.data.sentence(number).split()
        ranges = [axes.images[1].get_clim() for axes in panels]
        assert [told for _, told in titles] == [
            f"{100 * low:.1f} to {100 * high:.1f} %" for low, high in ranges
        ]


def test_the_threshold_is_drawn_in_percent_with_the_papers_marked() -> None:
    (axes,) = figures.draw_threshold({"full": [(0.3, 0.5), (0.4, 0.25)]}).axes
    curve, mark = axes.lines
    assert np.asarray(curve.get_xydata()).tolist() == [[0.3, 50.0], [0.4, 25.0]]
    assert np.unique(np.asarray(mark.get_xdata())).tolist() == [0.35]


def test_objects_that_cannot_be_drawn_are_named_and_compressed_run_lengths_can() -> None:
    box = np.zeros((6, 8), np.uint8)
    box[2:4, 3:6] = 1
    packed = coco_mask.encode(np.asfortranarray(box))
    segmentation = {"size": [6, 8], "counts": packed["counts"].decode()}
    assert np.array_equal(
        figures.decode_annotation({"id": 1, "segmentation": segmentation}, 6, 8), box
    )
    assert not figures.decode_annotation(
        {"id": 1, "segmentation": [[1, 1, 2, 2]]}, 6, 8
    ).any()  # fewer than three points
    with pytest.raises(InputError, match="annotation 7 cannot be drawn"):
        figures.decode_annotation({"id": 7, "segmentation": [["x"]]}, 6, 8)


@pytest.mark.parametrize("kind", ["compare", "failures", "attention", "threshold"])
def test_each_figure_is_one_command(
    kind: str, four_networks: list[Path], small_shapes: Path, tmp_path: Path
) -> None:
    chosen = four_networks if kind in ("compare", "threshold") else four_networks[-1:]
    output = tmp_path / f"deep/{kind}.png"
    figures_command.main(
        [
            kind,
            *map(str, chosen),
            "--data-root",
            str(small_shapes),
            "--samples",
            "4",
            "--output",
            str(output),
        ]
    )
    picture = matplotlib.image.imread(output)
    assert picture.shape[0] > 200
    assert picture[..., :3].std() > 0.05  # something is drawn
    assert all(
        (side[..., :3] == 1).all()
        for side in (picture[0], picture[-1], picture[:, 0], picture[:, -1])
    ), "nothing is cut"
    if kind == "threshold":
        with output.with_suffix(".csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 4 * 19
    if kind == "failures":
        with output.with_suffix(".csv").open() as file:
            rows = list(csv.DictReader(file))
        assert all(row["sort"] in figures.FAILURE_KINDS and float(row["IoU"]) < 0.5 for row in rows)
        assert [float(row["IoU"]) for row in rows] == sorted(float(row["IoU"]) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["failures", "CHECKPOINT", "CHECKPOINT"], "failures looks at one checkpoint, not 2"),
        (["compare", "nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
        (["compare", "CHECKPOINT", "--split", "testC"], "no split 'testC'"),
        (["threshold", "CHECKPOINT", "--samples", "-3"], "--samples must be 1 or more, got -3"),
    ],
)
def test_bad_input_is_one_error_line(
    arguments: list[str], expected: str, four_networks: list[Path], small_shapes: Path
) -> None:
    filled = [
        str(four_networks[0]) if argument == "CHECKPOINT" else argument for argument in arguments
    ]
    with pytest.raises(SystemExit, match=f"error: .*{expected}"):
        figures_command.main([*filled, "--data-root", str(small_shapes)])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"protocol": "first_sentence"},
            "different samples cannot be compared: protocol=all_sentences .* protocol=first_sentence",
        ),
        ({"dataset": {"name": "mine"}}, "different data cannot be compared: shapes .* and mine"),
    ],
)
@pytest.mark.parametrize("kind", ["compare", "threshold"])
def test_networks_whose_samples_differ_are_not_drawn_together(
    kind: str,
    change: dict[str, Any],
    expected: str,
    four_networks: list[Path],
    small_shapes: Path,
    tmp_path: Path,
) -> None:
    checkpoint = torch.load(four_networks[0], weights_only=True)
    config = checkpoint[KEY]["config"]
    config |= {
        name: config[name] | value if isinstance(value, dict) else value
        for name, value in change.items()
    }
    torch.save(checkpoint, tmp_path / "other.ckpt")
    arguments = [
        kind,
        str(four_networks[0]),
        str(tmp_path / "other.ckpt"),
        "--data-root",
        str(small_shapes),
    ]
    with pytest.raises(SystemExit, match=f"error: .*{expected}"):
        figures_command.main(arguments)
