"""Figures 4 and 5, attention, and the threshold, of a barely trained network."""

import csv
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from crislit import figures
from crislit.data.tokenizer import tokenize
from crislit.errors import InputError
from crislit.figures import Subject, other_objects, sort_failure, spread, threshold_curve, word_attention
from crislit.metrics import intersection_and_union, iou


def squares(*places: tuple[int, int]) -> list[np.ndarray]:
    """Masks of 4 x 4 pixels at these rows and columns of a 20 x 20 picture."""
    masks = []
    for row, column in places:
        mask = np.zeros((20, 20), dtype=bool)
        mask[row : row + 4, column : column + 4] = True
        masks.append(mask)
    return masks


def test_failures_are_sorted_by_what_the_prediction_covers() -> None:
    truth, other = squares((2, 2), (10, 10))
    nothing = np.zeros_like(truth)
    assert sort_failure(truth | other, truth, [other]) == "ambiguous sentence"
    assert sort_failure(other, truth, [other]) == "wrong object"
    assert sort_failure(truth, truth, [other]) == "poor boundary"
    assert sort_failure(np.roll(truth, 2, axis=0), truth, [other]) == "poor boundary"  # half of it
    assert sort_failure(np.roll(truth, 3, axis=0), truth, [other]) == "missed"  # a quarter of it
    assert sort_failure(nothing, truth, [other]) == "missed"
    assert sort_failure(other, truth, [nothing]) == "missed"  # an object without pixels is never covered
    assert sort_failure(truth, truth, []) == "poor boundary"
    part = truth.copy()
    part[:, :4] = False  # a thing within the target, and predicted with it
    assert sort_failure(truth, truth, [part]) == "poor boundary"
    assert sort_failure(truth | other, truth, [part | other]) == "ambiguous sentence"


def test_attention_over_words_is_a_distribution_and_padding_gets_none(four_networks: list[Path], small_shapes: Path) -> None:
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


def test_a_network_without_decoder_has_no_attention_to_show(four_networks: list[Path], small_shapes: Path) -> None:
    subject = Subject(four_networks[1], str(small_shapes), "val")
    with pytest.raises(InputError, match="no decoder"):
        word_attention(subject.model, torch.zeros(1, 3, 64, 64), tokenize(["star"], 12))


def test_networks_are_called_as_in_figure_4(four_networks: list[Path], small_shapes: Path) -> None:
    titles = [Subject(path, str(small_shapes), "val").title for path in four_networks]
    assert titles == ["baseline", "without decoder", "without contrastive, n = 1", "full, n = 3"]


def test_every_annotated_object_may_be_taken_for_the_target(four_networks: list[Path], small_shapes: Path) -> None:
    subject = Subject(four_networks[0], str(small_shapes), "val")
    annotations = other_objects(subject)
    for number in range(0, len(subject.data), 5):
        truth = subject.data.truth(number).astype(bool)
        image = subject.module.index.image_id(int(subject.data.samples[number, 0]))
        masks = [figures.decode(annotation, *truth.shape) for annotation in annotations[image]]
        assert len(masks) >= 4
        assert sum(np.array_equal(mask, truth) for mask in masks) == 1


def test_the_threshold_curve_agrees_with_masks_cut_by_hand(four_networks: list[Path], small_shapes: Path) -> None:
    subject = Subject(four_networks[3], str(small_shapes), "val")
    numbers = [0, 7, 11]
    curve = dict(threshold_curve(subject, numbers))
    assert list(curve) == [round(0.05 * step, 2) for step in range(1, 20)]
    for threshold in (0.05, 0.35, 0.5):
        by_hand = [
            iou(*intersection_and_union(probability > threshold, subject.data.truth(number)))
            for number, probability in subject.predictions(numbers)
        ]
        assert curve[threshold] == pytest.approx(np.mean(by_hand))


def test_samples_are_spread_over_the_split() -> None:
    assert spread(10, 3) == [0, 4, 9]
    assert spread(2, 6) == [0, 1]


@pytest.mark.parametrize("kind", ["compare", "failures", "attention", "threshold"])
def test_each_figure_is_one_command(kind: str, four_networks: list[Path], small_shapes: Path, tmp_path: Path) -> None:
    chosen = four_networks if kind in ("compare", "threshold") else four_networks[-1:]
    output = tmp_path / f"deep/{kind}.png"
    figures.main([kind, *map(str, chosen), "--data-root", str(small_shapes), "--samples", "4", "--output", str(output)])
    picture = matplotlib.image.imread(output)
    assert picture.shape[0] > 200
    assert picture[..., :3].std() > 0.05  # something is drawn
    assert all((side[..., :3] == 1).all() for side in (picture[0], picture[-1], picture[:, 0], picture[:, -1])), (
        "nothing is cut"
    )
    if kind == "threshold":
        with output.with_suffix(".csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 4 * 19
    if kind == "failures":
        with output.with_suffix(".csv").open() as file:
            rows = list(csv.DictReader(file))
        assert all(row["sort"] in figures.SORTS and float(row["IoU"]) < 0.5 for row in rows)
        assert [float(row["IoU"]) for row in rows] == sorted(float(row["IoU"]) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["failures", "CHECKPOINT", "CHECKPOINT"], "failures looks at one checkpoint, not 2"),
        (["compare", "nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
        (["compare", "CHECKPOINT", "--split", "testC"], "no split 'testC'"),
    ],
)
def test_bad_input_is_one_error_line(
    arguments: list[str], expected: str, four_networks: list[Path], small_shapes: Path
) -> None:
    filled = [str(four_networks[0]) if argument == "CHECKPOINT" else argument for argument in arguments]
    with pytest.raises(SystemExit, match=f"error: .*{expected}"):
        figures.main([*filled, "--data-root", str(small_shapes)])
